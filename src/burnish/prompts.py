"""Prompt sets: read them, split them by task, and draw the prompts of each step.

A set is a JSONL file, one prompt a line, with the keys of `types.Prompt`, but `source` for the
sources: an image, or a list of them in order. An image is a path relative to the file, or a `data:`
URL. Which prompts a step sees is a pure function of seed and step, so resuming needs no state and
ranks agree without talking.
"""

import base64
import binascii
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import Field

from burnish import images, runtime
from burnish.config import Config, ConfigError, located, nearest
from burnish.types import MAX_SOURCES, Prompt, Task

EntryT = TypeVar("EntryT")

_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,120}")
_KEYS = ("id", "text", "task", "category", "source", "target", "tags", "facts")


class PromptsConfig(Config):
    """Which prompts a stage trains on."""

    path: str | tuple[str, ...]
    """A set, or several that are drawn from as one."""
    tasks: tuple[Task, ...] = Field(default=("t2i", "edit"), min_length=1)
    categories: tuple[str, ...] | None = None
    """Of the prompts; None is all."""
    limit: int | None = Field(default=None, ge=1)
    """Take only the first so many of each task."""

    def read(self) -> list[Prompt]:
        """The prompts, task by task.

        Raises:
            ConfigError: a set that cannot be read, two prompts with the same id, or a task without
                prompts.
        """
        paths = (self.path,) if isinstance(self.path, str) else self.path
        if not paths:
            raise ConfigError("need at least one set of prompts, got none; give path a file")
        every = [prompt for path in paths for prompt in read_prompts(located(path))]
        twice = [name for name, count in Counter(p.id for p in every).items() if count > 1]
        if twice:
            raise ConfigError(
                f"need distinct ids in all sets of a stage, got {twice[0]!r} twice; rename one"
            )
        there = sorted({prompt.category for prompt in every if prompt.task in self.tasks})
        for wanted in self.categories or ():
            if wanted not in there:
                raise ConfigError(
                    f"need categories of the prompts ({', '.join(there)}), got {wanted!r}; did you "
                    f"mean {nearest(wanted, there) or (there or ['none'])[0]!r}?"
                )
        chosen: list[Prompt] = []
        for task in self.tasks:
            own = [prompt for prompt in every if prompt.task == task]
            kept = [p for p in own if self.categories is None or p.category in self.categories]
            if not kept:
                raise ConfigError(
                    f"need prompts for the task {task!r}, got none in {', '.join(paths)}; change "
                    "tasks or categories"
                )
            chosen += kept[: self.limit]
        return chosen


def read_prompts(path: Path) -> list[Prompt]:
    """Read a JSONL prompt set.

    Raises:
        ConfigError: no such file, a broken line (named by file and line), a bad or missing source
            image, more than `MAX_SOURCES` of them, or two prompts with the same id.
    """
    if not path.is_file():
        raise ConfigError(
            f"need a JSONL file of prompts, got {path}, which is no file; check the path"
        )
    prompts: list[Prompt] = []
    seen: set[str] = set()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: need readable UTF-8 text, got {error}; mend the file") from None
    # By newline alone: JSON text may hold other characters that end a line for `splitlines`.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        prompt = _prompt(line, where, path.parent, default_id=f"{path.stem}-{number}")
        if prompt.id in seen:
            raise ConfigError(f"{where}: need distinct ids, got {prompt.id!r} twice; rename one")
        seen.add(prompt.id)
        prompts.append(prompt)
    if not prompts:
        raise ConfigError(f"{path}: need at least one prompt, got an empty file; write some")
    return prompts


