"""A transformer whose weights are spread over processes (FSDP2).

Each process keeps a part of every weight, of its gradient, of its average and of its optimizer
state. In an update a block is gathered while it computes. Before work without gradient, which any
process may do alone and as often as it likes, the transformer is gathered once for all of it.
What is gathered has the precision of the matrix products; what is kept and added up has its own.

A teacher, or a start that is compared with, is spread like its student, and gathered while it is
asked: on a device one transformer is whole at a time.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from burnish.config import ConfigError
from burnish.policies.base import Policy, copied
from burnish.runtime import Runtime


class Shards:
    """The transformer of a policy, spread if the runtime asks for it; else all of this is free."""

    def __init__(self, policy: Policy[Any, Any], rt: Runtime) -> None:
        """Spread the transformer block by block.

        Args:
            policy: changed in place; what is trained must be settled.
            rt: processes.

        Raises:
            ConfigError: prompts are read by the transformer once for all steps: those keys and
                values leave a block behind its back.
        """
        self._policy, self._is_sharded = policy, rt.is_sharded
        if not rt.is_sharded:
            return
        check_prefix(type(policy), share=policy.share_prefix)
        # On no device: only who writes the result at the end fills it.
        self._plain = copied(policy.transformer, lambda own: own.detach().to("meta"))
        _spread(policy, rt)

    def leave(self, *, is_needed: bool) -> None:
        """Give the policy a plain transformer with all weights again, in the memory of the machine,
        to be written; all processes must come here.

        Args:
            is_needed: whether this process wants it; to the others the policy is lost.
        """
        if not self._is_sharded:
            return
        policy: Any = self._policy
        plain, spread = self._plain, policy.transformer
        if is_needed:
            plain = plain.to_empty(device="cpu")
        for module in _spread_modules(policy):
            module.reshard()
        with torch.no_grad():
            for name, tensor in (*plain.named_parameters(), *plain.named_buffers()):
                # Not as they are gathered to compute, which may be rounded.
                whole = full(_member(spread, name))
                if is_needed:
                    tensor.copy_(whole)
        if is_needed:
            policy.transformer = policy.pipeline.transformer = plain
        self._is_sharded = False


def frozen(policy: Policy[Any, Any], rt: Runtime) -> Policy[Any, Any]:
    """A sibling of a policy that is not spread yet; itself it is, if the runtime asks for it."""
    if not rt.is_sharded:
        return policy.sibling()
    other = policy.sibling(is_empty=True)
    _spread(other, rt)
    ours = policy.transformer.state_dict()
    shares = {
        name: _share(ours[name], tensor) for name, tensor in other.transformer.state_dict().items()
    }
    other.transformer.load_state_dict(shares, assign=True)
    return other


@contextlib.contextmanager
def whole(policy: Policy[Any, Any]) -> Iterator[None]:
    """Inside, this process has all weights of a policy, and needs no other process to compute with
    them; if they are spread, all processes must come here, and each not twice at once."""
    modules = _spread_modules(policy)
    for module in modules:
        module.set_reshard_after_forward(False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.reshard()
            module.set_reshard_after_forward(True)


def _spread(policy: Policy[Any, Any], rt: Runtime) -> None:
    mesh = torch.distributed.init_device_mesh(rt.device.type, (rt.world_size,))
    precision = MixedPrecisionPolicy(
        param_dtype=None if rt.dtype == torch.float32 else rt.dtype,
        reduce_dtype=torch.float32,
        # Latents and noise levels stay as exact as autocast has them.
        cast_forward_inputs=False,
    )
    blocks = policy.block_classes
    for module in [m for m in policy.transformer.modules() if type(m).__name__ in blocks]:
        fully_shard(module, mesh=mesh, mp_policy=precision)
    fully_shard(policy.transformer, mesh=mesh, mp_policy=precision)


def _spread_modules(policy: Policy[Any, Any]) -> list[FSDPModule]:
    return [module for module in policy.transformer.modules() if isinstance(module, FSDPModule)]


def check_prefix(
    family: type[Policy[Any, Any]], *, share: bool, trains_null: bool = False, where: str = ""
) -> None:
    """Raise unless transformers of the family can be spread.

    Args:
        family: of the policy.
        share: whether it shares prefixes if it can.
        trains_null: whether the unconditional branch has gradient. Prompts of other lengths are
            calls of their own there, and not as many of them on every process.
        where: key of the stage, for messages.
    """
    if family.has_shared_prefix and share:
        raise ConfigError(
            f"need policy.share_prefix=false for runtime.sharding=full with {family.family}, whose "
            "prompts are otherwise read once for all steps; set it, or train a LoRA with "
            "policy.dtype=bfloat16 and runtime.sharding=none"
        )
    if family.has_shared_prefix and trains_null:
        raise ConfigError(
            f"need an objective without the unconditional branch for runtime.sharding=full with "
            f"{family.family}, got one that trains both; set {where}algorithm.guidance=detached "
            "or runtime.sharding=none"
        )


def full(tensor: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """A whole tensor; if it is spread, all processes must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """The part of a tensor that this process has."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def rows(tensor: Shaped[Tensor, "..."]) -> slice:
    """Of a whole tensor, those that this process has of one that may be spread."""
    if not isinstance(tensor, DTensor):
        return slice(None)
    mesh = tensor.device_mesh
    size = -(-tensor.shape[0] // mesh.size())
    first = mesh.get_local_rank() * size
    return slice(first, first + size)


def like(whole: Shaped[Tensor, "..."], tensor: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """A whole tensor on the device of another, and spread as that is."""
    moved = whole.to(tensor.device)
    if isinstance(tensor, DTensor) and whole.ndim:
        return distribute_tensor(moved, tensor.device_mesh, tensor.placements)
    return moved


def _share(whole: Tensor, tensor: Tensor) -> Tensor:
    """Of a whole tensor, what this process has of one that may be spread, in its type."""
    if not isinstance(tensor, DTensor):
        return whole.to(tensor, copy=True)
    own = whole[rows(tensor)].detach().to(tensor.device_mesh.device_type, tensor.dtype, copy=True)
    mesh, shape, stride = tensor.device_mesh, tensor.shape, tensor.stride()
    return DTensor.from_local(own, mesh, tensor.placements, shape=shape, stride=stride)


def _member(module: Any, name: str) -> Tensor:
    """A parameter or buffer by its dotted name."""
    for part in name.split("."):
        module = getattr(module, part)
    found: Tensor = module
    return found
