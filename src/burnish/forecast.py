"""What every stage of a run, and its evaluation, will need of a device, found before anything large
is loaded.

The model is built with hollow weights, made ready as training makes it ready, and asked as training
asks it (`burnish.dry_run`). Each task is measured with its longest text and its largest source
image, as if all prompts of a batch were like that.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from burnish import images
from burnish.activations import num_bytes, weights
from burnish.algorithms.base import Footprint
from burnish.config import located
from burnish.dry_run import Counts, Drawing, Drawn, Measured, measure, measure_drawing, ready
from burnish.evaluation import AT_ONCE
from burnish.optimization import CHECKPOINTS, state_bytes
from burnish.planning import PHASES, Part, Phase, Plan, Sharding
from burnish.policies.base import Policy
from burnish.policies.parts.reading import MEMORY_BYTES
from burnish.prompt_sets import PromptSet
from burnish.prompts import read_prompts, spaced
from burnish.rewards.base import RewardConfig
from burnish.run_config import BASE, RunConfig
from burnish.runtime import DTYPES, Runtime, choose_dtype
from burnish.shelves import PolicyConfig, policy_class
from burnish.stages import may_borrow, with_folders
from burnish.training import StageConfig
from burnish.types import Prompt

_LOOKED_AT = 500
"""Prompts of a stage, evenly spread, among which the largest is looked for."""
_LIKELIEST = 8
"""Of these, the prompts whose source images have the most bytes."""
_FIELDS = 5
"""Latents that a state carries, at most: itself, and what it is compared with."""


def forecast(config: RunConfig, device: str, sharding: Sharding | None = None) -> list[Plan]:
    """The plan of every stage, and of the evaluation.

    Args:
        config: of the run; its model must be there, its stages need not.
        device: `cuda` or `cpu`, present or not.
        sharding: over how many devices; None is as the run says.

    Raises:
        ConfigError: a model or a set of prompts that cannot be read.
    """
    place = torch.device(device)
    rt = Runtime(device=place, dtype=choose_dtype(config.runtime.dtype, place))
    known: dict[Any, Any] = {}
    own = config.runtime
    spread = sharding or Sharding(own.processes if own.sharding == "full" else 1)
    plans = [_plan(config, name, rt, spread, known) for name in config.stages]
    return [*plans, _evaluation_plan(config, rt)]


def _plan(
    config: RunConfig, name: str, rt: Runtime, sharding: Sharding, known: dict[Any, Any]
) -> Plan:
    """The plan of one stage; `known` is what was measured for others."""
    stage = with_folders(config, config.stages[name], located("."))
    footprint = stage.algorithm.footprint(
        stage.rollout,
        stage.optimizer.micro_batch,
        may_borrow=may_borrow(config, stage, located(".")) and sharding.world_size == 1,
    )
    lora = None if stage.lora is None else stage.lora.model_dump_json()
    if lora not in known:
        known[lora] = ready(_hollow(config.policy), stage.lora)
    policy: Policy[Any, Any] = known[lora]
    prompts, asked, away = stage.prompts.read(), counts(stage, footprint), stage.rollout
    found: list[Measured] = []
    for task in stage.prompts.tasks:
        worst = largest(spaced(_of_task(prompts, task), _LOOKED_AT))
        key = (lora, asked, worst.text, worst.sources, away.negative_prompt)
        if key not in known:
            known[key] = measure(policy, worst, away.negative_prompt, asked, rt)
        found.append(known[key])
    is_gpu = rt.device.type == "cuda"
    host = [part for part in _host_parts(config, stage, footprint, policy, found) if part.num_bytes]
    if is_gpu:
        # On one machine each process has its own of most.
        count = max(config.runtime.processes, sharding.world_size)
        host = [_for_all(part, count) for part in host]
    parts = [
        *_frozen_parts(policy, is_offloaded=config.policy.offload and is_gpu),
        *_copied_parts(policy, footprint, name),
        *_trained_parts(policy, stage, name, is_gpu=is_gpu),
        *_drawing_parts(found, len(prompts), f"stages.{name}.rollout"),
        *_training_parts(policy, found, name, sharding),
        *([] if is_gpu else host),
    ]
    return Plan(
        stage=name,
        key=f"stages.{name}",
        device=rt.device.type,
        parts=[part for part in parts if part.num_bytes],
        host=host if is_gpu else [],
        disk=list(_disk_parts(policy, stage, footprint)),
        sharding=sharding,
    )


def _evaluation_plan(config: RunConfig, rt: Runtime) -> Plan:
    """Of the jobs that measure: a policy draws, and a judge scores."""
    plan, policy = config.evaluation, _hollow(config.policy)
    policy.transformer.requires_grad_(False)
    deployed = [config.deployed(name) for name in (BASE, *config.policies())]
    guidance = max(deployed, key=lambda own: own.scale)
    # The knowledge set has a picture for each prompt.
    seeds = plan.num_seeds if plan.knowledge is None else 1
    pictures = min(plan.micro_batch, AT_ONCE)
    drawn = Drawing(
        pictures=pictures,
        picture_prompts=min(pictures, math.ceil(pictures / seeds) + 1),
        draw_scale=guidance.scale,
    )
    sets = [read_prompts(located(path)) for path in (plan.prompts, plan.knowledge) if path]
    found = []
    for task in config.tasks(BASE):
        asked = [p for own in sets for p in spaced(_of_task(own, task), _LOOKED_AT)]
        if asked:
            worst = largest(asked)
            found.append(measure_drawing(policy, worst, guidance.negative_prompt, drawn, rt))
    is_gpu = rt.device.type == "cuda"
    host = [*_offloaded_parts(config, policy), *_judge_parts(policy, [config.judge])]
    parts = [
        *_frozen_parts(policy, is_offloaded=config.policy.offload and is_gpu),
        *_drawing_parts(found, plan.num_prompts, "evaluation"),
        *([] if is_gpu else host),
    ]
    return Plan(
        stage="evaluation",
        key="evaluation",
        device=rt.device.type,
        parts=[part for part in parts if part.num_bytes],
        host=host if is_gpu else [],
    )


def _hollow(config: PolicyConfig) -> Policy[Any, Any]:
    """A policy as `burnish.shelves.load_policy` makes it, without memory."""
    policy: Any = policy_class(config.family).hollow(
        located(config.path),
        resolution=config.resolution,
        dtype=DTYPES[config.dtype],
        frozen_dtype=DTYPES[config.frozen_dtype or config.dtype],
    )
    policy.buckets, policy.share_prefix = config.buckets, config.share_prefix
    if config.checkpointing:
        policy.transformer.enable_gradient_checkpointing()
    return policy


def _of_task(prompts: PromptSet, task: str) -> PromptSet:
    return prompts.select(lambda prompt: prompt.task == task)


def counts(stage: StageConfig, footprint: Footprint) -> Counts:
    """Of the largest micro-batches that a stage can come to."""
    rollout, plan = stage.rollout, stage.optimizer
    samples = stage.prompts_per_step * rollout.group_size
    block = max(1, rollout.micro_batch // rollout.group_size)
    pictures, prompts = min(rollout.micro_batch, samples), min(block, stage.prompts_per_step)
    looked = footprint.draws
    if stage.guard is not None:
        looked = min(rollout.micro_batch, stage.guard.num_prompts * stage.guard.num_seeds)
    # Signals lie group by group, and an update has its share of every group.
    signals = math.ceil(plan.micro_batch / max(1, footprint.states))
    credited = min(signals, samples)
    trained = min(signals, math.ceil(samples / plan.num_updates))
    own = max(1, rollout.group_size // plan.num_updates)
    return Counts(
        pictures=max(pictures, looked),
        picture_prompts=max(prompts, looked),
        credited=credited * footprint.states,
        credited_prompts=min(math.ceil(credited / rollout.group_size) + 1, stage.prompts_per_step),
        states=trained * footprint.states,
        state_prompts=min(math.ceil(trained / own) + 1, trained, stage.prompts_per_step),
        draw_scale=footprint.draw_scale,
        credit_scale=footprint.credit_scale,
        trains_null=footprint.trains_null,
    )


def largest(prompts: Sequence[Prompt]) -> Prompt:
    """A prompt with the longest text of all, and the largest source images."""
    longest = max(prompts, key=lambda prompt: len(prompt.text))
    sources = {prompt.sources: prompt.id for prompt in prompts if prompt.sources}
    if not sources:
        return longest
    likeliest = sorted(sources, key=lambda some: sum(map(len, some)))[-_LIKELIEST:]

    def area(some: tuple[bytes, ...]) -> int:
        return sum(math.prod(images.decode(one, where=sources[some]).size) for one in some)

    return dataclasses.replace(longest, sources=max(likeliest, key=area))


def _frozen_parts(policy: Policy[Any, Any], *, is_offloaded: bool) -> Iterator[Part]:
    """All of a policy that has weights."""
    kinds: dict[str, list[Tensor]] = {}
    for parameter in policy.transformer.parameters():
        kind = "trained" if parameter.requires_grad else "frozen"
        kinds.setdefault(f"{kind} ({_type(parameter)})", []).append(parameter)
    for kind, tensors in kinds.items():
        yield Part(name=f"transformer, {kind}", num_bytes=num_bytes(tensors), is_sharded=True)
    yield Part(name="transformer, buffers", num_bytes=num_bytes(policy.transformer.buffers()))
    for key, network in _others(policy).items():
        during: tuple[Phase, ...] = PHASES
        if is_offloaded:
            during = ("reading", "decoding") if key == "vae" else ("reading",)
        size = num_bytes(weights(network))
        kind = _type(next(network.parameters()))
        yield Part(name=f"{key} ({kind})", num_bytes=size, during=during)


def _copied_parts(policy: Policy[Any, Any], footprint: Footprint, name: str) -> Iterator[Part]:
    """Further copies of its transformer."""
    base = _base_bytes(policy) * policy.frozen_dtype.itemsize // policy.dtype.itemsize
    for copy in footprint.copies:
        advice = f"set stages.{name}.algorithm.kl_weight=0" if "kl_weight" in copy else ""
        yield Part(name=copy, num_bytes=base, advice=advice)


def _trained_parts(
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


def _drawing_parts(found: Sequence[Drawn], num_prompts: int, key: str) -> Iterator[Part]:
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


def _training_parts(
    policy: Policy[Any, Any], found: Sequence[Measured], name: str, sharding: Sharding
) -> Iterator[Part]:
    """What calls of the policy hold that train it."""
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
        during = ("reading", "drawing", "decoding", "credit")
        yield Part(name="all weights, gathered", num_bytes=whole, during=during, advice=fewer)
        yield Part(name="gathered block", num_bytes=_largest_block(policy), during=("update",))


def _host_parts(
    config: RunConfig,
    stage: StageConfig,
    footprint: Footprint,
    policy: Policy[Any, Any],
    found: Sequence[Measured],
) -> Iterator[Part]:
    """What stays in the memory of the machine, which is the device where there is no GPU."""
    samples = stage.prompts_per_step * stage.rollout.group_size
    latents = _most(found, "latents")
    picture = 3 * 4 * policy.buckets.largest.area
    states = latents * _FIELDS * (stage.rollout.num_kept + footprint.states)
    step = samples * (picture + states)
    yield Part(name="pictures and states of a step", num_bytes=step, is_common=True)
    ahead = footprint.copies_read_ahead * _base_bytes(policy)
    yield Part(name="teacher that is read ahead", num_bytes=ahead)
    # Training compares the end with it, to tell whether anything was learnt.
    base, frozen = _base_bytes(policy), num_bytes(weights(*_others(policy).values()))
    yield Part(name="copy of the start", num_bytes=base, is_common=True)
    yield Part(
        name="pipeline that is read again",
        num_bytes=base + frozen,
        during=("last look",),
        is_common=True,
    )
    yield from _offloaded_parts(config, policy)
    yield from _judge_parts(policy, _rewards(stage))


def _offloaded_parts(config: RunConfig, policy: Policy[Any, Any]) -> Iterator[Part]:
    if config.policy.offload:
        size = num_bytes(weights(*_others(policy).values()))
        yield Part(name="encoders and VAE, while they are not used", num_bytes=size)


def _judge_parts(policy: Policy[Any, Any], rewards: Iterable[RewardConfig]) -> Iterator[Part]:
    """What answers on the CPU; rewards with one judge share it."""
    judges: dict[str, int] = {}
    for reward in rewards:
        for key, size in reward.footprint(policy.resolution).items():
            judges[key] = max(size, judges.get(key, 0))
    for key, size in judges.items():
        yield Part(name=key, num_bytes=size)


def _for_all(part: Part, count: int) -> Part:
    """A part of one process, for all that have it."""
    if count == 1 or part.is_common:
        return part
    return dataclasses.replace(
        part, name=f"{part.name}, {count} times", num_bytes=count * part.num_bytes
    )


def _rewards(stage: StageConfig) -> list[RewardConfig]:
    guard = stage.guard
    return [*stage.rewards.values(), *([guard.judge, *guard.others.values()] if guard else ())]


def _disk_parts(
    policy: Policy[Any, Any], stage: StageConfig, footprint: Footprint
) -> Iterator[Part]:
    trained = [parameter for _, parameter in policy.trainable()]
    size = num_bytes(trained)
    one = (
        size
        + state_bytes(trained, stage.optimizer.kind)
        + (size if stage.optimizer.ema_decay > 0 else 0)
    )
    # One more while it is written.
    yield Part(name=f"{CHECKPOINTS + 1} checkpoints", num_bytes=(CHECKPOINTS + 1) * one)
    if stage.guard is not None or footprint.draws:
        # The best so far, and the best as it was at each checkpoint.
        best = CHECKPOINTS + 1
        yield Part(name=f"weights of the best looks, at most {best}", num_bytes=best * size)
    whole = _base_bytes(policy) + num_bytes(weights(*_others(policy).values()))
    yield Part(name="trained pipeline", num_bytes=whole)


def _others(policy: Policy[Any, Any]) -> dict[str, nn.Module]:
    """The frozen networks: encoders and VAE."""
    return {key: part for key, part in policy.networks().items() if key != "transformer"}


def _base_bytes(policy: Policy[Any, Any]) -> int:
    """Of the transformer without a LoRA, beside which all else is frozen."""
    frozen = [p for p in policy.transformer.parameters() if not p.requires_grad]
    return num_bytes(frozen or policy.transformer.parameters())


def _largest_block(policy: Policy[Any, Any]) -> int:
    kinds = policy.block_classes
    blocks = [part for part in policy.transformer.modules() if type(part).__name__ in kinds]
    return max((num_bytes(block.parameters()) for block in blocks), default=0)


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
