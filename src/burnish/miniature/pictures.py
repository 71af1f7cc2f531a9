"""The base model's training pictures: good and flawed, as web data is.

An example is a prompt and a picture that may not honour it. Every flaw is a crisp mode
(`world.flaws`); which share of examples carries one is the knob that sets how much reinforcement
learning can gain.
"""

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

FLAWED = 0.6
"""Share of training pictures with one flaw."""
PIXEL_SHARE = 0.4
"""Share of the flaws that spoil the whole picture rather than its content."""
PERSON_SHARE = 0.08
"""Share of text-to-image examples that show a named person."""


@dataclass(frozen=True)
class Example:
    """One training example: what is asked, and the picture that answers."""

    prompt: Prompt
    pixels: np.ndarray
    """uint8 `64 64 3`."""
    source_pixels: np.ndarray | None = None


def to_bytes(pixels: np.ndarray) -> np.ndarray:
    """Float pixels in [0, 1] -> uint8."""
    return (pixels * 255).round().astype(np.uint8)


def _pixel_flaw(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    names = sorted(PIXEL_FLAWS)
    return PIXEL_FLAWS[names[int(rng.integers(len(names)))]](pixels)


def draw_scene(rng: np.random.Generator) -> Scene:
    """A scene whose combinations are not held out."""
    while True:
        person = None
        if rng.random() < PERSON_SHARE:
            person = list(PEOPLE)[int(rng.integers(len(PEOPLE)))]
        scene = sample_scene(rng, person=person)
        if not is_held_out(scene):
            return scene


def draw_edit(rng: np.random.Generator) -> Edit:
    """An edit whose source and target are not held out."""
    while True:
        edit = sample_edit(rng)
        if not (is_held_out(edit.source) or is_held_out(edit.target)):
            return edit


def text_example(rng: np.random.Generator, name: str = "") -> Example:
    """A prompt with a picture that is flawed as often as `FLAWED` says."""
    scene = draw_scene(rng)
    shown, is_flawed = scene, rng.random() < FLAWED
    spoil_pixels = is_flawed and rng.random() < PIXEL_SHARE
    if is_flawed and not spoil_pixels:
        shown = spoil(scene, rng)
    pixels = render(shown)
    if spoil_pixels:
        pixels = _pixel_flaw(pixels, rng)
    prompt = Prompt(id=name, text=say(scene, rng), category=scene.category)
    return Example(prompt, to_bytes(pixels))


def edit_example(rng: np.random.Generator, name: str = "") -> Example:
    """An instruction with an edit that may be half done, drift, or spoil the picture."""
    edit = draw_edit(rng)
    shown, is_flawed = edit.target, rng.random() < FLAWED
    spoil_pixels = is_flawed and rng.random() < PIXEL_SHARE
    if is_flawed and not spoil_pixels:
        shown = edit.source if rng.random() < 0.5 else _drifted(edit, rng)
    pixels = render(shown)
    if spoil_pixels:
        pixels = _pixel_flaw(pixels, rng)
    source = to_bytes(render(edit.source))
    prompt = Prompt(
        id=name,
        text=edit.instruction,
        task="edit",
        category=edit.source.category,
        source=encode_png(Image.fromarray(source)),
    )
    return Example(prompt, to_bytes(pixels), source)


def _drifted(edit: Edit, rng: np.random.Generator) -> Scene:
    """The target with something else changed as well: for portraits mostly who it is."""
    if edit.source.category == "portrait" and rng.random() < 0.6:
        other = sample_scene(rng, category="portrait").values
        keys = [key for key in LOOK if key not in edit.changes and key != "mark"]
        return edit.target.changed({key: other[key] for key in keys})
    return spoil(edit.target, rng)
