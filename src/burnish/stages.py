"""A whole run: which stages there are, what each needs, and running them.

Stages and measurements are jobs. A job that has its inputs runs in a process of its own, as many at
a time as there are cores (or GPUs); a job that is complete is not run again. Everything a job
leaves is in the run folder:

    curation/<stage>/     every prompt as the stage's start draws it, and the prompts that are kept
    stages/<stage>/       run folder of the stage, its pipeline in model/
    evaluation/<policy>/  scores.jsonl and pictures/
    summary.json          the table of the report
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from burnish.algorithms.distill import DistillConfig, TeacherConfig
from burnish.config import Config, located, nearest
from burnish.curation import CurationConfig, measure_prompts, num_drawn, write_kept
from burnish.evaluation import EvaluationConfig, Row, measure, read_scores, write_rows
from burnish.ledger import digest_of, pin
from burnish.policies.base import Policy
from burnish.prompts import read_prompts
from burnish.runtime import Runtime, RuntimeConfig
from burnish.shelves import AnyReward, PolicyConfig, load_policy
from burnish.tracking import Run, read_rows, write_atomic
from burnish.training import StageConfig, train
from burnish.types import Prompt

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,60}")

BASE = "base"
UNGUIDED = "base-unguided"
BEST_OF = "base-best-of"
BASES = (BASE, UNGUIDED, BEST_OF)
"""The ways in which the base itself is measured."""
PARTS = ("rollout", "credit", "update")
"""Parts of a training step that are timed."""
STAGE = "stage:"
"""Prefix of a path that means the result of a stage of the same run."""


class StudyConfig(Config):
    """What makes a recipe a study: its stages are arms that answer a question."""

    question: str
    claim: str = ""
    """What the paper says."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] = Field(
        default=(0, 1, 2), min_length=1
    )
    """Of the runs; the pictures that are measured have the same seeds in all of them."""


class RunConfig(Config):
    """One complete run; recipes are files of this."""

    name: str = Field(pattern=rf"^{_NAME.pattern}$")
    """Also that of its folder."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    evidence: Literal["measured", "runs", "untested"] = "untested"
    """What is known of this recipe: numbers in the repository, that it runs, or nothing."""
    policy: PolicyConfig = PolicyConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    stages: Mapping[str, StageConfig] = Field(min_length=1)
    evaluation: EvaluationConfig = EvaluationConfig()
    judge: AnyReward
    """Scores the held-out pictures."""
    study: StudyConfig | None = None
    """For recipes that `burnish study` runs with several seeds."""

    @model_validator(mode="after")
    def _stages_follow(self) -> "RunConfig":
        for place, (name, stage) in enumerate(self.stages.items()):
            if name in BASES or not _NAME.fullmatch(name):
                raise ValueError(
                    f"need a stage name of letters, digits, _ and -, and not {BASE}..., "
                    f"got {name!r}; rename the stage"
                )
            known = [BASE, *list(self.stages)[:place]]
            for wanted in (stage.start, *_referred(stage)):
                if wanted not in known:
                    raise ValueError(
                        f"need stages that come before {name!r}, got {wanted!r}; did you mean "
                        f"{nearest(wanted, known) or known[-1]!r}?"
                    )
            for teacher in _teachers(stage):
                deployed = self.teacher_scale(teacher)
                if deployed is None:
                    raise ValueError(
                        f"need the guidance scale that the teacher in {teacher.path} is deployed "
                        f"with, got none; set stages.{name}.algorithm.teachers.*.guidance_scale"
                    )
                if teacher.guidance_scale not in (None, deployed):
                    raise ValueError(
                        f"need the scale {deployed:g} that {teacher.path} draws with, got "
                        f"{teacher.guidance_scale:g}; leave the teacher's guidance_scale out"
                    )
        return self

    def deployed_scale(self, policy: str) -> float:
        """Guidance at which a policy of the run is deployed and measured."""
        if policy in self.stages:
            return self.stages[policy].rollout.guidance_scale
        return 1.0 if policy == UNGUIDED else self.evaluation.guidance_scale

    def teacher_scale(self, teacher: TeacherConfig) -> float | None:
        """Guidance of a teacher as it is deployed: a stage of this run has only one."""
        if teacher.path.startswith(STAGE):
            return self.deployed_scale(teacher.path.removeprefix(STAGE))
        return teacher.guidance_scale

    def tasks(self, policy: str) -> tuple[str, ...]:
        """What a policy is measured on: a stage's own tasks, everything for the base."""
        every = tuple(
            dict.fromkeys(t for stage in self.stages.values() for t in stage.prompts.tasks)
        )
        return self.stages[policy].prompts.tasks if policy in self.stages else every

    def profile_of(self, name: str) -> str | None:
        """The stage whose profile a stage selects its prompts from: the first that draws and scores
        the same pictures. None without curation."""
        stage = self.stages[name]
        if stage.curation is None:
            return None

        def drawn(other: StageConfig) -> tuple[Any, ...]:
            return other.start, other.prompts, other.rollout, other.rewards

        return next(n for n, s in self.stages.items() if s.curation and drawn(s) == drawn(stage))

    def curated(self, name: str) -> CurationConfig:
        """What is drawn, and by what, to choose the prompts of a stage."""
        stage = self.stages[name]
        return CurationConfig(
            stage=name,
            seed=self.seed,
            policy=self.policy,
            runtime=self.runtime,
            prompts=stage.prompts,
            rollout=stage.rollout,
            rewards=stage.rewards,
        )

    def jobs(self) -> dict[str, tuple[str, ...]]:
        """Every job of the run with the jobs it waits for, in a good order to start them."""
        jobs: dict[str, tuple[str, ...]] = {}
        for name, stage in self.stages.items():
            needs = dict.fromkeys((stage.start, *_referred(stage)))
            trained = [f"train/{needed}" for needed in needs if needed != BASE]
            profile = self.profile_of(name)
            if profile == name:
                jobs[f"curate/{name}"] = tuple(trained[:1] if stage.start != BASE else ())
            jobs[f"train/{name}"] = (*trained, *([f"curate/{profile}"] if profile else []))
        jobs[f"measure/{BASE}"] = ()
        for name in self.stages:
            jobs[f"measure/{name}"] = (f"train/{name}",)
        return jobs


