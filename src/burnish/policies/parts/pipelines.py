"""What every policy around a diffusers pipeline object does alike: read it, write it, copy it.

The pipeline object keeps all modules, so what is saved draws without Burnish.
"""

import copy
import dataclasses
import importlib
import inspect
import shutil
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn

from burnish import activations, vision_build
from burnish.buckets import MULTIPLE, Buckets, Size
from burnish.config import ConfigError
from burnish.guidance import compose
from burnish.pipeline_folders import INDEX, copy_part, read_index
from burnish.policies.base import Guided, Policy, Prefix, Work, copied
from burnish.policies.parts.execution import compile_blocks, visiting
from burnish.policies.parts.reading import Condition, PromptReader, hash_json, require_one_task
from burnish.types import Prompt
from burnish.wording import brief

# Before the imports below: they fail where torch and torchvision are unequal builds.
vision_build.ensure_torchvision()

from diffusers.utils import logging as diffusers_logging  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

# A run shows its own progress; these would show a bar for every few megabytes of a load.
diffusers_logging.disable_progress_bar()
transformers_logging.disable_progress_bar()

ConditionT = TypeVar("ConditionT", bound=Condition[Any])
PrefixT = TypeVar("PrefixT", bound=Prefix)
PolicyT = TypeVar("PolicyT", bound="PipelinePolicy[Any, Any]")


