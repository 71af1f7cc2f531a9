"""Latents of Qwen-Image's VAEs: they have an axis of frames, of which an image fills one."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def _statistics(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the channels, shaped for `batch channel frame y x`."""
    mean, std = (
        torch.tensor(values, device=vae.device, dtype=vae.dtype).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std


def encode_grid(
    vae: Any, pixels: Float[Tensor, "batch colour height width"]
) -> Float[Tensor, "batch channel y x"]:
    """Normalised latents of pixels in [-1, 1], in the VAE's precision: its posterior's mode."""
    mean, std = _statistics(vae)
    latents = vae.encode(pixels.to(vae.device, vae.dtype).unsqueeze(2)).latent_dist.mode()
    return ((latents - mean) / std)[:, :, 0]


def decode_grid(
    vae: Any, grid: Float[Tensor, "batch channel y x"]
) -> Float[Tensor, "batch colour height width"]:
    """Pixels in [0, 1], float32, of normalised latents."""
    mean, std = _statistics(vae)
    latents = grid.to(vae.device, vae.dtype).unsqueeze(2) * std + mean
    pixels = vae.decode(latents, return_dict=False)[0][:, :, 0]
    return (pixels.float() / 2 + 0.5).clamp(0, 1)