def _teachers(stage: StageConfig) -> list[TeacherConfig]:
    if not isinstance(stage.algorithm, DistillConfig):
        return []
    return list(stage.algorithm.teachers.values())


def _referred(stage: StageConfig) -> tuple[str, ...]:
    """Stages that a stage names by path: its teachers."""
    paths = [teacher.path for teacher in _teachers(stage)]
    return tuple(path.removeprefix(STAGE) for path in paths if path.startswith(STAGE))


def with_folders(config: RunConfig, stage: StageConfig, folder: Path) -> StageConfig:
    """The stage with `stage:` paths resolved into a run folder, teachers as they are deployed."""
    if not isinstance(stage.algorithm, DistillConfig):
        return stage
    teachers = {
        task: teacher.model_copy(
            update={
                "path": str(model_folder(folder, teacher.path)),
                "guidance_scale": config.teacher_scale(teacher),
            }
        )
        for task, teacher in stage.algorithm.teachers.items()
    }
    algorithm = stage.algorithm.model_copy(update={"teachers": teachers})
    return stage.model_copy(update={"algorithm": algorithm})


def model_folder(folder: Path, path: str) -> Path:
    """Where the pipeline of a path is: a stage's result, an embedded model, or a plain folder."""
    if path.startswith(STAGE):
        return folder / "stages" / path.removeprefix(STAGE) / "model"
    return located(path)


def is_complete(folder: Path, job: str) -> bool:
    """Whether a job has left its result."""
    return (job_folder(folder, job) / "DONE").is_file()


def job_folder(folder: Path, job: str) -> Path:
    """Where a job leaves its result."""
    kind, name = job.split("/", 1)
    return folder / {"train": "stages", "measure": "evaluation", "curate": "curation"}[kind] / name


def run_job(config: RunConfig, folder: Path, job: str, rt: Runtime) -> None:
    """Do one job in this process and mark it complete."""
    kind, name = job.split("/", 1)
    work = {"train": _run_stage, "measure": _measure, "curate": _curate}[kind]
    work(config, folder, name, rt)
    write_atomic(job_folder(folder, job) / "DONE", "")


def _curate(config: RunConfig, folder: Path, name: str, rt: Runtime) -> None:
    own, place = config.curated(name), job_folder(folder, f"curate/{name}")
    Run.create(place, own, environment=rt.describe())
    measure_prompts(own, own.prompts.read(), _start(config, folder, name, rt), place, rt)


