"""Faces in pictures, and how alike two of them are: what finds them, and the embedded finder.

A finder gives every face of a picture as a unit vector; the cosine of two vectors tells whether
they show the same person. Whoever compares faces knows `Faces` alone. The embedded world has one
finder, a network of a few layers that looks at the whole picture, because its portraits show one
person each. YuNet and SFace stand in `burnish.opencv_faces`.
"""

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from burnish import images
from burnish.config import ConfigError
from burnish.wording import brief

SIDE = 64
"""Side in pixels of the picture that the embedded network sees."""
DIMENSION = 64
"""Length of the embedded network's vectors."""
WEIGHTS, FACTS = "model.safetensors", "face.json"
"""Files of an embedded finder's folder: the network, and what its training measured."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Face:
    """One face of a picture."""

    embedding: Float[Tensor, " dimension"]
    """Unit vector; only vectors of one finder can be compared."""
    size: float
    """Shorter side of its box in pixels of the picture."""
    turn: float | None = None
    """How far the nose stands from the middle of the eyes, in halves of their distance: 0 looks
    straight ahead, 1 and more is close to a profile; None where the finder cannot tell."""


@dataclass(frozen=True, kw_only=True)
class Standard:
    """How the vectors of a finder are to be read."""

    cosine_floor: float
    """Cosine of people who have nothing to do with each other."""
    cosine_ceiling: float
    """Cosine from which on two pictures show the same person for sure."""
    min_size: float
    """Smallest face, in pixels, whose vector can be trusted."""


@runtime_checkable
class Faces(Protocol):
    """Finds the faces of a picture; callable from several threads."""

    standard: Standard

    def find(self, picture: Image.Image) -> list[Face]:
        """All faces of an RGB picture of any size; whatever goes wrong inside is raised."""
        ...


class FaceNetwork(nn.Module):
    """Convolutions from a small picture to a unit vector, and whether it shows a face at all."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        channels = (3, width, 2 * width, 3 * width, 3 * width)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(channels):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1)]
            # Groups instead of batches: a vector must not depend on the other pictures.
            layers += [nn.GroupNorm(4, after), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Flatten())
        features = channels[-1] * (SIDE // 16) ** 2
        self.embedding = nn.Linear(features, DIMENSION)
        self.presence = nn.Linear(features, 1)

    def forward(
        self, pixels: Float[Tensor, "batch 3 64 64"]
    ) -> tuple[Float[Tensor, "batch 64"], Float[Tensor, " batch"]]:
        """Unit vectors and face logits (above 0: there is one) of pictures in [0, 1]."""
        seen = self.body(2 * pixels - 1)
        vectors = nn.functional.normalize(self.embedding(seen), dim=-1)
        return vectors, self.presence(seen).squeeze(-1)


class EmbeddedFaces:
    """The finder of the embedded world: one face or none, as large as the picture's shorter side.

    It knows the drawn world alone; on photographs its vectors mean nothing.
    """

    def __init__(self, network: FaceNetwork, standard: Standard) -> None:
        self.standard = standard
        self._network = network.eval().requires_grad_(False)

    @classmethod
    def load(cls, folder: Path) -> "EmbeddedFaces":
        """Read what `save` wrote.

        Raises:
            ConfigError: the folder holds no such finder.
        """
        network = FaceNetwork()
        try:
            facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
            stored = load_file(folder / WEIGHTS)
            network.load_state_dict({name: value.float() for name, value in stored.items()})
            standard = Standard(**{name: float(facts["standard"][name]) for name in _NAMES})
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = brief(error, names_file=True)
            raise ConfigError(
                f"need a folder with {WEIGHTS} and {FACTS} of the embedded finder, got {folder}: "
                f"{reason}; use embedded:weights/face"
            ) from None
        return cls(network, standard)

    @torch.no_grad()
    def find(self, picture: Image.Image) -> list[Face]:
        """The face of the picture, or nothing."""
        small = picture.convert("RGB")
        if small.size != (SIDE, SIDE):
            small = small.resize((SIDE, SIDE), Image.Resampling.BOX)
        vectors, presence = self._network(images.to_tensor(small)[None])
        if float(presence[0]) <= 0:
            return []
        return [Face(embedding=vectors[0], size=float(min(picture.size)))]


_NAMES = ("cosine_floor", "cosine_ceiling", "min_size")


def save(network: FaceNetwork, facts: Mapping[str, Any], folder: Path) -> None:
    """Write an embedded finder as float16; `facts["standard"]` has the fields of `Standard`."""
    folder.mkdir(parents=True, exist_ok=True)
    # Contiguous copies: safetensors refuses tensors that share memory.
    halves = {name: value.half().contiguous() for name, value in network.state_dict().items()}
    save_file(halves, folder / WEIGHTS)
    (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
