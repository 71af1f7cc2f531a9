"""The largest micro-batches that a device has memory for.

A micro-batch changes no picture and no gradient but for rounding, only how much is done at once.
Larger and larger ones are planned, with hollow weights, until they need too much or hold all work.
"""

from collections.abc import Mapping, Sequence

from burnish.config import ConfigError, located, parse
from burnish.evaluation import AT_ONCE
from burnish.planning.forecast import forecast, own_groups
from burnish.planning.plan import Phase, Plan, check, shown
from burnish.progress import progress
from burnish.run_config import RunConfig
from burnish.run_folder import with_folders

_DRAWING: tuple[Phase, ...] = ("reading", "drawing", "decoding")
_TRAINING: tuple[Phase, ...] = ("credit", "update", "optimizer step")


def largest(config: RunConfig, device: str, available: int) -> dict[str, int]:
    """Every micro-batch of a run by its key in a recipe, a power of two each.

    Args:
        config: of the run; its own micro-batches do not count.
        device: as for `forecast`.
        available: bytes of it.

    Raises:
        ConfigError: one by one is too much, or what `forecast` raises.
    """
    plain = config.model_dump(mode="json")
    caps = _caps(config)
    found: dict[str, int] = {}
    size, is_open = 1, set(caps)

    def plans(chosen: Mapping[str, int]) -> list[Plan]:
        overrides = [f"{key}={value}" for key, value in chosen.items()]
        return forecast(parse(RunConfig, plain, overrides), device)

    with progress("plan micro-batches") as bar:
        while is_open:
            for key, needed in _needs(plans(found | dict.fromkeys(is_open, size))).items():
                if key not in is_open:
                    continue
                if needed > available and size == 1:
                    raise ConfigError(
                        f"{key}: need {shown(needed)} on the device for one at a time, got "
                        f"{shown(available)}; `burnish doctor --recipe` tells of what"
                    )
                if needed <= available:
                    found[key] = size
                if needed > available or size >= caps[key]:
                    is_open.remove(key)
            bar.advance(note=f"{size} at once")
            size *= 2
        # As many look on as are trained at once, and some parts belong to no key.
        while short := [plan for plan in plans(found) if plan.needed > available]:
            keys = [key for plan in short for key in _keys_of(plan) if found[key] > 1]
            if not keys:
                check(short, available)
            found |= {key: found[key] // 2 for key in keys}
    return found


_EVALUATION: tuple[str, ...] = ("evaluation.micro_batch",)


def _keys(stage: str) -> tuple[str, str]:
    return f"stages.{stage}.rollout.micro_batch", f"stages.{stage}.optimizer.micro_batch"


def _keys_of(plan: Plan) -> tuple[str, ...]:
    return _EVALUATION if plan.key == "evaluation" else _keys(plan.stage)


def _caps(config: RunConfig) -> dict[str, int]:
    """Of every micro-batch, how much a process has to do at most."""
    caps: dict[str, int] = dict.fromkeys(_EVALUATION, AT_ONCE)
    for name, stage in config.stages.items():
        samples = own_groups(stage, config.runtime.processes) * stage.rollout.group_size
        looked = stage.guard.num_prompts * stage.guard.num_seeds if stage.guard else 0
        algorithm = with_folders(config, stage, located(".")).algorithm
        states = algorithm.footprint(stage.rollout, 1, may_borrow=False).states
        most = max(samples, looked), samples * max(1, states)
        caps |= dict(zip(_keys(name), most, strict=True))
    return caps


def _needs(plans: Sequence[Plan]) -> dict[str, int]:
    """Bytes of a device in the phases that a micro-batch fills, by its key."""
    found = {}
    for plan in plans:
        for key, phases in zip(_keys_of(plan), (_DRAWING, _TRAINING), strict=False):
            found[key] = max(plan.needed_in(phase) for phase in phases)
    return found
