"""The parts of a plan: everything of a policy, a stage and its judges that needs memory or disk.

What calls of the policy hold was measured by `burnish.planning.dry_run`; the rest is counted here.
"""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from burnish.activations import num_bytes, weights
from burnish.algorithms.base import Footprint
from burnish.config import ConfigError, located
from burnish.headers import stored_bytes
from burnish.optimization import CHECKPOINTS, state_bytes
from burnish.planning.dry_run import Drawn, Measured
from burnish.planning.plan import PHASES, PROCESS_BYTES, Part, Phase, Sharding
from burnish.policies.base import Policy
from burnish.policies.parts.reading import MEMORY_BYTES
from burnish.rewards.base import DeviceKind, RewardConfig
from burnish.run_config import RunConfig
from burnish.sharded_checkpoint import FILE_BYTES
from burnish.training import StageConfig

_RUNNING: tuple[Phase, ...] = PHASES[1:-1]
"""Between the first and the last moment of a stage."""
_FIELDS = 5
"""Latents that a state carries, at most: itself, and what it is compared with."""


def frozen_parts(
    policy: Policy[Any, Any], *, is_gpu: bool, is_offloaded: bool, is_sharded: bool = False
) -> Iterator[Part]:
    """All of a policy that has weights."""
    kinds: dict[str, list[Tensor]] = {}
    for parameter in policy.transformer.parameters():
        kind = "trained" if parameter.requires_grad else "frozen"
        kinds.setdefault(f"{kind} ({_type(parameter)})", []).append(parameter)
    for kind, tensors in kinds.items():
        yield Part(name=f"transformer, {kind}", num_bytes=num_bytes(tensors), is_sharded=True)
    if is_sharded and is_gpu:
        size = max(map(num_bytes, _blocks(policy)), default=0)
        yield Part(name="a block, until it is spread", num_bytes=size, during=("loading",))
    elif is_sharded:
        size = num_bytes(policy.transformer.parameters())
        name = "all weights, until they are spread"
        yield Part(name=name, num_bytes=size, during=("loading",))
    yield Part(name="transformer, buffers", num_bytes=num_bytes(policy.transformer.buffers()))
    for key, network in _others(policy).items():
        during: tuple[Phase, ...] = PHASES
        if is_offloaded:
            during = ("reading", "decoding") if key == "vae" else ("reading",)
        size = num_bytes(weights(network))
        kind = _type(next(network.parameters()))
        yield Part(name=f"{key} ({kind})", num_bytes=size, during=during)


def copied_parts(policy: Policy[Any, Any], footprint: Footprint, name: str) -> Iterator[Part]:
    """Further copies of its transformer."""
    base = _rounded_bytes(policy)
    for copy in footprint.copies:
        advice = f"set stages.{name}.algorithm.kl_weight=0" if "kl_weight" in copy else ""
        yield Part(name=copy, num_bytes=base, is_sharded=True, advice=advice)


def trained_parts(
    policy: Policy[Any, Any], stage: StageConfig, name: str, *, is_gpu: bool
) -> Iterator[Part]:
    """What training keeps of the weights that it changes."""
    trained = [parameter for _, parameter in policy.trainable()]
    size = num_bytes(trained)
    advice = f"train a LoRA, stages.{name}.lora={{rank: 32}}, or take more devices"
    if stage.lora is not None:
        advice = f"lower stages.{name}.lora.rank, or take more devices"

    def part(what: str, num_bytes: int, *during: Phase) -> Part:
        return Part(
            name=what,
            num_bytes=num_bytes,
            during=during or PHASES,
            is_sharded=True,
            advice=advice,
        )

    yield part("optimizer state", state_bytes(trained, stage.optimizer.kind))
    if stage.optimizer.ema_decay > 0:
        yield part("average (ema_decay)", size)
    yield part("gradients", size, "update", "optimizer step")
    yield part("copy that proves that weights move", size, "optimizer step")
    if is_gpu:
        # On a GPU torch updates all weights in one pass, with one more list of tensors.
        yield part("optimizer's own working memory", size, "optimizer step")


def _most(found: Sequence[Drawn], field: str) -> int:
    """Of the task that needs most."""
    return max((getattr(drawn, field) for drawn in found), default=0)


def drawing_parts(found: Sequence[Drawn], num_prompts: int, key: str) -> Iterator[Part]:
    """What calls of the policy hold that draw a micro-batch, set at a key of the recipe."""
    advice = f"lower {key}.micro_batch"
    # For an edit, what guidance leads away from has the source image, too.
    kept = min(MEMORY_BYTES, 2 * num_prompts * _most(found, "row"))
    yield Part(name="prompts that were read", num_bytes=kept)
    yield Part(name="reading a prompt", num_bytes=_most(found, "reading"), during=("reading",))
    rows: tuple[tuple[str, str, tuple[Phase, ...]], ...] = (
        ("prefix", "prefix", ("drawing", "decoding")),
        ("drawing a micro-batch", "drawing", ("drawing",)),
        ("decoding its pictures", "decoding", ("decoding",)),
    )
    for what, field, during in rows:
        yield Part(name=what, num_bytes=_most(found, field), during=during, advice=advice)


