"""The family of Stable Diffusion 3 and 3.5: three frozen text encoders, joint attention, no edits.

Decided here: a token of ours is one place of the VAE's latents, as the transformer cuts its patches
itself; noise is drawn in float32. Guidance is true guidance away from the empty prompt or a
negative one, read by all three encoders.
"""

import json
import math
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from jaxtyping import Float
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

from burnish import runtime, vision_build
from burnish.buckets import Buckets, Size
from burnish.config import ConfigError
from burnish.policies.parts.joint import ATTENTION_TARGETS, JointPolicy, JointPrefix, pack
from burnish.policies.parts.reading import (
    Condition,
    EncodedPrompt,
    PromptReader,
    tokenizer_facts,
)
from burnish.types import Prompt, Task

# Before the imports below: they fail where torch and torchvision are unequal builds.
vision_build.ensure_torchvision()

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL  # noqa: E402
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel  # noqa: E402
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (  # noqa: E402
    StableDiffusion3Pipeline,
)
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (  # noqa: E402
    FlowMatchEulerDiscreteScheduler,
)
from transformers import (  # noqa: E402
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)


@dataclass(frozen=True, kw_only=True)
class StablePrompt(EncodedPrompt):
    """One prompt as the transformer reads it: states of all three encoders, and a summary."""

    pooled: Float[Tensor, " channel"]


StableCondition = Condition[StablePrompt]


class StableReader(PromptReader[StablePrompt]):
    """Text encoders and tokenizers of one pipeline, and the prompts they have read."""

    row = StablePrompt

    @property
    def encoders(self) -> list[Any]:
        parts = self._pipeline.components
        names = ("text_encoder", "text_encoder_2", "text_encoder_3")
        # The third may be left out, to save memory: then its states are zeros.
        return [parts[name] for name in names if parts[name] is not None]

    def embed(self, prompts: Sequence[Prompt]) -> StableCondition:
        texts = [prompt.text for prompt in prompts]
        states, _, pooled, _ = self._pipeline.encode_prompt(
            texts, texts, texts, device=self.device, do_classifier_free_guidance=False
        )
        none = states.new_zeros(0, self._pipeline.transformer.config.in_channels)
        return Condition(
            tuple(
                StablePrompt(
                    key=self.key(prompt),
                    embedding=states[row],
                    pooled=pooled[row],
                    source=none,
                    shapes=(),
                )
                for row, prompt in enumerate(prompts)
            )
        )

    def template(self) -> Any:
        parts = self._pipeline.components
        tokenizers = [parts[name] for name in ("tokenizer", "tokenizer_2", "tokenizer_3")]
        return [tokenizer_facts(one) for one in tokenizers if one is not None]


