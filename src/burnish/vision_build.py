"""An import of torchvision that also works beside a torch that it was not built for."""

import functools
import importlib

import torch

_MISSING_OPERATOR = "operator torchvision::nms does not exist"
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


@functools.cache
def ensure_torchvision() -> bool:
    """Make `import torchvision` work beside a torch it was not built for; whether help was needed.

    The image processors of transformers import torchvision. Its wheels from the package index are
    CUDA builds: beside a CPU torch their operators cannot be loaded, and the import fails because
    it describes two operators that were never declared. Declaring these schemas is enough, as
    nothing here calls box operators. Where the builds match, the plain import works and no more is
    done. Call it before the first import from transformers or diffusers.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if _MISSING_OPERATOR not in str(error):
            raise
    else:
        return False
    _declare_operators()
    importlib.import_module("torchvision")
    return True


@functools.cache
def _declare_operators() -> torch.library.Library:
    # Cached, because the declarations vanish with the library object.
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    return library
