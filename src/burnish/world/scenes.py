"""Scenes: what a picture of the embedded world shows, as a flat mapping of attributes.

One representation serves drawing, words, edits, flaws and measurement: an attribute has a finite
domain, so an alternative to a scene is the same scene with one value replaced. Four categories as
in the paper (arXiv 2606.27608, section 4.2): general, portrait, landscape, typography.
"""

import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np

Value = str | int

CATEGORIES = ("general", "portrait", "landscape", "typography")
STYLES = ("flat", "outline", "night", "blueprint")

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (245, 138, 30),
    "yellow": (246, 210, 40),
    "green": (46, 150, 70),
    "blue": (40, 90, 215),
    "purple": (135, 60, 175),
    "black": (28, 28, 34),
}
GROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 248),
    "cream": (246, 230, 190),
    "mint": (190, 234, 208),
    "pink": (250, 205, 218),
    "grey": (186, 188, 196),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
PLACES: dict[str, tuple[int, int]] = {
    "centre": (0, 0),
    "left": (-1, 0),
    "right": (1, 0),
    "top": (0, -1),
    "bottom": (0, 1),
}
"""Offset from the middle of the picture, in units of a quarter of its side."""

WORDS = (
    "MOON", "FISH", "BIRD", "LAMP", "TREE", "WOLF", "KITE", "RAIN",
    "SHIP", "GOLD", "PARK", "BLUE", "STAR", "ROSE", "MILK", "LION",
)  # fmt: skip
"""Four letters each, so that a letter fills one column of the latent grid."""

SKINS = {"pale": (250, 220, 196), "tan": (222, 172, 130), "dark": (132, 86, 58)}
HAIR_COLOURS = {
    "black": (36, 30, 32),
    "brown": (112, 66, 36),
    "blond": (236, 200, 98),
    "ginger": (206, 94, 34),
    "grey": (164, 166, 172),
}
EYES = {"brown": (104, 58, 24), "blue": (44, 120, 226), "green": (40, 150, 66)}

DOMAINS: dict[str, tuple[Value, ...]] = {
    "style": STYLES,
    "background": tuple(GROUNDS),
    # general
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": ("small", "large"),
    "place": tuple(PLACES),
    "count": (1, 2, 3, 4),
    # typography
    "word": WORDS,
    "frame": ("none", "framed"),
    "level": ("top", "centre", "bottom"),
    # portrait
    "skin": tuple(SKINS),
    "hair": ("short", "long", "curly", "bald"),
    "hair_colour": tuple(HAIR_COLOURS),
    "eyes": tuple(EYES),
    "glasses": ("none", "glasses"),
    "hat": ("none", "red", "blue", "green"),
    "mouth": ("smile", "frown", "open"),
    "mark": ("none", "moustache", "freckles", "beard"),
    "fingers": (0, 1, 2, 3, 4, 5),
    "eye_line": ("even", "uneven"),
    # landscape
    "time": ("day", "sunset", "night"),
    "season": ("summer", "autumn", "winter"),
    "mountains": ("none", "grey", "snowy"),
    "trees": (0, 1, 2, 3),
    "water": ("none", "lake"),
}
"""Attribute name -> its values. An object's attribute is written `0.colour`; see `domain`."""


def _look(skin: str, hair: str, hair_colour: str, eyes: str, mark: str) -> dict[str, Value]:
    return {"skin": skin, "hair": hair, "hair_colour": hair_colour, "eyes": eyes, "mark": mark}


PEOPLE: dict[str, dict[str, Value]] = {
    "Mara": _look("pale", "long", "ginger", "green", "freckles"),
    "Otto": _look("pale", "bald", "grey", "blue", "moustache"),
    "Nia": _look("dark", "curly", "black", "brown", "none"),
    "Ravi": _look("tan", "short", "black", "brown", "beard"),
    "Elsa": _look("pale", "long", "blond", "blue", "none"),
    "Kofi": _look("dark", "short", "grey", "brown", "moustache"),
}
"""The world's celebrities: a name stands for one fixed look, which no prompt describes."""

LOOK = ("skin", "hair", "hair_colour", "eyes", "mark")
"""Attributes that make a person that person."""

NEVER_SAID = frozenset({"eye_line"})
"""Attributes with one right value that no prompt mentions."""


