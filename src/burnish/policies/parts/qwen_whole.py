"""Calls of `qwen_image21` that share nothing: text, source images and target in one sequence.

Every call reads the prompt again, at the price of that many tokens more, and what it computes stays
inside it. A transformer whose weights are spread over processes needs that: shared keys and values
would leave its blocks behind its back.

Padding would move a shorter prompt's target, so a call has prompts of one length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from burnish.policies.parts.joint import JointPrefix
from burnish.policies.parts.qwen_encoding import SLOT_TOKENS, QwenPrompt


@dataclass(frozen=True, eq=False)
class WholePrefix(JointPrefix):
    """Samples that refer to prompts, which every call reads again."""

    prompts: tuple[QwenPrompt, ...]

    @classmethod
    def join(cls, prefixes: Sequence["WholePrefix"]) -> "WholePrefix":
        """All samples of all prefixes, in order."""
        return cls(tuple(prompt for prefix in prefixes for prompt in prefix.prompts))

    @staticmethod
    def layout(prompt: QwenPrompt) -> tuple[Any, ...]:
        return prompt.layout, len(prompt.is_image)


def whole_velocity(
    transformer: Any,
    like: Tensor,
    latents: Float[Tensor, "batch y x channel"],
    sigmas: Float[Tensor, " batch"],
    prefix: WholePrefix,
) -> Float[Tensor, "batch y x channel"]:
    """Velocity of samples of one layout; `like` is as inputs of the transformer are."""
    tokens, first = latents.flatten(1, 2), prefix.prompts[0]
    target = first.is_image.new_ones(tokens.shape[1] // SLOT_TOKENS)
    is_image = torch.cat([first.is_image, target]).to(like.device)
    (output,) = transformer(
        hidden_states=torch.cat([prefix.stacked("source", like), tokens.to(like)], dim=1),
        timestep=sigmas.to(like.device),
        encoder_hidden_states=prefix.stacked("embedding", like),
        img_shapes=[[*first.shapes, (1, *latents.shape[1:3])]] * len(latents),
        img_mask=is_image.expand(len(latents), -1),
        return_dict=False,
    )
    return output[:, -tokens.shape[1] :].float().reshape(latents.shape)
