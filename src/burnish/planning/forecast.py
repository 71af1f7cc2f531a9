"""What every stage of a run, and its evaluation, will need of a device, found before anything large
is loaded.

The model is built with hollow weights, made ready as training makes it ready, and asked as training
asks it (`burnish.planning.dry_run`). Each task is measured with its longest text and its largest
source image, as if all prompts of a batch were like that.
"""

import contextlib
import dataclasses
import math
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch

from burnish import images, runtime
from burnish.activations import GpuPrecision
from burnish.algorithms.base import Footprint
from burnish.config import ConfigError, located
from burnish.evaluation import AT_ONCE
from burnish.planning.dry_run import Counts, Measured, Pictures, measure, measure_drawing, ready
from burnish.planning.parts import (
    copied_parts,
    disk_parts,
    drawing_parts,
    for_all,
    frozen_parts,
    host_parts,
    judge_parts,
    offloaded_parts,
    on_one_device,
    passing_parts,
    picture_bytes,
    trained_parts,
    training_parts,
)
from burnish.planning.plan import Part, Plan, Sharding, check, table
from burnish.policies.base import Policy
from burnish.policy_config import PolicyConfig, set_up
from burnish.precision import DTYPES, choose_dtype
from burnish.prompt_sets import PromptSet
from burnish.prompts import read_prompts, spaced
from burnish.run_config import BASE, RunConfig
from burnish.run_folder import may_borrow, with_folders
from burnish.runtime import Runtime
from burnish.shelves import policy_class
from burnish.training import StageConfig
from burnish.types import Prompt

_SMALL_SHARE = 0.5
"""Of the memory of the machine."""
_SMALL_AREA = 256 * 256
"""Pixels up to which what a state makes of the memory is less than the files of a small model."""
_LOOKED_AT = 500
"""Prompts of a stage, evenly spread, among which the largest is looked for."""
_LIKELIEST = 8
"""Of these, the prompts whose source images have the most bytes."""


def forecast(config: RunConfig, device: str, *, on_machine: int | None = None) -> list[Plan]:
    """The plan of every stage, and of the evaluation.

    Args:
        config: of the run, as `burnish.preflight.check_recipe` passes it; its model must be there,
            its stages need not.
        device: `cuda` or `cpu`, present or not.
        on_machine: processes of a stage that share the memory of one machine; None is all.

    Raises:
        ConfigError: a model or a set of prompts that cannot be read.
    """
    place = torch.device(device)
    rt = Runtime(device=place, dtype=choose_dtype(config.runtime.dtype, place))
    known: dict[Any, Any] = {}
    own = config.runtime
    spread = Sharding(own.processes if own.sharding == "full" else 1)
    together = on_machine or own.processes
    plans = [_plan(config, name, rt, spread, together, known) for name in config.stages]
    return [*plans, _evaluation_plan(config, rt)]


