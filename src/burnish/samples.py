"""Pictures of a stage while it trains, and what its rewards said of them: `samples/` of its run.

Nothing is drawn for them: they are a group that was drawn to learn from, so that who looks through
the folder sees what the rewards saw, the whole spread of a group, and a judge's own words.
"""

from collections.abc import Sequence
from typing import Any

from burnish.images import to_pil
from burnish.tracking import Run
from burnish.types import Failed, Group, NotApplicable, Score


def keep_samples(run: Run, step: int, groups: Sequence[Group], *, every: int) -> None:
    """Write the pictures of a group, each with its prompt and its scores beside it.

    Args:
        run: of the stage.
        step: that drew them.
        groups: of that step; the first is kept.
        every: steps from one group that is kept to the next; 0 keeps none.

    Raises:
        burnish.tracking.RunError: they cannot be written.
    """
    if every == 0 or step % every:
        return
    group = groups[0]
    prompt = group.prompt
    for place, path in enumerate(group.trajectories):
        record = {
            "prompt": prompt.id,
            "text": prompt.text,
            "category": prompt.category,
            "seed": path.seed,
            "scores": {name: _told(scores[place]) for name, scores in group.scores.items()},
        }
        run.save_sample(step, f"{prompt.id}-{place}", to_pil(path.image), record)


def _told(score: Score) -> dict[str, Any]:
    if isinstance(score, Failed):
        return {"failed": score.reason}
    if isinstance(score, NotApplicable):
        return {"not_applicable": score.reason}
    return {"value": score.value, "detail": dict(score.detail), "note": score.note}
