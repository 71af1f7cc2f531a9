"""What can be known before a run: whether its inputs can be read, and whether the machine works.

A run takes minutes to days, so whatever would stop it later is looked for first. Bad input is
refused before a file is written; a finding about the machine comes with what to do about it.
"""

import contextlib
import importlib.metadata
import platform
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from burnish import __version__, images, rollout, runtime, vision_build
from burnish.adapters import read_adapter
from burnish.bench.base import BenchConfig
from burnish.config import ConfigError, located, nearest
from burnish.forecast import check_memory
from burnish.guard import held_out
from burnish.pipeline_folders import (
    INDEX,
    check_kin,
    check_parts,
    check_targets,
    check_there,
)
from burnish.policies.base import Policy
from burnish.progress import track
from burnish.prompts import GroupSampler, PromptsConfig, read_prompts, spaced
from burnish.rewards.base import EVERY_CATEGORY, RewardConfig, check_weights
from burnish.rewards.oracle import OracleConfig
from burnish.run_config import STAGE, RunConfig
from burnish.sharding import check_prefix
from burnish.shelves import PolicyConfig, check_kernels, family_of, load_policy, policy_class
from burnish.training import StageConfig
from burnish.types import Guidance, Prompt

_GIBIBYTE = 1 << 30
_LEAST_DISK = 1.0  # GiB; a run of the miniature leaves a tenth of it.
_LOOKED_AT = 500
"""Prompts of a set whose images are decoded; `burnish prompts check` decodes all."""
_PACKAGES = ("diffusers", "transformers", "peft", "safetensors", "pillow", "numpy")


def check_inputs(config: RunConfig, jobs: Collection[str] | None = None) -> None:
    """Read what the jobs of a run will read, and whether this machine can do them.

    Args:
        config: of the run.
        jobs: that are left to do; None is all of them.

    Raises:
        ConfigError: what `check_recipe` raises, a judge that does not answer, an image of a prompt
            that cannot be used among those looked at, or too little memory.
    """
    check_recipe(config)
    check_places(config, runtime.choose_device(config.runtime.device).type)
    _check_judges(config, config.jobs() if jobs is None else jobs)
    check_memory(config)
    # Last, as it takes longest.
    _look_at_images(config)


def check_recipe(config: RunConfig) -> None:
    """Read all but pictures that the jobs of a run will read, on any machine.

    Raises:
        ConfigError: a missing model or judge, a broken prompt set, too few prompts for a step, a
            prompt with more source images than the family reads.
    """
    for key, path in _models(config).items():
        check_there(key, path)
        with _under(key):
            check_parts(located(path))
    _check_family(config)
    family = policy_class(config.policy.family)
    for key, path in _sets(config):
        with _under(key):
            every = read_prompts(located(path)).entries
            family.check_sources([entry for entry in every if entry.task in family.tasks])
    _check_apart(config)
    _check_facts(config)
    for name, stage in config.stages.items():
        _check_prompts(name, stage, family)
        _check_adapters(name, stage)
        stage.optimizer.check(f"stages.{name}", is_sharded=config.runtime.sharding == "full")
        if config.runtime.sharding == "full":
            check_prefix(
                family,
                share=config.policy.share_prefix,
                trains_null=stage.algorithm.trains_null,
                where=f"stages.{name}.",
            )
        if stage.lora is not None and stage.lora.targets is not None:
            base = located(config.policy.path)
            check_targets(f"stages.{name}.lora", stage.lora.targets, base)
    for key, path in _models(config).items():
        check_kin(key, located(path), located(config.policy.path))
    for key, reward in config.scorers():
        with _under(key):
            reward.check()
    for name, bench in config.benches.items():
        _check_bench(f"benches.{name}", bench)


