"""On-policy distillation: several teachers, guidance included, into one student.

The student draws its own path without guidance; at states of that path it learns the velocity that
the teacher of the prompt would follow there, as that teacher is deployed, guidance and all:

    loss = mean over states of weight * |v_student(x, sigma) - v_teacher,guided(x, sigma)|^2

States are constants. The student therefore ends up drawing at guidance 1 what its teachers draw at
theirs (arXiv 2606.27608, section 4.3, Eq. L_OPD). The sum runs over n = 0..N-1, the points the
solver really visits; the paper's index skips pure noise. One teacher per optimizer step, and only
that one on the device.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from burnish.algorithms.base import (
    Algorithm,
    AlgorithmConfig,
    Footprint,
    StageContext,
    refuse_average,
)
from burnish.batches import Batch, guided_velocities
from burnish.config import Config, ConfigError
from burnish.fixed_states import FixedStates, FixedStatesConfig, chosen
from burnish.looks import Watch
from burnish.objectives import velocity_matching
from burnish.policies.base import Policy
from burnish.prompt_sets import PromptSet
from burnish.residency import Source, Teachers
from burnish.rollout import read_ahead
from burnish.rollout_config import RolloutConfig
from burnish.sharding import whole
from burnish.types import Group, Guidance, Labelled, LossOutput, Prompt, Signal, Task, Trajectory

Weighting = Literal["one", "step", "kl"]
"""Of a state: `one`, the paper's plain sum; `step`, the length h of its solver step, as in the
bound on the distance of the two distributions; `kl`, h^2, as in the distance of the two next
states. Both are in units of an even step, so that they are 1 on an even schedule."""


States = Literal["student", "teacher"]
"""Whose path is learnt on: `student`, on-policy; `teacher`, the control, which never sees where the
student's own mistakes lead."""


class TeacherConfig(Config):
    """A teacher as it is deployed."""

    path: str
    """A diffusers folder, or `stage:<name>` for the result of an earlier stage of the run."""
    lora: str | None = None
    """A LoRA on the model in `path`: a safetensors file or its folder."""
    guidance_scale: float | None = Field(default=None, ge=1)
    """None is the scale that its own stage drew with; a teacher from elsewhere must have one."""
    negative_prompt: str | None = None
    """What its guidance leads away from; None is what its own stage drew with, else nothing."""

    @property
    def guidance(self) -> Guidance:
        """As it is deployed.

        Raises:
            ConfigError: its scale is not given.
        """
        if self.guidance_scale is None:
            raise ConfigError(
                f"need the guidance scale that the teacher in {self.path} is deployed with, got "
                "none; set its guidance_scale under algorithm.teachers"
            )
        return Guidance(self.guidance_scale, self.negative_prompt or "")


