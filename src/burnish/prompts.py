"""Prompt sets: read them, split them by task, and draw the prompts of each step.

A set has rows with the keys of `types.Prompt`, but `source` for the sources, an image or a list of
them in order: a JSONL file, where an image is a path relative to the file or a `data:` URL; a
Parquet file, or a folder of its shards; a data set that `datasets` has saved to disk. In the latter
two an image is its bytes, or the `{bytes, path}` of `datasets`. Sets stay on disk, see
`prompt_sets`. Which prompts a step sees is a pure function of seed and step, so resuming needs no
state and ranks agree without talking.
"""

import contextlib
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import Field, field_validator

from burnish import images, runtime
from burnish.buckets import aspect_ratio
from burnish.config import Config, ConfigError, located
from burnish.prompt_sets import Entry, PromptSet, number_of
from burnish.records import encodable, object_of
from burnish.row_images import decoded, encoded, is_url, listed, look_for, sources_of
from burnish.row_stores.base import PRESENT, Fields, RowStore
from burnish.row_stores.opening import open_rows
from burnish.tracking import writing
from burnish.types import Labelled, Prompt, Task
from burnish.wording import nearest, shown

EntryT = TypeVar("EntryT")

_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,120}")
_KEYS = ("id", "text", "task", "category", "source", "aspect", "target", "tags", "facts")
_PICTURES = ("source", "target")


class PromptsConfig(Config):
    """Which prompts a stage trains on."""

    path: str | tuple[str, ...]
    """A set, or several that are drawn from as one."""
    columns: Mapping[str, str] = {}
    """Column of each key of a prompt, `{text: caption, source: input_image}`, where a set has names
    of its own; what is not named here is not read. Empty: columns are called as the keys."""
    tasks: tuple[Task, ...] = Field(default=("t2i", "edit"), min_length=1)
    categories: tuple[str, ...] | None = None
    """Of the prompts; None is all."""
    limit: int | None = Field(default=None, ge=1)
    """Take only the first so many of each task."""

    @field_validator("columns")
    @classmethod
    def _columns_of_keys(cls, columns: Mapping[str, str]) -> Mapping[str, str]:
        for key in columns:
            if key not in _KEYS:
                raise ValueError(
                    f"need keys of {', '.join(_KEYS)}, got {key!r}; did you mean "
                    f"{nearest(key, _KEYS) or _KEYS[1]!r}?"
                )
        if columns and "text" not in columns:
            raise ValueError("need the column of text, got none; add text to the others")
        return columns

    @field_validator("tasks")
    @classmethod
    def _each_once(cls, tasks: tuple[Task, ...]) -> tuple[Task, ...]:
        if len(set(tasks)) < len(tasks):
            raise ValueError(f"need each task once, got {', '.join(tasks)}; leave one out")
        return tasks

    def open(self) -> PromptSet:
        """Every prompt of all sets.

        Raises:
            ConfigError: a set that cannot be read, or two prompts with the same id.
        """
        paths = (self.path,) if isinstance(self.path, str) else self.path
        if not paths:
            raise ConfigError("need at least one set of prompts, got none; give path a file")
        every = [e for path in paths for e in read_prompts(located(path), self.columns).entries]
        twice = [name for name, count in Counter(e.id for e in every).items() if count > 1]
        if twice:
            raise ConfigError(
                f"need distinct ids in all sets of a stage, got {twice[0]!r} twice; rename one"
            )
        return PromptSet(every)

    def read(self) -> PromptSet:
        """The prompts that are wanted, task by task.

        Raises:
            ConfigError: as `open`, or a task without prompts.
        """
        every = self.open()
        there = sorted({entry.category for entry in every.entries if entry.task in self.tasks})
        for wanted in self.categories or ():
            if wanted not in there:
                raise ConfigError(
                    f"need categories of the prompts ({', '.join(there)}), got {wanted!r}; did you "
                    f"mean {nearest(wanted, there) or (there or ['none'])[0]!r}?"
                )
        chosen: list[Entry] = []
        for task in self.tasks:
            own = [entry for entry in every.entries if entry.task == task]
            kept = [e for e in own if self.categories is None or e.category in self.categories]
            if not kept:
                paths = self.path if isinstance(self.path, str) else ", ".join(self.path)
                raise ConfigError(
                    f"need prompts for the task {task!r}, got none in {paths}; change tasks or "
                    "categories"
                )
            chosen += kept[: self.limit]
        return PromptSet(chosen)


