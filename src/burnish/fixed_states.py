"""How near a student has come to its teachers, on states that do not move with it.

The loss of on-policy distillation is taken on the student's own states. These change while it
learns, so that the loss may fall while the pictures get worse, and no two checkpoints are compared
on the same ground. Here the ground is fixed: states of each teacher's own path, and pictures that
are known to answer a prompt, noised to several levels. The student that is written is the one with
the least gap there, and `burnish.folding` tells how much of the gap was guidance.

    fixed-states/looks.jsonl        a row for each look, for each teacher and noise level
    fixed-states/states.safetensors the states, with the velocities of teachers and start
    fixed-states/step-.../          the weights with the least gap so far
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from burnish import images, runtime
from burnish.batches import guided_velocities, velocities
from burnish.config import Config, ConfigError, located
from burnish.flow import add_noise
from burnish.folding import folding
from burnish.looks import LEVELS, LOOKS, Look, Looks, Watch, best_of
from burnish.policies.base import Policy
from burnish.prompt_sets import PromptSet
from burnish.prompts import read_prompts
from burnish.residency import Teachers
from burnish.rollout import read_ahead, sample
from burnish.rollout_config import RolloutConfig
from burnish.runtime import Runtime
from burnish.sharding import whole
from burnish.tracking import read_rows, writing
from burnish.types import Guidance, Labelled, Prompt, Signal

_FIELDS = ("start", "start_guided", "target")
"""Velocities at a state: of the start, of the start guided, of the teacher."""
FOLDER = "fixed-states"
"""In that of the stage's run."""
BANDS: Mapping[str, tuple[float, float]] = {
    "all": (0.0, 1.0),
    "high": (2 / 3, 1.0),
    "middle": (1 / 3, 2 / 3),
    "low": (0.0, 1 / 3),
}
"""Noise levels that are told apart: above the first, up to the second."""


class FixedStatesConfig(Config):
    """Where a student is compared with its teachers, and how often."""

    every: int = Field(default=10, ge=1)
    """Steps between two looks."""
    prompts: str | None = None
    """A set for the teachers' paths; None is the stage's own prompts."""
    pictures: str | None = None
    """A set with targets; None compares on paths alone."""
    num_prompts: int = Field(default=8, ge=1)
    """Of each teacher and kind of state, from the end of a set: an evaluation begins at its
    beginning. A teacher with fewer takes them all."""


def chosen(
    config: FixedStatesConfig,
    prompts: Sequence[Prompt],
    labels: Sequence[str],
    label_of: Callable[[Labelled], str | None],
) -> tuple[dict[str, list[Prompt]], dict[str, list[Prompt]]]:
    """Prompts of the paths and of the pictures, by the label of their teacher.

    Args:
        config: which sets, and how many of each.
        prompts: of the stage.
        labels: of all teachers.
        label_of: whose prompt it is; None is nobody's.

    Raises:
        ConfigError: a set that cannot be read, a teacher without a single prompt, a picture that is
            not there, or one id in both sets.
    """

    def last(found: Sequence[Prompt]) -> dict[str, list[Prompt]]:
        every = PromptSet.of(found)
        own = {label: every.select(lambda e, label=label: label_of(e) == label) for label in labels}
        return {label: list(those[-config.num_prompts :]) for label, those in own.items()}

    paths = last(prompts if config.prompts is None else read_prompts(located(config.prompts)))
    known = [] if config.pictures is None else read_prompts(located(config.pictures))
    pictures = last(known)
    for label in labels:
        if not paths[label]:
            raise ConfigError(
                f"need prompts of the teacher {label}, got none in {config.prompts}; choose "
                "another set of prompts, or leave it out to take the stage's own"
            )
        bare = [prompt.id for prompt in pictures[label] if prompt.target is None]
        if bare:
            raise ConfigError(
                f"need a target for every prompt of pictures, got none for {bare[0]!r}; give one "
                "or leave the prompt out"
            )
        both = {p.id for p in paths[label]} & {p.id for p in pictures[label]}
        if both:
            raise ConfigError(
                f"need other ids in pictures than in prompts, got {min(both)!r} in both; rename one"
            )
    return paths, pictures


