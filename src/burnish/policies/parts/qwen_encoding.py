"""What the frozen parts of `qwen_image21` make of a prompt: text states and source latents.

The pipeline reads one set of source images for a whole batch; here every edit has its own, of one
image or several.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from burnish import vision_build
from burnish.policies.parts.qwen_vae import encode_grid
from burnish.policies.parts.reading import (
    Condition,
    EncodedPrompt,
    PromptReader,
    require_one_task,
    source_images,
    tokenizer_facts,
)
from burnish.types import Prompt

# Before the import below: it fails where torch and torchvision are unequal builds.
vision_build.ensure_torchvision()

from diffusers.pipelines.qwenimage21.pipeline_qwenimage21 import calculate_dimensions  # noqa: E402

_PLACE = "<image{}><|vision_start|><|image_pad|><|vision_end|>"
"""Of one source in the text that the encoder reads; the pipeline writes it alike."""
SLOT_TOKENS = 4
"""Latent tokens that one image slot of the encoder stands for: 2 x 2."""


@dataclass(frozen=True, kw_only=True)
class QwenPrompt(EncodedPrompt):
    """One prompt as the transformer reads it, without padding."""

    # It shapes the layout of a call.
    on_host: ClassVar[frozenset[str]] = frozenset({"is_image"})

    is_image: Bool[Tensor, " slot"]
    """Slots that the encoder reserved for the source images."""

    @property
    def num_text(self) -> int:
        """Text tokens around the source images."""
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
        # Words stand between two images, and at both ends.
        starts = self.is_image & ~self.is_image.roll(1)
        return self.shapes, tuple(starts.nonzero().flatten().tolist())


QwenCondition = Condition[QwenPrompt]


class _Sized(NamedTuple):
    """A source, and the pixels that encoder and VAE see it at."""

    picture: Image.Image
    width: int
    height: int


class QwenReader(PromptReader[QwenPrompt]):
    """Text encoder, processor and VAE of one pipeline, and the prompts they have read."""

    row = QwenPrompt

    def embed(
        self, prompts: Sequence[Prompt], *, sources: Sequence[Tensor] | None = None
    ) -> QwenCondition:
        """With gradient, always read afresh; `sources` are the latents of edits, where known."""
        is_edit = require_one_task(prompts) == "edit"
        sets = [
            [self._sized(picture) for picture in source_images(prompt)] if is_edit else []
            for prompt in prompts
        ]
        states, slots = self._read([prompt.text or " " for prompt in prompts], sets)
        if sources is None:
            sources = self._encode_sources(sets)
        factor = self._pipeline.vae_scale_factor
        channels = self._pipeline.transformer.config.in_channels
        rows = []
        for row, prompt in enumerate(prompts):
            rows.append(
                QwenPrompt(
                    key=self.key(prompt),
                    embedding=states[row],
                    is_image=slots[row],
                    source=sources[row] if is_edit else states[row].new_zeros(0, channels),
                    shapes=tuple(
                        (1, own.height // factor, own.width // factor) for own in sets[row]
                    ),
                )
            )
        return Condition(tuple(rows))

    def _sized(self, picture: Image.Image) -> _Sized:
        area = self._resolution**2
        width, height, _ = calculate_dimensions(area, picture.width / picture.height)
        return _Sized(picture, width, height)

    def _question(self, text: str, count: int) -> str:
        """What the encoder reads of a prompt with some sources: each has a number and a place."""
        pipeline = self._pipeline
        if not count:
            return str(pipeline.prompt_template_t2i.format(text))
        # The pipeline's template has the place of the first.
        places = " ".join(_PLACE.format(number) for number in range(1, count + 1))
        template: str = pipeline.prompt_template_ti2i.replace(_PLACE.format(1), places)
        return template.format(text)

    def _read(
        self, texts: list[str], sets: Sequence[Sequence[_Sized]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Encoder states and image slots of every text, without padding and system message."""
        pipeline, encoder = self._pipeline, self._pipeline.text_encoder
        pairs = zip(texts, sets, strict=True)
        inputs: dict[str, Any] = {"text": [self._question(text, len(own)) for text, own in pairs]}
        resize = pipeline.image_processor.resize
        pictures = [
            _over_white(resize(one.picture, width=one.width, height=one.height))
            for own in sets
            for one in own
        ]
        if pictures:
            inputs["images"] = pictures
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

    def _encode_sources(self, sets: Sequence[Sequence[_Sized]]) -> list[Tensor]:
        """Packed latents of every set, image after image; images of equal size run together."""
        every = [one for own in sets for one in own]
        sizes = [(one.width, one.height) for one in every]
        latents: dict[int, Tensor] = {}
        for width, height in set(sizes):
            rows = [row for row, other in enumerate(sizes) if other == (width, height)]
            prepare = self._pipeline.image_processor.preprocess
            pixels = [prepare(every[row].picture, width=width, height=height) for row in rows]
            latents |= zip(rows, encode_pixels(self._pipeline.vae, torch.cat(pixels)), strict=True)
        parts = iter([latents[row].flatten(0, 1) for row in range(len(every))])
        return [torch.cat([next(parts) for _ in own]) for own in sets if own]

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
) -> Float[Tensor, "batch y x channel"]:
    """Packed latents of pixels in [-1, 1]; opaque where the VAE wants an alpha not given."""
    channels = vae.config.in_channels // (vae.config.patch_size or 1) ** 2
    if missing := channels - pixels.shape[1]:
        opaque = pixels.new_ones(len(pixels), missing, *pixels.shape[2:])
        pixels = torch.cat([pixels, opaque], dim=1)
    return encode_grid(vae, pixels).permute(0, 2, 3, 1).contiguous().float()


def _over_white(image: Image.Image) -> Image.Image:
    """What the encoder sees of an image with transparency, as in its training."""
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.getchannel("A"))
    return white
