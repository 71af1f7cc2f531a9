"""A picture of the embedded world taken apart: the truth on a tree of pillars and facets.

The tree has the shape of Qwen-Image-Bench (arXiv 2605.28091): five pillars, abilities below them,
facets below those. A facet has a value where the prompt asks for what it shows: the colour of a
landscape is nobody's colour. What an edit must leave alone is fidelity, and counts as far as the
instruction was followed, as in `burnish.world.oracle.measure_edit`.
"""

from collections.abc import Mapping

import numpy as np

from burnish.world.edits import Edit
from burnish.world.oracle import ANATOMY, attribute_scores, quality, resolve
from burnish.world.scenes import LOOK, Scene, attribute, held_out_keys

Facet = tuple[str, str, str]
"""Pillar, ability, facet."""

QUALITY: dict[str, Facet] = {
    "sharpness": ("Quality", "Detail", "Sharpness"),
    "speckle": ("Quality", "Detail", "Noise"),
    "bands": ("Quality", "Detail", "Banding"),
    "misfit": ("Quality", "Realism", "Nothing else wrong"),
}
"""Facet of each part of the oracle's quality."""

_ATTRIBUTES: dict[str, Facet] = {
    "fingers": ("Aesthetics", "Portraiture", "Hand"),
    "eye_line": ("Aesthetics", "Portraiture", "Eye line"),
    "style": ("Aesthetics", "Style control", "Style"),
    "time": ("Aesthetics", "Lighting", "Time of day"),
    "colour": ("Alignment", "Attributes", "Colour"),
    "shape": ("Alignment", "Attributes", "Shape"),
    "size": ("Alignment", "Attributes", "Size"),
    "count": ("Alignment", "Attributes", "Quantity"),
    "mouth": ("Alignment", "Attributes", "Facial expression"),
    "glasses": ("Alignment", "Attributes", "Things worn"),
    "hat": ("Alignment", "Attributes", "Things worn"),
    **dict.fromkeys(LOOK, ("Alignment", "Attributes", "Features of a face")),
    "place": ("Alignment", "Layout", "Place"),
    "level": ("Alignment", "Layout", "Line of the text"),
    "background": ("Alignment", "Scene", "Background"),
    "season": ("Alignment", "Scene", "Season"),
    "mountains": ("Alignment", "Scene", "Mountains"),
    "trees": ("Alignment", "Scene", "Trees"),
    "water": ("Alignment", "Scene", "Water"),
    "word": ("Creative", "Text rendering", "Spelling"),
    "frame": ("Creative", "Text rendering", "Frame"),
}
LIKENESS: Facet = ("Fidelity", "World knowledge", "Named people")
KEPT: Facet = ("Fidelity", "Preservation", "What nobody asked to change")
IDENTITY: Facet = ("Fidelity", "Preservation", "Identity")
UNSEEN: Facet = ("Creative", "Imagination", "Combinations nobody trained on")
PILLARS = ("Quality", "Aesthetics", "Alignment", "Fidelity", "Creative")
FACETS: tuple[Facet, ...] = tuple(
    facet
    for pillar in PILLARS
    for facet in dict.fromkeys(
        [*QUALITY.values(), *_ATTRIBUTES.values(), LIKENESS, KEPT, IDENTITY, UNSEEN]
    )
    if facet[0] == pillar
)
"""All of them, pillar by pillar in the order of Qwen-Image-Bench."""


def facets_of_scene(pixels: np.ndarray, scene: Scene) -> dict[Facet, float]:
    """Values of the facets of one text-to-image picture, in [0, 1].

    Args:
        pixels: `height width 3` in [0, 1].
        scene: that the prompt tells.
    """
    scores, seen = attribute_scores(pixels, resolve(pixels, scene))
    looks = () if scene.person is None else LOOK
    # Nobody asks for a look by its name alone, nor for what is left open.
    asked = {
        key: value
        for key, value in scores.items()
        if attribute(key) in ANATOMY or (key not in scene.free and attribute(key) not in looks)
    }
    found = _quality(pixels, seen) | _means(asked)
    if scene.person is not None:
        found[LIKENESS] = float(np.mean([scores[key] for key in looks if key in scores]))
    if unseen := held_out_keys(scene):
        found[UNSEEN] = min(scores[key] for key in unseen)
    return found


def facets_of_edit(pixels: np.ndarray, edit: Edit) -> dict[Facet, float]:
    """Values of the facets of one edited picture, in [0, 1]."""
    scores, seen = attribute_scores(pixels, edit.target)
    changed = {key: scores.get(key, 1.0) for key in edit.changes}
    followed = min(changed.values())
    kept = {key: value for key, value in scores.items() if key not in changed}
    found = _quality(pixels, seen) | _means(changed)
    found[KEPT] = followed * float(np.mean(list(kept.values())))
    if edit.source.category == "portrait":
        found[IDENTITY] = followed * float(np.mean([v for k, v in kept.items() if k in LOOK]))
    return found


def _quality(pixels: np.ndarray, seen: Scene) -> dict[Facet, float]:
    return {QUALITY[part]: value for part, value in quality(pixels, seen).items()}


def _means(scores: Mapping[str, float]) -> dict[Facet, float]:
    """The mean of the attributes of each facet."""
    found: dict[Facet, list[float]] = {}
    for key, value in scores.items():
        found.setdefault(_ATTRIBUTES[attribute(key)], []).append(value)
    return {facet: float(np.mean(values)) for facet, values in found.items()}
