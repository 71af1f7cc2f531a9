"""In which type the matrix products are computed.

bfloat16 is worth it where the device has instructions for it. A processor without them computes
each product by way of float32, and a training step takes four to six times as long as in float32
(docs/studies/whole-run.md).
"""

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""By the names that recipes use."""


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions that multiply in bfloat16."""
    if device.type == "cuda":
        return True
    # Releases of torch that do not tell are taken to have none.
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The torch dtype of a name in `auto`, `float32`, `bfloat16`."""
    if name == "auto":
        return torch.bfloat16 if has_bfloat16(device) else torch.float32
    return DTYPES[name]