class PipelinePolicy(Policy[ConditionT, PrefixT]):
    """One diffusers pipeline as a policy; a family adds what is its own."""

    def __init__(
        self, pipeline: Any, *, resolution: int = 1024, cache_folder: Path | None = None
    ) -> None:
        """Take over a pipeline; its encoder and VAE are frozen.

        Args:
            pipeline: of the family's class.
            resolution: side of a square image in pixels, a multiple of `buckets.MULTIPLE`.
            cache_folder: where encoded prompts outlive the process; None keeps them in memory only.

        Raises:
            ConfigError: another resolution, or a pipeline that the family cannot use.
        """
        if resolution < MULTIPLE or resolution % MULTIPLE:
            nearest = max(1, round(resolution / MULTIPLE)) * MULTIPLE
            raise ConfigError(
                f"need a resolution that is a multiple of {MULTIPLE}, got {resolution}; take "
                f"{nearest}"
            )
        self.pipeline = pipeline
        self.transformer: Any = pipeline.transformer
        # Weights that are spread have another type while they are gathered.
        self._dtype = next(pipeline.transformer.parameters()).dtype
        self.vae: Any = pipeline.vae
        self.text_encoder: Any = pipeline.text_encoder
        self.resolution = resolution
        self.buckets = Buckets(resolution)
        self.work = Work()
        self._compiler = ""
        self._reader: Any = self._make_reader(cache_folder)
        for encoder in self._reader.encoders:
            encoder.requires_grad_(False).eval()
        self.vae.requires_grad_(False).eval()

    @abstractmethod
    def _make_reader(self, cache_folder: Path | None) -> PromptReader[Any]:
        """Who reads the prompts."""

    @classmethod
    def load(
        cls: type[PolicyT],
        folder: Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        frozen_dtype: torch.dtype | None = None,
        resolution: int = 1024,
        cache_folder: Path | None = None,
        offload: bool = False,
        is_hollow: bool = False,
    ) -> PolicyT:
        index, given = _checked_index(cls.pipeline_class, folder), {}
        if is_hollow:
            library, kind = index["transformer"]
            given["transformer"] = _hollow_network(folder / "transformer", library, kind, dtype)
        types = {"transformer": dtype, "default": frozen_dtype or dtype}
        pipeline = _read(cls.pipeline_class, folder, dtype=types, **given)
        (pipeline.transformer if offload else pipeline).to(device)
        pipeline.set_progress_bar_config(disable=True)
        return cls(pipeline, resolution=resolution, cache_folder=cache_folder)

    @classmethod
    def hollow(
        cls: type[PolicyT],
        folder: Path,
        *,
        dtype: torch.dtype = torch.float32,
        frozen_dtype: torch.dtype | None = None,
        resolution: int = 1024,
    ) -> PolicyT:
        index = _checked_index(cls.pipeline_class, folder)
        types = {"transformer": dtype}
        networks = {
            name: _hollow_network(
                folder / name, entry[0], entry[1], types.get(name, frozen_dtype or dtype)
            )
            for name, entry in index.items()
            if _is_network(entry)
        }
        pipeline = _read(cls.pipeline_class, folder, **networks)
        pipeline.set_progress_bar_config(disable=True)
        return cls(pipeline, resolution=resolution)

    def save(self, folder: Path) -> None:
        adapters = getattr(self.transformer, "peft_config", None)
        if adapters:
            raise ValueError(
                "need a transformer without adapters to write a pipeline folder, got "
                f"{', '.join(adapters)}; merge or unload them first"
            )
        source = self.pipeline.name_or_path
        if not source:
            # It was made in memory.
            self.pipeline.save_pretrained(folder)
            return
        parts = {name for name, part in self.pipeline.components.items() if part is not None}
        for name in parts - {"transformer"}:
            copy_part(Path(source) / name, folder / name)
        shutil.copyfile(Path(source) / INDEX, folder / INDEX)
        self.transformer.save_pretrained(folder / "transformer")

    def sibling(self: PolicyT, *, is_empty: bool = False) -> PolicyT:
        other = copy.copy(self)
        other._dtype = dtype = self.frozen_dtype
        device = torch.device("meta") if is_empty else self.device
        other.transformer = copied(self.transformer, lambda own: own.to(device, dtype, copy=True))
        other.transformer.requires_grad_(False).eval()
        # With a pipeline of its own, or it would draw and save with our transformer.
        parts = {**self.pipeline.components, "transformer": other.transformer}
        asked = inspect.signature(self.pipeline_class.__init__).parameters
        config = self.pipeline.config
        settings = {n: config[n] for n in asked if n not in parts and n in config}
        other.pipeline = self.pipeline_class(**parts, **settings)
        other.pipeline.set_progress_bar_config(disable=True)
        if self._compiler:
            # A copy of a compiled block is not compiled.
            other.compile_blocks(self._compiler)
        return other

    def compile_blocks(self, backend: str = "inductor") -> None:
        self._compiler = backend
        compile_blocks(self.transformer, self.block_classes, backend)

    def encode(self, prompts: Sequence[Prompt]) -> ConditionT:
        if (task := require_one_task(prompts)) not in self.tasks:
            raise ValueError(
                f"need prompts of task {' or '.join(self.tasks)} for {self.family}, got {task}; "
                "take another family"
            )
        found: Any = self._reader.encode(prompts)
        return found

    def forget(self) -> None:
        self._reader.forget()

    def encode_null(self, prompts: Sequence[Prompt], negative_prompt: str = "") -> ConditionT:
        text = negative_prompt or self.null_prompt
        return self.encode([dataclasses.replace(prompt, text=text) for prompt in prompts])

    def decode(
        self, latents: Float[Tensor, "batch y x channel"]
    ) -> Float[Tensor, "batch 3 height width"]:
        with visiting([self.vae], self.device):
            return self._decode(latents)

    @abstractmethod
    def _decode(
        self, latents: Float[Tensor, "batch y x channel"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """`decode`, with the VAE where the transformer is."""

    def encode_images(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch y x channel"]:
        with visiting([self.vae], self.device):
            return self._encode_images(images)

    @abstractmethod
    def _encode_images(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch y x channel"]:
        """`encode_images`, with the VAE where the transformer is."""

    def guided(
        self,
        latents: Float[Tensor, "batch y x channel"],
        sigmas: Float[Tensor, " batch"],
        prefix: PrefixT,
        null_prefix: PrefixT,
        scale: float,
    ) -> Guided:
        if scale == 1:
            conditional = self.velocity(latents, sigmas, prefix)
            return Guided(conditional, conditional, conditional)
        # With gradient always: processes that share spread weights must make equally many calls.
        if self.batch_guidance or torch.is_grad_enabled():
            both = self.join([prefix, null_prefix])
            twice = torch.cat([latents, latents]), torch.cat([sigmas, sigmas])
            conditional, unconditional = self.velocity(*twice, both).chunk(2)
        else:
            conditional = self.velocity(latents, sigmas, prefix)
            unconditional = self.velocity(latents, sigmas, null_prefix)
        guided = compose(conditional, unconditional, scale, self.rescales_guidance)
        return Guided(guided, conditional, unconditional)

    @property
    def _stride(self) -> int:
        """Side in pixels of what is one token."""
        return self.pipeline.vae_scale_factor

    def _grid(self, size: Size | None) -> tuple[int, int]:
        """Rows and columns of tokens."""
        height, width = size or self.buckets.default
        return height // self._stride, width // self._stride

    def _size(self, latents: Float[Tensor, "batch y x channel"]) -> Size:
        """Of the images that latents are."""
        _, rows, columns, _ = latents.shape
        return Size(rows * self._stride, columns * self._stride)

    def _levels(self, *arguments: Any, **settings: Any) -> Float[Tensor, " level"]:
        """Noise levels that the pipeline's scheduler sets for some arguments."""
        # A scheduler keeps its place in the schedule: a copy leaves the pipeline's own alone.
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        scheduler.set_timesteps(*arguments, **settings)
        return scheduler.sigmas.float().cpu()

    def _shift(self, num_tokens: int) -> float:
        """The scheduler's shift for an image of some tokens: a line through two settings."""
        config = self.pipeline.scheduler.config
        low, high = config.base_image_seq_len, config.max_image_seq_len
        slope = (config.max_shift - config.base_shift) / (high - low)
        return num_tokens * slope + (config.base_shift - slope * low)

    def pipeline_noise(self, latents: Float[Tensor, "batch y x channel"]) -> Tensor:
        """The same noise as the pipeline's own call takes it."""
        return latents.flatten(1, 2)

    def fingerprint(self) -> dict[str, str]:
        config = self.pipeline.scheduler.config
        # Names with an underscore tell how the object was made, not what it does.
        settings = {name: value for name, value in config.items() if not name.startswith("_")}
        return {**self._reader.fingerprint(), "scheduler": hash_json(settings)}

    def networks(self) -> dict[str, nn.Module]:
        parts = {**self.pipeline.components, "transformer": self.transformer}
        return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def _like(self) -> Tensor:
        """An empty tensor where inputs of the transformer are, in their type."""
        return torch.empty(0, device=self.device, dtype=self.dtype)

    @property
    def frozen_dtype(self) -> torch.dtype:
        return next(self.vae.parameters()).dtype


def _checked_index(pipeline_class: type, folder: Path) -> dict[str, Any]:
    """What a pipeline folder says of its components: library and class by name."""
    found = read_index(folder)
    name = found.get("_class_name")
    if name != pipeline_class.__name__:
        raise ConfigError(
            f"need a {pipeline_class.__name__} in {folder}, got {name}; "
            "choose the family of that pipeline"
        )
    return found


def _read(pipeline_class: Any, folder: Path, **settings: Any) -> Any:
    """The pipeline object of a folder."""
    try:
        return pipeline_class.from_pretrained(folder, **settings)
    except (OSError, ValueError, SafetensorError) as error:
        reason = brief(error, names_file=True)
        raise ConfigError(
            f"need a whole pipeline in {folder}, got {reason}; write or copy it again"
        ) from error


def _class_of(library: str, name: str) -> Any:
    return getattr(importlib.import_module(library), name, None)


def _is_network(entry: Any) -> bool:
    """Whether an entry of a pipeline's index is a network; no library but these two is imported."""
    if not isinstance(entry, list) or entry[0] not in ("diffusers", "transformers"):
        return False
    kind = _class_of(*entry)
    return isinstance(kind, type) and issubclass(kind, nn.Module)


def _hollow_network(folder: Path, library: str, name: str, dtype: torch.dtype) -> Any:
    kind = _class_of(library, name)
    try:
        if library == "diffusers":
            config = kind.load_config(folder)
            return activations.hollow(lambda: kind.from_config(config), dtype).eval()
        config = kind.config_class.from_pretrained(folder, local_files_only=True)
        return activations.hollow(lambda: kind(config), dtype).eval()
    except (OSError, ValueError) as error:
        reason = brief(error, names_file=True)
        raise ConfigError(
            f"need a {name} with its config.json in {folder}, got {reason}; write or copy it again"
        ) from error


def check_rows(count: int, prefix: Prefix) -> None:
    """Raise unless there is a prefix row for each sample."""
    if count != prefix.num_rows:
        raise ValueError(
            f"need one prefix row per sample, got {count} samples and {prefix.num_rows} rows; "
            "take the rows of the samples first"
        )