def read_prompts(path: Path, columns: Mapping[str, str] | None = None) -> PromptSet:
    """Open a set of prompts.

    All of it but its images is read and checked here, row by row, and image files are looked for;
    no image is opened. That happens when a prompt is drawn, or by `PromptSet.check`: a broken one
    is a `ConfigError` that names file and row.

    Args:
        path: a JSONL or Parquet file, a folder of Parquet files or a pattern of theirs, or a folder
            that `datasets` has saved.
        columns: see `PromptsConfig`.

    Raises:
        ConfigError: nothing there, a broken row (named by file and row), an unknown or missing
            column, an image file that is not there, more than `MAX_SOURCES` of them, or two prompts
            with the same id.
    """
    fields = Fields(names=_KEYS, required="text", large=_PICTURES, columns=columns or {})
    rows = open_rows(path, fields)
    reader = _Rows(rows)
    entries: list[Entry] = []
    seen: set[str] = set()
    categories: dict[str, str] = {}
    for number, row in enumerate(rows.scan()):
        prompt = reader.scanned(number, row)
        if prompt.id in seen:
            raise ConfigError(
                f"{rows.where(number)}: need distinct ids, got {prompt.id!r} twice; rename one"
            )
        seen.add(prompt.id)
        # One object for all prompts of a category.
        category = categories.setdefault(prompt.category, prompt.category)
        known = number_of(prompt.task, prompt.text), number_of(*reader.sources(row, prompt.id))
        labels = prompt.id, prompt.task, category, prompt.num_sources
        entries.append(Entry(*labels, *known, reader, number))
    if not entries:
        raise ConfigError(f"{path}: need at least one prompt, got an empty file; write some")
    return PromptSet(entries)


class _Rows:
    """The prompts that the rows of a store are."""

    def __init__(self, rows: RowStore) -> None:
        self._rows = rows
        self._name = _id_part(rows.name)

    def prompt(self, row: int) -> Prompt:
        return self._made(row, self._rows.row(row), self._rows.where(row))

    def check(self, row: int) -> None:
        found, where = self._rows.row(row), self._rows.where(row)
        for one in _pictures(found):
            # Not encoded again, as for a prompt that is drawn: that takes far longer.
            read = encoded if is_url(one) else decoded
            read(one, where, self._rows.folder)
        self.scanned(row, found)

    def scanned(self, row: int, found: Mapping[str, Any]) -> Prompt:
        """The prompt, with marks in the place of its images, whose files are looked for."""
        folder, where = self._rows.folder, self._rows.where(row)
        marks = {
            key: [PRESENT] * len(found[key]) if isinstance(found[key], list) else PRESENT
            for key in _PICTURES
            if key in found
        }
        made = self._made(row, {**found, **marks}, where)
        for one in _pictures(found):
            if isinstance(one, str) and not is_url(one):
                look_for(folder / one, where)
        return made

    def sources(self, found: Mapping[str, Any], name: str) -> Iterator[str]:
        """What tells the sources of a row apart from others, without reading them."""
        for one in listed(found.get("source")):
            if not isinstance(one, str):
                yield name
            else:
                yield one if is_url(one) else os.path.abspath(self._rows.folder / one)

    def _made(self, row: int, found: Mapping[str, Any], where: str) -> Prompt:
        if isinstance(facts := found.get("facts"), str):
            # Columns are all of one form, which facts are not.
            found = {**found, "facts": object_of(facts, f"{where}: facts")}
        name = f"{self._name}-{self._rows.number(row)}"
        return _prompt(found, where, self._rows.folder, default_id=name)


def _id_part(name: str) -> str:
    """A file's name as ids begin with it; one that they cannot, in other letters, all different."""
    if len(name) <= 100 and _ID.fullmatch(name):
        return name
    digest = hashlib.blake2b(os.fsencode(name), digest_size=4).hexdigest()
    return f"_{re.sub('[^A-Za-z0-9._-]', '_', name)[:90]}-{digest}"


def _pictures(row: Mapping[str, Any]) -> list[Any]:
    return [one for key in _PICTURES if key in row for one in listed(row[key])]


