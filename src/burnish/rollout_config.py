"""How groups are drawn: sampler, guidance, the window that injects noise, the steps that are kept.

All members of a group share window and kept steps; the paper leaves both open.
"""

import itertools
from collections.abc import Sequence
from typing import Literal

import scipy
import torch
from pydantic import Field, model_validator
from torch import Generator

from burnish.config import Config
from burnish.types import Guidance


class RolloutConfig(Config):
    """How groups are drawn."""

    num_steps: int = Field(default=10, ge=1)
    guidance_scale: float = Field(default=3.0, ge=1)
    """1 draws without guidance, and the unconditional branch is not run."""
    negative_prompt: str = ""
    """What guidance leads away from; empty is the empty prompt of the pipeline."""
    group_size: int = Field(default=16, ge=1)
    """Samples of each prompt."""
    kernel: Literal["ode", "flow_sde", "dance", "cps", "precise"] = "precise"
    """Transition inside the window."""
    noise_level: float = Field(default=1.5, ge=0)
    """In the kernel's own unit; 0 is the ODE."""
    window: int = Field(default=2, ge=0)
    """Number of consecutive stochastic steps."""
    window_range: tuple[int, int] | None = None
    """First step and end of the range that holds the window; None is the noisier half."""
    window_start: Literal["random", "first", "sliding"] = "random"
    """Random draws a place in the range for each prompt and step; first is its beginning; sliding
    moves on by one place every `window_every` training steps, from the noisy end of the range to
    the other, and begins again (MixGRPO, arXiv 2507.21802)."""
    window_steps: tuple[int, ...] | None = None
    """Explicit stochastic steps, in place of a range that holds a window; as many as `window`."""
    window_every: int = Field(default=10, ge=1)
    keep: Literal["window", "all", "none", "late"] | int = "window"
    """Which steps are kept. A number K keeps one random step from each K-th part of the path; late
    keeps one, most often of low noise: its place is drawn from Beta(5, 2) (DanceOPD, arXiv
    2606.27377)."""
    shared_noise: bool = False
    """All members start at the same noise, so that only the window tells them apart; their common
    path up to there is computed once."""
    micro_batch: int = Field(default=64, ge=1)
    """Samples at once; changes no sample."""

    @property
    def guidance(self) -> Guidance:
        """Scale and negative prompt."""
        return Guidance(self.guidance_scale, self.negative_prompt)

    @property
    def is_stochastic(self) -> bool:
        """Whether any step injects noise."""
        return self.window > 0 and self.noise_level > 0 and self.kernel != "ode"

    @property
    def num_kept(self) -> int:
        """Steps of a sample that are kept."""
        if isinstance(self.keep, int):
            return self.keep
        return {"window": self.window, "all": self.num_steps, "none": 0, "late": 1}[self.keep]

    @property
    def window_bounds(self) -> tuple[int, int]:
        """The range that holds the window: first step and end."""
        if self.window_steps:
            return min(self.window_steps), max(self.window_steps) + 1
        if self.window_range is not None:
            return self.window_range
        return 0, min(max(self.window, self.num_steps // 2), self.num_steps - 1)

    def window_at(self, step: int, choice: Generator) -> Sequence[int]:
        """Stochastic steps of a group at a step of training."""
        if self.window_steps is not None:
            return self.window_steps
        start, end = self.window_bounds
        places = end - self.window - start + 1
        if self.window_start == "random" and self.window:
            start += int(torch.randint(places, (), generator=choice))
        elif self.window_start == "sliding" and self.window:
            start += step // self.window_every % places
        return range(start, start + self.window)

    def kept_steps(self, window: Sequence[int], choice: Generator) -> frozenset[int]:
        """Steps of a group that are kept."""
        if isinstance(self.keep, int):
            bounds = [part * self.num_steps // self.keep for part in range(self.keep + 1)]
            return frozenset(
                int(torch.randint(low, high, (), generator=choice))
                for low, high in itertools.pairwise(bounds)
            )
        if self.keep == "late":
            drawn = torch.rand((), generator=choice, dtype=torch.double)
            place = float(scipy.stats.beta.ppf(float(drawn), 5, 2))
            return frozenset([min(int(place * self.num_steps), self.num_steps - 1)])
        return frozenset({"window": window, "all": range(self.num_steps), "none": ()}[self.keep])

    @model_validator(mode="after")
    def _check(self) -> "RolloutConfig":
        if self.window_steps is not None:
            self._check_steps(self.window_steps)
        start, end = self.window_bounds
        if self.window and not 0 <= start <= end - self.window < end < self.num_steps:
            raise ValueError(
                f"need a window range of at least {self.window} steps that ends before the last of "
                f"{self.num_steps} steps, got {start} to {end}; shorten the window, move the "
                "range, or take more steps"
            )
        if self.shared_noise and self.group_size > 1 and not self.is_stochastic:
            raise ValueError(
                "need a window with noise for shared_noise, got none, which makes all members of a "
                f"group one picture; set {self._noisy()} or leave rollout.shared_noise out"
            )
        if self.kernel in ("cps", "dance") and self.window and self.noise_level > 1:
            raise ValueError(
                f"need a noise_level of at most 1 for {self.kernel}, got {self.noise_level:g}, "
                "which is in another kernel's unit; set rollout.noise_level=0.3"
            )
        if self.kernel == "flow_sde" and self.window and self.noise_level and start == 0:
            raise ValueError(
                "need a window after the first step for flow_sde, whose noise is infinite at pure "
                f"noise, got {start} to {end}; set {self._moved()}rollout.kernel=precise"
            )
        if isinstance(self.keep, int) and not 1 <= self.keep <= self.num_steps:
            raise ValueError(
                f"need 1 to {self.num_steps} kept steps, got keep={self.keep}; "
                "keep no more steps than there are, or 'none'"
            )
        return self

    def _noisy(self) -> str:
        """Settings that inject noise, of those that do not."""
        level = 0.3 if self.kernel in ("cps", "dance") else 1.5
        settings = {
            f"window={max(1, min(2, self.num_steps - 1))}": not self.window,
            "kernel=precise": self.kernel == "ode",
            f"noise_level={level:g}": not self.noise_level,
        }
        return " ".join(f"rollout.{one}" for one, is_wanted in settings.items() if is_wanted)

    def _moved(self) -> str:
        """The window one step later, as a setting that is not the only remedy; nothing where the
        path is too short for it."""
        end = max(self.window_bounds[1], self.window + 1)
        setting = f"rollout.window_range=[1, {end}]"
        if self.window_steps is not None:
            end = self.window_steps[-1] + 2
            setting = f"rollout.window_steps={[step + 1 for step in self.window_steps]}"
        return f"{setting} or " if end < self.num_steps else ""

    def _check_steps(self, steps: tuple[int, ...]) -> None:
        is_ordered = list(steps) == sorted(set(steps))
        if not is_ordered or len(steps) != self.window or self.window_range is not None:
            raise ValueError(
                f"need window_steps in order, each once, as many as window={self.window}, and no "
                f"window_range, got {list(steps)}; set rollout.window={len(set(steps))}"
            )
