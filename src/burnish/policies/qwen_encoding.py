"""What the frozen parts of `qwen_image21` make of a prompt: text states and source latents.

The pipeline reads one set of source images for a whole batch; here every edit has its own. What was
read is kept by content, in memory and, if wanted, on disk, as a run meets its prompts many times.
"""

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from burnish import images, runtime
from burnish.types import Prompt, Task

# Before the import below: it fails where torch and torchvision are unequal builds.
runtime.ensure_torchvision()

from diffusers.pipelines.qwenimage21.pipeline_qwenimage21 import calculate_dimensions  # noqa: E402

SLOT_TOKENS = 4
"""Latent tokens that one image slot of the encoder stands for: 2 x 2."""

_MEMORY_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class EncodedPrompt:
    """One prompt as the transformer reads it, without padding."""

    key: str
    """Hash of task, text and source image; equal keys are equal prompts."""
    embedding: Float[Tensor, "slot channel"]
    is_image: Bool[Tensor, " slot"]
    """Slots that the encoder reserved for the source image; on the CPU, as it shapes the layout."""
    source: Float[Tensor, "token latent_channel"]
    """Normalised latents of the source image; no tokens for text-to-image."""
    shapes: tuple[tuple[int, int, int], ...]
    """(frame, height, width) of every source image in latent tokens."""

    @property
    def num_bytes(self) -> int:
        """Memory that keeping it costs."""
        return sum(part.nbytes for part in (self.embedding, self.is_image, self.source))

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


@dataclass(frozen=True)
class QwenCondition:
    """Encoded prompts of one batch."""

    prompts: tuple[EncodedPrompt, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def __add__(self, other: "QwenCondition") -> "QwenCondition":
        return QwenCondition(self.prompts + other.prompts)

    def select(self, indices: Sequence[int]) -> "QwenCondition":
        """The prompts at `indices`, which may repeat."""
        return QwenCondition(tuple(self.prompts[index] for index in indices))


class PromptEncoder:
    """Text encoder, processor and VAE of one pipeline, and the prompts they have read."""

    def __init__(self, pipeline: Any, *, resolution: int, folder: Path | None = None) -> None:
        """Keep encoded prompts in memory, and in `folder` if given."""
        self._pipeline = pipeline
        self._resolution = resolution
        self._folder = folder
        self._kept: OrderedDict[str, EncodedPrompt] = OrderedDict()
        self._kept_bytes = 0
        self._weights: int | None = None
        self._identity = ""

    def encode(self, prompts: Sequence[Prompt]) -> QwenCondition:
        """Without gradient; what was read before is not read again."""
        require_one_task(prompts)
        self._forget_if_weights_changed()
        keys = [self._key(prompt) for prompt in prompts]
        found = {key: row for key in set(keys) if (row := self._recall(key)) is not None}
        missing = {key: p for key, p in zip(keys, prompts, strict=True) if key not in found}
        # One by one: what a prompt becomes must not depend, not even in the last bit, on what else
        # was missing, or a resumed run would not repeat the one that was killed.
        for key, prompt in missing.items():
            with torch.no_grad():
                (row,) = self.embed([prompt]).prompts
            found[key] = row
            self._keep(row)
            if self._folder is not None:
                _write(self._file(key), row)
        return QwenCondition(tuple(found[key] for key in keys))

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
                EncodedPrompt(
                    key=self._key(prompt),
                    embedding=states[row],
                    is_image=slots[row],
                    source=sources[row] if is_edit else states[row].new_zeros(0, channels),
                    shapes=shapes,
                )
            )
        return QwenCondition(tuple(rows))

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

    def fingerprint(self) -> dict[str, str]:
        """Hashes of everything that decides what a prompt becomes."""
        pipeline = self._pipeline
        processor = pipeline.processor.image_processor
        tokenizer = json.loads(pipeline.processor.tokenizer.backend_tokenizer.to_str())
        # These two remember the last call.
        tokenizer |= {"padding": None, "truncation": None}
        template = [
            pipeline.prompt_template_t2i,
            pipeline.prompt_template_ti2i,
            pipeline._drop_idx,
            tokenizer,
            [processor.patch_size, processor.merge_size, dict(processor.size)],
            [processor.image_mean, processor.image_std],
        ]
        return {
            "vae": _hash_module(pipeline.vae),
            "encoder": _hash_module(pipeline.text_encoder),
            "template": hash_json(template),
        }

    def _key(self, prompt: Prompt) -> str:
        source = prompt.source if prompt.task == "edit" else None
        digest = hashlib.sha256(source or b"").hexdigest()
        return hash_json([prompt.task, prompt.text or " ", digest, self._resolution])

    def _recall(self, key: str) -> EncodedPrompt | None:
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        if self._folder is None:
            return None
        row = _read_file(self._file(key), key, self._pipeline.text_encoder.device)
        if row is not None:
            self._keep(row)
        return row

    def _keep(self, row: EncodedPrompt) -> None:
        self._kept[row.key] = row
        self._kept_bytes += row.num_bytes
        while self._kept_bytes > _MEMORY_BYTES:
            self._kept_bytes -= self._kept.popitem(last=False)[1].num_bytes

    def _forget_if_weights_changed(self) -> None:
        # Torch counts every write to a tensor: an optimizer step or a loaded checkpoint is noticed.
        frozen = (self._pipeline.text_encoder, self._pipeline.vae)
        writes = sum(p._version for module in frozen for p in module.parameters())
        if writes != self._weights:
            self._kept.clear()
            self._kept_bytes, self._weights, self._identity = 0, writes, ""

    def _file(self, key: str) -> Path:
        assert self._folder is not None
        # Hashing the weights takes long at full size and is needed for files only.
        self._identity = self._identity or hash_json(self.fingerprint())
        return self._folder / f"{hash_json([self._identity, key])}.safetensors"


