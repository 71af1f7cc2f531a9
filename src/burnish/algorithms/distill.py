"""On-policy distillation: several teachers, guidance included, into one student.

The student draws its own path without guidance; at states of that path it learns the velocity that
the teacher of the prompt's task would follow there, as that teacher is deployed, guidance and all:

    loss = mean over states of |v_student(x, sigma) - v_teacher,guided(x, sigma)|^2

States are constants. The student therefore ends up drawing at guidance 1 what its teachers draw at
theirs (arXiv 2606.27608, section 4.3, Eq. L_OPD). The sum runs over n = 0..N-1, the points the
solver really visits; the paper's index skips pure noise. One teacher per optimizer step, and only
that one on the device.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from burnish.algorithms.base import (
    Algorithm,
    AlgorithmConfig,
    Batch,
    LearnsFrom,
    Setting,
    evaluate_guided,
)
from burnish.config import Config, ConfigError
from burnish.objectives import velocity_matching
from burnish.policies.base import Policy
from burnish.types import Group, LossOutput, Signal, Task


class TeacherConfig(Config):
    """A teacher as it is deployed."""

    path: str
    """A diffusers folder, or `stage:<name>` for the result of an earlier stage of the run."""
    guidance_scale: float | None = Field(default=None, ge=1)
    """None is the scale that its own stage drew with; a teacher from elsewhere must have one."""


class DistillConfig(AlgorithmConfig):
    """Velocity matching on the student's own path."""

    needs_rewards: ClassVar[bool] = False
    learns_from: ClassVar[LearnsFrom] = "path"
    one_task_per_step: ClassVar[bool] = True
    kind: Literal["distill"] = "distill"
    teachers: Mapping[Task, TeacherConfig]
    """Teacher of each task; a task without a teacher is an error, never a default."""

    @model_validator(mode="after")
    def _has_teachers(self) -> "DistillConfig":
        if not self.teachers:
            raise ValueError("need at least one teacher, got none; name one for each task")
        return self

    def covers(self, task: Task) -> bool:
        return task in self.teachers

    def build(self, setting: Setting) -> "Distill":
        return Distill(self, setting)


class Teachers:
    """All teachers, of which one at a time is on the device.

    The weights of idle teachers wait on the CPU; activating a teacher copies its weights into the
    one resident transformer, so device memory does not grow with the number of teachers.
    """

    def __init__(self, student: Policy[Any, Any], configs: Mapping[Task, TeacherConfig]) -> None:
        self._resident = student.sibling()
        self._active: Task | None = None
        self._weights: dict[Task, dict[str, Tensor]] = {}
        expected = student.fingerprint()
        for task, config in configs.items():
            teacher = type(student).load(Path(config.path), resolution=student.resolution)
            for part, digest in teacher.fingerprint().items():
                if digest != expected[part]:
                    raise ConfigError(
                        f"need teachers that share the student's {part}, got another in "
                        f"{config.path}; train the teacher from the student's base"
                    )
            weights = {name: t.cpu() for name, t in teacher.transformer.state_dict().items()}
            self._check_shapes(weights, config.path)
            self._weights[task] = weights

    def _check_shapes(self, weights: Mapping[str, Tensor], path: str) -> None:
        mine = self._resident.transformer.state_dict()
        wrong = [n for n in mine.keys() | weights.keys() if n not in mine or n not in weights]
        wrong += [n for n in mine.keys() & weights.keys() if mine[n].shape != weights[n].shape]
        if wrong:
            raise ConfigError(
                f"need teachers of the student's architecture, got {len(wrong)} other tensors in "
                f"{path}, first {sorted(wrong)[0]}; train the teacher from the student's base"
            )

    def activate(self, task: Task) -> Policy[Any, Any]:
        """The teacher of a task, on the device.

        Raises:
            ConfigError: no teacher has this task.
        """
        if task not in self._weights:
            raise ConfigError(
                f"need a teacher for task {task!r}, got teachers for {sorted(self._weights)}; "
                f"add algorithm.teachers.{task} or leave out its prompts"
            )
        if task != self._active:
            self._resident.transformer.load_state_dict(self._weights[task])
            self._active = task
        return self._resident


class Distill(Algorithm):
    """On-policy distillation; see the module."""

    def __init__(self, config: DistillConfig, setting: Setting) -> None:
        self._config, self._setting = config, setting
        for task, teacher in config.teachers.items():
            if teacher.guidance_scale is None:
                raise ConfigError(
                    f"need the guidance scale that the teacher in {teacher.path} is deployed with, "
                    f"got none; set algorithm.teachers.{task}.guidance_scale"
                )
        self._teachers = Teachers(setting.policy, config.teachers)

    def credit(self, groups: Sequence[Group], step: int) -> tuple[list[Signal], dict[str, float]]:
        task = groups[0].prompt.task
        if any(group.prompt.task != task for group in groups):
            raise ValueError(
                "need groups of one task per step, got several; draw one task at a time"
            )
        teacher = self._teachers.activate(task)
        signals = [
            Signal(prompt=group.prompt, latents=t.latents, sigmas=t.sigmas)
            for group in groups
            for t in group.trajectories
        ]
        scale = self._config.teachers[task].guidance_scale
        assert scale is not None, "refused when the algorithm was built"
        targets = evaluate_guided(teacher, signals, self._setting.micro_batch, scale)
        return [
            signal.with_fields(target=guided)
            for signal, (guided, _) in zip(signals, targets, strict=True)
        ], {f"teacher/is_{name}": float(name == task) for name in self._config.teachers}

    def loss(self, policy: Policy[Any, Any], batch: Batch) -> LossOutput:
        velocity = batch.velocity(policy)
        losses = velocity_matching(velocity, batch.fields["target"])
        with torch.no_grad():
            size = velocity_matching(torch.zeros_like(velocity), batch.fields["target"]).mean()
            metrics = {
                "distill/gap": float(losses.mean()),
                "distill/gap_share": float(losses.mean() / size),
            }
        return LossOutput(loss=losses.mean(), metrics=metrics)
