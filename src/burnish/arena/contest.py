"""Who meets whom on what: pictures of several models for the same prompts.

A contestant is a name with a picture of each prompt: a policy of a run folder, or any folder of
pictures that are named by the ids of a set of prompts. A prompt that one has drawn must have been
drawn by all, and all pictures of a prompt have one size, or the eye would know them by it.
"""

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from burnish import images
from burnish.config import ConfigError
from burnish.prompt_sets import PromptSet
from burnish.types import Prompt

SUFFIXES = (".webp", ".png", ".jpg", ".jpeg")
"""Of pictures in a folder."""


@dataclass(frozen=True)
class Contest:
    """Prompts, and each contestant's picture of every one of them."""

    prompts: tuple[Prompt, ...]
    pictures: Mapping[str, Mapping[str, Path]]
    """By contestant, then by prompt."""

    def digest(self) -> str:
        """Changes with all that a voter sees or a vote is filed under: prompts with their sources
        and categories, contestants, and their pictures."""
        told = [
            (
                p.id,
                p.text,
                p.task,
                p.category,
                [hashlib.sha256(data).hexdigest() for data in p.sources],
            )
            for p in self.prompts
        ]
        found = hashlib.sha256(repr(told).encode())
        for name in sorted(self.pictures):
            found.update(f"\0{name}\0".encode())
            for prompt in self.prompts:
                data = self.pictures[name][prompt.id].read_bytes()
                found.update(hashlib.sha256(data).digest())
        return found.hexdigest()

    @property
    def matches(self) -> list[tuple[str, str]]:
        """Every two contestants, by name."""
        return list(itertools.combinations(sorted(self.pictures), 2))

    def pairs(self, seed: int, per_prompt: int | None = None) -> Iterator[tuple[Prompt, str, str]]:
        """Prompt, left and right contestant of every meeting, in a random order.

        Args:
            seed: of the order and the sides.
            per_prompt: meetings of each prompt, drawn without repetition; None is all pairs.
        """
        draws = np.random.default_rng(seed)
        every = self.matches
        meetings = []
        for prompt in self.prompts:
            count = len(every) if per_prompt is None else min(per_prompt, len(every))
            for place in draws.permutation(len(every))[:count]:
                pair = every[place] if draws.random() < 0.5 else every[place][::-1]
                meetings.append((prompt, *pair))
        yield from (meetings[place] for place in draws.permutation(len(meetings)))


def gather(
    places: Mapping[str, Path], prompts: Sequence[Prompt], *, tasks: Sequence[str] | None = None
) -> Contest:
    """The pictures of folders for the prompts that they have.

    Args:
        places: folder of each contestant, by its name.
        prompts: that the pictures are named after.
        tasks: of the prompts; None is all.

    Raises:
        ConfigError: fewer than two contestants, a folder without a picture that another has, or
            pictures of one prompt that differ in size.
    """
    if len(places) < 2:
        raise ConfigError(f"need two contestants at least, got {len(places)}; name more folders")
    every = PromptSet.of(prompts).select(lambda p: tasks is None or p.task in tasks)
    wanted = [entry.id for entry in every.entries]
    found = {name: _pictures(folder, wanted) for name, folder in places.items()}
    for name, pictures in found.items():
        if not pictures:
            raise ConfigError(
                f"need pictures named after prompts, such as {next(iter(wanted), 'ID')}.webp, got "
                f"none in {places[name]}; check the folder and the prompts"
            )
    shared = every.select(lambda p: all(p.id in own for own in found.values()))
    if not shared:
        counts = ", ".join(f"{name} {len(own)}" for name, own in found.items())
        raise ConfigError(f"need prompts that all have drawn, got none in common ({counts})")
    drawn = [p for p in wanted if any(p in own for own in found.values())]
    if len(shared) < len(drawn):
        lost = {name: [p for p in drawn if p not in own] for name, own in found.items()}
        name = max(lost, key=lambda name: len(lost[name]))
        raise ConfigError(
            f"need a picture of every prompt that another has drawn, {name} lacks "
            f"{len(lost[name])} of {len(drawn)}, such as {lost[name][0]}; draw them, or take "
            f"those prompts out of --prompts"
        )
    names = [entry.id for entry in shared.entries]
    for prompt in names:
        sizes = {name: images.read(own[prompt]).size for name, own in found.items()}
        if len(set(sizes.values())) > 1:
            told = ", ".join(f"{name} {w} x {h}" for name, (w, h) in sizes.items())
            raise ConfigError(
                f"need pictures of one size, got {told} for prompt {prompt}; draw them alike"
            )
    return Contest(
        prompts=tuple(shared),
        pictures={name: {p: own[p] for p in names} for name, own in found.items()},
    )


def _pictures(folder: Path, wanted: Sequence[str]) -> dict[str, Path]:
    if not folder.is_dir():
        raise ConfigError(f"need a folder of pictures, got {folder}; check the path")
    files = {file.stem: file for file in sorted(folder.iterdir()) if file.suffix in SUFFIXES}
    return {name: files[name] for name in wanted if name in files}
