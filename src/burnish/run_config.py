"""What a run is: its stages, the policies made of them, how they are measured, and which job waits
for which."""

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from burnish.algorithms.distill import DistillConfig, TeacherConfig
from burnish.arena.raters import CrowdConfig
from burnish.bench.base import BenchConfig
from burnish.config import Config, ConfigError
from burnish.curation import CurationConfig
from burnish.evaluation import EvaluationConfig
from burnish.merging import MergeConfig
from burnish.policy_config import PolicyConfig
from burnish.rewards.base import RewardConfig
from burnish.runtime import RuntimeConfig
from burnish.shelves import AnyBench, AnyReward
from burnish.training import StageConfig
from burnish.types import Guidance, Task
from burnish.wording import nearest

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,60}")
"""Of runs, stages, merges, benches: what can name a folder everywhere."""

BASE = "base"
UNGUIDED = "base-unguided"
BEST_OF = "base-best-of"
BASES = (BASE, UNGUIDED, BEST_OF)
"""The ways in which a base may be measured."""
FREE_RUNTIME = ("processes", "check_memory")
"""Settings of `runtime` that a run may be given at any time, as they decide no result."""
_DEFAULTS = RuntimeConfig().model_dump()
STAGE = "stage:"
"""Prefix of a path that means the result of a stage of the same run."""


class ComparisonConfig(Config):
    """Two arms that a study compares, beside all of them with the base and the first."""

    arm: str
    over: str
    categories: tuple[str, ...] | None = None
    """Of the prompts; None is all."""