class DistillConfig(AlgorithmConfig):
    """Velocity matching on the student's own path."""

    needs_rewards: ClassVar[bool] = False
    kind: Literal["distill"] = "distill"
    teachers: Mapping[str, TeacherConfig]
    """By label: a task, `t2i` or `edit`, or a category of one, such as `t2i/portrait`, which goes
    before its task. A prompt without a teacher is an error, never a default."""
    weight: Weighting = "one"
    states: States = "student"
    fixed_states: FixedStatesConfig | None = FixedStatesConfig()
    """Where checkpoints are compared, the nearest of which is written; None writes the last."""
    guidance_ramp: float = Field(default=0.0, ge=0, le=1)
    """Share of the stage over which the teachers' guidance rises from 1: a student that is far from
    guided paths asks its teachers where they have never been."""

    @model_validator(mode="after")
    def _has_teachers(self) -> "DistillConfig":
        if not self.teachers:
            raise ValueError("need at least one teacher, got none; name one for each task")
        for label in self.teachers:
            task, slash, category = label.partition("/")
            if task not in get_args(Task) or bool(slash) != bool(category):
                raise ValueError(
                    f"need labels of teachers like t2i, edit or t2i/portrait, got {label!r}; "
                    "rename it"
                )
        return self

    def check_rollout(
        self, rollout: RolloutConfig, tasks: Sequence[Task], *, draws_average: bool
    ) -> None:
        for task in tasks:
            if all(label.partition("/")[0] != task for label in self.teachers):
                raise ValueError(
                    f"need a teacher for task {task!r}, got none; add algorithm.teachers.{task} or "
                    "take the task out of prompts.tasks"
                )
        refuse_average(self.kind, draws_average)
        if rollout.is_stochastic or rollout.guidance_scale != 1:
            raise ValueError(
                "need the unguided ODE path of the student for distill, got "
                f"window={rollout.window} and guidance_scale={rollout.guidance_scale:g}; set "
                "rollout.window=0 rollout.guidance_scale=1, the teachers keep their own scale"
            )
        if rollout.keep in ("none", "window"):
            raise ValueError(
                f"need kept states for distill, got keep={rollout.keep}; set rollout.keep=4 or all"
            )

    def label(self, prompt: Labelled) -> str | None:
        """Of the prompt's teacher; None if it has none."""
        candidates = (f"{prompt.task}/{prompt.category}", prompt.task)
        return next((label for label in candidates if label in self.teachers), None)

    def pool(self, prompt: Labelled) -> str:
        label = self.label(prompt)
        if label is None:
            raise ConfigError(
                f"need a teacher for {prompt.task}/{prompt.category}, the label of prompt "
                f"{prompt.id}, got teachers for {', '.join(sorted(self.teachers))}; add one or "
                "leave out its prompts"
            )
        return label

    def sets(self) -> Mapping[str, str]:
        own = self.fixed_states
        named = {} if own is None else {"prompts": own.prompts, "pictures": own.pictures}
        return {f"fixed_states.{key}": path for key, path in named.items() if path is not None}

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        asked = sorted({self.pool(entry) for entry in PromptSet.of(prompts).entries})
        for label in self.teachers:
            if "/" in label and label not in asked:
                raise ConfigError(
                    f"algorithm.teachers.{label}: need a teacher of some prompt, got one of none; "
                    f"the prompts' labels are {', '.join(labels_of(prompts))}"
                )
        if self.fixed_states is not None:
            try:
                chosen(self.fixed_states, prompts, asked, self.label)
            except ConfigError as error:
                raise ConfigError(f"algorithm.fixed_states: {error}") from None

    def footprint(self, rollout: RolloutConfig, micro_batch: int, *, may_borrow: bool) -> Footprint:
        scale = max(teacher.guidance.scale for teacher in self.teachers.values())
        fixed = self.fixed_states
        return Footprint(
            copies=() if may_borrow else ("teacher in use",),
            copies_read_ahead=int(len(self.teachers) > 1 and not may_borrow),
            states=rollout.num_kept,
            credit_scale=scale,
            draw_scale=scale if fixed or self.states == "teacher" else rollout.guidance_scale,
            draws=min(micro_batch, fixed.num_prompts) if fixed else 0,
        )

    def build(self, context: StageContext) -> "Distill":
        return Distill(self, context)


def labels_of(prompts: Sequence[Prompt]) -> list[str]:
    """Every label that a teacher of some of the prompts could have."""
    entries = PromptSet.of(prompts).entries
    return sorted({name for p in entries for name in (p.task, f"{p.task}/{p.category}")})


def weights(
    kind: Weighting,
    sigmas: Float[Tensor, " step"],
    sigmas_next: Float[Tensor, " step"],
    num_steps: int,
) -> Float[Tensor, " step"]:
    """Factor of the squared error at each state.

    Args:
        kind: see `Weighting`.
        sigmas, sigmas_next: of the state and of the next one.
        num_steps: of the whole path; an even step is 1 / num_steps long.

    Reference: the bound of arXiv 2606.27608, appendix A, integrates over time; DiffusionOPD, arXiv
    2605.15055, compares the next states.

    >>> weights("step", torch.tensor([1.0, 0.75]), torch.tensor([0.75, 0.0]), 2)
    tensor([0.5000, 1.5000])
    """
    length = (sigmas - sigmas_next) * num_steps
    return {"one": torch.ones_like(length), "step": length, "kl": length**2}[kind]


