"""The state of an optimizer as a checkpoint holds it: named tensors, and numbers."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from burnish.checkpoint import JSON, CheckpointError, Tensors
from burnish.wording import brief

_TABLES = ("qmap", "absmax")
"""How names of what moments in 8 bits are read by begin, which has other shapes than its weight."""


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], JSON]:
    """The state of AdamW and its like as tensors `<parameter>.<name>` and JSON."""
    packed = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for index, entries in packed["state"].items():
        for name, value in _flat(entries):
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                values.setdefault(str(index), {})[name] = value
    groups = [{k: _number(v) for k, v in group.items()} for group in packed["param_groups"]]
    return tensors, {"param_groups": groups, "values": values}


def _flat(entries: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Of one parameter; some optimizers keep tensors of other shapes than its own in a group."""
    for name, value in entries.items():
        if isinstance(value, Mapping):
            yield from _flat(value)
        else:
            yield name, value


def load_optimizer_state(optimizer: torch.optim.Optimizer, tensors: Tensors, state: JSON) -> None:
    """Put back what `optimizer_state` gave into an optimizer of the same parameters in order.

    Raises:
        CheckpointError: the parameters of the optimizer have other numbers or shapes.
    """
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    entries: dict[int, dict[str, Any]] = {
        int(index): dict(values) for index, values in state["values"].items()
    }
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        shape = parameters[int(index)].shape if int(index) < len(parameters) else None
        is_moment = value.ndim > 0 and not name.startswith(_TABLES)
        if shape is None or (is_moment and value.shape != shape):
            raise CheckpointError(
                f"need the optimizer of the checkpoint, parameter {index} has shape"
                f" {shape and tuple(shape)} and its saved {name} {tuple(value.shape)};"
                " resume with the settings it was saved with"
            )
        entries.setdefault(int(index), {})[name] = value
    # JSON has no tuples, and Adam's betas are one.
    groups = [
        {k: tuple(v) if isinstance(v, list) and k != "params" else v for k, v in group.items()}
        for group in state["param_groups"]
    ]
    try:
        optimizer.load_state_dict({"state": entries, "param_groups": groups})
    except ValueError as error:
        raise CheckpointError(
            f"need the optimizer of the checkpoint, {brief(error)}; resume with the"
            " settings it was saved with"
        ) from None


def _number(value: Any) -> Any:
    """A setting of a parameter group as JSON has it; a learning rate may be a tensor."""
    return value.item() if isinstance(value, Tensor) else value
