"""The model of a run: its family, its sizes and how it is kept on a device; and reading it so."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator

from burnish.buckets import MULTIPLE, SQUARE, Buckets
from burnish.config import Config, ConfigError, located
from burnish.policies.base import Policy
from burnish.policies.parts.execution import (
    Again,
    Attention,
    check_attention,
    checkpoint_blocks,
    set_attention,
)
from burnish.precision import DTYPES
from burnish.runtime import Runtime
from burnish.shelves import Family, policy_class


class PolicyConfig(Config):
    """The model that everything starts from."""

    family: Family = "qwen_image21"
    path: str = "embedded:weights/base"
    resolution: int = Field(default=1024, ge=32, le=4096, multiple_of=MULTIPLE)
    """Side in pixels of a square picture."""
    aspects: tuple[str, ...] = Field(default=(SQUARE,), min_length=1)
    """Width to height of the pictures, 1:1, 16:9, each of about the area of the square in sides of
    whole multiples of 32 pixels; a prompt is drawn in the nearest, by its own aspect or that of an
    edit's first source. The first of these serves the others."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """In which the transformer's weights are kept on the device; what is trained is always kept in
    float32, so that bfloat16 is for training a LoRA."""
    frozen_dtype: Literal["float32", "bfloat16"] | None = None
    """Likewise, of all that is never trained: encoders, VAE, teachers, the start that `kl_weight`
    compares with; None is as `dtype`."""
    checkpointing: bool | float = False
    """Compute blocks again in the backward pass instead of keeping what they computed: far less
    memory, a third more work in an update. A number is the share of the blocks, evenly spread."""
    cache: str | None = None
    """Folder where what the encoders made of a prompt outlives the process, for this run and others
    with the same encoders; None keeps it in memory."""
    offload: bool = False
    """Keep encoders and VAE in the memory of the machine, and bring them to the device only while
    they are used."""
    share_prefix: bool = True
    """Compute what a prompt is to the transformer once for all its samples and steps, where a
    family can. False reads it again in every call, which is slower, most of all for edits, and lets
    the weights be spread over processes."""
    batch_guidance: bool = True
    """Ask for both velocities of a guided one in one call. False asks one after the other where no
    gradient is wanted, so that drawing and guided teachers hold half as much beside weights."""
    compile: bool = False
    """Have torch compile the repeated block: faster after minutes of compiling, and equal but for
    rounding."""
    attention: Attention = "native"
    """Kernel of attention, by diffusers' name; the flash ones take no mask, which most families
    need for prompts of unequal length."""

    @property
    def buckets(self) -> Buckets:
        """Sizes in which pictures are drawn."""
        return Buckets(self.resolution, self.aspects)

    def drawing(self, dtype: torch.dtype) -> "PolicyConfig":
        """As a policy is read that only draws, with matrix products of some type: as it will be
        deployed in that type, and no larger."""
        if DTYPES[self.dtype].itemsize <= dtype.itemsize:
            return self
        frozen = self.frozen_dtype or self.dtype
        return self.model_copy(update={"dtype": "bfloat16", "frozen_dtype": frozen})

    @field_validator("checkpointing", mode="before")
    @classmethod
    def _is_share(cls, value: Any) -> Any:
        # Of a union each member would be told of.
        if not isinstance(value, bool | int | float) or not 0 <= value <= 1:
            raise ValueError(
                f"need true, false or a share of the blocks from 0 to 1, got {value!r}; 0.5 "
                "computes half of them again"
            )
        return value

    @field_validator("aspects")
    @classmethod
    def _have_sizes(cls, aspects: tuple[str, ...], known: Any) -> tuple[str, ...]:
        Buckets(known.data.get("resolution", 1024), aspects)
        return aspects


def check_steps(family: str, folder: Path, num_steps: int) -> None:
    """Look, before weights are read, whether a pipeline draws in as many steps as it is asked.

    Raises:
        ConfigError: it takes others.
    """
    fixed = policy_class(family).fixed_steps(folder)
    if fixed not in (None, num_steps):
        raise ConfigError(
            f"need {fixed} steps for the model in {folder}, whose pipeline takes those of its own "
            f"grid whatever it is asked, got {num_steps}; take {fixed}"
        )


def check_guidance(family: str, folder: Path, scale: float) -> None:
    """Likewise, whether it can be drawn with guidance.

    Raises:
        ConfigError: it cannot, or not with this scale.
    """
    fixed = policy_class(family).fixed_guidance(folder)
    if fixed not in (None, scale):
        raise ConfigError(
            f"need guidance_scale={fixed:g} for the step-distilled model in {folder}, got "
            f"{scale:g}; take {fixed:g}, or its base model, which has guidance"
        )


def check_kernels(config: PolicyConfig) -> None:
    """Look, before weights are read, whether the kernel of attention can be had.

    Raises:
        ConfigError: it cannot.
    """
    if config.attention != "native":
        family = policy_class(config.family)
        check_attention(
            config.attention, is_chosen=family.chooses_attention, is_masked=family.is_masked
        )


def set_up(policy: Policy[Any, Any], config: PolicyConfig, again: Again = nullcontext) -> None:
    """Give a policy the settings that decide how it computes, whether it has weights or not.

    Args:
        policy: of the family; changed in place.
        config: its settings.
        again: opens what blocks are to be computed again in.
    """
    policy.buckets, policy.share_prefix = config.buckets, config.share_prefix
    policy.batch_guidance = config.batch_guidance
    checkpoint_blocks(policy.transformer, policy.block_classes, config.checkpointing, again=again)


def load_policy(config: PolicyConfig, folder: Path, rt: Runtime) -> Policy[Any, Any]:
    """A policy of the run's family from a pipeline folder, frozen until something trains it: of
    weights with gradient autocast keeps rounded copies. A transformer that will be spread over
    processes waits for that in the memory of the machine, as a device may not hold it whole."""
    check_kernels(config)
    policy = policy_class(config.family).load(
        folder,
        resolution=config.resolution,
        device="cpu" if rt.is_sharded else rt.device,
        dtype=DTYPES[config.dtype],
        frozen_dtype=DTYPES[config.frozen_dtype or config.dtype],
        cache_folder=None if config.cache is None else located(config.cache),
        offload=config.offload,
    )
    if not config.offload:
        for name, network in policy.networks().items():
            if name != "transformer":
                network.to(rt.device)
    transformer: Any = policy.transformer.requires_grad_(False)
    set_up(policy, config)
    if config.attention != "native":
        set_attention(transformer, config.attention)
    if config.compile:
        policy.compile_blocks()
    return policy