class Distill(Algorithm):
    """On-policy distillation; see the module."""

    def __init__(self, config: DistillConfig, context: StageContext) -> None:
        self._config, self._context = config, context
        self._guidance = {label: teacher.guidance for label, teacher in config.teachers.items()}
        sources = {
            label: Source(Path(t.path), None if t.lora is None else Path(t.lora))
            for label, t in config.teachers.items()
        }
        self._teachers = Teachers(
            context.policy, sources, context.rt, may_borrow=context.may_borrow
        )

    def guidance(self, label: str, step: int) -> Guidance:
        """Of a teacher at a step: its own after the ramp."""
        own = self._guidance[label]
        rising = self._config.guidance_ramp * self._context.steps
        share = min(1.0, (step + 1) / rising) if rising else 1.0
        return own._replace(scale=1 + (own.scale - 1) * share)

    def behaviour(
        self,
        policy: Policy[Any, Any],
        config: RolloutConfig,
        prompts: Sequence[Prompt],
        step: int,
    ) -> tuple[Policy[Any, Any], RolloutConfig]:
        """The student, or the teacher of these prompts as it is deployed."""
        if self._config.states == "student":
            return policy, config
        label = self._label(prompts)
        settings = self.guidance(label, step).settings()
        return self._teachers.activate(label), config.model_copy(update=settings)

    def watch(self, folder: Path, step: int, prompts: Sequence[Prompt]) -> Watch | None:
        """The gap to the teachers on fixed states."""
        if self._config.fixed_states is None:
            return None
        labels = {self._config.pool(entry) for entry in PromptSet.of(prompts).entries}
        return FixedStates(
            self._config.fixed_states,
            folder,
            step=step,
            teachers=self._teachers,
            guidance={label: self._guidance[label] for label in sorted(labels)},
            prompts=prompts,
            label_of=self._config.label,
            num_steps=self._context.num_steps,
            micro_batch=self._context.micro_batch,
        )

    def credit(self, groups: Sequence[Group], step: int) -> tuple[list[Signal], dict[str, float]]:
        label = self._label([group.prompt for group in groups])
        teacher = self._teachers.activate(label)
        order = self._teachers.labels
        self._teachers.prefetch(order[(order.index(label) + 1) % len(order)])
        paths = [(group.prompt, path) for group in groups for path in group.trajectories]
        signals = [self._signal(prompt, path) for prompt, path in paths]
        if self._config.states == "teacher":
            # It has said so already, when it drew.
            targets = [path.guided for _, path in paths]
        else:
            count, guidance = self._context.micro_batch, self.guidance(label, step)
            read_ahead(teacher, [group.prompt for group in groups], guidance)
            with whole(teacher):
                pairs = guided_velocities(teacher, signals, count, guidance)
            targets = [guided for guided, _ in pairs]
        found = [s.with_fields(target=t) for s, t in zip(signals, targets, strict=True)]
        return found, {f"teacher/is_{name}": float(name == label) for name in order}

    def _label(self, prompts: Sequence[Prompt]) -> str:
        """The one teacher of all these prompts."""
        labels = {self._config.pool(prompt) for prompt in prompts}
        if len(labels) > 1:
            raise ValueError(
                f"need groups of one teacher per step, got {', '.join(sorted(labels))}; draw one "
                "pool at a time"
            )
        return labels.pop()

    def _signal(self, prompt: Prompt, path: Trajectory) -> Signal:
        count = self._context.num_steps
        weight = weights(self._config.weight, path.sigmas, path.sigmas_next, count)
        return Signal(
            prompt=prompt, latents=path.latents, sigmas=path.sigmas, fields={"weight": weight}
        )

    def loss(self, policy: Policy[Any, Any], batch: Batch) -> LossOutput:
        velocity, target = batch.velocity(policy), batch.fields["target"]
        losses = velocity_matching(velocity, target, weight=batch.fields["weight"])
        with torch.no_grad():
            gap = velocity_matching(velocity, target)
            share = gap / velocity_matching(torch.zeros_like(velocity), target)
            metrics = {"distill/gap": float(gap.mean()), "distill/gap_share": float(share.mean())}
        return LossOutput(loss=losses.mean(), metrics=metrics)
