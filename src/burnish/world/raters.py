"""Simulated raters: people of the embedded world who look at a picture and give 1 to 5.

Each rater is strict by nature and by mood, which bears on what a fault costs: where nothing is
wrong all of them give 5, as people do who are asked to look for faults. The truth behind them is
the oracle's, read through the priorities of the paper (arXiv 2606.27608, section 3.2): presence and
count before attributes before places before expression, and a picture that misses the first is
capped low. Their reasoning names what they checked and what they saw, so that a judge can learn to
reason before it scores. They stand in for an annotation campaign; a study of judges compares with
the oracle.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from burnish.world.edits import Edit
from burnish.world.oracle import ANATOMY, attribute_scores, quality, resolve, strict_mean
from burnish.world.scenes import Scene, attribute

PRIORITIES: tuple[tuple[str, ...], ...] = (
    ("shape", "count", "word", "hair", "hat", "glasses", "trees", "water", "mountains"),
    ("colour", "size", "skin", "hair_colour", "eyes", "season", "time", "background", "style"),
    ("place", "level", "frame"),
    ("mouth", "mark"),
)
"""What a rater of alignment checks, in the order of weight."""
WEIGHTS = (0.45, 0.30, 0.15, 0.10)
"""Weight of each priority; those that a scene lacks are left out."""
CAP = 2.0
"""Highest alignment of a picture that misses presence or count."""


@dataclass(frozen=True)
class Opinion:
    """What all raters together say of one picture in one dimension."""

    dimension: str
    mean: float
    """Between 1 and 5."""
    std: float
    """Between raters."""
    num_raters: int
    truth: float
    """What a rater of middling strictness and mood would say, between 1 and 5."""
    reasoning: str


@dataclass(frozen=True)
class Raters:
    """A panel of lasting strictness: each takes exp(strictness + mood) of what a fault is worth."""

    strictness: tuple[float, ...]
    mood: float = 0.4
    """Standard deviation of one rater's passing mood, on the same scale."""

    @classmethod
    def hire(cls, count: int = 5, spread: float = 0.35, seed: int = 0) -> "Raters":
        """A panel whose strictness is drawn from a normal distribution of width `spread`."""
        drawn = np.random.default_rng(seed).normal(0, spread, size=count)
        return cls(tuple(float(own) for own in drawn - drawn.mean()))

    def rate(
        self, dimension: str, truth: float, reasoning: str, rng: np.random.Generator
    ) -> Opinion:
        """Every rater gives a whole number of points for a truth between 1 and 5."""
        moods = rng.normal(0, self.mood, len(self.strictness))
        points = np.round(5 - (5 - truth) * np.exp(np.asarray(self.strictness) + moods))
        points = np.clip(points, 1, 5)
        return Opinion(
            dimension=dimension,
            mean=float(points.mean()),
            std=float(points.std()),
            num_raters=len(points),
            truth=truth,
            reasoning=reasoning,
        )


def alignment_truth(scores: Mapping[str, float]) -> float:
    """Points from 1 to 5 for attribute scores in [0, 1], by `PRIORITIES`, with the cap."""
    tiers = [[v for k, v in scores.items() if attribute(k) in names] for names in PRIORITIES]
    present = [(w, tier) for w, tier in zip(WEIGHTS, tiers, strict=True) if tier]
    if not present:
        return 5.0
    total = sum(weight for weight, _ in present)
    share = sum(weight * strict_mean(tier) for weight, tier in present) / total
    points = 1 + 4 * share
    return min(points, CAP) if tiers[0] and min(tiers[0]) < 0.5 else points


def rate_scene(
    pixels: np.ndarray, scene: Scene, raters: Raters, rng: np.random.Generator
) -> list[Opinion]:
    """Alignment and aesthetic of a picture, and the anatomy of a portrait.

    Args:
        pixels: `height width 3` in [0, 1].
        scene: what the prompt asks for.
        raters: the panel.
        rng: of their moods.
    """
    right = resolve(pixels, scene)
    scores, seen = attribute_scores(pixels, right)
    stated = {
        k: v for k, v in scores.items() if k not in scene.free and attribute(k) not in ANATOMY
    }
    opinions = [
        raters.rate("alignment", alignment_truth(stated), checks(stated, right, seen), rng),
        _aesthetic(pixels, seen, raters, rng),
    ]
    if scene.category == "portrait":
        anatomy = {k: v for k, v in scores.items() if k in ANATOMY}
        truth = 1 + 4 * strict_mean(list(anatomy.values())) if anatomy else 5.0
        opinions.append(raters.rate("portrait", truth, checks(anatomy, right, seen), rng))
    return opinions


def rate_edit(
    pixels: np.ndarray, edit: Edit, raters: Raters, rng: np.random.Generator
) -> list[Opinion]:
    """Instruction and aesthetic of an edited picture.

    The change is the core of the instruction; what it did not mention is the rest. A change that
    was not made is capped like a missing object, however well the rest was kept.
    """
    scores, seen = attribute_scores(pixels, edit.target)
    core = {key: scores.get(key, 1.0) for key in edit.changes}
    rest = {key: value for key, value in scores.items() if key not in edit.changes}
    done = min(core.values())
    points = 1 + 4 * (0.6 * done + 0.4 * done * strict_mean(list(rest.values())))
    truth = min(points, CAP) if done < 0.5 else points
    said = "; ".join(checks(part, edit.target, seen) for part in (core, rest) if part)
    return [raters.rate("instruction", truth, said, rng), _aesthetic(pixels, seen, raters, rng)]


def _aesthetic(
    pixels: np.ndarray, seen: Scene, raters: Raters, rng: np.random.Generator
) -> Opinion:
    found = min(quality(pixels, seen).values())
    words = "clean" if found > 0.75 else "slightly spoilt" if found > 0.35 else "spoilt"
    return raters.rate("aesthetic", 1 + 4 * found, f"picture {words}", rng)


def checks(scores: Mapping[str, float], right: Scene, seen: Scene) -> str:
    """What was asked, what was seen, and whether that is right, in order of weight: `shape star
    seen star right, size large seen large slightly wrong, colour red seen blue wrong`."""
    parts = []
    for key in by_weight(scores):
        wanted, found = right.values[key], seen.values[key]
        is_right = scores[key] >= 0.5
        # A value that is wrong without being another one is a smear.
        shown = wanted if is_right else "unclear" if found == wanted else found
        verdict = "right" if scores[key] > 0.9 else "slightly wrong" if is_right else "wrong"
        parts.append(f"{words(key)} {wanted} seen {shown} {verdict}")
    return ", ".join(parts)


def by_weight(keys: Iterable[str]) -> list[str]:
    """Attributes in the order in which raters speak of them."""
    order = {name: n for n, name in enumerate(n for names in PRIORITIES for n in names)}
    return sorted(keys, key=lambda key: (order.get(attribute(key), len(order)), key))


def words(key: str) -> str:
    """What raters call an attribute."""
    return attribute(key).replace("_", " ")
