"""The largest micro-batches that a device has memory for.

A micro-batch changes no picture and no gradient but for rounding, only how much is done at once.
Larger and larger ones are planned, with hollow weights, until they need too much or change nothing.
"""

from collections.abc import Sequence

from burnish.config import ConfigError, parse
from burnish.forecast import forecast
from burnish.planning import Phase, Plan, Sharding, shown
from burnish.progress import progress
from burnish.run_config import RunConfig

_DRAWING: tuple[Phase, ...] = ("reading", "drawing", "decoding")
_TRAINING: tuple[Phase, ...] = ("credit", "update", "optimizer step")


def largest(
    config: RunConfig, device: str, available: int, sharding: Sharding | None = None
) -> dict[str, int]:
    """Every micro-batch of a run by its key in a recipe, a power of two each.

    Args:
        config: of the run; its own micro-batches do not count.
        device: as for `forecast`, like `sharding`.
        available: bytes of it.

    Raises:
        ConfigError: one by one is too much, or what `forecast` raises.
    """
    plain = config.model_dump(mode="json")
    found: dict[str, int] = {}
    held: dict[str, int] = {}
    size, is_open = 1, {key for name in config.stages for key in _keys(name)} | {*_EVALUATION}
    # The states of one picture are trained together.
    longest = max(stage.rollout.num_steps for stage in config.stages.values())
    with progress("plan micro-batches") as bar:
        while is_open:
            chosen = found | dict.fromkeys(is_open, size)
            overrides = [f"{key}={value}" for key, value in chosen.items()]
            plans = forecast(parse(RunConfig, plain, overrides), device, sharding)
            for key, needed in _needs(plans).items():
                if key not in is_open:
                    continue
                if needed > available and key not in found:
                    raise ConfigError(
                        f"{key}: need {shown(needed)} on the device for one at a time, got "
                        f"{shown(available)}; `burnish doctor --recipe` tells of what"
                    )
                is_more = needed != held.get(key)
                if needed > available or not (is_more or size <= longest):
                    is_open.remove(key)
                elif is_more:
                    found[key], held[key] = size, needed
            bar.advance(note=f"{size} at once")
            size *= 2
    return found


_EVALUATION = ("evaluation.micro_batch",)


def _keys(stage: str) -> tuple[str, str]:
    return f"stages.{stage}.rollout.micro_batch", f"stages.{stage}.optimizer.micro_batch"


def _needs(plans: Sequence[Plan]) -> dict[str, int]:
    """Bytes of a device in the phases that a micro-batch fills, by its key."""
    found = {}
    for plan in plans:
        keys = _EVALUATION if plan.key == "evaluation" else _keys(plan.stage)
        for key, phases in zip(keys, (_DRAWING, _TRAINING), strict=False):
            found[key] = max(plan.needed_in(phase) for phase in phases)
    return found
