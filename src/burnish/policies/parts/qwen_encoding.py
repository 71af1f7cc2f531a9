"""What the frozen parts of `qwen_image21` make of a prompt: text states and source latents.

The pipeline reads one set of source images for a whole batch; here every edit has its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from burnish import runtime
from burnish.policies.parts.qwen_vae import encode_grid
from burnish.policies.parts.reading import (
    Condition,
    EncodedPrompt,
    PromptReader,
    require_one_task,
    source_image,
    tokenizer_facts,
)
from burnish.types import Prompt

# Before the import below: it fails where torch and torchvision are unequal builds.
runtime.ensure_torchvision()

from diffusers.pipelines.qwenimage21.pipeline_qwenimage21 import calculate_dimensions  # noqa: E402

SLOT_TOKENS = 4
"""Latent tokens that one image slot of the encoder stands for: 2 x 2."""


@dataclass(frozen=True, kw_only=True)
class QwenPrompt(EncodedPrompt):
    """One prompt as the transformer reads it, without padding."""

    # It shapes the layout of a call.
    on_host: ClassVar[frozenset[str]] = frozenset({"is_image"})

    is_image: Bool[Tensor, " slot"]
    """Slots that the encoder reserved for the source image."""

    @property
    def num_text(self) -> int:
        """Text tokens before and after the source image."""
        return len(self.is_image) - len(self.source) // SLOT_TOKENS

    @property
    def num_tokens(self) -> int:
        """Length of the prefix: text tokens and source tokens."""
        return self.num_text + len(self.source)

    @property
    def target_position(self) -> int:
        """Frame position of the target: text advances it by one, an image by its longer side."""
        return self.num_text + sum(max(height, width) for _, height, width in self.shapes)

    @property
    def layout(self) -> tuple[Any, ...]:
        """Prompts of equal layout can share a call: source images as large and as early."""
        return self.shapes, int(self.is_image.int().argmax()) if self.shapes else -1


QwenCondition = Condition[QwenPrompt]


class QwenReader(PromptReader[QwenPrompt]):
    """Text encoder, processor and VAE of one pipeline, and the prompts they have read."""

    row = QwenPrompt

    def embed(
        self, prompts: Sequence[Prompt], *, sources: Sequence[Tensor] | None = None
    ) -> QwenCondition:
        """With gradient, always read afresh; `sources` are the latents of edits, where known."""
        is_edit = require_one_task(prompts) == "edit"
        pictures = [source_image(prompt) for prompt in prompts] if is_edit else []
        sizes = [
            calculate_dimensions(self._resolution**2, picture.width / picture.height)[:2]
            for picture in pictures
        ]
        states, slots = self._read([prompt.text or " " for prompt in prompts], pictures, sizes)
        if sources is None:
            sources = self._encode_sources(pictures, sizes)
        factor = self._pipeline.vae_scale_factor
        channels = self._pipeline.transformer.config.in_channels
        rows = []
        for row, prompt in enumerate(prompts):
            shapes = ((1, sizes[row][1] // factor, sizes[row][0] // factor),) if is_edit else ()
            rows.append(
                QwenPrompt(
                    key=self.key(prompt),
                    embedding=states[row],
                    is_image=slots[row],
                    source=sources[row] if is_edit else states[row].new_zeros(0, channels),
                    shapes=shapes,
                )
            )
        return Condition(tuple(rows))

    def _read(
        self, texts: list[str], pictures: list[Image.Image], sizes: list[tuple[int, int]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Encoder states and image slots of every text, without padding and system message."""
        pipeline, encoder = self._pipeline, self._pipeline.text_encoder
        template = pipeline.prompt_template_ti2i if pictures else pipeline.prompt_template_t2i
        inputs: dict[str, Any] = {"text": [template.format(text) for text in texts]}
        if pictures:
            inputs["images"] = [
                _over_white(pipeline.image_processor.resize(picture, width=width, height=height))
                for picture, (width, height) in zip(pictures, sizes, strict=True)
            ]
        # Left padding as in training: the side decides the positions that the encoder sees.
        tokens = pipeline.processor(
            **inputs, padding=True, padding_side="left", return_tensors="pt"
        ).to(encoder.device)
        # The transformer was trained on the last layer's output before the final norm. The norm's
        # own input is that, whatever a version of transformers returns as `hidden_states[-1]`.
        seen: list[Tensor] = []
        handle = encoder.model.language_model.norm.register_forward_pre_hook(
            lambda _module, arguments: seen.append(arguments[0])
        )
        try:
            encoder.model(**tokens, use_cache=False)
        finally:
            handle.remove()
        kept = tokens.attention_mask.bool()
        marks = tokens.input_ids == pipeline._img_token_id
        drop = pipeline._drop_idx
        rows = range(len(texts))
        return (
            [seen[-1][row][kept[row]][drop:] for row in rows],
            [marks[row][kept[row]][drop:].cpu() for row in rows],
        )

    def _encode_sources(
        self, pictures: list[Image.Image], sizes: list[tuple[int, int]]
    ) -> list[Tensor]:
        """Packed latents of every image; images of equal size run together."""
        latents: dict[int, Tensor] = {}
        for size in set(sizes):
            rows = [row for row, other in enumerate(sizes) if other == size]
            prepare = self._pipeline.image_processor.preprocess
            pixels = [prepare(pictures[row], width=size[0], height=size[1]) for row in rows]
            latents |= zip(rows, encode_pixels(self._pipeline.vae, torch.cat(pixels)), strict=True)
        return [latents[row] for row in range(len(pictures))]

    def template(self) -> Any:
        pipeline = self._pipeline
        processor = pipeline.processor.image_processor
        return [
            pipeline.prompt_template_t2i,
            pipeline.prompt_template_ti2i,
            pipeline._drop_idx,
            tokenizer_facts(pipeline.processor.tokenizer),
            [processor.patch_size, processor.merge_size, dict(processor.size)],
            [processor.image_mean, processor.image_std],
        ]


def encode_pixels(
    vae: Any, pixels: Float[Tensor, "batch colour height width"]
) -> Float[Tensor, "batch token channel"]:
    """Packed latents of pixels in [-1, 1]; opaque where the VAE wants an alpha not given."""
    channels = vae.config.in_channels // (vae.config.patch_size or 1) ** 2
    if missing := channels - pixels.shape[1]:
        opaque = pixels.new_ones(len(pixels), missing, *pixels.shape[2:])
        pixels = torch.cat([pixels, opaque], dim=1)
    return encode_grid(vae, pixels).flatten(2).transpose(1, 2).float()


def _over_white(image: Image.Image) -> Image.Image:
    """What the encoder sees of an image with transparency, as in its training."""
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.getchannel("A"))
    return white
