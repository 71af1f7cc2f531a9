"""The optimizer steps on the signals of one rollout, alike on one process or several.

Every group is dealt out evenly over the updates of a step, and every process has the signals of its
own groups. The loss of an update is the mean over the states of all processes, so that the gradient
does not know how many there are: each adds its part, and parts may be uneven or empty.
"""

import statistics
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from burnish import runtime
from burnish.algorithms.base import Algorithm, SelfCheckError
from burnish.batches import by_kind, chunks, stack
from burnish.optimization import OptimizerConfig, State, moved, set_rate
from burnish.policies.base import Policy
from burnish.runtime import Runtime
from burnish.sharding import full
from burnish.tracking import RunError
from burnish.types import Prompt, Signal

Logged = dict[str, list[tuple[float, int]]]
"""By name, the value of each micro-batch and its number of states."""
_ENDS = {"max": max, "min": min}


def update(
    plan: OptimizerConfig,
    algorithm: Algorithm,
    state: State,
    rt: Runtime,
    prompts: Sequence[Prompt],
    signals: Sequence[Signal],
    *,
    seed: int,
    total: int,
) -> dict[str, float]:
    """Make all optimizer steps of one step of a stage; returns what the loss logs, over all states.

    Args:
        plan: how often, and how fast.
        algorithm: whose loss it is.
        state: changed in place.
        rt: processes and precision.
        prompts: that this process drew, in order; those of dropped groups, too.
        signals: of this process.
        seed: of the order.
        total: steps of the stage.

    Raises:
        RunError: a gradient that is not finite.
        SelfCheckError: a ratio other than 1 before the first update, or weights that do not move.
    """
    parameters = [parameter for _, parameter in state.policy.trainable()]
    logged: Logged = {}
    norms = []
    for number, part in enumerate(_parts(plan, rt, prompts, signals, state.step, seed)):
        states = sum(rt.gather(sum(len(signal.sigmas) for signal in part)))
        _accumulate(plan, algorithm, state, rt, prompts, part, states, logged)
        if not rt.is_sharded:
            rt.all_reduce_gradients(parameters)
        elif not states:
            state.optimizer.zero_grad(set_to_none=True)
        norm = full(nn.utils.clip_grad_norm_(parameters, plan.max_grad_norm))
        if not bool(norm.isfinite()):
            raise RunError(
                f"need a finite gradient, got {float(norm)} at step {state.step}; lower "
                "optimizer.learning_rate and begin in another folder with --out, as this one "
                "belongs to its settings"
            )
        norms.append(float(norm))
        place = state.step * plan.num_updates + number
        set_rate(state.optimizer, plan, update=place, total=total * plan.num_updates)
        witness = moved(parameters) if state.step == number == 0 else None
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        if witness is not None and states and not any(rt.gather(witness())):
            raise SelfCheckError("need weights that move, got none changed by the first step")
        if state.average:
            own = [parameter.detach() for parameter in parameters]
            torch._foreach_lerp_(state.average, own, 1 - plan.ema_decay)
    return _over_states(rt, logged) | {"policy/grad_norm": sum(norms) / len(norms)}


def _accumulate(
    plan: OptimizerConfig,
    algorithm: Algorithm,
    state: State,
    rt: Runtime,
    prompts: Sequence[Prompt],
    part: Sequence[Signal],
    states: int,
    logged: Logged,
) -> None:
    """Add the gradient of the signals of one update, of as many states on all processes."""
    is_first = state.step == 0 and "loss" not in logged
    for chunk in _together(state.policy, list(chunks(by_kind(part), plan.micro_batch)), rt):
        if chunk is None:
            _idle(state.policy, prompts[0], rt)
            continue
        batch = stack(chunk, state.policy.device)
        with rt.autocast():
            output = algorithm.loss(state.policy, batch)
        # What is averaged over processes is the sum of their parts.
        share = len(batch.sigmas) * rt.world_size / max(states, 1)
        with rt.attention():
            (output.loss * share).backward()
        for name, value in {"loss": float(output.loss.detach()), **output.metrics}.items():
            logged.setdefault(name, []).append((value, len(batch.sigmas)))
        if is_first:
            check_ratio(output.metrics, plan.num_updates)


def _together(
    policy: Policy[Any, Any], found: list[Sequence[Signal]], rt: Runtime
) -> Sequence[Sequence[Signal] | None]:
    """The micro-batches; where all processes must compute together, one call of the transformer for
    each (`burnish.sharding.check_prefix`), and as many on every process: None is nothing."""
    if not rt.is_sharded:
        return found
    alike: list[Sequence[Signal]] = []
    for chunk in found:
        own: dict[Hashable, list[Signal]] = {}
        for signal in chunk:
            own.setdefault(policy.layout(signal.prompt), []).append(signal)
        alike += own.values()
    return [*alike, *[None] * (max(rt.gather(len(alike))) - len(alike))]


def _idle(policy: Policy[Any, Any], prompt: Prompt, rt: Runtime) -> None:
    """Take part in a pass through the transformer with nothing to add."""
    with rt.autocast():
        noise = policy.noise([runtime.generator(0, "idle")], policy.buckets.size(prompt))
        level = torch.full((1,), 0.5, device=policy.device)
        velocity = policy.velocity(noise, level, policy.prefix(policy.encode([prompt])))
    with rt.attention():
        (0.0 * velocity.sum()).backward()


def _parts(
    plan: OptimizerConfig,
    rt: Runtime,
    prompts: Sequence[Prompt],
    signals: Sequence[Signal],
    step: int,
    seed: int,
) -> Iterator[list[Signal]]:
    """The signals of this process for each update."""
    counts = [sum(signal.prompt.id == prompt.id for signal in signals) for prompt in prompts]
    draws = runtime.generator(seed, "order", step)
    turns = rt.mine(_turns(rt.together(counts), plan.num_updates, draws))
    own = [turn for group in turns for turn in group]
    for number in range(plan.num_updates):
        yield [signal for signal, turn in zip(signals, own, strict=True) if turn == number]


def _turns(counts: Sequence[int], num_updates: int, draws: torch.Generator) -> list[list[int]]:
    """Update of each signal of each group: every group is dealt out evenly, so that advantages stay
    balanced.

    Args:
        counts: signals of each group; a dropped one has none.
        num_updates: optimizer steps.
        draws: of the order.
    """
    turns: list[list[int]] = []
    first = 0
    for count in counts:
        own = [0] * count
        for place, member in enumerate(torch.randperm(count, generator=draws).tolist()):
            own[member] = (first + place) % num_updates
        turns.append(own)
        first += count > 0
    return turns


def _over_states(rt: Runtime, logged: Logged) -> dict[str, float]:
    """What was logged, of all processes; it does not know how micro-batches were cut."""
    parts = rt.gather(logged)
    found = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        entries = [entry for part in parts for entry in part.get(name, ())]
        values, states = zip(*entries, strict=True)
        end = _ENDS.get(name.rpartition("_")[2])
        found[name] = end(values) if end else statistics.fmean(values, states)
    return found


def check_ratio(metrics: Mapping[str, float], num_updates: int) -> None:
    """Old and new policy are the same before the first update."""
    # With several updates the old velocities come from batches of another shape.
    allowed = 0.0 if num_updates == 1 else 1e-3
    for ratio in (metrics.get(f"policy/ratio_{end}", 1.0) for end in ("min", "max")):
        if abs(ratio - 1) > allowed:
            raise SelfCheckError(f"need a ratio of 1 before the first update, got {ratio:.8g}")