def _prompt(line: str, where: str, folder: Path, default_id: str) -> Prompt:
    try:
        row = json.loads(line)
    except ValueError:
        raise ConfigError(
            f"{where}: need one JSON object a line, got {line[:60]!r}; mend the line"
        ) from None
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise ConfigError(
            f'{where}: need an object with a "text", got {line[:60]!r}; mend the line'
        )
    for key in row.keys() - set(_KEYS):
        raise ConfigError(
            f"{where}: need keys of {', '.join(_KEYS)}, got {key!r}; "
            f"did you mean {nearest(key, _KEYS) or _KEYS[1]!r}?"
        )
    task = row.get("task", "edit" if row.get("source") else "t2i")
    if task not in ("t2i", "edit"):
        raise ConfigError(f"{where}: need task t2i or edit, got {task!r}; mend the line")
    tags, facts = row.get("tags", []), row.get("facts", {})
    if not isinstance(tags, list) or not isinstance(facts, dict):
        raise ConfigError(f"{where}: need a list of tags and a mapping of facts; mend the line")
    name = str(row.get("id", default_id))
    if not _ID.fullmatch(name):
        raise ConfigError(
            f"{where}: need an id of letters, digits and . _ -, got {name!r}; it names files"
        )
    sources = _sources(row.get("source"), where, folder)
    if bool(sources) != (task == "edit"):
        given = "a source image" if sources else "no source image"
        raise ConfigError(f"{where}: need a source image for an edit only, got {given} for {task}")
    target = row.get("target")
    return Prompt(
        id=name,
        text=row["text"],
        task=task,
        category=str(row.get("category", "general")),
        sources=sources,
        target=None if target is None else _picture(target, where, folder),
        tags=tuple(map(str, tags)),
        facts=facts,
    )


def _sources(given: Any, where: str, folder: Path) -> tuple[bytes, ...]:
    listed: list[Any] = given if isinstance(given, list) else [] if given is None else [given]
    # Before any of them is read.
    if len(listed) > MAX_SOURCES:
        raise ConfigError(
            f"{where}: need at most {MAX_SOURCES} source images, got {len(listed)}; leave some out"
        )
    return tuple(_picture(one, where, folder) for one in listed)


def _picture(given: Any, where: str, folder: Path) -> bytes:
    if str(given).startswith("data:"):
        try:
            data = base64.b64decode(str(given).partition(",")[2], validate=True)
        except binascii.Error:
            raise ConfigError(
                f"{where}: need base64 after 'data:', got other text; mend the line"
            ) from None
        images.decode(data, where=where)
        return data
    try:
        return images.encode_png(images.read(folder / str(given)))
    except images.ImageError as error:
        raise ConfigError(f"{where}: {error}") from None


def write_prompts(path: Path, prompts: Sequence[Prompt]) -> None:
    """Write a set that `read_prompts` reads, source images inside."""
    lines = []
    for prompt in prompts:
        row: dict[str, Any] = {"id": prompt.id, "text": prompt.text, "task": prompt.task}
        row["category"] = prompt.category
        if prompt.sources:
            urls = [images.data_url(picture) for picture in prompt.sources]
            row["source"] = urls if len(urls) > 1 else urls[0]
        if prompt.target is not None:
            row["target"] = images.data_url(prompt.target)
        if prompt.tags:
            row["tags"] = list(prompt.tags)
        if prompt.facts:
            row["facts"] = dict(prompt.facts)
        lines.append(json.dumps(row))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


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
        pool: Callable[[Prompt], str] = lambda _: "",
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
        pools: dict[str, list[Prompt]] = {}
        for prompt in prompts:
            pools.setdefault(pool(prompt), []).append(prompt)
        self._pools = [pools[label] for label in sorted(pools)]
        smallest = min(len(own) for own in self._pools)
        if smallest < per_step:
            raise ConfigError(
                f"need at least {per_step} prompts for a step, got {smallest}; give more prompts "
                "or fewer per step"
            )

    def prompts(self, step: int) -> list[Prompt]:
        """The prompts of one step, all different."""
        turn, pool = step // len(self._pools), self._pools[step % len(self._pools)]
        epoch, place = divmod(turn, len(pool) // self._per_step)
        names = (self._seed, "prompts", step % len(self._pools), epoch)
        order = torch.randperm(len(pool), generator=runtime.generator(names[0], *names[1:]))
        rows = order[place * self._per_step : (place + 1) * self._per_step]
        return [pool[int(row)] for row in rows]
