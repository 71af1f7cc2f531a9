"""The embedded world's own truth as a reward: one dimension of `burnish.world.oracle`.

It knows the scene behind a prompt (`Prompt.facts`) and measures from pixels alone. The facts of an
edit are its first source and what changes there, so that further sources count for nothing. Studies
of learned rewards hold it out; studies of the optimisation itself train on it, and say so.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np

from burnish.rewards.base import Reward, RewardConfig
from burnish.types import Failed, NotApplicable, Prompt, Score, Scored, ScoreRequest
from burnish.world.edits import Edit
from burnish.world.oracle import Measures, measure_edit, measure_scene
from burnish.world.render import SIZE
from burnish.world.scenes import Scene

Dimension = Literal[
    "composite",
    "alignment",
    "quality",
    "portrait",
    "likeness",
    "style",
    "instruction",
    "preservation",
    "identity",
]


class OracleConfig(RewardConfig):
    """Which dimension of the truth."""

    kind: Literal["oracle"] = "oracle"
    dimension: Dimension = "composite"

    def build(self) -> "Oracle":
        return Oracle(self.dimension)


class Oracle(Reward):
    """Scores in [0, 1]."""

    def __init__(self, dimension: Dimension) -> None:
        self.dimension = dimension

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        return [self._score_one(request) for request in requests]

    def _score_one(self, request: ScoreRequest) -> Score:
        if not request.prompt.facts:
            return NotApplicable(reason="the prompt tells no facts of the embedded world")
        pixels = request.image.permute(1, 2, 0).contiguous().numpy()
        if not np.isfinite(pixels).all():
            return Failed(reason="the image is not finite")
        if pixels.shape[:2] != (SIZE, SIZE):
            height, width, _ = pixels.shape
            return Failed(reason=f"need the world's {SIZE} x {SIZE} pixels, got {width} x {height}")
        found = measures(request.prompt, pixels)
        if self.dimension not in found:
            return NotApplicable(reason=f"{self.dimension} means nothing for this prompt")
        return Scored(value=found[self.dimension], detail=found)


def measures(prompt: Prompt, pixels: np.ndarray) -> Measures:
    """All dimensions of one picture, `height width 3` in [0, 1]."""
    return dict(_measured(json.dumps(dict(prompt.facts)), pixels.astype(np.float32).tobytes()))


# Several dimensions of one picture are usually asked for one after the other.
@lru_cache(maxsize=256)
def _measured(facts: str, pixels: bytes) -> Measures:
    known = json.loads(facts)
    picture = np.frombuffer(pixels, dtype=np.float32).reshape(SIZE, SIZE, 3)
    if "changes" in known:
        return measure_edit(picture, Edit.from_json(known))
    return measure_scene(picture, Scene.from_json(known))