def _prompt(row: Mapping[str, Any], where: str, folder: Path, default_id: str) -> Prompt:
    if not isinstance(row.get("text"), str):
        raise ConfigError(f'{where}: need an object with a "text", got {shown(row)}; fix the line')
    for key in row.keys() - set(_KEYS):
        raise ConfigError(
            f"{where}: need keys of {', '.join(_KEYS)}, got {key!r}; "
            f"did you mean {nearest(key, _KEYS) or _KEYS[1]!r}?"
        )
    task = row.get("task", "edit" if row.get("source") else "t2i")
    if task not in ("t2i", "edit"):
        raise ConfigError(f"{where}: need task t2i or edit, got {task!r}; fix the line")
    tags, facts = row.get("tags", []), row.get("facts", {})
    if not isinstance(tags, list) or not isinstance(facts, dict):
        raise ConfigError(f"{where}: need a list of tags and a mapping of facts; fix the line")
    try:
        json.dumps(facts)
    except TypeError as error:
        raise ConfigError(
            f"{where}: need facts that JSON can hold, got {error}; write them as JSON text"
        ) from None
    name = str(row.get("id", default_id))
    if not _ID.fullmatch(name):
        raise ConfigError(
            f"{where}: need an id of letters, digits and . _ -, got {name!r}; it names files"
        )
    sources = sources_of(row.get("source"), where, folder)
    if bool(sources) != (task == "edit"):
        given = "a source image" if sources else "no source image"
        raise ConfigError(f"{where}: need a source image for an edit only, got {given} for {task}")
    target, aspect = row.get("target"), row.get("aspect")
    if aspect is not None:
        _check_aspect(aspect, where)
    return Prompt(
        id=name,
        text=encodable(row["text"], "text", where),
        task=task,
        category=encodable(str(row.get("category", "general")), "category", where),
        sources=sources,
        aspect=aspect,
        target=None if target is None else encoded(target, where, folder),
        tags=tuple(map(str, tags)),
        facts=facts,
    )


def _check_aspect(aspect: Any, where: str) -> None:
    try:
        aspect_ratio(str(aspect))
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def write_prompts(path: Path, prompts: Iterable[Prompt]) -> None:
    """Write a set that `read_prompts` reads, images inside; one prompt is in memory at a time.

    Raises:
        RunError: it cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    with writing(path), contextlib.ExitStack() as stack:
        path.parent.mkdir(parents=True, exist_ok=True)
        stack.callback(partial.unlink, missing_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(_row(prompt)) + "\n" for prompt in prompts)
        # Only now, as the prompts may come from the very file.
        partial.replace(path)


def _row(prompt: Prompt) -> dict[str, Any]:
    row: dict[str, Any] = {"id": prompt.id, "text": prompt.text, "task": prompt.task}
    row["category"] = prompt.category
    if prompt.sources:
        urls = [images.data_url(picture) for picture in prompt.sources]
        row["source"] = urls if len(urls) > 1 else urls[0]
    if prompt.aspect is not None:
        row["aspect"] = prompt.aspect
    if prompt.target is not None:
        row["target"] = images.data_url(prompt.target)
    if prompt.tags:
        row["tags"] = list(prompt.tags)
    if prompt.facts:
        row["facts"] = dict(prompt.facts)
    return row


def spaced(items: Sequence[EntryT], count: int) -> list[EntryT]:
    """At most so many, at even distances: nobody chose them, and neighbours are not alike.

    >>> spaced([0, 1, 2, 3, 4], 2)
    [0, 2]
    """
    count = min(count, len(items))
    return [items[place * len(items) // count] for place in range(count)]


class GroupSampler:
    """Which prompts a step draws: none twice in an epoch, which leaves out an odd remainder.

    Steps take turns among the pools, in the order of their labels, so that each has as many.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        *,
        per_step: int,
        seed: int,
        pool: Callable[[Labelled], str] = lambda _: "",
    ) -> None:
        """Sort the prompts.

        Args:
            prompts: of any mix of tasks.
            per_step: how many a step draws, all of one pool.
            seed: of the order.
            pool: label of the pool of a prompt.

        Raises:
            ConfigError: a pool with fewer prompts than a step draws.
        """
        self._per_step, self._seed = per_step, seed
        self._prompts = PromptSet.of(prompts)
        pools: dict[str, list[int]] = {}
        for row, entry in enumerate(self._prompts.entries):
            pools.setdefault(pool(entry), []).append(row)
        self._pools = [pools[label] for label in sorted(pools)]
        smallest = min(len(own) for own in self._pools)
        if smallest < per_step:
            raise ConfigError(
                f"need at least {per_step} prompts for a step, got {smallest}; give more prompts "
                "or fewer per step"
            )

    def prompts(self, step: int) -> list[Prompt]:
        """The prompts of one step, all different; only these are read.

        Raises:
            ConfigError: one cannot be read, such as a broken image.
        """
        turn, pool = step // len(self._pools), self._pools[step % len(self._pools)]
        epoch, place = divmod(turn, len(pool) // self._per_step)
        names = (self._seed, "prompts", step % len(self._pools), epoch)
        order = torch.randperm(len(pool), generator=runtime.generator(names[0], *names[1:]))
        rows = order[place * self._per_step : (place + 1) * self._per_step]
        return [self._prompts[pool[int(row)]] for row in rows]
