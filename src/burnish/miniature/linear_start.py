"""Weights with which the tiny autoencoder is a linear one: the whitened principal components of
patches.

The network's only nonlinearities on the way are SiLU and an RMS norm. Both are made harmless. Every
component u runs through two channels, as u and as -u, because

    silu(u) - silu(-u) = u

and two further channels carry a large constant, so that the norm divides by nearly the same number
everywhere. Residual branches start at zero. One pair of channels being spent on the constant, 63 of
64 latent channels carry a component and the last starts empty.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

CONSTANT = 16.0
"""What the constant channels hold; the components have unit variance."""


@dataclass(frozen=True)
class Components:
    """Principal components of patches, largest first."""

    mean: Float[Tensor, " value"]
    directions: Float[Tensor, "value component"]
    scales: Float[Tensor, " component"]
    """Standard deviation along each direction."""


def principal_components(patches: Float[Tensor, "patch value"], count: int) -> Components:
    """The `count` leading principal components of some patches."""
    mean = patches.mean(dim=0)
    centred = patches - mean
    variances, directions = torch.linalg.eigh(centred.T @ centred / len(patches))
    kept = slice(-count, None)
    scales = variances[kept].clamp_min(1e-8).sqrt()
    return Components(mean, directions[:, kept].flip(1), scales.flip(0))


@torch.no_grad()
def start_linear(vae: Any, patches: Float[Tensor, "patch value"]) -> None:
    """Set the weights of a one-level `AutoencoderKLQwenImage21` in place.

    Args:
        vae: its width must be twice its number of latent channels.
        patches: flattened as the autoencoder's own patches are.
    """
    encoder, decoder = vae.encoder, vae.decoder
    width, z_dim = encoder.conv_in.out_channels, decoder.conv_in.in_channels
    if width != 2 * z_dim:
        raise ValueError(f"need a width of {2 * z_dim} for {z_dim} latent channels, got {width}")
    count = z_dim - 1
    found = principal_components(patches, count)
    for module in vae.modules():
        for name in ("conv2", "proj"):  # the last layer of a residual branch
            if isinstance(branch := getattr(module, name, None), nn.Conv2d):
                _set(branch, torch.zeros(0, 0))
    plus, minus = torch.arange(count), count + torch.arange(count)
    constant = torch.zeros(width)
    constant[2 * count :] = CONSTANT
    # Of the norm's output per unit of its input, for components of unit variance.
    gain = width**0.5 / (2 * CONSTANT**2 + 2 * count) ** 0.5

    whiten = (found.directions / found.scales).T
    weight, bias = torch.zeros(width, patches.shape[1]), constant.clone()
    weight[plus], weight[minus] = whiten, -whiten
    bias[plus], bias[minus] = -(whiten @ found.mean), whiten @ found.mean
    _set(encoder.conv_in, weight, bias)
    weight = torch.zeros(2 * z_dim, width)
    weight[plus, plus], weight[plus, minus] = 1 / gain, -1 / gain
    _set(encoder.conv_out, weight)
    _set(vae.quant_conv, torch.eye(2 * z_dim))

    _set(vae.post_quant_conv, torch.eye(z_dim))
    weight = torch.zeros(width, z_dim)
    weight[plus, plus], weight[minus, plus] = 1.0, -1.0
    _set(decoder.conv_in, weight, constant)
    colour = found.directions * found.scales / gain
    weight = torch.zeros(patches.shape[1], width)
    weight[:, plus], weight[:, minus] = colour, -colour
    _set(decoder.conv_out, weight, found.mean)


def _set(
    conv: nn.Conv2d, weight: Float[Tensor, "out inn"], bias: Float[Tensor, " out"] | None = None
) -> None:
    """A convolution that applies `weight` at every place, and zeros elsewhere."""
    middle = conv.weight.shape[-1] // 2
    conv.weight.zero_()
    conv.weight[: weight.shape[0], : weight.shape[1], middle, middle] = weight
    assert conv.bias is not None
    conv.bias.zero_() if bias is None else conv.bias.copy_(bias)
