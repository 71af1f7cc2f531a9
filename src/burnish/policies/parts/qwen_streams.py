"""What Qwen-Image's families share: a transformer with a stream each for text and images.

Decided here: prompts of one call may differ in length, as the transformer takes a mask of the text,
and only source images of other sizes need calls of their own; a picture's size does not follow its
source's unless `buckets` say so; noise is drawn in float32. Guidance is true guidance, and a guided
velocity has the length of the conditional one in every token. Without a negative prompt it leads
away from a blank, as the model's authors do; the pipeline itself draws without guidance where it is
given none.
"""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from burnish import runtime, vision_build
from burnish.buckets import Size
from burnish.config import ConfigError
from burnish.policies.parts.joint import (
    ATTENTION_TARGETS,
    JointPolicy,
    JointPrefix,
    pack,
    unpack,
)
from burnish.policies.parts.qwen_tokens import byte_tokenizer
from burnish.policies.parts.qwen_vae import decode_grid, encode_grid
from burnish.policies.parts.reading import (
    Condition,
    EncodedPrompt,
    PromptReader,
    require_one_task,
    tokenizer_facts,
)
from burnish.types import Prompt

# Before the imports below: they fail where torch and torchvision are unequal builds.
vision_build.ensure_torchvision()

from diffusers.models.autoencoders.autoencoder_kl_qwenimage import (  # noqa: E402
    AutoencoderKLQwenImage,
)
from diffusers.models.transformers.transformer_qwenimage import (  # noqa: E402
    QwenImageTransformer2DModel,
)
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (  # noqa: E402
    FlowMatchEulerDiscreteScheduler,
)
from transformers import (  # noqa: E402
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

PolicyT = TypeVar("PolicyT", bound="StreamsPolicy")

PATCH = 2
"""Side of the square of latents that is one token."""


@dataclass(frozen=True, kw_only=True)
class StreamsPrompt(EncodedPrompt):
    """One prompt as the transformer reads it."""

    @property
    def layout(self) -> tuple[Any, ...]:
        return self.shapes


class StreamsReader(PromptReader[StreamsPrompt]):
    """Text encoder and VAE of one pipeline, and the prompts they have read.

    Texts are read by the pipeline's own method, which cuts off its system message and, in text to
    image, whatever is longer than a call would read.
    """

    row = StreamsPrompt

    def embed(self, prompts: Sequence[Prompt]) -> Condition[StreamsPrompt]:
        require_one_task(prompts)
        # One by one: the pipeline of edits reads one set of images for all its texts.
        return Condition(tuple(self._read(prompt) for prompt in prompts))

    def _read(self, prompt: Prompt) -> StreamsPrompt:
        seen, grids = self.sources(prompt)
        states, _ = self._pipeline.encode_prompt(
            prompt.text, device=self.device, max_sequence_length=self._longest, **seen
        )
        none = states.new_zeros(0, self._pipeline.transformer.config.in_channels)
        return StreamsPrompt(
            key=self.key(prompt),
            embedding=states[0],
            source=torch.cat(
                [none, *(pack(grid, PATCH)[0].flatten(0, 1).to(none) for grid in grids)]
            ),
            shapes=tuple((1, grid.shape[-2] // PATCH, grid.shape[-1] // PATCH) for grid in grids),
        )

    def sources(self, prompt: Prompt) -> tuple[dict[str, Any], list[Tensor]]:
        """A prompt's images: what the text encoder is given besides, and normalised latents."""
        return {}, []

    @property
    def _longest(self) -> int:
        """Text tokens that a call of the pipeline reads, unless it is told otherwise."""
        asked = inspect.signature(type(self._pipeline).__call__).parameters
        return asked["max_sequence_length"].default

    def template(self) -> Any:
        pipeline = self._pipeline
        return [
            pipeline.prompt_template_encode,
            pipeline.prompt_template_encode_start_idx,
            [pipeline.tokenizer_max_length, self._longest],
            tokenizer_facts(pipeline.tokenizer),
        ]


class StreamsPolicy(JointPolicy):
    """A pipeline around a `diffusers.QwenImageTransformer2DModel` as a policy."""

    patch: ClassVar[int] = PATCH
    noise_patch: ClassVar[int] = PATCH
    rescales_guidance: ClassVar[bool] = True
    null_prompt: ClassVar[str] = " "
    block_classes: ClassVar[tuple[str, ...]] = ("QwenImageTransformerBlock",)
    guidance_argument: ClassVar[str] = "true_cfg_scale"
    size_arguments: ClassVar[tuple[str, ...]] = ("height", "width")
    lora_targets: ClassVar[tuple[str, ...]] = ATTENTION_TARGETS

    def __init__(
        self, pipeline: Any, *, resolution: int = 1024, cache_folder: Path | None = None
    ) -> None:
        if pipeline.transformer.config.guidance_embeds:
            raise ConfigError(
                "need a transformer with guidance_embeds=false, got true; its guidance is an input "
                "that diffusers' transformer does not take: use a model with true guidance"
            )
        super().__init__(pipeline, resolution=resolution, cache_folder=cache_folder)

    def _make_reader(self, cache_folder: Path | None) -> PromptReader[Any]:
        return StreamsReader(self.pipeline, resolution=self.resolution, folder=cache_folder)

    @classmethod
    def tiny(cls: type[PolicyT], seed: int = 0) -> PolicyT:
        with runtime.seeded(seed, "tiny", cls.family):
            parts = _tiny_parts()
        asked = inspect.signature(cls.pipeline_class.__init__).parameters
        pipeline: Any = cls.pipeline_class(**{n: part for n, part in parts.items() if n in asked})
        pipeline.set_progress_bar_config(disable=True)
        return cls(pipeline, resolution=64)

    def _call(self, latents: Tensor, sigmas: Tensor, prefix: JointPrefix) -> Tensor:
        like = self._like
        texts, is_text = prefix.padded("embedding", like)
        sources = prefix.stacked("source", like)
        # The shapes tell the transformer which tokens are sources, whose time may stand still.
        rows, columns = latents.shape[1:3]
        shapes = [(1, rows, columns), *prefix.prompts[0].shapes]
        (velocity,) = self.transformer(
            hidden_states=torch.cat([latents.flatten(1, 2).to(like), sources], dim=1),
            timestep=sigmas.to(self.device),
            encoder_hidden_states=texts,
            encoder_hidden_states_mask=is_text,
            img_shapes=[shapes] * len(latents),
            return_dict=False,
        )
        return velocity[:, : rows * columns].unflatten(1, (rows, columns)).float()

    def schedule(
        self, num_steps: int, size: Size | None = None
    ) -> Float[Tensor, " steps_plus_one"]:
        sigmas = np.linspace(1.0, 1 / num_steps, num_steps)
        return self._levels(sigmas=sigmas, mu=self._shift(math.prod(self._grid(size))))

    def pipeline_noise(
        self, latents: Float[Tensor, "batch y x channel"]
    ) -> Float[Tensor, "batch token channel"]:
        return latents.flatten(1, 2)

    def _decode(
        self, latents: Float[Tensor, "batch y x channel"]
    ) -> Float[Tensor, "batch 3 height width"]:
        return decode_grid(self.vae, unpack(latents, PATCH))

    def _encode_images(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch y x channel"]:
        return pack(encode_grid(self.vae, 2 * images - 1), PATCH).float()

    def pipeline_latents(
        self,
        prompt: Prompt,
        noise: Float[Tensor, "1 y x channel"],
        *,
        num_steps: int,
        guidance_scale: float,
        negative_prompt: str = "",
    ) -> Float[Tensor, "1 y x channel"]:
        is_guided = guidance_scale != 1
        clean: Tensor = self.pipeline(
            prompt=prompt.text,
            negative_prompt=(negative_prompt or self.null_prompt) if is_guided else None,
            true_cfg_scale=guidance_scale,
            num_inference_steps=num_steps,
            latents=self.pipeline_noise(noise),
            output_type="latent",
            **self._size(noise)._asdict(),
            **self._given(prompt),
        ).images
        return clean.view_as(noise)

    def _given(self, prompt: Prompt) -> dict[str, Any]:
        """What the pipeline's call is given besides text."""
        return {}


def _tiny_parts() -> dict[str, Any]:
    """Parts of any pipeline of the family with fresh random weights; byte-wise tokens."""
    channels, width = 4, 32
    tokenizer = byte_tokenizer()
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae": AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=channels,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=torch.randn(channels).mul(0.3).tolist(),
            latents_std=torch.rand(channels).add(0.5).tolist(),
        ).eval(),
        "text_encoder": _tiny_encoder(tokenizer, width),
        "tokenizer": tokenizer,
        "processor": _tiny_processor(tokenizer),
        "transformer": QwenImageTransformer2DModel(
            in_channels=channels * PATCH**2,
            out_channels=channels,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=width,
            axes_dims_rope=(4, 6, 6),
        ).eval(),
    }


def _tiny_encoder(tokenizer: PreTrainedTokenizerBase, width: int) -> Any:
    ids = tokenizer.get_vocab()
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": width,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 3, 3],
            },
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": width,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def _tiny_processor(tokenizer: PreTrainedTokenizerBase) -> Qwen2VLProcessor:
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(patch_size=14),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(patch_size=14),
    )
