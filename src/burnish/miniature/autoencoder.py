"""Train the miniature's autoencoder: a tiny `AutoencoderKLQwenImage21`.

Sixteen tokens of 64 channels describe a 64 x 64 picture. The network works on patches of 16 x 16
pixels, one to a token, and starts as what is best among linear autoencoders of such patches: their
principal components, whitened. After 90 seconds on one core its error was a third of that from
random weights, and its latents stay nearly white. That matters more than the last digit of the
error: where a few channels hold all the variance, a diffusion model sees the rest only at the very
end of a path, and draws it as a smear.

The loss is the squared and the absolute error of the pixels: the absolute error alone would rather
erase a thin letter than risk it. A diffusion model needs smooth latents more than a generative
prior, so the latents get a little noise and a light pull to the origin instead of a KL term.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from burnish.miniature.linear_start import start_linear
from burnish.runtime import Runtime, quick
from burnish.vision_build import ensure_torchvision

# Before the import below: it fails where torch and torchvision are unequal builds.
ensure_torchvision()

from diffusers import AutoencoderKLQwenImage21  # noqa: E402

PATCH = 16
Z_DIM = 64

SIZES: dict[str, Any] = {
    "base_dim": 2 * Z_DIM,
    "decoder_base_dim": 2 * Z_DIM,
    "dim_mult": [1],
    "num_res_blocks": 1,
    "z_dim": Z_DIM,
    "patch_size": PATCH,
    "in_channels": 4 * PATCH**2,
    "out_channels": 4 * PATCH**2,
    "temperal_downsample": [],
}


@dataclass(frozen=True, kw_only=True)
class AutoencoderPlan:
    """How long and how fast the autoencoder is trained."""

    steps: int = 2500
    decoder_steps: int = 800
    """Further steps of the decoder alone: they cost half as much and make pictures crisper."""
    batch_size: int = 32
    learning_rate: float = 1.5e-3
    latent_noise: float = 0.1
    latent_pull: float = 1e-4


def new_autoencoder(
    mean: list[float] | None = None, std: list[float] | None = None
) -> AutoencoderKLQwenImage21:
    """An untrained autoencoder; `mean` and `std` are the 64 channel statistics of its latents."""
    return AutoencoderKLQwenImage21(
        **SIZES, latents_mean=mean or [0.0] * Z_DIM, latents_std=std or [1.0] * Z_DIM
    )


def to_input(pixels: np.ndarray) -> Tensor:
    """uint8 `batch height width 3` -> float `batch 4 1 height width` in [-1, 1], alpha 1."""
    rgb = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    return torch.cat([rgb, torch.ones_like(rgb[:, :1])], dim=1).unsqueeze(2)


def patches(images: Float[Tensor, "batch 4 1 height width"]) -> Float[Tensor, "patch value"]:
    """What the autoencoder's first convolution sees at each place of each image."""
    batch, channels, _, height, width = images.shape
    rows, columns = height // PATCH, width // PATCH
    split = images.reshape(batch, channels, rows, PATCH, columns, PATCH)
    return split.permute(0, 2, 4, 1, 5, 3).reshape(batch * rows * columns, -1)


def train_autoencoder(
    draw: Callable[[int], np.ndarray],
    plan: AutoencoderPlan,
    runtime: Runtime,
    *,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> AutoencoderKLQwenImage21:
    """Start as principal components, train encoder and decoder, then the decoder alone; the
    latents' statistics go to the config.

    Args:
        draw: `draw(n)` gives pictures, uint8 `n 64 64 3`.
        plan: how long.
        runtime: ranks that share each step's batch.
        on_step: called with the number of the step and its loss.
    """
    vae = new_autoencoder()
    start_linear(vae, patches(to_input(draw(1500))))
    _fit(vae, list(vae.parameters()), draw, plan, runtime, range(plan.steps), on_step)
    mean, std = latent_statistics(vae, draw(512))
    # Every process draws other pictures, and all must normalise alike.
    statistics = torch.tensor([mean, std])
    runtime.broadcast([statistics])
    mean, std = statistics.tolist()
    vae.register_to_config(latents_mean=mean, latents_std=std)
    decoder = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    extra = range(plan.steps, plan.steps + plan.decoder_steps)
    _fit(vae, decoder, draw, plan, runtime, extra, on_step)
    return vae.eval()


def _fit(
    vae: AutoencoderKLQwenImage21,
    parameters: list[torch.nn.Parameter],
    draw: Callable[[int], np.ndarray],
    plan: AutoencoderPlan,
    runtime: Runtime,
    steps: range,
    on_step: Callable[[int, float], None],
) -> None:
    """One training of some of the parameters, with its own schedule."""
    if not steps:
        return
    vae.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    runtime.broadcast(parameters)
    optimizer = torch.optim.AdamW(
        parameters, lr=plan.learning_rate, betas=(0.9, 0.98), weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, plan.learning_rate, total_steps=len(steps), pct_start=0.1
    )
    for step in steps:
        batch = to_input(draw(plan.batch_size))
        with quick().autocast():
            mean = vae.encode(batch, return_dict=False)[0].mean
            noisy = mean + plan.latent_noise * torch.randn_like(mean)
            output = vae.decode(noisy, return_dict=False)[0].float()
        error = output - batch
        loss = 4 * error.pow(2).mean() + error.abs().mean()
        loss = loss + plan.latent_pull * mean.float().pow(2).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        runtime.all_reduce_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        on_step(step, float(loss.detach()))


@torch.no_grad()
def latent_statistics(
    vae: AutoencoderKLQwenImage21, pixels: np.ndarray
) -> tuple[list[float], list[float]]:
    """Mean of each latent channel over some pictures, and the scale it is divided by.

    The scale is the geometric mean of the channel's own standard deviation and of the middle one of
    all channels. Divided by its own, a channel that only sharpens an edge would weigh as much as
    the one that says red or blue, and colours would be settled last; undivided, the colours would
    be all that a diffusion model sees.
    """
    latents = torch.cat(
        [
            vae.encode(to_input(chunk), return_dict=False)[0].mode()
            for chunk in np.array_split(pixels, 8)
        ]
    )
    flat = latents.transpose(0, 1).flatten(1)
    std = flat.std(dim=1).clamp_min(1e-3)
    return flat.mean(dim=1).tolist(), (std * std.median()).sqrt().tolist()
