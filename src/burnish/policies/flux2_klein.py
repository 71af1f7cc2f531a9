"""The family of FLUX.2 [klein]: text, target and source images in one joint attention.

Decided here: every edit has its own source images, and prompts whose sources differ in number or
size run in calls of their own, as one call has one set of positions; a picture's size does not
follow its source's unless `buckets` say so; noise is drawn in float32. Guidance is that of the
undistilled base models, away from the empty prompt or a negative one; a step-distilled model has
none and is refused it.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from burnish import runtime, vision_build
from burnish.buckets import Size
from burnish.policies.parts.joint import ATTENTION_TARGETS, JointPolicy, JointPrefix, pack
from burnish.policies.parts.qwen_tokens import byte_tokenizer
from burnish.policies.parts.reading import (
    Condition,
    EncodedPrompt,
    PromptReader,
    require_one_task,
    source_images,
    tokenizer_facts,
)
from burnish.types import Prompt, Task

# Before the imports below: they fail where torch and torchvision are unequal builds.
vision_build.ensure_torchvision()

from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2  # noqa: E402
from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel  # noqa: E402
from diffusers.pipelines.flux2.pipeline_flux2_klein import (  # noqa: E402
    Flux2KleinPipeline,
    compute_empirical_mu,
)
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (  # noqa: E402
    FlowMatchEulerDiscreteScheduler,
)
from transformers import Qwen3Config, Qwen3ForCausalLM  # noqa: E402

FluxCondition = Condition[EncodedPrompt]

_PATCH = 2  # Side of the square of latents that is one token.
_MAX_AREA = 1024 * 1024  # Pixels of a source image; the pipeline makes larger ones smaller.
_SOURCE_TIME = (
    10  # Distance on the first position axis from target to source, and source to source.
)
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class FluxReader(PromptReader[EncodedPrompt]):
    """Text encoder, tokenizer and VAE of one pipeline, and the prompts they have read."""

    row = EncodedPrompt

    def embed(self, prompts: Sequence[Prompt]) -> FluxCondition:
        is_edit = require_one_task(prompts) == "edit"
        pictures = [source_images(prompt) if is_edit else [] for prompt in prompts]
        pipeline = self._pipeline
        states, _ = pipeline.encode_prompt([p.text for p in prompts], device=self.device)
        channels = pipeline.transformer.config.in_channels
        rows = []
        for row, prompt in enumerate(prompts):
            grids = [encode_grid(pipeline.vae, self._pixels(one)) for one in pictures[row]]
            tokens = [pack(grid)[0].flatten(0, 1) for grid in grids]
            rows.append(
                EncodedPrompt(
                    key=self.key(prompt),
                    embedding=states[row],
                    source=torch.cat(tokens) if tokens else states.new_zeros(0, channels),
                    shapes=tuple((1, grid.shape[-2], grid.shape[-1]) for grid in grids),
                )
            )
        return Condition(tuple(rows))

    def _pixels(self, picture: Image.Image) -> Float[Tensor, "1 3 height width"]:
        """In [-1, 1], of a size that the VAE divides, as the pipeline prepares a source."""
        prepare, multiple = self._pipeline.image_processor, self._pipeline.vae_scale_factor * _PATCH
        picture = picture.convert("RGB")
        prepare.check_image_input(picture)
        if picture.width * picture.height > _MAX_AREA:
            picture = prepare._resize_to_target_area(picture, _MAX_AREA)
        width, height = (side // multiple * multiple for side in picture.size)
        pixels: Tensor = prepare.preprocess(picture, height=height, width=width, resize_mode="crop")
        return pixels

    def template(self) -> Any:
        pipeline, tokenizer = self._pipeline, self._pipeline.tokenizer
        return [
            tokenizer.chat_template,
            tokenizer_facts(tokenizer),
            tokenizer.padding_side,
            pipeline.tokenizer_max_length,
        ]


class Flux2KleinPolicy(JointPolicy):
    """A `diffusers.Flux2KleinPipeline` as a policy."""

    family: ClassVar[str] = "flux2_klein"
    pipeline_class: ClassVar[type] = Flux2KleinPipeline
    tasks: ClassVar[tuple[Task, ...]] = ("t2i", "edit")
    # As its makers say of [klein]: https://docs.bfl.ai/guides/prompting_editing_overview
    max_sources: ClassVar[int] = 4
    # Beyond these its pipeline refuses a source.
    min_source_side: ClassVar[int] = 64
    max_source_ratio: ClassVar[float] = 8.0
    patch: ClassVar[int] = _PATCH
    is_masked: ClassVar[bool] = False
    block_classes: ClassVar[tuple[str, ...]] = (
        "Flux2TransformerBlock",
        "Flux2SingleTransformerBlock",
    )
    guidance_argument: ClassVar[str] = "guidance_scale"
    size_arguments: ClassVar[tuple[str, ...]] = ("height", "width")
    # Not the outer projection of the single blocks: its name, attn.to_out, is that of a list of
    # modules in the double ones.
    lora_targets: ClassVar[tuple[str, ...]] = (
        *ATTENTION_TARGETS,
        "attn.to_qkv_mlp_proj",
        "ff.linear_in",
        "ff.linear_out",
    )

    def _make_reader(self, cache_folder: Path | None) -> FluxReader:
        return FluxReader(self.pipeline, resolution=self.resolution, folder=cache_folder)

    @classmethod
    def fixed_guidance(cls, folder: Path) -> float | None:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        # Its steps were distilled, and guidance with them.
        return 1.0 if index.get("is_distilled") else None

    @classmethod
    def tiny(cls, seed: int = 0) -> "Flux2KleinPolicy":
        with runtime.seeded(seed, "tiny", cls.family):
            tokenizer = byte_tokenizer()
            tokenizer.chat_template = _CHAT_TEMPLATE
            padding: Any = tokenizer.pad_token_id
            # The pipeline reads states behind layers 9, 18 and 27.
            encoder = Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=28,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
                max_position_embeddings=1024,
                pad_token_id=padding,
            )
            vae = AutoencoderKLFlux2(
                block_out_channels=(8, 8, 8, 8),
                layers_per_block=1,
                latent_channels=4,
                norm_num_groups=4,
            )
            transformer = Flux2Transformer2DModel(
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=3 * 16,
                axes_dims_rope=(4, 4, 4, 4),
                guidance_embeds=False,
            )
            # Fresh statistics are 0 and 1, and would hide that they are used.
            statistics: Any = vae.bn
            statistics.running_mean.normal_(std=0.3)
            statistics.running_var.uniform_(0.5, 1.5)
            pipeline = Flux2KleinPipeline(
                scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
                vae=vae.eval(),
                text_encoder=Qwen3ForCausalLM(encoder).eval(),
                tokenizer=tokenizer,
                transformer=transformer.eval(),
            )
        pipeline.set_progress_bar_config(disable=True)
        return cls(pipeline, resolution=64)

    def _call(self, latents: Tensor, sigmas: Tensor, prefix: JointPrefix) -> Tensor:
        like = self._like
        texts, sources = prefix.stacked("embedding", like), prefix.stacked("source", like)
        rows, columns = latents.shape[1:3]
        places = [_grid_positions(0, (1, rows, columns))]
        for number, shape in enumerate(prefix.prompts[0].shapes, start=1):
            places.append(_grid_positions(number * _SOURCE_TIME, shape))
        slots = torch.zeros(texts.shape[1], 4, dtype=torch.long)
        slots[:, 3] = torch.arange(texts.shape[1])
        (velocity,) = self.transformer(
            hidden_states=torch.cat([latents.flatten(1, 2).to(like), sources], dim=1),
            timestep=sigmas.to(self.device),
            guidance=None,
            encoder_hidden_states=texts,
            txt_ids=slots.to(self.device),
            img_ids=torch.cat(places).to(self.device),
            return_dict=False,
        )
        return velocity[:, : rows * columns].unflatten(1, (rows, columns)).float()

    def schedule(
        self, num_steps: int, size: Size | None = None
    ) -> Float[Tensor, " steps_plus_one"]:
        tokens = math.prod(self._grid(size))
        shift = compute_empirical_mu(image_seq_len=tokens, num_steps=num_steps)
        sigmas = np.linspace(1.0, 1 / num_steps, num_steps)
        return self._levels(sigmas=sigmas, mu=shift)

    def _decode(
        self, latents: Float[Tensor, "batch y x channel"]
    ) -> Float[Tensor, "batch 3 height width"]:
        mean, std = latent_statistics(self.vae)
        grid = self.pipeline_noise(latents).to(self.vae.device, self.vae.dtype) * std + mean
        pixels = self.vae.decode(torch.pixel_shuffle(grid, _PATCH), return_dict=False)[0]
        return (pixels.float() / 2 + 0.5).clamp(0, 1)

    def _encode_images(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch y x channel"]:
        return pack(encode_grid(self.vae, 2 * images - 1)).float()

    def pipeline_latents(
        self,
        prompt: Prompt,
        noise: Float[Tensor, "1 y x channel"],
        *,
        num_steps: int,
        guidance_scale: float,
        negative_prompt: str = "",
    ) -> Float[Tensor, "1 y x channel"]:
        pictures = None
        if prompt.task == "edit":
            pictures = [picture.convert("RGB") for picture in source_images(prompt)]
        away, _ = self.pipeline.encode_prompt([negative_prompt], device=self.device)
        clean = self.pipeline(
            prompt=prompt.text,
            image=pictures,
            negative_prompt_embeds=away,
            guidance_scale=guidance_scale,
            num_inference_steps=num_steps,
            latents=self.pipeline_noise(noise),
            **self._size(noise)._asdict(),
            output_type="latent",
        ).images
        return pack(_normalised(self.vae, clean))


def latent_statistics(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the VAE's channels, shaped for `batch channel y x`."""
    variance = vae.bn.running_var + vae.config.batch_norm_eps
    return vae.bn.running_mean.view(1, -1, 1, 1), variance.sqrt().view(1, -1, 1, 1)


def encode_grid(
    vae: Any, pixels: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, "batch channel y x"]:
    """Normalised latents of pixels in [-1, 1], squares of them in the channels."""
    return _normalised(vae, vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode())


def _normalised(vae: Any, latents: Tensor) -> Tensor:
    mean, std = latent_statistics(vae)
    return (torch.pixel_unshuffle(latents, _PATCH) - mean) / std


def _grid_positions(time: int, shape: tuple[int, int, int]) -> Tensor:
    """Positions of an image's tokens on the axes of time, height, width and text."""
    frames, height, width = shape
    return torch.cartesian_prod(
        torch.arange(time, time + frames),
        torch.arange(height),
        torch.arange(width),
        torch.zeros(1, dtype=torch.long),
    )
