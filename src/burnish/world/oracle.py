"""The oracle: how much of a scene a picture shows, measured from pixels alone.

Analysis by synthesis. For every attribute the oracle draws the right scene T and each alternative A
(one value replaced) and asks how far the picture x has gone from T towards A:

    s_A = 1 - <x - T, A - T> / |A - T|^2        1 at x = T, 0 at x = A

The attribute's score is the smallest s_A, with a ramp that forgives blur: it is right or wrong,
seldom between. Whatever the prompt leaves open is first set to the value that explains the picture
best. Quality is what the best explanation leaves over: lost sharpness, speckle, bands, or anything
else.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from burnish.world.edits import Edit
from burnish.world.flaws import alternatives
from burnish.world.render import render
from burnish.world.scenes import LOOK, Scene, Value, attribute, domain

Measures = dict[str, float]

_MIN_CONTRAST = 2e-5
"""Mean squared difference below which two scenes look the same and an alternative says nothing."""
ANATOMY = ("fingers", "eye_line")
"""What the portrait dimension checks, and a rater of portraits, as the paper's reward does."""


def _ramp(value: float, low: float, high: float) -> float:
    return min(max((value - low) / (high - low), 0.0), 1.0)


@lru_cache(maxsize=768)
def _contrasts(scene: Scene) -> tuple[tuple[tuple[str, Value], ...], np.ndarray]:
    """(key, value) of every visible alternative, and A - T over |A - T|^2, one row each."""
    right = render(scene).ravel()
    labels: list[tuple[str, Value]] = []
    rows: list[np.ndarray] = []
    for key in scene.values:
        for value in alternatives(scene, key):
            difference = render(scene.changed({key: value})).ravel() - right
            energy = float(difference @ difference)
            if energy > _MIN_CONTRAST * difference.size:
                labels.append((key, value))
                rows.append(difference / energy)
    return tuple(labels), np.stack(rows)


def resolve(pixels: np.ndarray, scene: Scene) -> Scene:
    """The scene with every free attribute set to the value that explains the picture best."""
    for key in sorted(scene.free):
        options = [scene.changed({key: value}) for value in domain(key)]
        errors = [float(((pixels - render(option)) ** 2).sum()) for option in options]
        scene = options[int(np.argmin(errors))]
    return scene


