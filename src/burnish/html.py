"""What every page of Burnish has in common: one file that holds all it shows and opens offline.

Prompts, names and notes are other people's text: the templates escape all of it, and each page
forbids itself scripts and anything that would be fetched.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from PIL import Image

from burnish import images

_MAX_SIDE = 192  # Pixels of a picture in the page; smaller ones are kept as they are.
_NUM_COLOURS = 10
_ENLARGED = 128  # Pictures of fewer pixels are enlarged without smoothing.


def template(name: str) -> Template:
    """A template of `templates/`, with the filter `plain` for numbers; only HTML is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["plain"] = plain
    return environment.get_template(name)


def colours(names: Sequence[str]) -> dict[str, str]:
    """A class of `page.css` for each of several models; more than it has begin again."""
    return {name: f"arm-{place % _NUM_COLOURS}" for place, name in enumerate(names)}


def plain(value: float | int | None, digits: int = 3, sign: str = "") -> str:
    """A number without interval, with a minus that is as wide as a plus."""
    if value is None:
        return "missing"
    return format(value, f"{sign},.{digits}f").replace("-", "\N{MINUS SIGN}")


def sources(pictures: Sequence[bytes], *, where: str) -> list[dict[str, Any]]:
    """The encoded sources of a prompt, each `embedded`; `where` names the prompt in messages."""
    return [embedded(images.decode(data, where=where)) for data in pictures]


def embedded(picture: Image.Image) -> dict[str, Any]:
    """A picture as a URL that carries it, and whether its pixels are so few that they are shown."""
    is_small = max(picture.size) <= _MAX_SIDE
    if not is_small:
        picture.thumbnail((_MAX_SIDE, _MAX_SIDE), Image.Resampling.LANCZOS)
    url = images.data_url(images.encode_webp(picture, quality=None if is_small else 78))
    return {"url": url, "is_enlarged": max(picture.size) < _ENLARGED}
