"""Draw groups of samples, and keep the states that training asks for.

Decided here: the sampler is the deterministic Euler step, except in a short window of steps where
a kernel injects noise, and never in the last step, whose transition would be a spike. Every sample
has a random generator of its own, named by run seed, step, prompt and member, so that a sample does
not depend on what it was batched with. Prompts are read once per group, the empty prompt included.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from burnish import runtime
from burnish.batches import branches
from burnish.buckets import Size
from burnish.flow import KERNELS
from burnish.policies.base import Guided, Policy, Prefix
from burnish.rollout_config import RolloutConfig
from burnish.types import Group, Guidance, Prompt, Task, Trajectory


@dataclass
class _Sample:
    """One path under way."""

    seed: int
    generator: Generator
    start: Float[Tensor, "1 y x channel"]
    """Initial noise."""
    size: Size
    """Of the image; one for all samples of a batch."""
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
    is_decoded: bool = True,
) -> list[Group]:
    """Draw one group for each prompt, without gradient and in eval mode.

    Args:
        policy: whose images these are.
        prompts: of any mix of tasks; their ids must differ, as they name the random draws.
        config: how to draw.
        seed: seed of the run.
        step: step of the run; with `seed` and the prompt's id it decides every random number.
        on_batch: called with complete groups as soon as their images exist.
        is_decoded: whether anybody looks at the images; without, they have no pixels.

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
        read_ahead(policy, prompts, config.guidance)
        for rows in _blocks(policy, prompts, max(1, config.micro_batch // config.group_size)):
            block = [prompts[row] for row in rows]
            members = [_members(policy, prompt, config, seed, step) for prompt in block]
            paths = _trajectories(policy, block, members, config, is_decoded=is_decoded)
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
    on_step: Callable[[int], None] | None = None,
) -> list[Float[Tensor, "3 _ _"]]:
    """One image for each prompt, of the size of its bucket, without injected noise.

    Args:
        policy: whose images these are.
        prompts: of any mix of tasks; a prompt may stand there several times.
        num_steps: sampler steps.
        guidance: scale 1 draws without.
        seeds: one for each prompt, of the initial noise, as the pipeline's generator would have it.
        micro_batch: images at once; changes no image.
        on_step: called behind every step of a batch with the number of its images.

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
        read_ahead(policy, prompts, config.guidance)
        for rows in _blocks(policy, prompts, micro_batch):
            block = [prompts[row] for row in rows]
            samples = [
                [_sample_of(policy, policy.buckets.size(prompts[row]), seeds[row])] for row in rows
            ]
            paths = _trajectories(policy, block, samples, config, on_step=on_step)
            images |= {row: group[0].image for row, group in zip(rows, paths, strict=True)}
    return [images[row] for row in range(len(prompts))]


def read_ahead(policy: Policy[Any, Any], prompts: Sequence[Prompt], guidance: Guidance) -> None:
    """Have prompts read, and what guidance leads away from: all at once, as encoders may have to
    come to the device for it, and before a transformer that is spread is gathered beside them."""
    for task in dict.fromkeys(prompt.task for prompt in prompts):
        asked = [prompt for prompt in prompts if prompt.task == task]
        policy.encode(asked)
        if guidance.scale != 1:
            policy.encode_null(asked, guidance.negative_prompt)


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


def _blocks(policy: Policy[Any, Any], prompts: Sequence[Prompt], count: int) -> Iterator[list[int]]:
    """Rows of at most `count` prompts of one task and one size each."""
    kinds: dict[tuple[Task, Size], list[int]] = {}
    for row, prompt in enumerate(prompts):
        kinds.setdefault((prompt.task, policy.buckets.size(prompt)), []).append(row)
    for rows in kinds.values():
        yield from (rows[first : first + count] for first in range(0, len(rows), count))


def _sample_of(policy: Policy[Any, Any], size: Size, seed: int) -> _Sample:
    generator = torch.Generator().manual_seed(seed)
    return _Sample(seed, generator, policy.noise([generator], size), size)


def _members(
    policy: Policy[Any, Any], prompt: Prompt, config: RolloutConfig, seed: int, step: int
) -> list[_Sample]:
    """The samples of one group at their starts."""
    choice = runtime.generator(seed, "window", step, prompt.id)
    window = config.window_at(step, choice)
    wanted, size = config.kept_steps(window, choice), policy.buckets.size(prompt)
    samples = [
        _sample_of(policy, size, runtime.derived_seed(seed, "sample", step, prompt.id, member))
        for member in range(config.group_size)
    ]
    if config.shared_noise:
        draws = runtime.generator(seed, "shared noise", step, prompt.id)
        shared = policy.noise([draws], size)
        for member in samples:
            member.start = shared
    for member in samples:
        member.window, member.wanted = window, wanted
    return samples


def _trajectories(
    policy: Policy[Any, Any],
    prompts: Sequence[Prompt],
    groups: Sequence[Sequence[_Sample]],
    config: RolloutConfig,
    *,
    is_decoded: bool = True,
    on_step: Callable[[int], None] | None = None,
) -> list[list[Trajectory]]:
    """Paths of all samples, for prompts of one task and one size."""
    is_guided = config.guidance_scale != 1
    away = policy.encode_null(prompts, config.negative_prompt) if is_guided else None
    prefix, null = branches(policy, policy.encode(prompts), away)
    flat = [(row, member) for row, group in enumerate(groups) for member in group]
    paths: list[list[Trajectory]] = [[] for _ in prompts]
    for first in range(0, len(flat), config.micro_batch):
        rows, batch = zip(*flat[first : first + config.micro_batch], strict=True)
        null_rows = None if null is None else null.take(rows)
        clean = _denoise(policy, batch, prefix.take(rows), null_rows, config, on_step)
        images = policy.decode(clean).cpu() if is_decoded else torch.zeros(len(rows), 3, 0, 0)
        for place, row in enumerate(rows):
            paths[row].append(_trajectory(batch[place], clean[place].cpu(), images[place]))
    return paths


def _denoise(
    policy: Policy[Any, Any],
    samples: Sequence[_Sample],
    prefix: Prefix,
    null: Prefix | None,
    config: RolloutConfig,
    on_step: Callable[[int], None] | None,
) -> Float[Tensor, "batch y x channel"]:
    """Clean latents; the wanted steps are left in the samples."""
    size = samples[0].size
    schedule = policy.schedule(config.num_steps, size)
    latents = torch.cat([sample.start for sample in samples]).float()
    for step in range(config.num_steps):
        sigma, sigma_next = (level.expand(len(samples)) for level in schedule[step : step + 2])
        found = _ask(policy, step, samples, latents, sigma, prefix, null, config.guidance_scale)
        guided = found.guided
        next_latents = KERNELS["ode"](
            latents, guided, sigma=sigma, sigma_next=sigma_next, noise_level=0.0
        ).mean
        noise = torch.zeros_like(latents)
        # Windows differ between prompts, so one batch may hold both kinds of step.
        rows = [row for row, sample in enumerate(samples) if step in sample.window]
        if rows:
            drawn = policy.noise([samples[row].generator for row in rows], size)
            noise[rows] = drawn.to(noise)
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
            sigmas=sigma,
            sigmas_next=sigma_next,
            noise=noise,
            **found._asdict(),
        )
        latents = next_latents
        if on_step is not None:
            on_step(len(samples))
    return latents


def _ask(
    policy: Policy[Any, Any],
    step: int,
    samples: Sequence[_Sample],
    latents: Float[Tensor, "batch y x channel"],
    sigma: Float[Tensor, " batch"],
    prefix: Prefix,
    null: Prefix | None,
    scale: float,
) -> Guided:
    """Velocities of all samples; those that are still one are asked for once."""
    rows, places = _distinct(samples, step)
    is_shared = len(rows) < len(samples)
    if is_shared:
        latents, sigma, prefix = latents[rows], sigma[rows], prefix.take(rows)
        null = None if null is None else null.take(rows)
    if null is None:
        velocity = policy.velocity(latents, sigma, prefix)
        found = Guided(velocity, velocity, velocity)
    else:
        found = policy.guided(latents, sigma, prefix, null, scale)
    return Guided(*(velocity[places] for velocity in found)) if is_shared else found


def _distinct(samples: Sequence[_Sample], step: int) -> tuple[list[int], list[int]]:
    """A row of every state at the start of a step, and for all samples the place of theirs: members
    with one start are one until the first step that adds a noise of their own."""
    rows: list[int] = []
    places: dict[int, int] = {}
    found = []
    for row, sample in enumerate(samples):
        has_parted = bool(sample.window) and step > sample.window[0]
        state = -1 - row if has_parted else id(sample.start)
        if state not in places:
            places[state] = len(rows)
            rows.append(row)
        found.append(places[state])
    return rows, found


def _keep(step: int, samples: Sequence[_Sample], **states: Tensor) -> None:
    rows = [row for row, sample in enumerate(samples) if step in sample.wanted]
    if not rows:
        return
    # One copy to the CPU for the batch, and none of it is a view of what goes on changing.
    kept = {name: state[rows].cpu() for name, state in states.items()}
    for place, row in enumerate(rows):
        samples[row].kept.append({name: state[place] for name, state in kept.items()})


def _trajectory(
    sample: _Sample, clean: Float[Tensor, "y x channel"], image: Float[Tensor, "3 height width"]
) -> Trajectory:
    """The record of a finished path."""
    steps: dict[str, Tensor] = {
        name: clean.new_zeros(0, *clean.shape) for name in ("latents", "noise", *Guided._fields)
    } | {name: clean.new_zeros(0) for name in ("sigmas", "sigmas_next")}
    if sample.kept:
        steps = {name: torch.stack([kept[name] for kept in sample.kept]) for name in steps}
    return Trajectory(seed=sample.seed, clean=clean, image=image, **steps)
