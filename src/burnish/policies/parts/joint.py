"""The prefix of families whose text and image read each other at every noise level.

There what a prompt is to the transformer changes with the noisy latents, so nothing but what the
frozen encoder and VAE made of it can be shared between samples and steps, and a prefix has no
gradient. One call of such a transformer has one layout: prompts of equal length, source images of
equal size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from burnish.policies.base import Prefix
from burnish.policies.parts.reading import EncodedPrompt


@dataclass(frozen=True, eq=False)
class JointPrefix(Prefix):
    """Samples that refer to what was read of their prompts."""

    prompts: tuple[EncodedPrompt, ...]

    @property
    def num_rows(self) -> int:
        return len(self.prompts)

    def take(self, rows: Sequence[int]) -> "JointPrefix":
        return JointPrefix(tuple(self.prompts[row] for row in rows))

    @classmethod
    def join(cls, prefixes: Sequence["JointPrefix"]) -> "JointPrefix":
        """All samples of all prefixes, in order."""
        return cls(tuple(prompt for prefix in prefixes for prompt in prefix.prompts))

    def layouts(self) -> list[list[int]]:
        """Rows that can share a call of the transformer."""
        found: dict[object, list[int]] = {}
        for row, prompt in enumerate(self.prompts):
            found.setdefault((prompt.shapes, len(prompt.embedding)), []).append(row)
        return list(found.values())

    def stacked(self, field: str, like: Tensor) -> Tensor:
        """A tensor of all rows, which have one layout, on the device of another."""
        return torch.stack([getattr(prompt, field) for prompt in self.prompts]).to(like)


def pack(grid: Float[Tensor, "batch channel y x"]) -> Float[Tensor, "batch token channel"]:
    """Tokens row by row."""
    return grid.flatten(2).transpose(1, 2).contiguous()


def reassemble(parts: Sequence[Tensor], layouts: Sequence[Sequence[int]]) -> Tensor:
    """Rows in their own order, from one result for each layout."""
    if len(parts) == 1:
        return parts[0]
    order = torch.tensor([row for rows in layouts for row in rows], device=parts[0].device)
    return torch.cat(list(parts)).index_select(0, order.argsort())
