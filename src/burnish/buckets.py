"""In which sizes pictures are drawn: buckets of one area, each of another aspect ratio.

A tensor has one size, so pictures are drawn, and their states trained on, bucket by bucket. Which
bucket a prompt belongs to is decided by the prompt alone.
"""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from burnish import images
from burnish.types import Prompt

SQUARE = "1:1"
MULTIPLE = 32
"""A side is so many pixels or a multiple of them; every family's tokens divide it."""
_ASPECT = re.compile("([0-9]{1,5}):([0-9]{1,5})")
_FLATTEST = 4.0


class Size(NamedTuple):
    """Of a picture, in pixels."""

    height: int
    width: int

    @property
    def area(self) -> int:
        """Number of pixels."""
        return self.height * self.width

    def __str__(self) -> str:
        return f"{self.width} x {self.height}"


def aspect_ratio(aspect: str) -> float:
    """Width over height.

    >>> aspect_ratio("3:2")
    1.5

    Raises:
        ValueError: no two numbers, or sides that differ more than fourfold.
    """
    found = _ASPECT.fullmatch(aspect)
    width, height = map(int, found.groups()) if found else (0, 0)
    if not width or not height or not 1 / _FLATTEST <= width / height <= _FLATTEST:
        raise ValueError(
            f"need an aspect of width to height between 1:{_FLATTEST:g} and {_FLATTEST:g}:1, such "
            f"as 16:9, got {aspect!r}; fix it"
        )
    return width / height


def size_of(aspect: str, resolution: int) -> Size:
    """The size of some aspect with about the area of a square, in multiples of `MULTIPLE` pixels.

    >>> size_of("16:9", 1024)
    Size(height=768, width=1376)

    Args:
        aspect: width to height.
        resolution: side of the square in pixels.
    """
    root = math.sqrt(aspect_ratio(aspect))

    def rounded(side: float) -> int:
        return max(1, round(side / MULTIPLE)) * MULTIPLE

    return Size(height=rounded(resolution / root), width=rounded(resolution * root))


class Buckets:
    """The sizes that a model draws in, and which of them a prompt gets."""

    def __init__(self, resolution: int, aspects: Sequence[str] = (SQUARE,)) -> None:
        """Make a bucket for each aspect.

        Args:
            resolution: side in pixels of the square of the same area.
            aspects: width to height; the first is for prompts that say nothing.

        Raises:
            ValueError: an aspect that is none, no aspect, or two that are one size.
        """
        if not aspects:
            raise ValueError(f"need at least one aspect, got none; give {SQUARE}")
        found: dict[Size, str] = {}
        for aspect in aspects:
            size = size_of(aspect, resolution)
            if size in found:
                raise ValueError(
                    f"need aspects that differ at {resolution} pixels, got {found[size]} and "
                    f"{aspect}, both {size}; leave one out, or raise the resolution"
                )
            found[size] = aspect
        self.sizes = tuple(found)
        """All of them."""

    @property
    def names(self) -> tuple[str, ...]:
        """All sizes for readers."""
        return tuple(map(str, self.sizes))

    @property
    def default(self) -> Size:
        """Of a prompt that says nothing."""
        return self.sizes[0]

    @property
    def largest(self) -> Size:
        """The size of most pixels."""
        return max(self.sizes, key=lambda size: size.area)

    def size(self, prompt: Prompt) -> Size:
        """The size nearest in shape to what a prompt asks for: its aspect, or that of the first
        source of an edit.

        Raises:
            burnish.images.ImageError: a source that is no image.
        """
        if len(self.sizes) == 1 or not (prompt.aspect or prompt.sources):
            return self.default
        if prompt.aspect:
            wanted = aspect_ratio(prompt.aspect)
        else:
            width, height = images.size(prompt.sources[0], where=f"source of prompt {prompt.id!r}")
            wanted = width / height
        return min(self.sizes, key=lambda size: abs(math.log(size.width / size.height / wanted)))