def _start(config: RunConfig, folder: Path, name: str, rt: Runtime) -> Policy[Any, Any]:
    """The policy that a stage starts from."""
    start = config.stages[name].start
    path = config.policy.path if start == BASE else STAGE + start
    return load_policy(config.policy, model_folder(folder, path), rt)


def _chosen(config: RunConfig, folder: Path, name: str) -> StageConfig:
    """The stage with the prompts that its curation keeps."""
    stage, profile = config.stages[name], config.profile_of(name)
    if stage.curation is None or profile is None:
        return stage
    source, own = (job_folder(folder, f"curate/{n}") for n in (profile, name))
    write_kept(source, stage.prompts.read(), stage.curation, own)
    prompts = stage.prompts.model_copy(update={"path": str(own / "kept.jsonl"), "limit": None})
    return stage.model_copy(update={"prompts": prompts})


def _run_stage(config: RunConfig, folder: Path, name: str, rt: Runtime) -> None:
    stage = config.stages[name]
    policy = _start(config, folder, name, rt)
    # By its own words, so that a run can be moved; what it refers to is looked up here.
    run = Run.create(job_folder(folder, f"train/{name}"), stage, environment=rt.describe())
    files = {f"the files of {name}": digest_of(r.inputs()) for name, r in stage.rewards.items()}
    pin(run.folder, "rewards", files)
    stage = with_folders(config, _chosen(config, folder, name), folder)
    train(stage, policy, run, rt, seed=config.seed, label=name)


def _measure(config: RunConfig, folder: Path, name: str, rt: Runtime) -> None:
    path = STAGE + name if name in config.stages else config.policy.path
    policy = load_policy(config.policy, model_folder(folder, path), rt)
    for role in BASES if name == BASE else (name,):
        _measure_role(config, folder / "evaluation" / role, role, policy, rt)


def _measure_role(
    config: RunConfig, target: Path, name: str, policy: Policy[Any, Any], rt: Runtime
) -> None:
    """Rows and pictures of one policy, at one guidance."""
    plan, tasks, is_best_of = config.evaluation, config.tasks(name), name == BEST_OF
    wanted = plan.best_of_prompts if is_best_of else plan.num_prompts
    held_out = _some(read_prompts(located(plan.prompts)), tasks, wanted)
    sets = [(held_out, plan.best_of if is_best_of else plan.num_seeds)]
    if plan.knowledge is not None and not is_best_of:
        knowledge = read_prompts(located(plan.knowledge))
        sets.append((_some(knowledge, tasks, plan.num_knowledge), 1))
    judge = config.judge.build()
    rows: list[Row] = []
    for prompts, num_seeds in sets:
        rows += measure(
            policy,
            prompts,
            judge,
            rt,
            name=name,
            config=plan,
            guidance_scale=config.deployed_scale(name),
            num_seeds=num_seeds,
            pictures=None if is_best_of else target / "pictures",
        )
    write_rows(target / "scores.jsonl", rows)


def _some(prompts: list[Prompt], tasks: tuple[str, ...], count: int) -> list[Prompt]:
    return [p for task in tasks for p in [p for p in prompts if p.task == task][:count]]


def spent(config: RunConfig, folder: Path, stage: str) -> dict[str, Any]:
    """Steps, pictures drawn, network evaluations, and minutes of one stage of the run in a folder.

    `curated` are the pictures that chose its prompts; stages that share a profile all needed it.
    """
    place = folder / "stages" / stage
    steps, times = read_rows(place / "metrics.jsonl"), read_rows(place / "timings.jsonl")
    drawn = [row["data/images"] for row in steps if row.get("data/images") is not None]
    asked = [row["data/evaluations"] for row in steps if row.get("data/evaluations") is not None]
    profile = config.profile_of(stage)
    minutes = {p: sum(row.get(f"time/{p}") or 0.0 for row in times) / 60 for p in PARTS}
    return {
        "steps": len(steps),
        "images": sum(drawn) if drawn else None,
        "evaluations": sum(asked) if asked else None,
        "curated": num_drawn(job_folder(folder, f"curate/{profile}")) if profile else 0,
        "minutes": {p: minutes[p] if times else None for p in PARTS}
        | {"total": sum(minutes.values()) if times else None},
    }


def all_scores(config: RunConfig, folder: Path) -> list[Row]:
    """The rows of every policy measured so far."""
    names = (*BASES, *config.stages)
    files = [folder / "evaluation" / name / "scores.jsonl" for name in names]
    return [row for file in files if file.is_file() for row in read_scores(file)]