def require_one_task(prompts: Sequence[Prompt]) -> Task:
    """The task that all prompts share.

    Raises:
        ValueError: there is none.
    """
    tasks = sorted({prompt.task for prompt in prompts})
    if len(tasks) != 1:
        given = " and ".join(tasks) or "no prompt"
        raise ValueError(f"need prompts of one task, got {given}; encode each task for itself")
    return prompts[0].task


def latent_statistics(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the VAE's channels, shaped for `batch channel frame y x`."""
    mean, std = (
        torch.tensor(values, device=vae.device, dtype=vae.dtype).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std


def encode_pixels(
    vae: Any, pixels: Float[Tensor, "batch colour height width"]
) -> Float[Tensor, "batch token channel"]:
    """Packed latents of pixels in [-1, 1]; opaque where the VAE wants an alpha not given."""
    channels = vae.config.in_channels // (vae.config.patch_size or 1) ** 2
    if missing := channels - pixels.shape[1]:
        opaque = pixels.new_ones(len(pixels), missing, *pixels.shape[2:])
        pixels = torch.cat([pixels, opaque], dim=1)
    mean, std = latent_statistics(vae)
    latents = vae.encode(pixels.to(vae.device, vae.dtype).unsqueeze(2)).latent_dist.mode()
    return ((latents - mean) / std).flatten(2).transpose(1, 2).float()


def source_image(prompt: Prompt) -> Image.Image:
    """The image that an edit changes.

    Raises:
        ValueError: the prompt has none, or bytes that are no image.
    """
    if prompt.source is None:
        raise ValueError(
            f"need a source image for the edit {prompt.id!r}, got none; "
            "give one or make its task t2i"
        )
    return images.decode(prompt.source, where=f"source of prompt {prompt.id!r}").convert("RGBA")


def _over_white(image: Image.Image) -> Image.Image:
    """What the encoder sees of an image with transparency, as in its training."""
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.getchannel("A"))
    return white


def hash_json(value: Any) -> str:
    """SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _hash_module(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # As bytes, because numpy has no bfloat16.
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write(file: Path, row: EncodedPrompt) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    # Under another name first: several processes may share the folder, and any may be killed.
    unfinished = file.with_name(f"{file.name}.{os.getpid()}")
    tensors = {"embedding": row.embedding, "is_image": row.is_image, "source": row.source}
    save_file(
        {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
        unfinished,
        metadata={"shapes": json.dumps(row.shapes)},
    )
    unfinished.replace(file)


def _read_file(file: Path, key: str, device: torch.device) -> EncodedPrompt | None:
    try:
        with safe_open(file, framework="pt") as stored:
            shapes = json.loads(stored.metadata()["shapes"])
            # Copied: a tensor that maps the file would crash the process once the file is damaged.
            return EncodedPrompt(
                key=key,
                embedding=stored.get_tensor("embedding").to(device, copy=True),
                is_image=stored.get_tensor("is_image").clone(),
                source=stored.get_tensor("source").to(device, copy=True),
                shapes=tuple((frame, height, width) for frame, height, width in shapes),
            )
    except (FileNotFoundError, SafetensorError):
        # Not there, or damaged: it is encoded again and the file replaced.
        return None
