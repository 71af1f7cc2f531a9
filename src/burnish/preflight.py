"""What can be known before a run: whether its inputs can be read, and fit together.

A run takes minutes to days, so whatever would stop it later is looked for first. Bad input is
refused before a file is written.
"""

import contextlib
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from burnish import runtime
from burnish.adapters import read_adapter
from burnish.bench.base import BenchConfig
from burnish.config import ConfigError, located
from burnish.contamination import ContaminationWarning, contamination
from burnish.guard import held_out
from burnish.pipeline_folders import check_kin, check_parts, check_targets, check_there
from burnish.planning.forecast import check_memory
from burnish.policies.base import Policy
from burnish.policy_config import check_guidance, check_kernels, check_steps
from burnish.progress import track
from burnish.prompt_sets import PromptSet
from burnish.prompts import GroupSampler, PromptsConfig, read_prompts, spaced
from burnish.rewards.base import EVERY_CATEGORY, RewardConfig, check_weights
from burnish.rewards.oracle import OracleConfig
from burnish.run_config import STAGE, RunConfig, teachers_of
from burnish.sharding import check_prefix
from burnish.shelves import family_of, policy_class
from burnish.training import StageConfig
from burnish.wording import nearest

_LOOKED_AT = 500
"""Prompts of a set whose images are decoded; `burnish prompts check` decodes all."""


def check_inputs(config: RunConfig, jobs: Collection[str] | None = None) -> None:
    """Read what the jobs of a run will read, and whether this machine can do them.

    Args:
        config: of the run.
        jobs: that are left to do; None is all of them.

    Raises:
        ConfigError: what `check_recipe` raises, a judge that does not answer, an image of a prompt
            that cannot be used among those looked at, or too little memory.
    """
    trained = check_recipe(config)
    check_devices(config, runtime.choose_device(config.runtime.device).type)
    _check_judges(config, config.jobs() if jobs is None else jobs)
    check_memory(config)
    # Last, as it takes longest.
    _look_at_images(config)
    for found in contamination(config, trained):
        warnings.warn(f"{found}; leave them out of one", ContaminationWarning, stacklevel=2)


def check_recipe(config: RunConfig) -> dict[str, PromptSet]:
    """Read all but pictures that the jobs of a run will read, on any machine.

    Returns:
        The prompts of each stage.

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
    trained: dict[str, PromptSet] = {}
    for name, stage in config.stages.items():
        trained[name] = _check_prompts(name, stage, family)
        with _under(f"stages.{name}"):
            stage.check_read()
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
    return trained


@contextlib.contextmanager
def _under(key: str) -> Iterator[None]:
    """What is refused inside is told with the key that names it in a recipe."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None


def check_devices(config: RunConfig, device: str) -> None:
    """Look whether rewards want to be where the run is: they share its devices and its plan.

    Args:
        config: of the run.
        device: of the run, `cuda` or `cpu`.

    Raises:
        ConfigError: one wants to be on a GPU, and the run is on none.
    """
    for key, reward in config.scorers():
        if reward.runs_on == "cuda" and device != "cuda":
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
    base = located(config.policy.path)
    with _under("policy"):
        family.check_sizes(base, config.policy.buckets)
    with _under("evaluation.num_steps"):
        check_steps(family.family, base, config.evaluation.num_steps)
    for key, scale in scales.items():
        with _under(key):
            check_guidance(family.family, base, scale)


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
    for label, teacher in teachers_of(stage).items():
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
        for task, teacher in teachers_of(stage).items():
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


def _check_prompts(name: str, stage: StageConfig, family: type[Policy[Any, Any]]) -> PromptSet:
    """The prompts of a stage: some for every task, enough for a step, of categories that have
    weights, none with more sources than the family reads, and none that its guard looks at."""
    with _under(f"stages.{name}.prompts"):
        chosen = stage.prompts.read()
        family.check_sources(chosen.entries)
        for entry in chosen.entries:
            stage.algorithm.pool(entry)
    try:
        if stage.guard is not None:
            held_out(stage.guard, stage.prompts.tasks, chosen)
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
    return chosen


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
