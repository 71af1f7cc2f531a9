"""Checkpoints of tensors that are spread: each process writes its share, any number reads them.

Torch's distributed checkpoint puts the shares into safetensors files, with the place of each in its
tensor; what reads them asks for the shares it needs, however many processes wrote. Nothing is
gathered. Around it is what makes every checkpoint whole or not there: another name until all is
written, hashes, a marker, and one process that renames when all are done.
"""

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from burnish import checkpoint
from burnish.checkpoint import JSON, CheckpointError, Tensors
from burnish.runtime import Runtime
from burnish.wording import brief

_SHARES = "shard-{:05d}-*.safetensors"
_APART = ":"
"""Between the group of a tensor and its name."""
FILE_BYTES = 1 << 30
"""Of a file, about; a process holds one in its memory while it writes."""


def save(
    folder: Path, step: int, tensors: Mapping[str, Tensors], state: JSON, rt: Runtime, *, keep: int
) -> None:
    """Write the checkpoint of a step; all processes must come here.

    Args:
        folder: as for `burnish.checkpoint.save`, in a place that all processes see.
        step: likewise.
        tensors: by group; spread, or alike on all processes.
        state: likewise.
        rt: processes.
        keep: likewise.

    Raises:
        CheckpointError: it cannot be written.
    """
    named = {
        f"{group}{_APART}{name}": tensor.detach()
        for group, own in tensors.items()
        for name, tensor in own.items()
    }
    size = sum(tensor.nbytes for tensor in named.values())
    with contextlib.ExitStack() as stack:
        place = checkpoint.unfinished(folder, step)
        if rt.is_main:
            stack.enter_context(checkpoint.placing(folder, step, num_bytes=size, keep=keep))
        rt.barrier()
        writer = HuggingFaceStorageWriter(
            str(place), fqn_to_index_mapping=_files(named, rt), save_distributed=True
        )
        with checkpoint.saving(place):
            try:
                dcp.save(named, storage_writer=writer)
            except CheckpointException as error:
                # No `Exception`, and of many lines.
                reasons = [failure[0] for failure in error.failures.values()]
                raise CheckpointError(f"need to write {place}, got {_one_line(reasons)}") from None
            shares = checkpoint.facts(sorted(place.glob(_SHARES.format(rt.rank + 1))))
        every = rt.gather(shares)
        if rt.is_main:
            found = {name: fact for own in every for name, fact in own.items()}
            checkpoint.complete(place, step, found, state)
    # Nobody goes on to the next one, or ends, before this one has its name.
    rt.barrier()


def read(folder: Path, like: Callable[[str, str], Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of a checkpoint by group and name; if spread ones are wanted, all processes must
    come here.

    Args:
        folder: of one checkpoint.
        like: the tensor that one of a group and name belongs to; where that is spread and of the
            same shape, so is what is read.
    """
    stored: Any = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    named: dict[str, Tensor] = {}
    for key, facts in stored.items():
        owner = like(*key.split(_APART, 1))
        dtype = facts.properties.dtype
        if isinstance(owner, DTensor) and owner.shape == facts.size:
            named[key] = torch.empty_like(owner, dtype=dtype, requires_grad=False)
        else:
            named[key] = torch.empty(facts.size, dtype=dtype)
    is_alone = not torch.distributed.is_initialized()
    dcp.load(named, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=is_alone)
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in named.items():
        group, name = key.split(_APART, 1)
        found.setdefault(group, {})[name] = tensor
    return found


def whole(folder: Path) -> dict[str, dict[str, Tensor]]:
    """All of its tensors, whole, in the memory of this process."""
    return read(folder, lambda group, name: torch.empty(0))


def _one_line(reasons: Sequence[BaseException]) -> str:
    told = [brief(reason) for reason in reasons]
    return f"{told[0]}; check its place and the free disk space, and start the same command again"


def _files(named: Tensors, rt: Runtime) -> dict[str, int]:
    """The number of the file of each tensor, so that no file of a process is large."""
    sums = itertools.accumulate(tensor.nbytes // rt.world_size for tensor in named.values())
    return {name: 1 + total // FILE_BYTES for name, total in zip(named, sums, strict=True)}