@contextlib.contextmanager
def _under(key: str) -> Iterator[None]:
    """What is refused inside is told with the key that names it in a recipe."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None


def check_places(config: RunConfig, device: str) -> None:
    """Look whether rewards want to be where the run is: they share its devices and its plan.

    Args:
        config: of the run.
        device: of the run, `cuda` or `cpu`.

    Raises:
        ConfigError: one wants to be on a GPU, and the run is on none.
    """
    for key, reward in config.scorers():
        if reward.place == "cuda" and device != "cuda":
            raise ConfigError(
                f"{key}: need a run on a GPU for device=cuda, got one on a {device}; set "
                f"{key}.device=cpu, or runtime.device=cuda where there is a GPU"
            )


def _check_judges(config: RunConfig, jobs: Collection[str]) -> None:
    """Ask every judge that is elsewhere and will be needed; many dimensions may share one."""
    measures = any(job.startswith("measure/") for job in jobs)
    needed: dict[str, tuple[str, RewardConfig]] = {}
    for key, reward in config.scorers():
        section, *path = key.split(".")
        is_needed = measures
        if section == "stages":
            is_needed = not {f"train/{path[0]}", f"curate/{path[0]}"}.isdisjoint(jobs)
        if is_needed:
            needed[repr(reward)] = key, reward
    for key, reward in needed.values():
        with _under(key):
            reward.meet()


def _sets(config: RunConfig) -> Iterator[tuple[str, str]]:
    """The sets of prompts that measure, by the key that names each."""
    plan = config.evaluation
    yield "evaluation.prompts", plan.prompts
    if plan.knowledge is not None:
        yield "evaluation.knowledge", plan.knowledge
    for name, stage in config.stages.items():
        if stage.guard is not None:
            yield f"stages.{name}.guard.prompts", stage.guard.prompts
            if stage.guard.retention is not None:
                yield f"stages.{name}.guard.retention.prompts", stage.guard.retention.prompts
        for key, path in stage.algorithm.sets().items():
            yield f"stages.{name}.algorithm.{key}", path


def _check_apart(config: RunConfig) -> None:
    """Raise where a prompt that measures has the id of another: scores and pictures go by it."""
    plan = config.evaluation
    if plan.knowledge is None:
        return
    ids = [{e.id for e in read_prompts(located(p)).entries} for p in (plan.prompts, plan.knowledge)]
    if both := ids[0] & ids[1]:
        raise ConfigError(
            f"evaluation.knowledge: need other ids than those of evaluation.prompts, got "
            f"{min(both)!r} in both; give the prompts of {plan.knowledge} an `id` each"
        )


def _check_facts(config: RunConfig) -> None:
    """Raise where the oracle, which knows prompts of the embedded world alone, judges others."""
    every = read_prompts(located(config.evaluation.prompts))
    judges = {"judge": config.judge, "edit_judge": config.edit_judge}
    judges["arena.judge"] = config.arena.judge if config.arena else None
    for key, judge in judges.items():
        if isinstance(judge, OracleConfig) and len(every) and not every[0].facts:
            raise ConfigError(
                f"{key}: need another judge than the oracle for prompts that are not of the "
                f"embedded world, got {every[0].id!r} of {config.evaluation.prompts}; name one"
            )


def _check_family(config: RunConfig) -> None:
    """Raise unless the run's family is that of its models, and can be guided as it is asked to."""
    family = policy_class(config.policy.family)
    for key, path in _models(config).items():
        with _under(key):
            found = family_of(located(path))
        if found != family.family:
            raise ConfigError(
                f"{key}: need a {family.pipeline_class.__name__} for policy.family="
                f"{family.family}, got a {policy_class(found).pipeline_class.__name__} in {path}; "
                f"set policy.family={found}"
            )
    check_kernels(config.policy)
    scales = {"evaluation.guidance_scale": config.evaluation.guidance_scale}
    for name, stage in config.stages.items():
        if strange := [task for task in stage.prompts.tasks if task not in family.tasks]:
            raise ConfigError(
                f"stages.{name}.prompts.tasks: need {' or '.join(family.tasks)} for policy.family="
                f"{family.family}, got {strange[0]}; leave the task out, or take another family"
            )
        scales[f"stages.{name}.rollout.guidance_scale"] = stage.rollout.guidance_scale
    with _under("policy"):
        family.check_sizes(located(config.policy.path), config.policy.buckets)
    for key, scale in scales.items():
        with _under(key):
            family.check_guidance(located(config.policy.path), scale)


def _check_bench(key: str, config: BenchConfig) -> None:
    """A bench is taken at the end of a run, and should not fail there."""
    with _under(key):
        judge = config.build().judge()
    if judge is None:
        raise ConfigError(
            f"{key}: need a bench with a judge, got one without; name its server with `judge`, or "
            "take the bench after the run with `burnish bench`"
        )


def _check_adapters(name: str, stage: StageConfig) -> None:
    """Read the LoRAs of the teachers, which are small, before anything large."""
    teachers: Mapping[str, Any] = getattr(stage.algorithm, "teachers", {})
    for label, teacher in teachers.items():
        try:
            if teacher.lora is not None:
                read_adapter(Path(teacher.lora))
        except ConfigError as error:
            key = f"stages.{name}.algorithm.teachers.{label}.lora"
            raise ConfigError(f"{key}: {error}") from None


def _models(config: RunConfig) -> dict[str, str]:
    """Every model of a run that the run does not make itself, by the key that names it."""
    found = {"policy.path": config.policy.path}
    for name, stage in config.stages.items():
        teachers: Mapping[str, Any] = getattr(stage.algorithm, "teachers", {})
        for task, teacher in teachers.items():
            found[f"stages.{name}.algorithm.teachers.{task}.path"] = teacher.path
    return {key: path for key, path in found.items() if not path.startswith(STAGE)}


def _look_at_images(config: RunConfig) -> None:
    """Decode the images of every set, or of an even sample of a large one."""
    family = policy_class(config.policy.family)
    sets = [(key, PromptsConfig(path=path)) for key, path in _sets(config)]
    sets += [(f"stages.{name}.prompts", stage.prompts) for name, stage in config.stages.items()]
    # Stages often share a set.
    shared = {(one.path, repr(one.columns)): (key, one) for key, one in reversed(sets)}
    for key, prompts in shared.values():
        with _under(key):
            every = prompts.open()
            for place in track(spaced(range(len(every)), _LOOKED_AT), "images of prompts"):
                every.check(place)
                if every.entries[place].task == "edit":
                    family.check_source_sizes(every[place])


