"""Latents of any shape, and the arithmetic on them that all the maths shares."""

import torch
from jaxtyping import Float
from torch import Tensor

Latents = Float[Tensor, "batch *latent"]
"""Anything shaped like the latents: the target's only, without padding or source-image tokens."""
Velocity = Float[Tensor, "batch *latent"]
"""Noise - clean, shaped like the latents."""
PerSample = Float[Tensor, " batch"]
"""One number per sample."""


def widened(values: Tensor) -> Tensor:
    """Float32, or wider where it is: bfloat16 loses small steps."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def latent_mean(values: Latents) -> PerSample:
    """Over all dimensions of each sample."""
    return values.reshape(len(values), -1).mean(dim=1)


def over(values: PerSample, latents: Latents) -> Tensor:
    """A value of each sample, shaped to multiply latents."""
    return values.to(latents).reshape(-1, *[1] * (latents.ndim - 1))
