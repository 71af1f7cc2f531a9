"""Edits: an instruction, what it changes, and what it must leave alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from burnish.world.flaws import alternatives
from burnish.world.grammar import pick
from burnish.world.scenes import PEOPLE, STYLES, Scene, Value, attribute, domain, sample_scene

EDITABLE = {
    "general": ("colour", "shape", "size", "background", "remove", "style"),
    "typography": ("word", "colour", "background", "frame", "style"),
    "portrait": ("hair_colour", "glasses", "hat", "mouth", "background", "style"),
    "landscape": ("season", "time", "trees", "water", "mountains"),
}


@dataclass(frozen=True)
class Edit:
    """A source scene, the instruction, and the attributes that must change."""

    source: Scene
    instruction: str
    changes: Mapping[str, Value]

    @property
    def target(self) -> Scene:
        """The scene that a perfect edit shows."""
        return self.source.changed(self.changes)

    def to_json(self) -> dict[str, Any]:
        """Plain values, readable by `from_json`."""
        return {
            "source": self.source.to_json(),
            "instruction": self.instruction,
            "changes": dict(self.changes),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Edit":
        """The edit that `to_json` wrote."""
        return cls(Scene.from_json(data["source"]), data["instruction"], dict(data["changes"]))


def _name(scene: Scene, index: str) -> str:
    return f"{scene.values[f'{index}.colour']} {scene.values[f'{index}.shape']}"


def _object_instruction(scene: Scene, key: str, new: Value) -> tuple[str, ...]:
    index, name = key.split(".")
    thing = _name(scene, index)
    if int(scene.values[f"{index}.count"]) > 1:
        thing = thing + ("es" if thing.endswith("cross") else "s")
    if new == "none":
        return (f"remove the {thing}", f"take the {thing} away")
    if name == "colour":
        return (f"make the {thing} {new}", f"change the {thing} to {new}")
    if name == "shape":
        return (f"replace the {thing} with a {new}", f"turn the {thing} into a {new}")
    return (f"make the {thing} {'larger' if new == 'large' else 'smaller'}",)


def _wear_instruction(name: str, new: Value) -> tuple[str, ...]:
    thing = "glasses" if name == "glasses" else "the hat"
    if new == "none":
        return (f"remove {thing}", f"take off {thing}")
    wear = "glasses" if name == "glasses" else f"a {new} hat"
    return (f"add {wear}", f"put on {wear}")


def _instruction(scene: Scene, key: str, new: Value, rng: np.random.Generator) -> str:
    name = attribute(key)
    if "." in key:
        ways = _object_instruction(scene, key, new)
    elif name in ("glasses", "hat"):
        ways = _wear_instruction(name, new)
    else:
        ways = {
            "background": (f"change the background to {new}", f"make the background {new}"),
            "word": (f'change the word to "{new}"', f'let it say "{new}"'),
            "colour": (f"make the letters {new}", f"change the text to {new}"),
            "frame": ("add a frame",) if new == "framed" else ("remove the frame",),
            "hair_colour": (f"make the hair {new}", f"dye the hair {new}"),
            "mouth": {
                "smile": ("make the person smile",),
                "frown": ("make the person frown",),
                "open": ("open the mouth",),
            }.get(str(new), ()),
            "season": (f"make it {new}", f"change the season to {new}"),
            "time": {
                "day": ("make it daytime",),
                "sunset": ("make it sunset",),
                "night": ("make it night",),
            }.get(str(new), ()),
            "trees": (f"change the number of trees to {new}", f"show {new} trees"),
            "water": ("add a lake",) if new == "lake" else ("remove the lake",),
            "mountains": ("remove the mountains",) if new == "none" else (f"show {new} mountains",),
            "style": (f"turn it into {new} style", f"redraw it in {new} style"),
        }[name]
    return pick(rng, ways)


def _options(scene: Scene, name: str) -> list[tuple[str, Value]]:
    """(key, new value) of every edit of one kind that the scene admits."""
    v = scene.values
    if name == "remove":
        return [(f"{i}.shape", "none") for i in range(2) if "1.shape" in v]
    keys = [key for key in v if attribute(key) == name]
    if name == "size":
        keys = [key for key in keys if v[key.replace("size", "count")] == 1]
    if name == "hair_colour" and v["hair"] == "bald":
        keys = []
    new_values = STYLES if name == "style" else None
    return [
        (key, new)
        for key in keys
        for new in (new_values or alternatives(scene, key))
        if new != v[key] and new in domain(key)
    ]


def sample_edit(
    rng: np.random.Generator, *, category: str | None = None, person: str | None = None
) -> Edit:
    """Draw a source scene and one instruction; sources are flat in style, and always say
    everything.

    Without category and person, one source in twenty shows a named person.
    """
    if category is None and person is None and rng.random() < 0.05:
        person = str(rng.choice(list(PEOPLE)))
    scene = sample_scene(rng, category=category, person=person, style="flat")
    scene = Scene(scene.category, scene.values, frozenset(), scene.person)
    kinds = EDITABLE[scene.category]
    options: list[tuple[str, Value]] = []
    while not options:
        options = _options(scene, kinds[int(rng.integers(len(kinds)))])
    key, new = options[int(rng.integers(len(options)))]
    return Edit(scene, _instruction(scene, key, new, rng), {key: new})
