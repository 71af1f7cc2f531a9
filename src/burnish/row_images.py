"""The images of a row: bytes, the path of a file, either as `datasets` has it, or a `data:` URL.

Faults are errors of one line that name the row, as its other fields' are.
"""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from burnish import images
from burnish.config import ConfigError
from burnish.row_stores.base import PRESENT
from burnish.types import MAX_SOURCES


def listed(given: Any) -> list[Any]:
    """What is given as a list: itself, nothing, or one."""
    return given if isinstance(given, list) else [] if given is None else [given]


def is_url(picture: Any) -> bool:
    """Whether the image is spelt out in text."""
    return isinstance(picture, str) and picture.startswith("data:")


def look_for(path: Path, where: str) -> None:
    """See whether a file is there.

    Raises:
        ConfigError: it is not.
    """
    try:
        path.stat()
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{where}: need a readable image file, got {path}: {problem}; check the path"
        ) from None


def sources_of(given: Any, where: str, folder: Path) -> tuple[bytes, ...]:
    """The encoded images of one that is given, or of a list of them in order.

    Raises:
        ConfigError: more than `MAX_SOURCES`, or one that cannot be read.
    """
    given = listed(given)
    # Before any of them is read.
    if len(given) > MAX_SOURCES:
        raise ConfigError(
            f"{where}: need at most {MAX_SOURCES} source images, got {len(given)}; leave some out"
        )
    return tuple(encoded(one, where, folder) for one in given)


def encoded(given: Any, where: str, folder: Path) -> bytes:
    """An image as bytes of a file: those of a URL as they are, others as PNG; a mark is kept.

    Raises:
        ConfigError: it cannot be read.
    """
    if given is PRESENT:
        return PRESENT
    if is_url(given):
        try:
            data = base64.b64decode(given.partition(",")[2], validate=True)
        except ValueError:
            raise ConfigError(
                f"{where}: need base64 after 'data:', got other text; fix the line"
            ) from None
        try:
            images.decode(data, where="its image")
        except images.ImageError as error:
            raise ConfigError(f"{where}: {error}") from None
        return data
    return images.encode_png(decoded(given, where, folder))


def decoded(given: Any, where: str, folder: Path) -> Image.Image:
    """An image by its bytes, by the path of its file, or by either as `datasets` has it.

    Raises:
        ConfigError: it cannot be read.
    """
    if isinstance(given, Mapping):
        given = given.get("bytes") or given.get("path")
    try:
        if isinstance(given, bytes):
            return images.decode(given, where="its image")
        return images.read(folder / str(given))
    except images.ImageError as error:
        raise ConfigError(f"{where}: {error}") from None
