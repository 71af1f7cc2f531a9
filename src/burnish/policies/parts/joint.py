"""Families whose text and image read each other at every noise level.

There what a prompt is to the transformer changes with the noisy latents, so nothing but what the
frozen encoder and VAE made of it can be shared between samples and steps, and a prefix has no
gradient. One call of such a transformer has one layout: source images of equal size and, unless it
takes a mask of the text, prompts of equal length.
"""

from abc import abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor
from torch.nn.utils.rnn import pad_sequence

from burnish.buckets import Size
from burnish.policies.base import Prefix
from burnish.policies.parts.pipelines import PipelinePolicy, check_rows
from burnish.policies.parts.reading import Condition, EncodedPrompt
from burnish.types import Prompt

ATTENTION_TARGETS = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)
"""Projections of image and of text in an attention with weights for each, by diffusers' names."""


PrefixT = TypeVar("PrefixT", bound="JointPrefix")


@dataclass(frozen=True, eq=False)
class JointPrefix(Prefix):
    """Samples that refer to what was read of their prompts."""

    prompts: tuple[EncodedPrompt, ...]

    @property
    def num_rows(self) -> int:
        return len(self.prompts)

    def take(self: PrefixT, rows: Sequence[int]) -> PrefixT:
        return type(self)(tuple(self.prompts[row] for row in rows))

    @staticmethod
    def layout(prompt: Any) -> Hashable:
        """What prompts that can share a call of the transformer have in common."""
        return prompt.layout

    def in_calls(
        self: PrefixT,
        call: Callable[[Tensor, Tensor, PrefixT], Tensor],
        latents: Float[Tensor, "batch y x channel"],
        sigmas: Float[Tensor, " batch"],
    ) -> Float[Tensor, "batch y x channel"]:
        """The velocities that some calls give, one for each layout, in the order of the rows."""
        layouts: dict[Hashable, list[int]] = {}
        for row, prompt in enumerate(self.prompts):
            layouts.setdefault(self.layout(prompt), []).append(row)
        parts = [call(latents[rows], sigmas[rows], self.take(rows)) for rows in layouts.values()]
        if len(parts) == 1:
            return parts[0]
        order = torch.tensor([row for rows in layouts.values() for row in rows])
        return torch.cat(parts).index_select(0, order.argsort().to(parts[0].device))

    def stacked(self, field: str, like: Tensor) -> Tensor:
        """A tensor of all rows, which have one layout, on the device of another."""
        return torch.stack([getattr(prompt, field) for prompt in self.prompts]).to(like)

    def padded(self, field: str, like: Tensor) -> tuple[Tensor, Bool[Tensor, "batch slot"] | None]:
        """Likewise where rows differ in length: zeros follow the shorter ones, and a mask tells
        what is real; None where all is, as attention is faster without one."""
        rows = [getattr(prompt, field).to(like) for prompt in self.prompts]
        lengths = [len(row) for row in rows]
        if min(lengths) == max(lengths):
            return torch.stack(rows), None
        slots = torch.arange(max(lengths), device=like.device)
        limits = torch.tensor(lengths, device=like.device)
        return pad_sequence(rows, batch_first=True), slots < limits[:, None]


def pack(
    grid: Float[Tensor, "batch plane row column"], patch: int = 1
) -> Float[Tensor, "batch y x channel"]:
    """Tokens, each a square of `patch` by `patch` places."""
    return torch.pixel_unshuffle(grid, patch).permute(0, 2, 3, 1).contiguous()


def unpack(
    latents: Float[Tensor, "batch y x channel"], patch: int = 1
) -> Float[Tensor, "batch plane row column"]:
    """Undo `pack`."""
    return torch.pixel_shuffle(latents.permute(0, 3, 1, 2), patch)


class JointPolicy(PipelinePolicy[Condition[Any], JointPrefix]):
    """A policy of such a family; it adds its pipeline, its reader and one call of its transformer.

    A token is a square of `patch` latents, and noise is drawn in float32.
    """

    has_shared_prefix: ClassVar[bool] = False
    patch: ClassVar[int]
    """Side of the square of latents that is one token."""
    noise_patch: ClassVar[int] = 1
    """Likewise of the noise as the pipeline draws it."""

    def __init__(
        self, pipeline: Any, *, resolution: int = 1024, cache_folder: Path | None = None
    ) -> None:
        super().__init__(pipeline, resolution=resolution, cache_folder=cache_folder)
        self._channels = pipeline.transformer.config.in_channels

    @abstractmethod
    def _call(self, latents: Tensor, sigmas: Tensor, prefix: JointPrefix) -> Tensor:
        """Velocity of samples of one layout."""

    @property
    def _stride(self) -> int:
        return self.pipeline.vae_scale_factor * self.patch

    def layout(self, prompt: Prompt) -> Hashable:
        (row,) = self.encode([prompt]).prompts
        return super().layout(prompt), JointPrefix.layout(row)

    def prefix(self, condition: Condition[Any]) -> JointPrefix:
        return JointPrefix(condition.prompts)

    def join(self, prefixes: Sequence[JointPrefix]) -> JointPrefix:
        return JointPrefix(tuple(prompt for prefix in prefixes for prompt in prefix.prompts))

    def velocity(
        self,
        latents: Float[Tensor, "batch y x channel"],
        sigmas: Float[Tensor, " batch"],
        prefix: JointPrefix,
    ) -> Float[Tensor, "batch y x channel"]:
        check_rows(len(latents), prefix)
        self.work.count(len(latents))
        return prefix.in_calls(self._call, latents, sigmas)

    def noise(
        self, generators: Sequence[Generator], size: Size | None = None
    ) -> Float[Tensor, "batch y x channel"]:
        sides = [side * self.noise_patch for side in self._grid(size)]
        shape = (1, self._channels // self.noise_patch**2, *sides)
        drawn = [torch.randn(shape, generator=g, device=g.device) for g in generators]
        return pack(torch.cat(drawn).to(self.device), self.noise_patch)

    def pipeline_noise(
        self, latents: Float[Tensor, "batch y x channel"]
    ) -> Float[Tensor, "batch channel y x"]:
        return unpack(latents)
