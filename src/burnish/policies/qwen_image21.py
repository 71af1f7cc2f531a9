"""The family of Qwen-Image 2.1: text and source images in one causal sequence before the target.

Decided here: prompts of one batch may differ in length and edits in their source images, although
one call of the pipeline shares one set of images; a picture's size does not follow its source's
unless `buckets` say so; noise is drawn in float32; a drawn image's alpha is dropped.
"""

import contextlib
import math
from collections.abc import Hashable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Generator, Tensor
from torch.nn.utils.rnn import pad_sequence

from burnish import runtime, vision_build
from burnish.buckets import Size
from burnish.config import ConfigError
from burnish.pipeline_folders import read_index
from burnish.policies.parts.execution import uncompiled
from burnish.policies.parts.pipelines import PipelinePolicy, check_rows
from burnish.policies.parts.qwen_assembly import assemble
from burnish.policies.parts.qwen_encoding import (
    SLOT_TOKENS,
    QwenCondition,
    QwenPrompt,
    QwenReader,
    encode_pixels,
)
from burnish.policies.parts.qwen_prefix import KeyValueStore, PrefixProcessor, QwenPrefix
from burnish.policies.parts.qwen_tokens import byte_tokenizer
from burnish.policies.parts.qwen_vae import decode_grid
from burnish.policies.parts.qwen_whole import WholePrefix, whole_velocity
from burnish.policies.parts.reading import source_images
from burnish.types import MAX_SOURCES, Prompt, Task

# Before the imports below: they fail where torch and torchvision are unequal builds.
vision_build.ensure_torchvision()

from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache  # noqa: E402
from diffusers.pipelines.qwenimage21.pipeline_qwenimage21 import QwenImage21Pipeline  # noqa: E402