def _highpass(pixels: np.ndarray) -> np.ndarray:
    padded = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), mode="edge")
    height, width = pixels.shape[:2]
    window = [padded[i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return pixels - np.mean(window, axis=0)


_SHARPNESS = {
    "general": (0.15, 0.28),
    "landscape": (0.35, 0.70),
    "portrait": (0.35, 0.70),
    "typography": (0.35, 0.70),
}
"""Sharpness of a blurred and of a clean picture once the miniature's autoencoder has passed it."""


@dataclass(frozen=True)
class _Detail:
    """What the fine structure of a right picture is like."""

    fine: np.ndarray
    energy: float
    plain: np.ndarray
    """True where there is no structure, so that any is noise."""


@lru_cache(maxsize=4096)
def _detail(scene: Scene) -> _Detail:
    fine = _highpass(render(scene))
    energy = max(float((fine**2).sum()), 1e-6)
    return _Detail(fine, energy, np.abs(fine).max(axis=2) < 0.02)


def quality(pixels: np.ndarray, seen: Scene) -> dict[str, float]:
    """Sharpness, speckle, bands and any other misfit against what is seen.

    Args:
        pixels: `height width 3` in [0, 1].
        seen: the scene that explains the picture best.

    Returns:
        Values in [0, 1] by name, 1 as good as a clean picture; the worst is a picture's quality.
    """
    right = _detail(seen)
    sharpness = float((_highpass(pixels) * right.fine).sum()) / right.energy
    rest = pixels - render(seen)
    speckle = float(np.sqrt((_highpass(rest)[right.plain] ** 2).mean())) if right.plain.any() else 0
    rows = rest.mean(axis=(1, 2))
    smooth = np.convolve(rows, np.ones(8) / 8, mode="same")
    bands = float(np.sqrt(((rows - smooth)[4:-4] ** 2).mean()))
    misfit = float(np.sqrt((rest**2).mean()))
    return {
        "sharpness": _ramp(sharpness, *_SHARPNESS[seen.category]),
        "speckle": 1 - _ramp(speckle, 0.020, 0.036),
        "bands": 1 - _ramp(bands, 0.025, 0.060),
        "misfit": 1 - _ramp(misfit, 0.045, 0.090),
    }


def _explain(pixels: np.ndarray, scene: Scene, suspects: list[dict[str, Value]]) -> Scene:
    """Take over suspected changes greedily, as long as each leaves clearly less unexplained."""
    error = float(((pixels - render(scene)) ** 2).mean())
    for _ in range(3):
        tried = [scene.changed(change) for change in suspects]
        errors = [float(((pixels - render(option)) ** 2).mean()) for option in tried]
        if not errors or min(errors) > 0.9 * error:
            break
        error, scene = min(errors), tried[int(np.argmin(errors))]
    return scene


def attribute_scores(pixels: np.ndarray, scene: Scene) -> tuple[dict[str, float], Scene]:
    """Score of every visible attribute, and the scene that explains the picture best.

    Args:
        pixels: one picture, `height width 3` in [0, 1].
        scene: what it should show, with nothing free.
    """
    labels, contrasts = _contrasts(scene)
    along = 1 - contrasts @ (pixels - render(scene)).ravel()
    scores: dict[str, float] = {}
    seen: dict[str, Value] = {}
    for (key, value), raw in zip(labels, along, strict=True):
        if raw < scores.get(key, np.inf):
            scores[key], seen[key] = float(raw), value
    suspects = [{key: seen[key]} for key, raw in scores.items() if raw < 0.5]
    ramped = {key: _ramp(raw, 0.20, 0.60) for key, raw in scores.items()}
    return ramped, _explain(pixels, scene, suspects)


def strict_mean(values: Sequence[float]) -> float:
    """Half mean, half minimum: one thing missed costs more than its share."""
    return 0.5 * float(np.mean(values)) + 0.5 * float(np.min(values)) if values else 1.0


def measure_scene(pixels: np.ndarray, scene: Scene) -> Measures:
    """All dimensions of one text-to-image picture.

    Returns:
        `alignment` and `quality` always; `portrait` for portraits, `likeness` for named people,
        `style` where one is asked for; `composite`, the mean of the first three that apply. All in
        [0, 1].
    """
    right = resolve(pixels, scene)
    scores, seen = attribute_scores(pixels, right)
    stated = [v for k, v in scores.items() if k not in scene.free and attribute(k) not in ANATOMY]
    measures = {
        "alignment": strict_mean(stated),
        "quality": min(quality(pixels, seen).values()),
    }
    if scene.category == "portrait":
        measures["portrait"] = strict_mean([v for k, v in scores.items() if k in ANATOMY])
    measures["composite"] = float(np.mean(list(measures.values())))
    if scene.person is not None:
        measures["likeness"] = strict_mean([v for k, v in scores.items() if k in LOOK])
    if scene.values["style"] != "flat":
        measures["style"] = scores.get("style", 1.0)
    return measures


def measure_edit(pixels: np.ndarray, edit: Edit) -> Measures:
    """All dimensions of one edited picture.

    Preservation counts only as far as the instruction was followed: returning the source untouched
    preserves everything and earns nothing.

    Returns:
        `instruction`, `preservation`, `quality`, `identity` for portraits, and `composite`, the
        mean of the first three. All in [0, 1].
    """
    scores, seen = attribute_scores(pixels, edit.target)
    instruction = min(scores.get(key, 1.0) for key in edit.changes)
    kept = {key: value for key, value in scores.items() if key not in edit.changes}
    measures = {
        "instruction": instruction,
        "preservation": instruction * strict_mean(list(kept.values())),
        "quality": min(quality(pixels, seen).values()),
    }
    measures["composite"] = float(np.mean(list(measures.values())))
    if edit.source.category == "portrait":
        measures["identity"] = strict_mean([v for k, v in kept.items() if k in LOOK])
    return measures