def training_parts(
    policy: Policy[Any, Any],
    found: Sequence[Measured],
    name: str,
    sharding: Sharding,
    num_prompts: int,
) -> Iterator[Part]:
    """What calls of the policy hold that train it; `num_prompts` are read together."""
    advice = f"lower stages.{name}.optimizer.micro_batch"
    fewer = f"train a LoRA, stages.{name}.lora={{rank: 32}}, with policy.dtype=bfloat16"
    rows: tuple[tuple[str, str, Phase, str], ...] = (
        ("velocities without gradient", "crediting", "credit", advice),
        ("copies of weights in another type", "copies", "update", ""),
        ("activations, forward and backward", "updating", "update", advice),
    )
    for what, field, phase, lower in rows:
        yield Part(name=what, num_bytes=_most(found, field), during=(phase,), advice=lower)
    if sharding.world_size > 1:
        whole = num_bytes(policy.transformer.parameters())
        during: tuple[Phase, ...] = ("drawing", "decoding", "credit")
        if 2 * num_prompts * _most(found, "row") > MEMORY_BYTES:
            # What is not remembered is read again, beside them.
            during = ("reading", *during)
        yield Part(name="all weights, gathered", num_bytes=whole, during=during, advice=fewer)
        yield Part(
            name="gathered blocks, gradients of one",
            num_bytes=_block_bytes(policy),
            during=("update",),
        )


def host_parts(
    config: RunConfig,
    stage: StageConfig,
    footprint: Footprint,
    policy: Policy[Any, Any],
    found: Sequence[Measured],
    sharding: Sharding,
) -> Iterator[Part]:
    """What stays in the memory of the machine, which is the device where there is no GPU."""
    samples = stage.prompts_per_step * stage.rollout.group_size
    latents = _most(found, "latents")
    states = latents * _FIELDS * (stage.rollout.num_kept + footprint.states)
    step = samples * ((picture_bytes(policy) if stage.rewards else 0) + states)
    name = "pictures and states of a step"
    yield Part(name=name, num_bytes=step, during=_RUNNING, is_common=True)
    size = footprint.copies_read_ahead * _rounded_bytes(policy)
    ahead = Part(
        name="teacher that is read ahead", num_bytes=size, during=PHASES[1:], is_sharded=True
    )
    yield dataclasses.replace(ahead, num_bytes=sharding.share(ahead), is_sharded=False)
    if sharding.world_size > 1:
        # A tensor is a file's at least, which is copied from the device and put together.
        size = 3 * max(FILE_BYTES, max(p.nbytes for p in policy.transformer.parameters()))
        name = "file of a checkpoint, until it is written"
        yield Part(name=name, num_bytes=size, during=("optimizer step",))
    else:
        name, size = "checkpoint, until it is written", _checkpoint_bytes(policy, stage)
        yield Part(name=name, num_bytes=size, during=("optimizer step",), is_common=True)
    # What was trained is mapped from its file.
    again = _converted(config, _others(policy))
    name = "pipeline that is read again"
    yield Part(name=name, num_bytes=again, during=("last look",), is_common=True)
    yield from offloaded_parts(config, policy)
    yield from judge_parts(policy, dict(stage.scorers()).values(), "cpu")


def picture_bytes(policy: Policy[Any, Any]) -> int:
    """Of the largest that a policy draws, as it waits for its scores."""
    return 3 * 4 * policy.buckets.largest.area


def passing_parts(
    config: RunConfig, policy: Policy[Any, Any], *, is_sharded: bool = False
) -> Iterator[Part]:
    """What is in the machine's memory on its way to a GPU and back, and what every process is."""
    passing = {"transformer": policy.transformer} if config.policy.offload else policy.networks()
    name = "pipeline on its way to the device"
    size = _converted(config, passing)
    # One process after another reads its own.
    yield Part(name=name, num_bytes=size, during=("loading",), is_common=True)
    if is_sharded:
        whole = num_bytes(policy.transformer.parameters())
        name = "transformer, gathered to be written"
        yield Part(name=name, num_bytes=whole, during=("last look",), is_common=True)
    yield Part(name="the process itself", num_bytes=PROCESS_BYTES["cpu"])


def offloaded_parts(config: RunConfig, policy: Policy[Any, Any]) -> Iterator[Part]:
    """What waits beside the device to visit it."""
    if config.policy.offload:
        size = num_bytes(weights(*_others(policy).values()))
        yield Part(name="encoders and VAE, while they are not used", num_bytes=size)


def judge_parts(
    policy: Policy[Any, Any], rewards: Iterable[RewardConfig], device: DeviceKind
) -> Iterator[Part]:
    """What answers on a device; rewards with one judge share it."""
    judges: dict[str, int] = {}
    for reward in (reward for reward in rewards if reward.runs_on == device):
        for key, size in reward.footprint(policy.resolution).items():
            judges[key] = max(size, judges.get(key, 0))
    advice = "set its device=cpu, or have it answer from a server" if device == "cuda" else ""
    for key, size in judges.items():
        yield Part(name=key, num_bytes=size, advice=advice)


