"""What a model family must offer so that sampling, training and teaching can use it.

A policy is single-device code around one diffusers pipeline. It converts at its border: inside
Burnish a velocity is always `noise - clean` at noise level `sigma`, 1 being pure noise, and latents
are `batch y x channel`, each place of the grid a token. Whatever does not depend on the noisy
latents is computed once per prompt (`prefix`) and shared by all samples and all steps of that
prompt, in sampling and, with gradient, in training.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Generic, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from burnish import images
from burnish.buckets import Buckets, Size
from burnish.config import ConfigError
from burnish.types import Labelled, Prompt, Task

ConditionT = TypeVar("ConditionT")
PrefixT = TypeVar("PrefixT", bound="Prefix")
ModuleT = TypeVar("ModuleT", bound=nn.Module)


class Prefix(ABC):
    """All that a velocity needs besides latents and noise level, one row per prompt."""

    @property
    @abstractmethod
    def num_rows(self) -> int:
        """Number of samples this prefix stands for."""

    @abstractmethod
    def take(self, rows: Sequence[int]) -> "Prefix":
        """The prefix of the samples `rows[i]`; rows may repeat, and repeating copies no memory."""


class Guided(NamedTuple):
    """What one batched call of both branches gives."""

    guided: Float[Tensor, "batch y x channel"]
    """Composed by `burnish.guidance.compose` as the family's pipeline does."""
    conditional: Float[Tensor, "batch y x channel"]
    unconditional: Float[Tensor, "batch y x channel"]
    """Not run, and equal to the conditional one, where the scale is 1."""


class Work:
    """How often a network was asked for a velocity, by one policy and its siblings."""

    def __init__(self) -> None:
        self.evaluations = 0
        """One for each sample and branch; three with gradient, as a backward pass takes about as
        long as two forward passes. Reading prompts is not counted."""

    def count(self, rows: int) -> None:
        """Note a forward pass over some rows."""
        self.evaluations += rows * (3 if torch.is_grad_enabled() else 1)


