"""Votes by a reward: a judge, or the miniature's oracle as a crowd of simulated raters.

A reward reads every picture once. A rater sees two scores through a noise of their own and prefers
the higher one; within a margin it is a tie, and two pictures below `bad` are both bad. Such voters
are named after their reward, so that nobody takes them for people.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import Field

from burnish import images
from burnish.arena.battles import Battle, Winner
from burnish.arena.contest import Contest
from burnish.config import Config, ConfigError
from burnish.progress import progress
from burnish.rewards.base import Reward
from burnish.shelves import AnyReward
from burnish.significance import MIN_COVERAGE
from burnish.types import Failed, NotApplicable, Scored, ScoreRequest


class RatersConfig(Config):
    """How a crowd votes by a reward's scores, in the reward's own unit."""

    count: int = Field(default=4, ge=1)
    """Raters; each votes once on every meeting that it is shown."""
    noise: float = Field(default=0.0, ge=0)
    """Standard deviation of what a rater adds to each score."""
    margin: float = Field(default=0.0, ge=0)
    """A smaller difference is a tie."""
    bad: float | None = None
    """Two pictures below are both bad; None calls none bad."""
    seed: int = 0


class CrowdConfig(Config):
    """A reward and the crowd that votes by its scores."""

    judge: AnyReward
    raters: RatersConfig = RatersConfig()


def scores(
    contest: Contest, reward: Reward, batch_size: int = 64
) -> dict[tuple[str, str], float | Failed]:
    """What a reward says of every picture, by contestant and prompt; a prompt on which it has no
    say is missing."""
    wanted = [(name, prompt) for name in contest.pictures for prompt in contest.prompts]
    found: dict[tuple[str, str], float | Failed] = {}
    with progress("score pictures", len(wanted)) as bar:
        for first in range(0, len(wanted), batch_size):
            block = wanted[first : first + batch_size]
            requests = [
                ScoreRequest(
                    prompt=prompt,
                    image=images.to_tensor(
                        images.read(contest.pictures[name][prompt.id]).convert("RGB")
                    ),
                )
                for name, prompt in block
            ]
            for (name, prompt), answer in zip(block, reward.score(requests), strict=True):
                if not isinstance(answer, NotApplicable):
                    value = answer.value if isinstance(answer, Scored) else answer
                    found[name, prompt.id] = value
            bar.advance(len(block))
    return found


def vote(
    contest: Contest,
    seen: Mapping[tuple[str, str], float | Failed],
    plan: RatersConfig,
    *,
    crowd: str,
    per_prompt: int | None = None,
) -> list[Battle]:
    """The votes of all raters; a meeting with a picture that has no score is left out.

    Args:
        contest: who meets whom.
        seen: score of every picture, as `scores` returns it.
        plan: of the raters.
        crowd: name of the reward; a rater is `simulated:CROWD-3`.
        per_prompt: meetings of each prompt for each rater; None is all pairs.

    Raises:
        ConfigError: too many pictures of a contestant failed to score, or no two pictures of a
            prompt have scores.
    """
    _check_scored(contest, seen, crowd)
    told = {key: value for key, value in seen.items() if not isinstance(value, Failed)}
    battles = []
    for rater in range(plan.count):
        draws = np.random.default_rng([plan.seed, rater])
        meetings = contest.pairs(int(draws.integers(2**31)), per_prompt)
        for number, (prompt, left, right) in enumerate(meetings):
            if (left, prompt.id) not in told or (right, prompt.id) not in told:
                continue
            values = [told[name, prompt.id] for name in (left, right)]
            noisy = np.array(values) + plan.noise * draws.standard_normal(2)
            battles.append(
                Battle(
                    battle=f"{rater}-{number}",
                    prompt=prompt.id,
                    category=prompt.category,
                    a=left,
                    b=right,
                    winner=_winner(noisy.tolist(), plan),
                    voter=f"simulated:{crowd}-{rater}",
                )
            )
    if not battles:
        raise ConfigError(
            f"need scores of two pictures of a prompt, got none from the judge {crowd}; fix it or "
            "name another one (the oracle knows prompts of the embedded world alone)"
        )
    return battles


def _check_scored(
    contest: Contest, seen: Mapping[tuple[str, str], float | Failed], crowd: str
) -> None:
    """Raise where one contestant would be rated by the pictures that a reward could read."""
    for name in contest.pictures:
        own = [value for (other, _), value in seen.items() if other == name]
        lost = [value.reason for value in own if isinstance(value, Failed)]
        # Of a few pictures one may be beyond any judge.
        if len(lost) > max(1, round((1 - MIN_COVERAGE) * len(own))):
            raise ConfigError(
                f"need scores of {MIN_COVERAGE:.0%} of the {len(own)} pictures of {name}, got "
                f"{len(own) - len(lost)} from the judge {crowd} ({lost[0]}); see what is wrong "
                "with the judge or the pictures, or name another judge"
            )


def _winner(values: Sequence[float], plan: RatersConfig) -> Winner:
    if plan.bad is not None and max(values) < plan.bad:
        return "both_bad"
    if abs(values[0] - values[1]) <= plan.margin:
        return "tie"
    return "a" if values[0] > values[1] else "b"