class FixedStatesWarning(UserWarning):
    """A distillation that may not be worth its result."""


def _gap(look: Look) -> float:
    return look["gap"] if look["step"] else math.inf


def _is_nearer(one: Look, other: Look) -> bool:
    """Whether a look has less of a gap than another; that at the start has none that counts."""
    return _gap(one) < _gap(other)


class FixedStates(Watch):
    """The looks of one distillation."""

    def __init__(
        self,
        config: FixedStatesConfig,
        folder: Path,
        *,
        step: int,
        teachers: Teachers,
        guidance: Mapping[str, Guidance],
        prompts: Sequence[Prompt],
        label_of: Callable[[Labelled], str | None],
        num_steps: int,
        micro_batch: int,
    ) -> None:
        """Read what was seen before.

        Args:
            config: where, and how often.
            folder: of the stage's run.
            step: at which the stage goes on.
            teachers: of the stage.
            guidance: of each teacher as it is deployed.
            prompts: of the stage.
            label_of: whose prompt it is; None is nobody's.
            num_steps: of the teachers' paths.
            micro_batch: states at once.

        Raises:
            ConfigError: sets of prompts that do not serve.
        """
        self.looks = Looks(folder / FOLDER, every=config.every, step=step, is_better=_is_nearer)
        self._teachers, self._guidance = teachers, dict(guidance)
        self._num_steps, self._micro_batch = num_steps, micro_batch
        self._states: dict[str, list[Signal]] = {}
        self._paths, self._pictures = chosen(config, prompts, list(guidance), label_of)

    def look(
        self, policy: Policy[Any, Any], step: int, reward: float | None, rt: Runtime
    ) -> dict[str, float]:
        """Measure the gap to every teacher."""
        with rt.autocast():
            if not self.looks.rows:
                self._fix(policy)
            elif not self._states:
                self._states = self._read()
            parts = [
                part
                for label, own in self._states.items()
                for part in self._parts(policy, label, own)
            ]
        whole = [part for part in parts if part["band"] == "all"]
        gap = sum(part["gap"] / part["way"] for part in whole) / len(whole)
        row: Look = {"step": step, "gap": gap, "parts": parts}
        self.looks.rows.append(row)
        told = {"fixed_states/gap": gap}
        for part in whole:
            told[f"fixed_states/gap_{part['label']}"] = part["gap"] / part["way"]
            told[f"fixed_states/guidance_{part['label']}"] = part["guidance"]
            told[f"fixed_states/learnt_{part['label']}"] = part["learnt"]
        return told

    def restore(self, policy: Policy[Any, Any]) -> None:
        """Give the policy the weights with the least gap; a start is no student."""
        if self.looks.best["gap"] >= self.looks.rows[0]["gap"]:
            message = (
                "no student came nearer to its teachers than the start was; train longer, or lower "
                "optimizer.learning_rate"
            )
            warnings.warn(message, FixedStatesWarning, stacklevel=2)
        self.looks.restore(policy)

    def _parts(
        self, policy: Policy[Any, Any], label: str, signals: Sequence[Signal]
    ) -> list[dict[str, Any]]:
        """One entry for each band of noise levels that has states."""
        student = velocities(policy, signals, self._micro_batch)
        fields = [[signal.fields[name] for signal in signals] for name in _FIELDS]
        parts = []
        for band, (low, high) in BANDS.items():
            rows = [(signal.sigmas > low) & (signal.sigmas <= high) for signal in signals]
            if any(bool(own.any()) for own in rows):
                # Flat, as states differ in size.
                ours, start, guided, target = (
                    torch.cat([one[own].flatten() for one, own in zip(values, rows, strict=True)])
                    for values in (student, *fields)
                )
                found = folding(ours, start, guided, target)
                parts.append({"label": label, "band": band, **asdict(found)})
        return parts

    def prepare(self, policy: Policy[Any, Any], rt: Runtime) -> None:
        """Draw the states and ask the teachers, before the first look."""
        if self.looks.rows:
            return
        for label, guidance in self._guidance.items():
            teacher = self._teachers.activate(label)
            prompts = [*self._paths[label], *self._pictures[label]] if rt.is_main else []
            with rt.autocast():
                read_ahead(teacher, prompts, guidance)
            with whole(teacher), rt.autocast():
                if rt.is_main:
                    places = [*self._on_paths(teacher, label), *self._on_pictures(policy, label)]
                    wanted = guided_velocities(teacher, places, self._micro_batch, guidance)
                    self._states[label] = [
                        signal.with_fields(target=target)
                        for signal, (target, _) in zip(places, wanted, strict=True)
                    ]

    def _fix(self, policy: Policy[Any, Any]) -> None:
        """Ask the policy at the states, which is still the start, and write all of it down."""
        for label, guidance in self._guidance.items():
            signals = self._states[label]
            ours = guided_velocities(policy, signals, self._micro_batch, guidance)
            self._states[label] = [
                signal.with_fields(start_guided=guided, start=conditional)
                for signal, (guided, conditional) in zip(signals, ours, strict=True)
            ]
        with writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            save_file(_packed(self._states), self._path)

    def _read(self) -> dict[str, list[Signal]]:
        """The states as they were fixed at the start."""
        stored = load_file(self._path)
        return {
            label: [
                Signal(
                    prompt=prompt,
                    latents=stored[f"{label}.{place}.latents"],
                    sigmas=stored[f"{label}.{place}.sigmas"],
                    fields={name: stored[f"{label}.{place}.{name}"] for name in _FIELDS},
                )
                for place, prompt in enumerate([*self._paths[label], *self._pictures[label]])
            ]
            for label in self._guidance
        }

    @property
    def _path(self) -> Path:
        return self.looks.folder / "states.safetensors"

    def _on_paths(self, teacher: Policy[Any, Any], label: str) -> list[Signal]:
        """States of the path that a teacher draws as it is deployed."""
        plan = RolloutConfig(
            num_steps=self._num_steps,
            **self._guidance[label].settings(),
            group_size=1,
            window=0,
            keep=min(len(LEVELS), self._num_steps),
            micro_batch=self._micro_batch,
        )
        return [
            Signal(prompt=group.prompt, latents=path.latents, sigmas=path.sigmas)
            for group in sample(teacher, self._paths[label], plan, seed=0, step=0, is_decoded=False)
            for path in group.trajectories
        ]

    def _on_pictures(self, policy: Policy[Any, Any], label: str) -> list[Signal]:
        """Known pictures at each noise level."""
        found = []
        for prompt in self._pictures[label]:
            assert prompt.target is not None, "refused when the set was read"
            size = policy.buckets.size(prompt)
            picture = images.decode(prompt.target, where=f"target of prompt {prompt.id!r}")
            pixels = images.to_tensor(picture.convert("RGB").resize((size.width, size.height)))
            with torch.no_grad():
                clean = policy.encode_images(pixels[None].to(policy.device)).float().cpu()
            clean = clean.expand(len(LEVELS), *clean.shape[1:])
            draws = runtime.generator(0, "fixed states", prompt.id)
            sigmas = torch.tensor(LEVELS)
            latents = add_noise(clean, torch.randn(clean.shape, generator=draws), sigmas)
            found.append(Signal(prompt=prompt, latents=latents, sigmas=sigmas))
        return found


def folded(folder: Path) -> list[dict[str, Any]]:
    """What the written student has taken in, by teacher and band of noise; nothing without a look.

    Args:
        folder: of the stage's run.
    """
    looks = read_rows(folder / FOLDER / LOOKS)
    best = best_of(looks, _is_nearer) if looks else {"step": 0, "parts": []}
    return [{"step": best["step"], **part} for part in best["parts"]]


def _packed(states: Mapping[str, Sequence[Signal]]) -> dict[str, Tensor]:
    """All tensors of all signals, by label, place and name, each with memory of its own."""
    return {
        f"{label}.{place}.{name}": values.float().contiguous().clone()
        for label, signals in states.items()
        for place, signal in enumerate(signals)
        for name, values in {
            "latents": signal.latents,
            "sigmas": signal.sigmas,
            **signal.fields,
        }.items()
    }