def _plan(
    config: RunConfig,
    name: str,
    rt: Runtime,
    sharding: Sharding,
    on_machine: int,
    known: dict[Any, Any],
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
        is_narrow = rt.dtype != torch.float32

        def made(settings: PolicyConfig) -> Policy[Any, Any]:
            return ready(_hollow(settings, rt), stage.lora, is_autocast=is_narrow)

        kept, gathered = made(config.policy), config.policy.drawing(rt.dtype)
        known[lora] = kept, made(gathered) if sharding.world_size > 1 and is_narrow else kept
    policy, computing = known[lora]
    prompts, away = stage.prompts.read(), stage.rollout
    asked = counts(stage, footprint, config.runtime.processes)
    found: list[Measured] = []
    for task in stage.prompts.tasks:
        worst = largest(spaced(_of_task(prompts, task), _LOOKED_AT))
        key = (lora, asked, worst.text, worst.sources, away.negative_prompt)
        if key not in known:
            known[key] = measure(computing, worst, away.negative_prompt, asked, rt)
        found.append(known[key])
    is_gpu, is_sharded = rt.device.type == "cuda", sharding.world_size > 1
    is_offloaded = config.policy.offload and is_gpu
    host = _there(host_parts(config, stage, footprint, policy, found, sharding))
    if is_gpu:
        host += passing_parts(config, policy, is_sharded=is_sharded)
        # On one machine each process has its own of most.
        host = [for_all(part, on_machine) for part in host]
    parts = [
        *frozen_parts(policy, is_gpu=is_gpu, is_offloaded=is_offloaded, is_sharded=is_sharded),
        *copied_parts(policy, footprint, name),
        *trained_parts(policy, stage, name, is_gpu=is_gpu),
        *drawing_parts(found, len(prompts), f"stages.{name}.rollout"),
        *training_parts(computing, found, name, sharding, _read_together(stage, sharding)),
        *(judge_parts(policy, dict(stage.scorers()).values(), "cuda") if is_gpu else host),
    ]
    return Plan(
        stage=name,
        key=f"stages.{name}",
        device=rt.device.type,
        parts=_there(parts if is_gpu else on_one_device(parts, on_machine, sharding)),
        host=host if is_gpu else [],
        disk=list(disk_parts(policy, stage, footprint)),
        sharding=sharding if is_gpu else Sharding(),
    )


def _evaluation_plan(config: RunConfig, rt: Runtime) -> Plan:
    """Of the jobs that measure: a policy draws, and a judge scores."""
    plan, policy = config.evaluation, _hollow(config.policy.drawing(rt.dtype), rt)
    policy.transformer.requires_grad_(False)
    deployed = [config.deployed(name) for name in (BASE, *config.policies())]
    guidance = max(deployed, key=lambda own: own.scale)
    # Prompts of each task, and pictures of each.
    asked_for = [(plan.num_prompts, plan.num_seeds), (plan.best_of_prompts, plan.best_of)]
    if plan.knowledge is not None:
        asked_for.append((plan.num_knowledge, 1))
    tasks = config.tasks(BASE)
    # Those between two looks of the judge.
    blocks = [(min(count, max(1, AT_ONCE // seeds)), seeds) for count, seeds in asked_for]
    drawn = Pictures(
        pictures=max(min(plan.micro_batch, count * seeds) for count, seeds in blocks),
        picture_prompts=max(
            min(count, math.ceil(min(plan.micro_batch, count * seeds) / seeds) + 1)
            for count, seeds in blocks
        ),
        draw_scale=guidance.scale,
    )
    sets = [read_prompts(located(path)) for path in (plan.prompts, plan.knowledge) if path]
    found = []
    for task in tasks:
        asked = [p for own in sets for p in spaced(_of_task(own, task), _LOOKED_AT)]
        if asked:
            worst = largest(asked)
            found.append(measure_drawing(policy, worst, guidance.negative_prompt, drawn, rt))
    is_gpu = rt.device.type == "cuda"
    size = max(count * seeds for count, seeds in blocks) * picture_bytes(policy)
    host = [
        Part(name="pictures until they are scored", num_bytes=size),
        *offloaded_parts(config, policy),
        *judge_parts(policy, config.judges.values(), "cpu"),
    ]
    if is_gpu:
        host += passing_parts(config, policy)
    read = len(tasks) * sum(count for count, _ in asked_for)
    parts = [
        *frozen_parts(policy, is_gpu=is_gpu, is_offloaded=config.policy.offload and is_gpu),
        *drawing_parts(found, read, "evaluation"),
        *(judge_parts(policy, config.judges.values(), "cuda") if is_gpu else host),
    ]
    return Plan(
        stage="evaluation",
        key="evaluation",
        device=rt.device.type,
        parts=_there(parts),
        host=host if is_gpu else [],
    )


def _there(parts: Iterable[Part]) -> list[Part]:
    """Those of some size."""
    return [part for part in parts if part.num_bytes]


def _hollow(config: PolicyConfig, rt: Runtime) -> Policy[Any, Any]:
    """A policy as `burnish.policy_config.load_policy` makes it, without memory."""
    policy: Any = policy_class(config.family).hollow(
        located(config.path),
        resolution=config.resolution,
        dtype=DTYPES[config.dtype],
        frozen_dtype=DTYPES[config.frozen_dtype or config.dtype],
    )
    set_up(policy, config, GpuPrecision if rt.device.type == "cuda" else contextlib.nullcontext)
    return policy


def _of_task(prompts: PromptSet, task: str) -> PromptSet:
    return prompts.select(lambda prompt: prompt.task == task)


def _read_together(stage: StageConfig, sharding: Sharding) -> int:
    """Prompts that a process reads before it draws."""
    own = own_groups(stage, sharding.world_size)
    if stage.guard is None:
        return own
    kept = stage.guard.retention.num_prompts if stage.guard.retention else 0
    return max(own, len(stage.prompts.tasks) * stage.guard.num_prompts + kept)


def own_groups(stage: StageConfig, processes: int) -> int:
    """Groups of a step that one of the processes draws and trains, at most."""
    return -(-stage.prompts_per_step // processes)


def counts(stage: StageConfig, footprint: Footprint, processes: int = 1) -> Counts:
    """Of the largest micro-batches that a stage can come to in one of its processes."""
    rollout, plan, groups = stage.rollout, stage.optimizer, own_groups(stage, processes)
    samples = groups * rollout.group_size
    block = max(1, rollout.micro_batch // rollout.group_size)
    pictures, prompts = min(rollout.micro_batch, samples), min(block, groups)
    # All processes look at the same.
    looked = footprint.draws
    if stage.guard is not None:
        looked = min(rollout.micro_batch, stage.guard.num_prompts * stage.guard.num_seeds)
    # Signals lie group by group, and an update has its share of every group.
    signals = math.ceil(plan.micro_batch / max(1, footprint.states))
    credited = min(signals, samples)
    trained = min(signals, _of_an_update(rollout.group_size, groups, processes, plan.num_updates))
    own = max(1, rollout.group_size // plan.num_updates)
    return Counts(
        pictures=max(pictures, looked),
        picture_prompts=max(prompts, looked),
        credited=credited * footprint.states,
        credited_prompts=min(math.ceil(credited / rollout.group_size) + 1, groups),
        states=trained * footprint.states,
        state_prompts=min(math.ceil(trained / own) + 1, trained, groups),
        draw_scale=footprint.draw_scale,
        credit_scale=footprint.credit_scale,
        trains_null=stage.algorithm.trains_null,
    )


def _of_an_update(size: int, groups: int, processes: int, num_updates: int) -> int:
    """Signals of the largest update of a process: every group of a step is dealt out from one
    update on, the next group from the next one on, and each process has one group in turn."""
    return max(
        sum(
            -(-(size - (number - place * processes) % num_updates) // num_updates)
            for place in range(groups)
        )
        for number in range(num_updates)
    )


def largest(prompts: Sequence[Prompt]) -> Prompt:
    """A prompt with the longest text of all, and the largest source images."""
    longest = max(prompts, key=lambda prompt: len(prompt.text))
    with_sources = {prompt.sources: prompt for prompt in prompts if prompt.sources}
    if not with_sources:
        return longest
    likeliest = sorted(with_sources, key=lambda some: sum(map(len, some)))[-_LIKELIEST:]
    widest = max((with_sources[some] for some in likeliest), key=_source_area)
    return dataclasses.replace(longest, sources=widest.sources)


def _source_area(prompt: Prompt) -> int:
    """Pixels of all source images of a prompt."""
    return sum(
        math.prod(images.decode(one, where=f"source of prompt {prompt.id!r}").size)
        for one in prompt.sources
    )


def memory_beside(device: torch.device) -> int | None:
    """Bytes of the machine's memory beside a GPU; None where that is the device, or unknown."""
    return runtime.memory(runtime.ALONE.device) if device.type == "cuda" else None


def check_memory(config: RunConfig) -> None:
    """Raise, with the plan on stderr, where a run needs more than its device has, unless it is told
    to start nevertheless.

    Raises:
        ConfigError: it does.
    """
    device = runtime.choose_device(config.runtime.device)
    # Each process has a GPU: where there are fewer, the others are on other machines.
    gpus = torch.cuda.device_count() if device.type == "cuda" else config.runtime.processes
    available = runtime.memory(device) if config.runtime.check_memory else None
    if available is None or (device.type == "cpu" and _is_small(config, available)):
        return
    plans = forecast(config, device.type, on_machine=min(gpus, config.runtime.processes))
    beside = memory_beside(device)
    try:
        check(plans, available, beside)
    except ConfigError:
        for plan in plans:
            if plan.shortage(available) or (beside and plan.host_shortage(beside)):
                print(table(plan, available), file=sys.stderr)
        raise


def _is_small(config: RunConfig, available: int) -> bool:
    """Whether every state that is drawn or trained at once might weigh as much as all the files of
    the model, many times what it does where pictures are small, and still a part of the memory
    would do."""
    folder = located(config.policy.path)
    size = sum(file.stat().st_size for file in folder.glob("*/*.safetensors"))
    states = [max(s.rollout.micro_batch, s.optimizer.micro_batch) for s in config.stages.values()]
    most = max(*states, min(config.evaluation.micro_batch, AT_ONCE))
    is_light = config.runtime.processes * size * most < _SMALL_SHARE * available
    return is_light and _widest(config) <= _SMALL_AREA


def _widest(config: RunConfig) -> int:
    """Pixels of the largest picture that is drawn, or of all sources that a prompt brings."""
    found, plan = [config.policy.buckets.largest.area], config.evaluation
    sets = {f"stages.{name}.prompts": stage.prompts.read for name, stage in config.stages.items()}
    for key, path in (("prompts", plan.prompts), ("knowledge", plan.knowledge)):
        if path is not None:
            sets[f"evaluation.{key}"] = partial(read_prompts, located(path))
    for key, read in sets.items():
        try:
            if looked := spaced(read(), _LOOKED_AT):
                found.append(_source_area(largest(looked)))
        except (ConfigError, images.ImageError) as error:
            raise ConfigError(f"{key}: {error}") from None
    return max(found)
