"""Draw groups of samples, and keep the states that training asks for.

Decided here: the sampler is the deterministic Euler step, except in a short window of steps where
a kernel injects noise, and never in the last step, whose transition would be a spike. Every sample
has a random generator of its own, named by run seed, step, prompt and member, so that a sample does
not depend on what it was batched with. All members of a group share window and kept steps; the
paper leaves both open. Prompts are read once per group, the empty prompt included.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from scipy.stats import beta
from torch import Generator, Tensor

from burnish import runtime
from burnish.config import Config
from burnish.flow import KERNELS
from burnish.policies.base import Guided, Policy, Prefix
from burnish.types import Group, Guidance, Prompt, Trajectory


class RolloutConfig(Config):
    """How groups are drawn."""

    num_steps: int = Field(default=10, ge=1)
    guidance_scale: float = Field(default=3.0, ge=0)
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
    """All members start at the same noise, so that only the window tells them apart."""
    micro_batch: int = Field(default=64, ge=1)
    """Samples at once; changes no sample."""

    @property
    def guidance(self) -> Guidance:
        """Scale and negative prompt."""
        return Guidance(self.guidance_scale, self.negative_prompt)

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
        if self.kernel == "cps" and self.window and self.noise_level > 1:
            raise ValueError(
                f"need a noise_level of at most 1 for cps, got {self.noise_level:g}, which is in "
                "another kernel's unit; set rollout.noise_level=0.5"
            )
        if self.kernel == "flow_sde" and self.window and self.noise_level and start == 0:
            raise ValueError(
                "need a window after the first step for flow_sde, whose noise is infinite at pure "
                f"noise, got {start} to {end}; set window_range=[1, {max(end, self.window + 1)}] "
                "or kernel=precise"
            )
        if isinstance(self.keep, int) and not 1 <= self.keep <= self.num_steps:
            raise ValueError(
                f"need 1 to {self.num_steps} kept steps, got keep={self.keep}; "
                "keep no more steps than there are, or 'none'"
            )
        return self

    def _check_steps(self, steps: tuple[int, ...]) -> None:
        is_ordered = list(steps) == sorted(set(steps))
        if not is_ordered or len(steps) != self.window or self.window_range is not None:
            raise ValueError(
                f"need window_steps in order, each once, as many as window={self.window}, and no "
                f"window_range, got {list(steps)}; set rollout.window={len(set(steps))}"
            )


@dataclass
class _Sample:
    """One path under way."""

    seed: int
    generator: Generator
    start: Float[Tensor, "1 token channel"]
    """Initial noise."""
    window: Sequence[int] = ()
    """Stochastic steps."""
    wanted: frozenset[int] = frozenset()
    """Steps to keep."""
    kept: list[dict[str, Tensor]] = field(default_factory=list)


def sample(
    policy: Policy[Any, Any],
    prompts: Sequence[Prompt],
    config: RolloutConfig,
    *,
    seed: int,
    step: int,
    on_batch: Callable[[list[Group]], None] | None = None,
) -> list[Group]:
    """Draw one group for each prompt, without gradient and in eval mode.

    Args:
        policy: whose images these are.
        prompts: of any mix of tasks; their ids must differ, as they name the random draws.
        config: how to draw.
        seed: seed of the run.
        step: step of the run; with `seed` and the prompt's id it decides every random number.
        on_batch: called with complete groups as soon as their images exist.

    Raises:
        ValueError: two prompts have one id.
    """
    ids = [prompt.id for prompt in prompts]
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise ValueError(
            f"need prompts with distinct ids, got {twice!r} twice; draw it in one group"
        )
    groups: dict[int, Group] = {}
    with _drawing(policy):
        for rows in _blocks(prompts, max(1, config.micro_batch // config.group_size)):
            block = [prompts[row] for row in rows]
            members = [_members(policy, prompt, config, seed, step) for prompt in block]
            paths = _trajectories(policy, block, members, config)
            done = [
                Group(prompt=prompt, trajectories=tuple(group))
                for prompt, group in zip(block, paths, strict=True)
            ]
            groups |= zip(rows, done, strict=True)
            if on_batch is not None:
                on_batch(done)
    return [groups[row] for row in range(len(prompts))]


def draw(
    policy: Policy[Any, Any],
    prompts: Sequence[Prompt],
    *,
    num_steps: int,
    guidance: Guidance,
    seeds: Sequence[int],
    micro_batch: int = 64,
) -> Float[Tensor, "prompt 3 height width"]:
    """One image for each prompt, without injected noise.

    Args:
        policy: whose images these are.
        prompts: of any mix of tasks; a prompt may stand there several times.
        num_steps: sampler steps.
        guidance: scale 1 draws without.
        seeds: one for each prompt, of the initial noise, as the pipeline's generator would have it.
        micro_batch: images at once; changes no image.

    Raises:
        ValueError: there is not one seed for each prompt.
    """
    if len(prompts) != len(seeds):
        raise ValueError(
            f"need one seed for each prompt, got {len(seeds)} seeds and {len(prompts)} prompts; "
            "repeat the prompts or the seeds"
        )
    config = RolloutConfig(
        num_steps=num_steps,
        **guidance.settings(),
        group_size=1,
        window=0,
        keep="none",
        micro_batch=micro_batch,
    )
    images: dict[int, Tensor] = {}
    with _drawing(policy):
        for rows in _blocks(prompts, micro_batch):
            block = [prompts[row] for row in rows]
            samples = [[_sample_of(policy, seeds[row])] for row in rows]
            paths = _trajectories(policy, block, samples, config)
            images |= {row: group[0].image for row, group in zip(rows, paths, strict=True)}
    return torch.stack([images[row] for row in range(len(prompts))])


@contextlib.contextmanager
def _drawing(policy: Policy[Any, Any]) -> Iterator[None]:
    """Eval mode without gradient; `no_grad`, because training reads the states as its inputs."""
    was_training = policy.transformer.training
    policy.transformer.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        policy.transformer.train(was_training)


def _blocks(prompts: Sequence[Prompt], size: int) -> Iterator[list[int]]:
    """Rows of at most `size` prompts of one task each."""
    for task in dict.fromkeys(prompt.task for prompt in prompts):
        rows = [row for row, prompt in enumerate(prompts) if prompt.task == task]
        yield from (rows[first : first + size] for first in range(0, len(rows), size))


def _sample_of(policy: Policy[Any, Any], seed: int) -> _Sample:
    generator = torch.Generator().manual_seed(seed)
    return _Sample(seed, generator, policy.noise([generator]))


def _members(
    policy: Policy[Any, Any], prompt: Prompt, config: RolloutConfig, seed: int, step: int
) -> list[_Sample]:
    """The samples of one group at their starts."""
    choice = runtime.generator(seed, "window", step, prompt.id)
    window = _window(config, step, choice)
    wanted = _wanted(config, window, choice)
    samples = [
        _sample_of(policy, runtime.derived_seed(seed, "sample", step, prompt.id, member))
        for member in range(config.group_size)
    ]
    if config.shared_noise:
        shared = policy.noise([runtime.generator(seed, "shared noise", step, prompt.id)])
        for member in samples:
            member.start = shared
    for member in samples:
        member.window, member.wanted = window, wanted
    return samples


def _window(config: RolloutConfig, step: int, choice: Generator) -> Sequence[int]:
    if config.window_steps is not None:
        return config.window_steps
    start, end = config.window_bounds
    places = end - config.window - start + 1
    if config.window_start == "random" and config.window:
        start += int(torch.randint(places, (), generator=choice))
    elif config.window_start == "sliding" and config.window:
        start += step // config.window_every % places
    return range(start, start + config.window)


def _wanted(config: RolloutConfig, window: Sequence[int], choice: Generator) -> frozenset[int]:
    if isinstance(config.keep, int):
        bounds = [part * config.num_steps // config.keep for part in range(config.keep + 1)]
        return frozenset(
            int(torch.randint(low, high, (), generator=choice))
            for low, high in itertools.pairwise(bounds)
        )
    if config.keep == "late":
        place = float(beta.ppf(float(torch.rand((), generator=choice, dtype=torch.double)), 5, 2))
        return frozenset([min(int(place * config.num_steps), config.num_steps - 1)])
    return frozenset({"window": window, "all": range(config.num_steps), "none": ()}[config.keep])


def _trajectories(
    policy: Policy[Any, Any],
    prompts: Sequence[Prompt],
    groups: Sequence[Sequence[_Sample]],
    config: RolloutConfig,
) -> list[list[Trajectory]]:
    """Paths of all samples, for prompts of one task."""
    is_guided = config.guidance_scale != 1
    away = policy.encode_null(prompts, config.negative_prompt) if is_guided else None
    prefix, null = branches(policy, policy.encode(prompts), away)
    flat = [(row, member) for row, group in enumerate(groups) for member in group]
    paths: list[list[Trajectory]] = [[] for _ in prompts]
    for first in range(0, len(flat), config.micro_batch):
        rows, batch = zip(*flat[first : first + config.micro_batch], strict=True)
        null_rows = None if null is None else null.take(rows)
        clean = _denoise(policy, batch, prefix.take(rows), null_rows, config)
        images = policy.decode(clean).cpu()
        for place, row in enumerate(rows):
            paths[row].append(_trajectory(batch[place], clean[place].cpu(), images[place]))
    return paths


def branches(policy: Policy[Any, Any], condition: Any, away: Any) -> tuple[Prefix, Prefix | None]:
    """Prefix of some prompts, and of what guidance leads away from, so that rows of both join again
    for free; None where `away` is None, which is without guidance."""
    prefix = policy.prefix(condition)
    if away is None:
        return prefix, None
    both = policy.join([prefix, policy.prefix(away)])
    count = prefix.num_rows
    return both.take(range(count)), both.take(range(count, 2 * count))


def _denoise(
    policy: Policy[Any, Any],
    samples: Sequence[_Sample],
    prefix: Prefix,
    null: Prefix | None,
    config: RolloutConfig,
) -> Float[Tensor, "batch token channel"]:
    """Clean latents; the wanted steps are left in the samples."""
    schedule = policy.schedule(config.num_steps)
    latents = torch.cat([sample.start for sample in samples]).float()
    for step in range(config.num_steps):
        sigma, sigma_next = (level.expand(len(samples)) for level in schedule[step : step + 2])
        if null is None:
            velocity = policy.velocity(latents, sigma, prefix)
            found = Guided(velocity, velocity, velocity)
        else:
            found = policy.guided(latents, sigma, prefix, null, config.guidance_scale)
        guided = found.guided
        next_latents = KERNELS["ode"](
            latents, guided, sigma=sigma, sigma_next=sigma_next, noise_level=0.0
        ).mean
        noise = torch.zeros_like(latents)
        # Windows differ between prompts, so one batch may hold both kinds of step.
        rows = [row for row, sample in enumerate(samples) if step in sample.window]
        if rows:
            noise[rows] = policy.noise([samples[row].generator for row in rows]).to(noise)
            next_latents[rows] = KERNELS[config.kernel](
                latents[rows],
                guided[rows],
                sigma=sigma[rows],
                sigma_next=sigma_next[rows],
                noise_level=config.noise_level,
            ).advance(noise[rows])
        _keep(
            step,
            samples,
            latents=latents,
            next_latents=next_latents,
            sigmas=sigma,
            sigmas_next=sigma_next,
            noise=noise,
            **found._asdict(),
        )
        latents = next_latents
    return latents


def _keep(step: int, samples: Sequence[_Sample], **states: Tensor) -> None:
    rows = [row for row, sample in enumerate(samples) if step in sample.wanted]
    if not rows:
        return
    # One copy to the CPU for the batch, and none of it is a view of what goes on changing.
    kept = {name: state[rows].cpu() for name, state in states.items()}
    for place, row in enumerate(rows):
        samples[row].kept.append({name: state[place] for name, state in kept.items()})


def _trajectory(
    sample: _Sample, clean: Float[Tensor, "token channel"], image: Float[Tensor, "3 height width"]
) -> Trajectory:
    """The record of a finished path."""
    steps: dict[str, Tensor] = {
        name: clean.new_zeros(0, *clean.shape)
        for name in ("latents", "next_latents", "noise", *Guided._fields)
    } | {name: clean.new_zeros(0) for name in ("sigmas", "sigmas_next")}
    if sample.kept:
        steps = {name: torch.stack([kept[name] for kept in sample.kept]) for name in steps}
    return Trajectory(seed=sample.seed, clean=clean, image=image, **steps)