class StableDiffusion3Policy(JointPolicy):
    """A `diffusers.StableDiffusion3Pipeline` as a policy."""

    family: ClassVar[str] = "stable_diffusion3"
    chooses_attention: ClassVar[bool] = False
    pipeline_class: ClassVar[type] = StableDiffusion3Pipeline
    tasks: ClassVar[tuple[Task, ...]] = ("t2i",)
    patch: ClassVar[int] = 1
    block_classes: ClassVar[tuple[str, ...]] = ("JointTransformerBlock",)
    guidance_argument: ClassVar[str] = "guidance_scale"
    size_arguments: ClassVar[tuple[str, ...]] = ("height", "width")
    lora_targets: ClassVar[tuple[str, ...]] = ATTENTION_TARGETS

    def _make_reader(self, cache_folder: Path | None) -> StableReader:
        return StableReader(self.pipeline, resolution=self.resolution, folder=cache_folder)

    @classmethod
    def tiny(cls, seed: int = 0) -> "StableDiffusion3Policy":
        with runtime.seeded(seed, "tiny", cls.family):
            clip = [_tiny_clip(width) for width in (16, 24)]
            words = _tiny_sentences()
            # Its annotations say one block.
            blocks: dict[str, Any] = {
                "down_block_types": ("DownEncoderBlock2D",) * 4,
                "up_block_types": ("UpDecoderBlock2D",) * 4,
                "block_out_channels": (8, 8, 8, 8),
            }
            pipeline = StableDiffusion3Pipeline(
                scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
                vae=AutoencoderKL(
                    **blocks,
                    norm_num_groups=4,
                    latent_channels=4,
                    scaling_factor=1.5,
                    shift_factor=0.1,
                    use_quant_conv=False,
                    use_post_quant_conv=False,
                ).eval(),
                text_encoder=clip[0][1],
                tokenizer=clip[0][0],
                text_encoder_2=clip[1][1],
                tokenizer_2=clip[1][0],
                text_encoder_3=T5EncoderModel(
                    T5Config(
                        vocab_size=len(words),
                        d_model=40,
                        d_kv=8,
                        d_ff=32,
                        num_heads=2,
                        num_layers=1,
                    )
                ).eval(),
                tokenizer_3=words,
                transformer=SD3Transformer2DModel(
                    sample_size=8,
                    in_channels=4,
                    out_channels=4,
                    num_layers=2,
                    attention_head_dim=16,
                    num_attention_heads=2,
                    joint_attention_dim=40,
                    caption_projection_dim=32,
                    pooled_projection_dim=40,
                    pos_embed_max_size=16,
                    qk_norm="rms_norm",
                ).eval(),
            )
        pipeline.set_progress_bar_config(disable=True)
        return cls(pipeline, resolution=64)

    @classmethod
    def check_sizes(cls, folder: Path, buckets: Buckets) -> None:
        try:
            own, vae = (
                json.loads((folder / name / "config.json").read_text(encoding="utf-8"))
                for name in ("transformer", "vae")
            )
            factor = 2 ** (len(vae["block_out_channels"]) - 1)
            most = own["pos_embed_max_size"] * own["patch_size"] * factor
        except (OSError, ValueError, KeyError):
            # What is not whole is told by who reads it.
            return
        for size in buckets.sizes:
            if max(size) > most:
                raise ConfigError(
                    f"need sides of at most {most} pixels for the model in {folder}, got {size}; "
                    "lower policy.resolution, or leave an aspect out"
                )

    def _call(self, latents: Tensor, sigmas: Tensor, prefix: JointPrefix) -> Tensor:
        like = self._like
        (velocity,) = self.transformer(
            hidden_states=self.pipeline_noise(latents).to(like),
            timestep=1000 * sigmas.to(self.device),
            encoder_hidden_states=prefix.stacked("embedding", like),
            pooled_projections=prefix.stacked("pooled", like),
            return_dict=False,
        )
        return pack(velocity).float()

    def schedule(
        self, num_steps: int, size: Size | None = None
    ) -> Float[Tensor, " steps_plus_one"]:
        if not self.pipeline.scheduler.config.use_dynamic_shifting:
            return self._levels(num_steps)
        tokens = math.prod(self._grid(size)) // self.transformer.config.patch_size**2
        return self._levels(num_steps, mu=self._shift(tokens))

    def _decode(
        self, latents: Float[Tensor, "batch y x channel"]
    ) -> Float[Tensor, "batch 3 height width"]:
        config = self.vae.config
        grid = self.pipeline_noise(latents).to(self.vae.device, self.vae.dtype)
        pixels = self.vae.decode(
            grid / config.scaling_factor + config.shift_factor, return_dict=False
        )[0]
        return (pixels.float() / 2 + 0.5).clamp(0, 1)

    def _encode_images(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch y x channel"]:
        config = self.vae.config
        pixels = (2 * images - 1).to(self.vae.device, self.vae.dtype)
        grid = self.vae.encode(pixels).latent_dist.mode()
        return pack((grid - config.shift_factor) * config.scaling_factor).float()

    def pipeline_latents(
        self,
        prompt: Prompt,
        noise: Float[Tensor, "1 y x channel"],
        *,
        num_steps: int,
        guidance_scale: float,
        negative_prompt: str = "",
    ) -> Float[Tensor, "1 y x channel"]:
        clean = self.pipeline(
            prompt=prompt.text,
            negative_prompt=negative_prompt,
            guidance_scale=guidance_scale,
            num_inference_steps=num_steps,
            latents=self.pipeline_noise(noise),
            **self._size(noise)._asdict(),
            output_type="latent",
        ).images
        return pack(clean)


def _tiny_clip(width: int) -> tuple[CLIPTokenizer, CLIPTextModelWithProjection]:
    """One token for each byte, in words and at their end."""
    symbols = sorted(ByteLevel.alphabet())
    symbols += [f"{symbol}</w>" for symbol in symbols]
    symbols += ["<|startoftext|>", "<|endoftext|>"]
    numbers = {symbol: number for number, symbol in enumerate(symbols)}
    end = numbers["<|endoftext|>"]
    config = CLIPTextConfig(
        vocab_size=len(numbers),
        hidden_size=width,
        intermediate_size=32,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=end - 1,
        eos_token_id=end,
        pad_token_id=end,
    )
    tokenizer = CLIPTokenizer(vocab=numbers, merges=[], model_max_length=77)
    return tokenizer, CLIPTextModelWithProjection(config).eval()


def _tiny_sentences() -> T5Tokenizer:
    """One piece for each printable character."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [(symbol, -3.0) for symbol in string.digits + string.ascii_letters + ".,"]
    return T5Tokenizer(vocab=pieces, extra_ids=0)