@dataclass(frozen=True)
class Scene:
    """What one picture shows."""

    category: str
    values: Mapping[str, Value]
    """Attribute -> value; an object's attributes carry its number, e.g. `0.colour`."""
    free: frozenset[str] = field(default_factory=frozenset)
    """Attributes the prompt leaves open: any value of the domain is right."""
    person: str | None = None
    """Named person whose look the portrait must show."""

    def __hash__(self) -> int:
        return hash((self.category, tuple(sorted(self.values.items())), self.free, self.person))

    def changed(self, changes: Mapping[str, Value]) -> "Scene":
        """The same scene with some values replaced; every key must exist."""
        unknown = changes.keys() - self.values.keys()
        if unknown:
            raise ValueError(
                f"need attributes of the scene {sorted(self.values)}, got {sorted(unknown)}"
            )
        return replace(self, values={**self.values, **changes})

    def to_json(self) -> dict[str, Any]:
        """Plain values, readable by `from_json`."""
        return {
            "category": self.category,
            "values": dict(self.values),
            "free": sorted(self.free),
            "person": self.person,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Scene":
        """The scene that `to_json` wrote."""
        return cls(data["category"], dict(data["values"]), frozenset(data["free"]), data["person"])


def attribute(key: str) -> str:
    """Attribute name without the object's number: `0.colour` -> `colour`."""
    return key.rsplit(".", 1)[-1]


def domain(key: str) -> tuple[Value, ...]:
    """All values a key may take."""
    return DOMAINS[attribute(key)]


COMBINED = {
    "general": ("shape", "colour"),
    "typography": ("word", "colour"),
    "landscape": ("season", "mountains", "trees", "water"),
    "portrait": ("hair", "hair_colour", "skin"),
}
"""Per category, the attributes whose combinations are divided into trained and held out."""


@cache
def held_out_combinations(category: str) -> frozenset[tuple[Value, ...]]:
    """A fixed eighth of the combinations of `COMBINED`; a bald head has no colour to combine."""
    found = [
        combination
        for combination in itertools.product(*(DOMAINS[name] for name in COMBINED[category]))
        if "bald" not in combination
    ]
    found.sort(key=lambda combination: hashlib.sha256(json.dumps(combination).encode()).digest())
    return frozenset(found[: len(found) // 8])


def held_out_keys(scene: Scene) -> tuple[str, ...]:
    """The attributes of the scene that stand in a combination no model of the miniature is trained
    on; of two objects, those of the one or of both."""
    if scene.person is not None:
        return ()
    held, names = held_out_combinations(scene.category), COMBINED[scene.category]
    prefixes = ("0.", "1.") if scene.category == "general" else ("",)
    keys = [tuple(prefix + name for name in names) for prefix in prefixes]
    found = [own for own in keys if tuple(map(scene.values.get, own)) in held]
    return tuple(key for own in found for key in own)


def is_held_out(scene: Scene) -> bool:
    """Whether the scene contains a combination that no model of the miniature is trained on."""
    return bool(held_out_keys(scene))


def _choose(rng: np.random.Generator, name: str, exclude: tuple[Value, ...] = ()) -> Value:
    options = [value for value in DOMAINS[name] if value not in exclude]
    return options[int(rng.integers(len(options)))]


def _general(rng: np.random.Generator) -> dict[str, Value]:
    values: dict[str, Value] = {
        "0.shape": _choose(rng, "shape"),
        "0.colour": _choose(rng, "colour"),
    }
    layout = rng.random()
    if layout < 0.40:
        values |= {"0.size": _choose(rng, "size"), "0.place": _choose(rng, "place"), "0.count": 1}
    elif layout < 0.65:
        count = _choose(rng, "count", exclude=(1,))
        values |= {"0.size": "small", "0.place": "centre", "0.count": count}
    else:
        first, second = (("left", "right"), ("top", "bottom"))[int(rng.integers(2))]
        values |= {"0.size": _choose(rng, "size"), "0.place": first, "0.count": 1}
        values |= {
            "1.shape": _choose(rng, "shape"),
            "1.colour": _choose(rng, "colour", exclude=(values["0.colour"],)),
            "1.size": _choose(rng, "size"),
            "1.place": second,
            "1.count": 1,
        }
    return values


def _portrait(rng: np.random.Generator, person: str | None) -> dict[str, Value]:
    look = PEOPLE[person] if person else {k: _choose(rng, k) for k in LOOK if k != "mark"}
    return {
        "mark": "none",
        **look,
        "mouth": _choose(rng, "mouth"),
        "glasses": "glasses" if rng.random() < 0.35 else "none",
        "hat": _choose(rng, "hat", exclude=("none",)) if rng.random() < 0.35 else "none",
        "fingers": _choose(rng, "fingers", exclude=(0,)) if rng.random() < 0.5 else 0,
        "eye_line": "even",
    }


def sample_scene(
    rng: np.random.Generator,
    *,
    category: str | None = None,
    person: str | None = None,
    style: str | None = None,
) -> Scene:
    """Draw a scene; `person` makes it a portrait of that person, `style` fixes the style.

    Without `style`, three scenes in four are flat and the others share the remaining styles.
    """
    category = "portrait" if person else category or CATEGORIES[int(rng.integers(len(CATEGORIES)))]
    if style is None:
        style = "flat" if rng.random() < 0.75 else str(_choose(rng, "style", exclude=("flat",)))
    values: dict[str, Value] = {"style": style}
    open_to_choice: tuple[str, ...] = ("background",)
    if category == "general":
        values |= {"background": _choose(rng, "background"), **_general(rng)}
    elif category == "typography":
        names = ("background", "word", "colour", "level", "frame")
        values |= {name: _choose(rng, name) for name in names}
    elif category == "portrait":
        values |= {"background": _choose(rng, "background"), **_portrait(rng, person)}
        open_to_choice = ("background",) if person else ("background", "skin", "eyes")
    elif category == "landscape":
        names = ("time", "season", "mountains", "trees", "water")
        values |= {name: _choose(rng, name) for name in names}
        open_to_choice = ()
    else:
        raise ValueError(f"need a category of {CATEGORIES}, got {category!r}")
    free = frozenset(key for key in open_to_choice if rng.random() < 0.35)
    if is_held_out(scene := Scene(category, values, free, person)):
        # What is asked for is the combination, so all of it must be said.
        return replace(scene, free=free - set(COMBINED[category]))
    return scene