def _check_prompts(name: str, stage: StageConfig, family: type[Policy[Any, Any]]) -> None:
    """Raise unless there are prompts for every task, enough for a step, of categories that have
    weights, none with more sources than the family reads."""
    with _under(f"stages.{name}.prompts"):
        chosen = stage.prompts.read()
        family.check_sources(chosen.entries)
        for entry in chosen.entries:
            stage.algorithm.pool(entry)
    try:
        if stage.guard is not None:
            held_out(stage.guard, stage.prompts.tasks, chosen.entries)
        stage.algorithm.check_prompts(chosen)
    except ConfigError as error:
        raise ConfigError(f"stages.{name}.{error}") from None
    with _under(f"stages.{name}.prompts_per_step"):
        GroupSampler(chosen, per_step=stage.prompts_per_step, seed=0, pool=stage.algorithm.pool)
    for task in stage.prompts.tasks if stage.rewards else ():
        try:
            categories = [e.category for e in chosen.entries if e.task == task]
            check_weights(stage.rewards, [task], categories)
        except ValueError as error:
            raise ConfigError(f"stages.{name}.rewards: {error}") from None
    _check_spelling(name, stage, {entry.category for entry in chosen.entries})


def _check_spelling(name: str, stage: StageConfig, categories: Collection[str]) -> None:
    """A category that no prompt has may be that of other prompts, or a slip of the finger."""
    for key, reward in stage.rewards.items():
        for given in reward.weights.keys() - {*categories, EVERY_CATEGORY}:
            meant = nearest(given, sorted(categories))
            if meant is not None and meant not in reward.weights:
                raise ConfigError(
                    f"stages.{name}.rewards.{key}.weights: need categories of the prompts "
                    f"({', '.join(sorted(categories))}), got {given!r}; did you mean {meant!r}?"
                )


# --- The machine -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    name: str
    is_fine: bool
    found: str
    advice: str = ""
    """What to do if it is not fine."""


def examine(model: str = PolicyConfig().path) -> list[Finding]:
    """Look at versions, device, cores, memory, disk, and whether a model loads and draws."""
    return [*_versions(), *_machine(), _drawing(model)]


def _versions() -> Iterator[Finding]:
    yield Finding(name="burnish", is_fine=True, found=__version__)
    yield Finding(
        name="python",
        is_fine=sys.version_info >= (3, 11),
        found=platform.python_version(),
        advice="use Python 3.11 or newer",
    )
    yield Finding(name="torch", is_fine=True, found=torch.__version__)
    yield _torchvision()
    for package in _PACKAGES:
        version, is_fine = "not installed", False
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version, is_fine = importlib.metadata.version(package), True
        advice = "install Burnish again with its dependencies"
        yield Finding(name=package, is_fine=is_fine, found=version, advice=advice)


def _torchvision() -> Finding:
    try:
        was_helped = vision_build.ensure_torchvision()
        version = importlib.metadata.version("torchvision")
    except Exception as error:
        # Whatever an import stumbles on is what the user wants to know here.
        return Finding(
            name="torchvision",
            is_fine=False,
            found=_one_line(error),
            advice="install the torchvision that belongs to the torch above",
        )
    note = ", built for another torch, made usable" if was_helped else ", fits torch"
    return Finding(name="torchvision", is_fine=True, found=version + note)


def _machine() -> Iterator[Finding]:
    device = runtime.choose_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    yield Finding(name="device", is_fine=True, found=f"{device} ({name})")
    yield Finding(name="cores", is_fine=True, found=str(runtime.usable_cores()))
    size = runtime.memory(torch.device("cpu"))
    if size is not None:
        yield Finding(name="memory", is_fine=True, found=f"{size / _GIBIBYTE:.1f} GiB")
    free = shutil.disk_usage(Path.cwd()).free / _GIBIBYTE
    yield Finding(
        name="free disk",
        is_fine=free >= _LEAST_DISK,
        found=f"{free:.1f} GiB in {Path.cwd()}",
        advice=f"free {_LEAST_DISK:g} GiB at least, or work in another folder",
    )


def _drawing(model: str) -> Finding:
    """Load a model and draw one picture in two steps."""
    name = f"model {model}"
    if not (located(model) / INDEX).is_file():
        advice = "make it with `burnish miniature build`, or install Burnish again"
        return Finding(name=name, is_fine=False, found="missing", advice=advice)
    try:
        rt = runtime.start()
        policy = load_policy(PolicyConfig(resolution=64), located(model), rt)
        prompt = Prompt(id="doctor", text="a large red circle")
        with rt.autocast():
            drawn = rollout.draw(policy, [prompt], num_steps=2, guidance=Guidance(3.0), seeds=[0])
        images.to_pil(drawn[0])
    except Exception as error:
        # Whatever a library stumbles on is what the user wants to know here.
        advice = "install Burnish again; BURNISH_TRACEBACK=1 burnish sample x shows where"
        return Finding(name=name, is_fine=False, found=_one_line(error), advice=advice)
    return Finding(name=name, is_fine=True, found="loads and draws")


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
