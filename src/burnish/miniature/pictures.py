"""The base model's training pictures: good and flawed, as web data is.

An example is a prompt and a picture that may not honour it. Every flaw is a crisp mode
(`world.flaws`); which share of examples carries one is the knob that sets how much reinforcement
learning can gain.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from burnish.images import encode_png
from burnish.types import Prompt
from burnish.world.edits import Edit, sample_edit
from burnish.world.flaws import PIXEL_FLAWS, spoil
from burnish.world.grammar import say
from burnish.world.render import render
from burnish.world.scenes import LOOK, PEOPLE, Scene, is_held_out, sample_scene

FLAWED = 0.8
"""Share of training pictures with one flaw."""
PIXEL_SHARE = 0.5
"""Share of the flaws that spoil the whole picture rather than its content."""
PERSON_SHARE = 0.06
"""Share of examples that show a named person."""
CATEGORY_SHARES = {"general": 0.46, "portrait": 0.24, "landscape": 0.07, "typography": 0.23}
"""Shares of the others: what is hard to learn is shown more often."""


@dataclass(frozen=True)
class Example:
    """One training example: what is asked, and the picture that answers."""

    prompt: Prompt
    pixels: np.ndarray
    """uint8 `64 64 3`."""
    source_pixels: np.ndarray | None = None
    is_flawed: bool = False


def to_bytes(pixels: np.ndarray) -> np.ndarray:
    """Float pixels in [0, 1] -> uint8."""
    return (pixels * 255).round().astype(np.uint8)


def pixel_flaw(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The picture with a random flaw that spoils all of it, floats in and out."""
    names = sorted(PIXEL_FLAWS)
    return PIXEL_FLAWS[names[int(rng.integers(len(names)))]](pixels)


def _first(draw: Callable[[], Scene], *, held_out: bool = False) -> Scene:
    """The first scene drawn with a combination that is held out, or without one."""
    while is_held_out(scene := draw()) != held_out:
        pass
    return scene


def draw_scene(
    rng: np.random.Generator, category: str | None = None, *, held_out: bool = False
) -> Scene:
    """A scene without combinations that are held out, or with one; of one category or of any."""

    def draw() -> Scene:
        return sample_scene(rng, **({"category": category} if category else _subject(rng)))

    return _first(draw, held_out=held_out)


def _subject(rng: np.random.Generator) -> dict[str, str]:
    """Whom, or what kind of thing, the next picture shows."""
    if rng.random() < PERSON_SHARE:
        return {"person": str(rng.choice(list(PEOPLE)))}
    return {"category": str(rng.choice(list(CATEGORY_SHARES), p=list(CATEGORY_SHARES.values())))}


def draw_edit(rng: np.random.Generator, *, held_out: bool = False) -> Edit:
    """An edit whose source and target are not held out, or of which one is."""
    while True:
        edit = sample_edit(rng, **_subject(rng))
        if (is_held_out(edit.source) or is_held_out(edit.target)) == held_out:
            return edit


def text_example(rng: np.random.Generator, name: str = "") -> Example:
    """A prompt with a picture that is flawed as often as `FLAWED` says."""
    scene = draw_scene(rng)
    shown, is_flawed = scene, rng.random() < FLAWED
    spoil_pixels = is_flawed and rng.random() < PIXEL_SHARE
    if is_flawed and not spoil_pixels:
        shown = _first(lambda: spoil(scene, rng))
    pixels = render(shown)
    if spoil_pixels:
        pixels = pixel_flaw(pixels, rng)
    prompt = Prompt(id=name, text=say(scene, rng), category=scene.category)
    return Example(prompt, to_bytes(pixels), is_flawed=is_flawed)


def edit_example(rng: np.random.Generator, name: str = "") -> Example:
    """An instruction with an edit that may be half done, drift, or spoil the picture."""
    edit = draw_edit(rng)
    shown, is_flawed = edit.target, rng.random() < FLAWED
    spoil_pixels = is_flawed and rng.random() < PIXEL_SHARE
    if is_flawed and not spoil_pixels:
        is_undone = rng.random() < 0.5
        shown = edit.source if is_undone else _first(lambda: _drifted(edit, rng))
    pixels = render(shown)
    if spoil_pixels:
        pixels = pixel_flaw(pixels, rng)
    source = to_bytes(render(edit.source))
    prompt = Prompt(
        id=name,
        text=edit.instruction,
        task="edit",
        category=edit.source.category,
        sources=(encode_png(Image.fromarray(source)),),
    )
    return Example(prompt, to_bytes(pixels), source, is_flawed)


def _drifted(edit: Edit, rng: np.random.Generator) -> Scene:
    """The target with something else changed as well: for portraits mostly who it is."""
    if edit.source.category == "portrait" and rng.random() < 0.6:
        other = sample_scene(rng, category="portrait").values
        keys = [key for key in LOOK if key not in edit.changes and key != "mark"]
        return edit.target.changed({key: other[key] for key in keys})
    return spoil(edit.target, rng)