class Policy(ABC, Generic[ConditionT, PrefixT]):
    """One diffusion transformer with its frozen encoder and VAE."""

    family: ClassVar[str]
    """The file name on the shelf."""

    pipeline_class: ClassVar[type]
    """Of diffusers."""

    tasks: ClassVar[tuple[Task, ...]]
    """What the family can be asked for."""

    max_sources: ClassVar[int] = 0
    """Source images of one edit, at most; 0 where the family does no edits."""

    min_source_side: ClassVar[int] = 1
    """Pixels of a source image's shorter side, at least."""

    max_source_ratio: ClassVar[float] = math.inf
    """Longer side of a source image to its shorter one, at most."""

    transformer: nn.Module
    """The only part that is trained."""

    resolution: int
    """Side in pixels of a square image."""

    buckets: Buckets
    """Sizes in which images are drawn; one square, unless others are set."""

    work: Work
    """Told of every velocity."""

    has_shared_prefix: ClassVar[bool] = True
    """Whether a prefix is work of the transformer, with gradient, done once for all samples and
    steps of a prompt; else it only holds what the frozen parts have read."""

    share_prefix: bool = True
    """Whether that is done where it can be; else every call reads its prompts again."""

    batch_guidance: bool = True
    """Whether a guided velocity without gradient is one call of the transformer; else it is two, in
    less memory."""

    chooses_attention: ClassVar[bool] = True
    """Whether the kernel of attention can be chosen; else it is torch's own."""

    is_masked: ClassVar[bool] = True
    """Whether prompts of unequal length share a call of the transformer, with a mask."""

    rescales_guidance: ClassVar[bool] = False
    """Whether the pipeline gives a guided velocity the length of the conditional one, token by
    token (`burnish.guidance.compose`)."""

    null_prompt: ClassVar[str] = ""
    """What the pipeline is told to lead away from where there is no negative prompt."""

    block_classes: ClassVar[tuple[str, ...]]
    """Class names of the repeated blocks; the units of sharding."""

    guidance_argument: ClassVar[str]
    """Name of the scale of guidance in the pipeline's own call."""

    size_arguments: ClassVar[tuple[str, ...]]
    """Likewise, of the side in pixels."""

    lora_targets: ClassVar[tuple[str, ...]]
    """Module name endings that a LoRA adapts by default."""

    @classmethod
    @abstractmethod
    def load(
        cls,
        folder: Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        frozen_dtype: torch.dtype | None = None,
        resolution: int = 1024,
        cache_folder: Path | None = None,
        offload: bool = False,
        is_hollow: bool = False,
    ) -> "Policy[ConditionT, PrefixT]":
        """Read a diffusers pipeline folder.

        Args:
            folder: as `save_pretrained` of the pipeline writes it.
            device: where all modules go.
            dtype: of the transformer's weights.
            frozen_dtype: of encoders and VAE; None is `dtype`.
            resolution: side of a square image in pixels.
            cache_folder: where encoded prompts outlive the process; None keeps them in memory.
            offload: leave encoders and VAE in the memory of the machine, from where they come to
                the device whenever they are used.
            is_hollow: read all but the transformer, whose weights have shape and type, and no
                memory.

        Raises:
            burnish.config.ConfigError: the folder is no pipeline of this family.
        """

    @classmethod
    @abstractmethod
    def hollow(
        cls,
        folder: Path,
        *,
        dtype: torch.dtype = torch.float32,
        frozen_dtype: torch.dtype | None = None,
        resolution: int = 1024,
    ) -> "Policy[ConditionT, PrefixT]":
        """What `load` would read, with weights that have shape and type, and no memory.

        It does all that a policy does inside `burnish.activations.Live`, which counts what that
        would hold.

        Args:
            folder: of a diffusers pipeline; of its networks only the settings are read.
            dtype: of the transformer's weights.
            frozen_dtype: of encoders and VAE; None is `dtype`.
            resolution: side of a square image in pixels.

        Raises:
            burnish.config.ConfigError: the folder is no pipeline of this family.
        """

    @classmethod
    def fixed_guidance(cls, folder: Path) -> float | None:
        """The guidance scale that alone serves the pipeline of a folder; None if any does."""
        return None

    @classmethod
    def fixed_steps(cls, folder: Path) -> int | None:
        """The steps that the pipeline of a folder takes whatever it is asked; None if it obeys."""
        return None

    @classmethod
    def check_sizes(cls, folder: Path, buckets: Buckets) -> None:
        """Look, before weights are read, whether a model can draw in all sizes.

        Raises:
            burnish.config.ConfigError: it cannot.
        """

    @classmethod
    def check_sources(cls, prompts: Sequence[Labelled]) -> None:
        """Look, before weights are read, whether every edit has as many sources as can be read.

        Raises:
            burnish.config.ConfigError: one has more.
        """
        for prompt in prompts:
            if prompt.num_sources > cls.max_sources:
                raise ConfigError(
                    f"need at most {cls.max_sources} source images of a prompt for {cls.family}, "
                    f"got {prompt.num_sources} of {prompt.id!r}; leave some out, or take another "
                    "family"
                )

    @classmethod
    def check_source_sizes(cls, prompt: Prompt) -> None:
        """Look, before weights are read, whether the sources of an edit have sizes to be read in.

        Raises:
            burnish.config.ConfigError: one has not.
        """
        for source in prompt.sources:
            width, height = images.size(source, where=f"source of prompt {prompt.id!r}")
            short, long = sorted((width, height))
            if short < cls.min_source_side or long > cls.max_source_ratio * short:
                raise ConfigError(
                    f"need source images of {cls.min_source_side} pixels a side or more, and of at "
                    f"most {cls.max_source_ratio:g} to 1, for {cls.family}, got {width} x {height} "
                    f"of prompt {prompt.id!r}; scale or cut it"
                )

    @classmethod
    @abstractmethod
    def tiny(cls, seed: int = 0) -> "Policy[ConditionT, PrefixT]":
        """A random-weight instance small enough for tests."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write a diffusers pipeline folder that `from_pretrained` reads without Burnish."""

    @abstractmethod
    def encode(self, prompts: Sequence[Prompt]) -> ConditionT:
        """Run the frozen encoder: text, and source images of edits in order. All prompts share one
        task."""

    @abstractmethod
    def forget(self) -> None:
        """Read prompts again that were read before."""

    @abstractmethod
    def encode_null(self, prompts: Sequence[Prompt], negative_prompt: str = "") -> ConditionT:
        """The unconditional branch: what guidance leads away from instead of the prompt,
        `null_prompt` if that is empty; the source images of an edit stay."""

    @abstractmethod
    def prefix(self, condition: ConditionT) -> PrefixT:
        """What all samples and steps of these prompts share; has gradient if grad is enabled."""

    @abstractmethod
    def join(self, prefixes: Sequence[PrefixT]) -> PrefixT:
        """One prefix with the rows of all, in order; they may come from different tasks.

        Parts taken from one joined prefix join again for free, so whoever calls `guided` at every
        step joins conditional and null prefix once and takes both from the result.
        """

    @abstractmethod
    def velocity(
        self,
        latents: Float[Tensor, "batch y x channel"],
        sigmas: Float[Tensor, " batch"],
        prefix: PrefixT,
    ) -> Float[Tensor, "batch y x channel"]:
        """Conditional velocity `noise - clean`, float32; row i belongs to row i of the prefix."""

    @abstractmethod
    def guided(
        self,
        latents: Float[Tensor, "batch y x channel"],
        sigmas: Float[Tensor, " batch"],
        prefix: PrefixT,
        null_prefix: PrefixT,
        scale: float,
    ) -> Guided:
        """Both branches from one batched call, and their composition."""

    @abstractmethod
    def noise(
        self, generators: Sequence[Generator], size: Size | None = None
    ) -> Float[Tensor, "batch y x channel"]:
        """Standard normal latents, one generator per sample: a sample does not know its batch.

        Args:
            generators: of the samples.
            size: of the images; None is that of a prompt that says nothing.
        """

    @abstractmethod
    def schedule(
        self, num_steps: int, size: Size | None = None
    ) -> Float[Tensor, " steps_plus_one"]:
        """Noise levels from 1 to 0 as the pipeline's own scheduler would set them for a size."""

    @abstractmethod
    def decode(
        self, latents: Float[Tensor, "batch y x channel"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """Images in [0, 1]."""

    @abstractmethod
    def encode_images(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch y x channel"]:
        """Normalised clean latents (the mode of the VAE's posterior)."""

    @abstractmethod
    def pipeline_latents(
        self,
        prompt: Prompt,
        noise: Float[Tensor, "1 y x channel"],
        *,
        num_steps: int,
        guidance_scale: float,
        negative_prompt: str = "",
    ) -> Float[Tensor, "1 y x channel"]:
        """Clean latents by the pipeline's own call, of an image of the noise's size: the truth that
        a rollout is checked against."""

    @abstractmethod
    def fingerprint(self) -> dict[str, str]:
        """Hashes of what teacher and student must share: vae, scheduler, encoder, template."""

    @abstractmethod
    def sibling(self, *, is_empty: bool = False) -> "Policy[ConditionT, PrefixT]":
        """Same encoder and VAE around a copy of the transformer in `frozen_dtype`: a teacher or
        reference.

        Args:
            is_empty: its weights have shape and type, and are on no device yet.
        """

    @abstractmethod
    def compile_blocks(self, backend: str = "inductor") -> None:
        """Have torch compile the repeated blocks at their first call, and those of siblings."""

    def layout(self, prompt: Prompt) -> Hashable:
        """Prompts of one layout share a call of the transformer."""
        return self.buckets.size(prompt)

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the transformer is."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """In which the transformer's own weights are kept."""

    @property
    @abstractmethod
    def frozen_dtype(self) -> torch.dtype:
        """In which all is kept that is never trained: encoders, VAE, siblings."""

    @abstractmethod
    def networks(self) -> dict[str, nn.Module]:
        """All that has weights, by the name of its folder: the transformer, encoders, VAE."""

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Named parameters that a run updates."""
        return (
            (name, parameter)
            for name, parameter in self.transformer.named_parameters()
            if parameter.requires_grad
        )


def copied(network: ModuleT, weight: Callable[[Tensor], Tensor]) -> ModuleT:
    """A deep copy of a network with other weights, made one at a time from its own."""
    made: dict[int, object] = {
        id(own): nn.Parameter(weight(own.detach()), own.requires_grad)
        for own in network.parameters()
    }
    return copy.deepcopy(network, made)
