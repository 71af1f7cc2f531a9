"""A whole `QwenImage21Pipeline` with fresh random weights, at any size.

Sizes are given as differences from a small default; everything that has to agree between the parts
(widths, token ids, patch sizes) is derived here, so that a caller cannot assemble a pipeline whose
encoder and transformer do not fit.
"""

from collections.abc import Mapping
from typing import Any

from burnish import vision_build
from burnish.policies.parts.qwen_tokens import CHAT_TEMPLATE, SPECIAL_TOKENS

# Before the imports below: they fail where torch and torchvision are unequal builds.
vision_build.ensure_torchvision()

from diffusers.models.autoencoders.autoencoder_kl_qwenimage21 import (  # noqa: E402
    AutoencoderKLQwenImage21,
)
from diffusers.models.transformers.transformer_qwenimage21 import (  # noqa: E402
    QwenImage21Transformer2DModel,
)
from diffusers.pipelines.qwenimage21.pipeline_qwenimage21 import QwenImage21Pipeline  # noqa: E402
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (  # noqa: E402
    FlowMatchEulerDiscreteScheduler,
)
from transformers import (  # noqa: E402
    PreTrainedTokenizerBase,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)


def assemble(
    tokenizer: PreTrainedTokenizerBase,
    *,
    transformer: Mapping[str, Any] | None = None,
    vae: Mapping[str, Any] | None = None,
    encoder: Mapping[str, Any] | None = None,
    scheduler: Mapping[str, Any] | None = None,
) -> QwenImage21Pipeline:
    """Build the real classes with random weights drawn from torch's global generator.

    Args:
        tokenizer: a Qwen tokenizer with `SPECIAL_TOKENS`, e.g. `byte_tokenizer()`.
        transformer: changes to the transformer's config; default 6 layers of 6 heads of 32.
        vae: changes to the VAE's config; `latents_mean` and `latents_std` once they are measured.
        encoder: changes to the encoder's text config (`hidden_size`, `num_hidden_layers`, ...);
            a key `vision` holds changes to its vision config.
        scheduler: changes to the scheduler's config; default is the resolution-dependent shift.

    Raises:
        ValueError: the tokenizer lacks a special token.
    """
    missing = [token for token in SPECIAL_TOKENS if token not in tokenizer.get_vocab()]
    if missing:
        raise ValueError(
            f"need a tokenizer with Qwen's special tokens, got one without {', '.join(missing)};"
            " add them"
        )
    encoder_config = _encoder_config(tokenizer, dict(encoder or {}))
    vae_sizes = _vae_sizes(vae or {})
    sizes = {
        "num_layers": 6,
        "num_attention_heads": 6,
        "attention_head_dim": 32,
        "axes_dims_rope": (8, 12, 12),
        "in_channels": vae_sizes["z_dim"],
        "out_channels": vae_sizes["z_dim"],
        "context_in_dim": encoder_config.get_text_config().hidden_size,
    }
    pipeline = QwenImage21Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            **{"use_dynamic_shifting": True, **(scheduler or {})}
        ),
        vae=AutoencoderKLQwenImage21(**vae_sizes).eval(),
        text_encoder=Qwen3VLForConditionalGeneration(encoder_config).eval(),
        processor=_processor(tokenizer, encoder_config.vision_config),
        transformer=QwenImage21Transformer2DModel(**{**sizes, **(transformer or {})}).eval(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _vae_sizes(changes: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {
        "base_dim": 16,
        "decoder_base_dim": 16,
        "dim_mult": [1, 2, 4, 4, 4],
        "num_res_blocks": 1,
        "z_dim": 64,
        **changes,
    }
    # Fresh weights have no statistics yet; the class's defaults are those of the published VAE.
    return {
        "latents_mean": [0.0] * sizes["z_dim"],
        "latents_std": [1.0] * sizes["z_dim"],
        **sizes,
    }


def _encoder_config(tokenizer: PreTrainedTokenizerBase, changes: dict[str, Any]) -> Qwen3VLConfig:
    vision_changes = changes.pop("vision", {})
    ids = tokenizer.get_vocab()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
        },
        "pad_token_id": tokenizer.pad_token_id,
        **changes,
    }
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
        "out_hidden_size": text["hidden_size"],
        **vision_changes,
    }
    return Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )


def _processor(tokenizer: PreTrainedTokenizerBase, vision: Any) -> Qwen3VLProcessor:
    patches = {
        "patch_size": vision.patch_size,
        "merge_size": vision.spatial_merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
        # The processor's own lower bound would enlarge small images, and the transformer expects
        # one image slot for every 2 x 2 latent tokens.
        "size": {"shortest_edge": 32 * 32, "longest_edge": 4096 * 4096},
    }
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(
            **patches, image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5]
        ),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(**patches),
        # The pipeline measures its system message with it and writes the rest itself.
        chat_template=CHAT_TEMPLATE,
    )