def for_all(part: Part, count: int) -> Part:
    """A part of one process, for all that have it."""
    if count == 1 or part.is_common:
        return part
    return dataclasses.replace(
        part, name=f"{part.name}, {count} times", num_bytes=count * part.num_bytes
    )


def on_one_device(parts: Iterable[Part], count: int, sharding: Sharding) -> list[Part]:
    """What that many processes have on a device that all of them share, as they do a CPU."""
    others = (count - 1) * PROCESS_BYTES["cpu"]
    found = [
        # All shares of a part are the whole.
        dataclasses.replace(part, is_sharded=False)
        if part.is_sharded and sharding.world_size > 1
        else for_all(part, count)
        for part in parts
    ]
    if count == 1:
        return found
    found.append(Part(name="the other processes themselves", num_bytes=others))
    # More of them would need more.
    advice = "take a machine with more memory, or fewer processes (runtime.processes)"
    return [part if part.advice else dataclasses.replace(part, advice=advice) for part in found]


def disk_parts(
    policy: Policy[Any, Any], stage: StageConfig, footprint: Footprint
) -> Iterator[Part]:
    """What a stage writes."""
    size = num_bytes(parameter for _, parameter in policy.trainable())
    # One more while it is written.
    every = (CHECKPOINTS + 1) * _checkpoint_bytes(policy, stage)
    yield Part(name=f"{CHECKPOINTS + 1} checkpoints", num_bytes=every)
    if stage.guard is not None or footprint.draws:
        # The best so far, and the best as it was at each checkpoint.
        best = CHECKPOINTS + 1
        yield Part(name=f"weights of the best looks, at most {best}", num_bytes=best * size)
    whole = _base_bytes(policy) + num_bytes(weights(*_others(policy).values()))
    yield Part(name="trained pipeline", num_bytes=whole)


def _checkpoint_bytes(policy: Policy[Any, Any], stage: StageConfig) -> int:
    """Of one: what is trained, its average, and the optimizer's state."""
    trained = [parameter for _, parameter in policy.trainable()]
    count = 2 if stage.optimizer.ema_decay > 0 else 1
    return count * num_bytes(trained) + state_bytes(trained, stage.optimizer.kind)


def _others(policy: Policy[Any, Any]) -> dict[str, nn.Module]:
    """The frozen networks: encoders and VAE."""
    return {key: part for key, part in policy.networks().items() if key != "transformer"}


def _converted(config: RunConfig, networks: Mapping[str, nn.Module]) -> int:
    """Bytes of networks that are read into another type than that of their files. The others are
    mapped from their files, and such memory is given back where it is wanted."""
    total = 0
    for key, network in networks.items():
        stored = _stored(config, key)
        for dtype, own in _by_type(_saved(network)).items():
            total += max(0, num_bytes(own) - stored[dtype])
    return total


def _stored(config: RunConfig, key: str) -> Counter[torch.dtype]:
    with contextlib.suppress(ConfigError):
        return stored_bytes(located(config.policy.path) / key)
    return Counter()


def _saved(network: nn.Module) -> Iterator[Tensor]:
    """What a network's files hold: no LoRA, and no buffers that are computed anew."""
    saved = network.state_dict().keys()
    yield from _base(network)
    yield from (buffer for name, buffer in network.named_buffers() if name in saved)


def _base(network: nn.Module) -> list[nn.Parameter]:
    """Of a network without a LoRA, beside which all else is frozen."""
    frozen = [p for p in network.parameters() if not p.requires_grad]
    return frozen or list(network.parameters())


def _by_type(tensors: Iterable[Tensor]) -> dict[torch.dtype, list[Tensor]]:
    found: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.dtype, []).append(tensor)
    return found


def _base_bytes(policy: Policy[Any, Any]) -> int:
    """Of the transformer without a LoRA."""
    return num_bytes(_base(policy.transformer))


def _rounded_bytes(policy: Policy[Any, Any]) -> int:
    """Likewise, as policies are that stand frozen beside it."""
    return _base_bytes(policy) * policy.frozen_dtype.itemsize // policy.dtype.itemsize


def _block_bytes(policy: Policy[Any, Any]) -> int:
    """Of what is gathered in an update, its gradient likewise, and that in float32 as it is added
    up: the largest block, with the next one gathered already, and what is outside of all blocks."""
    *blocks, outside = _blocks(policy)
    return _gathered_bytes(outside) + max(
        (num_bytes(own) + _gathered_bytes(own) for own in blocks), default=0
    )


def _gathered_bytes(weights: Sequence[Tensor]) -> int:
    return 2 * num_bytes(weights) + sum(4 * weight.numel() for weight in weights)


def _blocks(policy: Policy[Any, Any]) -> list[list[nn.Parameter]]:
    """The weights of every block, and last those outside of all blocks, which are spread
    together."""
    kinds = policy.block_classes
    blocks = [part for part in policy.transformer.modules() if type(part).__name__ in kinds]
    found = [list(block.parameters()) for block in blocks]
    inside = {id(weight) for own in found for weight in own}
    return [*found, [p for p in policy.transformer.parameters() if id(p) not in inside]]


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