class QwenImage21Policy(PipelinePolicy[QwenCondition, QwenPrefix | WholePrefix]):
    """A `diffusers.QwenImage21Pipeline` as a policy."""

    family: ClassVar[str] = "qwen_image21"
    pipeline_class: ClassVar[type] = QwenImage21Pipeline
    tasks: ClassVar[tuple[Task, ...]] = ("t2i", "edit")
    max_sources: ClassVar[int] = MAX_SOURCES
    null_prompt: ClassVar[str] = " "
    block_classes: ClassVar[tuple[str, ...]] = ("QwenImage21TransformerBlock",)
    guidance_argument: ClassVar[str] = "true_cfg_scale"
    size_arguments: ClassVar[tuple[str, ...]] = ("height", "width", "output_resolution")
    lora_targets: ClassVar[tuple[str, ...]] = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "img_mlp.proj",
        "img_mlp.gate_layer",
        "img_mlp.out",
    )

    def __init__(
        self, pipeline: Any, *, resolution: int = 1024, cache_folder: Path | None = None
    ) -> None:
        if not pipeline.transformer.config.causal_condition:
            raise ConfigError(
                "need a transformer with causal_condition=true, got false; its text depends on the "
                "noise level, so no prefix can be shared between steps: take another model"
            )
        super().__init__(pipeline, resolution=resolution, cache_folder=cache_folder)
        self.processor: Any = pipeline.processor
        self._channels = pipeline.transformer.config.in_channels
        for block in pipeline.transformer.transformer_blocks:
            block.attn.set_processor(PrefixProcessor())

    def _make_reader(self, cache_folder: Path | None) -> QwenReader:
        return QwenReader(self.pipeline, resolution=self.resolution, folder=cache_folder)

    @classmethod
    def fixed_steps(cls, folder: Path) -> int | None:
        return len(read_index(folder).get("sample_sigmas") or ()) or None

    @classmethod
    def tiny(cls, seed: int = 0) -> "QwenImage21Policy":
        with runtime.seeded(seed, "tiny", cls.family):
            pipeline = assemble(
                byte_tokenizer(),
                transformer={"num_layers": 2, "num_attention_heads": 2},
                vae={
                    "base_dim": 8,
                    "decoder_base_dim": 8,
                    "dim_mult": [1, 1, 2, 2, 2],
                    "latents_mean": torch.randn(64).mul(0.3).tolist(),
                    "latents_std": torch.rand(64).add(0.5).tolist(),
                },
                encoder={"hidden_size": 64},
            )
            # Fresh norms are identities, and would hide a state taken before or after one.
            with torch.no_grad():
                for module in (pipeline.transformer, pipeline.text_encoder):
                    for parameter in module.parameters():
                        if parameter.ndim == 1:
                            parameter.add_(torch.randn_like(parameter), alpha=0.3)
        return cls(pipeline, resolution=64)

    # --- Prompts -----------------------------------------------------------------------------

    def embed(
        self, prompts: Sequence[Prompt], *, sources: Sequence[Tensor] | None = None
    ) -> QwenCondition:
        """`encode` without its cache, and with gradient where the encoder's weights ask for it.

        `sources` are the latents of each edit's source images (`token channel`, image after image)
        where they are already known.
        """
        return self._reader.embed(prompts, sources=sources)

    # --- Velocity ----------------------------------------------------------------------------

    def layout(self, prompt: Prompt) -> Hashable:
        if self.share_prefix:
            return super().layout(prompt)
        (row,) = self.encode([prompt]).prompts
        return super().layout(prompt), WholePrefix.layout(row)

    def prefix(self, condition: QwenCondition) -> QwenPrefix | WholePrefix:
        if not self.share_prefix:
            return WholePrefix(condition.prompts)
        layouts: dict[Any, dict[str, QwenPrompt]] = {}
        for prompt in condition.prompts:
            # By key, so that equal prompts are read once, e.g. all null prompts of text-to-image.
            layouts.setdefault(prompt.layout, {})[prompt.key] = prompt
        stores = [self._extract(tuple(prompts.values())) for prompts in layouts.values()]
        keys = [key for prompts in layouts.values() for key in prompts]
        rows = {key: row for row, key in enumerate(keys)}
        return QwenPrefix(
            KeyValueStore.stack(stores), tuple(rows[prompt.key] for prompt in condition.prompts)
        )

    def join(self, prefixes: Sequence[QwenPrefix | WholePrefix]) -> QwenPrefix | WholePrefix:
        kind: Any = type(prefixes[0])
        return kind.join(prefixes)

    def _extract(self, prompts: Sequence[QwenPrompt]) -> KeyValueStore:
        """One pass over prompts of one layout, padded on the right."""
        count = len(prompts)
        longest = max(prompts, key=lambda prompt: len(prompt.is_image))
        lengths = torch.tensor([len(prompt.is_image) for prompt in prompts], device=self.device)
        slots = torch.arange(len(longest.is_image), device=self.device)
        is_padded = any(len(prompt.is_image) < len(slots) for prompt in prompts)
        sources = torch.stack([prompt.source for prompt in prompts])
        # The transformer wants a target; the smallest one fills a single slot.
        target = sources.new_zeros(count, SLOT_TOKENS, self._channels)
        is_image = torch.cat([longest.is_image, longest.is_image.new_ones(1)]).to(self.device)
        cache = QwenImage21KVCache(len(self.transformer.transformer_blocks))
        # A compiler would take lengths and the number of sources for constants.
        with uncompiled() if self._compiler else contextlib.nullcontext():
            self.transformer(
                hidden_states=torch.cat([sources, target], dim=1).to(self.device, self.dtype),
                timestep=torch.zeros(count, device=self.device),
                encoder_hidden_states=pad_sequence(
                    [prompt.embedding for prompt in prompts], batch_first=True
                ).to(self.device, self.dtype),
                encoder_hidden_states_mask=slots < lengths[:, None] if is_padded else None,
                img_shapes=[[*longest.shapes, (1, 2, 2)]] * count,
                img_mask=is_image.expand(count, -1),
                kv_cache=cache,
                kv_cache_mode="extract",
                return_dict=False,
            )
        layers = [layer.get() for layer in cache.layer_caches]
        return KeyValueStore.aligned(
            keys=tuple(keys for keys, _ in layers),
            values=tuple(values for _, values in layers),
            prompts=prompts,
            frequencies=self._frame_frequencies(),
        )

    def _frame_frequencies(self) -> Float[Tensor, " pair"]:
        rope = self.transformer.pos_embed
        num_channels = rope.axes_dim[0]
        exponents = torch.arange(0, num_channels, 2, device=self.device).float() / num_channels
        return 1.0 / torch.pow(rope.theta, exponents)

    def velocity(
        self,
        latents: Float[Tensor, "batch y x channel"],
        sigmas: Float[Tensor, " batch"],
        prefix: QwenPrefix | WholePrefix,
    ) -> Float[Tensor, "batch y x channel"]:
        batch, rows, columns, _ = latents.shape
        check_rows(batch, prefix)
        self.work.count(batch)
        if isinstance(prefix, WholePrefix):
            return prefix.in_calls(
                partial(whole_velocity, self.transformer, self._like), latents, sigmas
            )
        # Text and sources are in the cache. What is passed here only puts the target where the
        # cached keys expect it.
        position, context = prefix.store.position, self.transformer.config.context_in_dim
        blank = torch.zeros(1, 1, context, device=self.device, dtype=self.dtype)
        slots = torch.arange(position + rows * columns // SLOT_TOKENS, device=self.device)
        (velocity,) = self.transformer(
            hidden_states=latents.flatten(1, 2).to(self.device, self.dtype),
            timestep=sigmas.to(self.device),
            encoder_hidden_states=blank.expand(batch, position, context),
            img_shapes=[[(1, rows, columns)]] * batch,
            img_mask=(slots >= position).expand(batch, -1),
            kv_cache=prefix.cache(rows * columns),
            kv_cache_mode="cached",
            return_dict=False,
        )
        return velocity.unflatten(1, (rows, columns)).float()

    # --- Latents and images ------------------------------------------------------------------

    def noise(
        self, generators: Sequence[Generator], size: Size | None = None
    ) -> Float[Tensor, "batch y x channel"]:
        shape = (1, self._channels, *self._grid(size))
        drawn = [torch.randn(shape, generator=g, device=g.device) for g in generators]
        return torch.cat(drawn).to(self.device).permute(0, 2, 3, 1).contiguous()

    def schedule(
        self, num_steps: int, size: Size | None = None
    ) -> Float[Tensor, " steps_plus_one"]:
        sigmas = self.pipeline.config.sample_sigmas
        if sigmas is None or len(sigmas) != num_steps:
            sigmas = np.linspace(1.0, 1 / num_steps, num_steps)
        return self._levels(sigmas=sigmas, mu=self._shift(math.prod(self._grid(size))))

    def _decode(
        self, latents: Float[Tensor, "batch y x channel"]
    ) -> Float[Tensor, "batch 3 height width"]:
        return decode_grid(self.vae, latents.permute(0, 3, 1, 2))[:, :3]

    def _encode_images(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch y x channel"]:
        return encode_pixels(self.vae, 2 * images - 1)

    def pipeline_latents(
        self,
        prompt: Prompt,
        noise: Float[Tensor, "1 y x channel"],
        *,
        num_steps: int,
        guidance_scale: float,
        negative_prompt: str = "",
    ) -> Float[Tensor, "1 y x channel"]:
        clean: Tensor = self.pipeline(
            prompt.text,
            image=source_images(prompt) if prompt.task == "edit" else None,
            negative_prompt=None if guidance_scale == 1 else negative_prompt,
            true_cfg_scale=guidance_scale,
            num_inference_steps=num_steps,
            latents=self.pipeline_noise(noise),
            **self._size(noise)._asdict(),
            output_resolution=self.resolution,
            output_type="latent",
        ).images
        return clean.view_as(noise)