class StudyConfig(Config):
    """What makes a recipe a study: its stages are arms that answer a question."""

    question: str
    claim: str = ""
    """What the paper says."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] = Field(
        default=(0, 1, 2), min_length=1
    )
    """Of the runs; the pictures that are measured have the same seeds in all of them."""
    compare: tuple[ComparisonConfig, ...] = ()

    @model_validator(mode="after")
    def _seeds_differ(self) -> "StudyConfig":
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(
                f"need seeds that differ, got {list(self.seeds)}; a seed counts once, leave the "
                "other out"
            )
        return self


class RunMergeConfig(MergeConfig):
    """A policy that is not trained but made of stages of the run."""

    of: tuple[str, ...] = Field(min_length=1)
    """Stages."""
    guidance_scale: float | None = Field(default=None, ge=1)
    """It is measured with; None is that of its first stage: a merge has no guidance folded in."""


class RunConfig(Config):
    """One complete run; recipes are files of this."""

    name: str = Field(pattern=rf"^{NAME.pattern}$")
    """Also that of its folder."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    evidence: Literal["measured", "runs", "untested"] = "untested"
    """What is known of this recipe: numbers in the repository, that it runs, or nothing."""
    policy: PolicyConfig = PolicyConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    stages: Mapping[str, StageConfig] = Field(min_length=1)
    merges: Mapping[str, RunMergeConfig] = {}
    """Policies made of the weights of stages; they are measured, and stages may start there."""
    evaluation: EvaluationConfig = EvaluationConfig()
    judge: AnyReward
    """Scores the held-out pictures."""
    edit_judge: AnyReward | None = None
    """Scores those of edits; None is `judge`, which should then know edits, too."""
    benches: Mapping[str, AnyBench] = {}
    """What the base and every policy that is able takes, under names of yours."""
    arena: CrowdConfig | None = None
    """Votes on the pictures that were measured: a reward, and the raters who see its scores."""
    study: StudyConfig | None = None
    """For recipes that `burnish study` runs with several seeds."""

    @model_validator(mode="after")
    def _stages_follow(self) -> "RunConfig":
        for place, (name, stage) in enumerate(self.stages.items()):
            _check_name(name)
            before = list(self.stages)[:place]
            merged = [m for m, own in self.merges.items() if set(own.of) <= set(before)]
            known = [BASE, *before, *merged]
            for wanted in (stage.start, *_referred(stage)):
                if wanted not in known:
                    raise ValueError(
                        f"need stages that come before {name!r}, got {wanted!r}; did you mean "
                        f"{nearest(wanted, known) or known[-1]!r}?"
                    )
            for teacher in teachers_of(stage).values():
                self.deployed_teacher(teacher)
        return self

    @model_validator(mode="after")
    def _processes_have_groups(self) -> "RunConfig":
        for name, stage in self.stages.items():
            if stage.prompts_per_step < self.runtime.processes:
                raise ValueError(
                    f"need a group for each of {self.runtime.processes} processes, got "
                    f"stages.{name}.prompts_per_step={stage.prompts_per_step}; raise it, or lower "
                    "runtime.processes"
                )
        return self

    @model_validator(mode="after")
    def _rounded_weights_are_not_trained(self) -> "RunConfig":
        for name, stage in self.stages.items():
            if self.policy.dtype == "bfloat16" and stage.lora is None:
                raise ValueError(
                    f"need a LoRA to train weights that are kept in bfloat16, got stages.{name} "
                    f"without; set stages.{name}.lora.rank=32 or policy.dtype=float32"
                )
        return self

    @model_validator(mode="after")
    def _merges_have_parts(self) -> "RunConfig":
        for name, merge in self.merges.items():
            _check_name(name)
            if name in self.stages:
                raise ValueError(f"need a name for a merge that no stage has, got {name!r}")
            for wanted in merge.of:
                if wanted not in self.stages:
                    near = nearest(wanted, list(self.stages)) or next(iter(self.stages))
                    raise ValueError(
                        f"merges.{name}.of: need stages, got {wanted!r}; did you mean {near!r}?"
                    )
            is_given = merge.method == "task_arithmetic" and merge.scales is not None
            if is_given and len(merge.scales or ()) != len(merge.of):
                raise ValueError(
                    f"merges.{name}.scales: need {len(merge.of)}, one for each stage, got "
                    f"{len(merge.scales or ())}"
                )
        return self

    @model_validator(mode="after")
    def _benches_have_names(self) -> "RunConfig":
        for name in self.benches:
            if not NAME.fullmatch(name):
                raise ValueError(f"need a bench name of letters, digits, _ and -, got {name!r}")
        return self

    @model_validator(mode="after")
    def _compares_its_arms(self) -> "RunConfig":
        for pair in self.study.compare if self.study else ():
            for wanted in (pair.arm, pair.over):
                if wanted not in self.policies():
                    near = nearest(wanted, self.policies()) or self.policies()[0]
                    raise ValueError(
                        f"study.compare: need stages or merges, got {wanted!r}; did you mean "
                        f"{near!r}?"
                    )
        return self

    def scorers(self) -> Iterator[tuple[str, RewardConfig]]:
        """All that score, by the key that names each."""
        yield "judge", self.judge
        if self.edit_judge is not None:
            yield "edit_judge", self.edit_judge
        for name, stage in self.stages.items():
            yield from ((f"stages.{name}.{key}", reward) for key, reward in stage.scorers())

    @property
    def judges(self) -> dict[Task, AnyReward]:
        """Who scores held-out pictures, by their task."""
        return {"t2i": self.judge, "edit": self.edit_judge or self.judge}

    def policies(self) -> tuple[str, ...]:
        """All that the run makes: results of stages, and merges."""
        return (*self.stages, *self.merges)

    @property
    def bases(self) -> tuple[str, ...]:
        """The ways in which the base itself is measured: without guidance too, where it has any."""
        is_guided = self.deployed(BASE).scale != 1
        return tuple(name for name in BASES if name != UNGUIDED or is_guided)

    def folds_guidance(self, student: str) -> bool:
        """Whether a policy was distilled from a teacher that is guided, and is not itself."""
        teachers = teachers_of(self.stages[student]).values() if student in self.stages else ()
        scales = [self.deployed_teacher(teacher).guidance.scale for teacher in teachers]
        return self.deployed(student).scale == 1 and any(scale != 1 for scale in scales)

    def deployed(self, policy: str) -> Guidance:
        """Guidance at which a policy of the run is deployed and measured."""
        if policy in self.stages:
            return self.stages[policy].rollout.guidance
        if policy in self.merges:
            merge = self.merges[policy]
            own = self.deployed(merge.of[0])
            return own._replace(scale=merge.guidance_scale or own.scale)
        if policy == UNGUIDED:
            return Guidance()
        return Guidance(self.evaluation.guidance_scale, self.evaluation.negative_prompt)

    def deployed_teacher(self, teacher: TeacherConfig) -> TeacherConfig:
        """A teacher with its guidance: a stage of this run has only one.

        Raises:
            ConfigError: a teacher from elsewhere without a scale, or one with another than its own.
        """
        if not teacher.path.startswith(STAGE):
            return teacher.model_copy(update=teacher.guidance.settings())
        own = self.deployed(teacher.path.removeprefix(STAGE)).settings()
        for name, value in own.items():
            given = getattr(teacher, name)
            if given not in (None, value):
                raise ConfigError(
                    f"need the {name} {value!r} that {teacher.path} draws with, got {given!r}; "
                    f"leave the teacher's {name} out"
                )
        return teacher.model_copy(update=own)

    def tasks(self, policy: str) -> tuple[str, ...]:
        """What a policy is measured on: a stage's own tasks, those of all stages of a merge,
        everything for the base."""
        every = tuple(
            dict.fromkeys(t for stage in self.stages.values() for t in stage.prompts.tasks)
        )
        if policy in self.merges:
            parts = {task for name in self.merges[policy].of for task in self.tasks(name)}
            return tuple(task for task in every if task in parts)
        return self.stages[policy].prompts.tasks if policy in self.stages else every

    def profile_of(self, name: str) -> str | None:
        """The stage whose profile a stage selects its prompts from: the first that draws and scores
        the same pictures. None without curation."""
        stage = self.stages[name]
        if stage.curation is None:
            return None
        return next(n for n, s in self.stages.items() if s.curation and drawn(s) == drawn(stage))

    def curated(self, name: str) -> CurationConfig:
        """What is drawn, and by what, to choose the prompts of a stage."""
        stage = self.stages[name]
        return CurationConfig(
            stage=name,
            seed=self.seed,
            policy=self.policy,
            # Those would make another profile of the same.
            runtime=self.runtime.model_copy(
                update={name: _DEFAULTS[name] for name in FREE_RUNTIME}
            ),
            prompts=stage.prompts,
            rollout=stage.rollout,
            rewards=stage.rewards,
        )

    def jobs(self) -> dict[str, tuple[str, ...]]:
        """Every job of the run with the jobs it waits for, each after all of those."""
        jobs: dict[str, tuple[str, ...]] = {}
        for name, stage in self.stages.items():
            needs = dict.fromkeys((stage.start, *_referred(stage)))
            trained = [self._job_of(needed) for needed in needs if needed != BASE]
            profile = self.profile_of(name)
            if profile == name:
                jobs[f"curate/{name}"] = tuple(trained[:1] if stage.start != BASE else ())
            jobs[f"train/{name}"] = (*trained, *([f"curate/{profile}"] if profile else []))
            for merged, merge in self.merges.items():
                parts = tuple(f"train/{part}" for part in merge.of)
                if set(parts) <= jobs.keys():
                    jobs.setdefault(f"merge/{merged}", parts)
        jobs[f"measure/{BASE}"] = ()
        for name in self.policies():
            jobs[f"measure/{name}"] = (self._job_of(name),)
        for name in (BASE, *self.policies()):
            if self.benches_of(name):
                jobs[f"bench/{name}"] = () if name == BASE else (self._job_of(name),)
        for task in self.tasks(BASE) if self.arena is not None else ():
            meeting = self.able(task)
            jobs[f"arena/{task}"] = tuple(f"measure/{n}" for n in meeting if n != UNGUIDED)
        return jobs

    def benches_of(self, policy: str) -> dict[str, BenchConfig]:
        """The benches that a policy is able to take."""
        tasks = self.tasks(policy)
        return {name: bench for name, bench in self.benches.items() if bench.asks() in tasks}

    def able(self, task: str) -> tuple[str, ...]:
        """All that can do a task: the base, guided and not, and policies of the run."""
        drawn = (name for name in self.bases if name != BEST_OF)
        return tuple(name for name in (*drawn, *self.policies()) if task in self.tasks(name))

    def _job_of(self, policy: str) -> str:
        """The job that makes a policy."""
        return f"{'merge' if policy in self.merges else 'train'}/{policy}"


def _check_name(name: str) -> None:
    if name in BASES or not NAME.fullmatch(name):
        raise ValueError(
            f"need a stage name of letters, digits, _ and -, and not {BASE}..., got {name!r}; "
            "rename the stage"
        )


def teachers_of(stage: StageConfig) -> Mapping[str, TeacherConfig]:
    """The teachers of a stage by label; none of one that does not distill."""
    return stage.algorithm.teachers if isinstance(stage.algorithm, DistillConfig) else {}


def drawn(stage: StageConfig) -> tuple[Any, ...]:
    """What the profile of a stage's prompts depends on, of its own settings."""
    return stage.start, stage.prompts, stage.rollout, stage.rewards


def _referred(stage: StageConfig) -> tuple[str, ...]:
    """Stages that a stage names by path: its teachers."""
    paths = [teacher.path for teacher in teachers_of(stage).values()]
    return tuple(path.removeprefix(STAGE) for path in paths if path.startswith(STAGE))
