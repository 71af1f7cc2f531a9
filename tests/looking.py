"""A look at a policy as a stage takes it."""

from typing import Any

from burnish.looks import Watch
from burnish.policies.base import Policy
from burnish.runtime import Runtime


def look(
    watch: Watch, policy: Policy[Any, Any], step: int, reward: float | None, rt: Runtime
) -> dict[str, float]:
    """Look, and remember it."""
    watch.prepare(policy, rt)
    told = watch.look(policy, step, reward, rt)
    watch.looks.remember({name: weight.detach() for name, weight in policy.trainable()}, told)
    return told
