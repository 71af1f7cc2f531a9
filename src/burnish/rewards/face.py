"""Does an edit keep the person? Faces of the source are compared with those of the picture.

Of several sources only the first is looked at: it is the picture that is changed, and whether the
faces of a reference should be in the result is for the instruction to say.

| source | picture | score |
|---|---|---|
| drawn from text, or the prompt has the tag `identity:changes` | any | not applicable |
| no face, or only small or turned ones | any | not applicable |
| faces | faces | mean over the source's faces of their match, see below |
| faces | none | 0, the lowest: otherwise a policy learns to hide the face |
| the finder raises, or is given what is no image | any | failed |
| faces | the finder raises, or a pixel is not finite | failed |

Whether the reward has a say is a function of the prompt alone, so that it is the same for a whole
group. The tag is how a data set says that the instruction removes, replaces or turns the person, or
changes what makes them that person; nothing here reads the words of the instruction.

Each face of the source that can be trusted is matched with one face of the picture so that the sum
of the cosines is highest. A match counts 0 at the floor of the cosine and below, 1 at the ceiling
and above, and linearly between; a face without a match counts as the floor. The map saturates
because two pictures of one person differ too: beyond the ceiling a higher cosine means a copied
picture, not a better likeness.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import model_validator
from scipy.optimize import linear_sum_assignment

from burnish import images
from burnish.config import located
from burnish.identity import EmbeddedFaces, Face, Faces
from burnish.opencv_faces import OpenCvFaces
from burnish.rewards.base import Reward, RewardConfig
from burnish.types import Failed, NotApplicable, Prompt, Score, Scored, ScoreRequest
from burnish.wording import brief

CHANGES_IDENTITY = "identity:changes"
"""Tag of prompts whose instruction is about who is shown, or about hiding or turning them."""
_REMEMBERED = 512
"""Sources whose faces are kept, so that each is searched once for all pictures of its group."""


class FaceConfig(RewardConfig):
    """Which finder, and how its cosines are read; what is None is the finder's own standard."""

    kind: Literal["face"] = "face"
    backend: Literal["opencv", "miniature"]
    """`opencv` for photographs, `miniature` for the embedded world alone."""
    detector: str = ""
    """For opencv: path of YuNet's ONNX file."""
    recognizer: str = ""
    """For opencv: path of SFace's ONNX file."""
    path: str = "embedded:weights/face"
    """For miniature: the folder of the embedded finder."""
    cosine_floor: float | None = None
    """Cosine that scores 0."""
    cosine_ceiling: float | None = None
    """Cosine that scores 1."""
    min_size: float | None = None
    """Smallest face of a source that has a say, shorter side in pixels; 48 for opencv."""
    max_turn: float = 0.8
    """Most that a face of a source may be turned, see `Face.turn`; 1 is close to a profile."""

    @model_validator(mode="after")
    def _floor_is_below_ceiling(self) -> "FaceConfig":
        if self.cosine_floor is not None and self.cosine_ceiling is not None:
            _check(self.cosine_floor, self.cosine_ceiling)
        return self

    def inputs(self) -> Sequence[Path]:
        if self.backend == "opencv":
            return [Path(self.detector), Path(self.recognizer)]
        return list(located(self.path).glob("*.safetensors"))

    def build(self) -> "FaceIdentity":
        faces: Faces
        if self.backend == "opencv":
            faces = OpenCvFaces.load(self.detector, self.recognizer)
        else:
            faces = EmbeddedFaces.load(located(self.path))
        return FaceIdentity(
            faces,
            cosine_floor=self.cosine_floor,
            cosine_ceiling=self.cosine_ceiling,
            min_size=self.min_size,
            max_turn=self.max_turn,
        )


class FaceIdentity(Reward):
    """Scores in [0, 1]; the detail tells the lowest cosine of a match and the counted faces."""

    def __init__(
        self,
        faces: Faces,
        *,
        cosine_floor: float | None = None,
        cosine_ceiling: float | None = None,
        min_size: float | None = None,
        max_turn: float = 0.8,
    ) -> None:
        standard = faces.standard
        self._faces, self._max_turn = faces, max_turn
        self._floor = standard.cosine_floor if cosine_floor is None else cosine_floor
        self._ceiling = standard.cosine_ceiling if cosine_ceiling is None else cosine_ceiling
        self._min_size = standard.min_size if min_size is None else min_size
        _check(self._floor, self._ceiling)
        self._remembered = lru_cache(maxsize=_REMEMBERED)(self._find_in_source)

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        return [self._score_one(request) for request in requests]

    def _score_one(self, request: ScoreRequest) -> Score:
        wanted = self._wanted(request.prompt)
        if not isinstance(wanted, tuple):
            return wanted
        if not bool(request.image.isfinite().all()):
            return Failed(reason="the image is not finite")
        try:
            return self._compared(wanted, self._faces.find(images.to_pil(request.image)))
        except Exception as error:
            return Failed(reason=_told("the faces of the picture could not be compared", error))

    def _wanted(self, prompt: Prompt) -> tuple[Face, ...] | NotApplicable | Failed:
        """The faces that a picture must show; a function of the prompt alone."""
        if prompt.task != "edit" or not prompt.sources:
            return NotApplicable(reason="only an edit has a face to keep")
        if CHANGES_IDENTITY in prompt.tags:
            return NotApplicable(reason="the instruction is about who is shown")
        try:
            found = self._remembered(prompt.sources[0])
        except Exception as error:
            return Failed(reason=_told("the faces of the source could not be found", error))
        if not found:
            return NotApplicable(reason="the source shows no face")
        trusted = tuple(face for face in found if self._is_trusted(face))
        return trusted or NotApplicable(reason="the source's faces are too small or turned away")

    def _find_in_source(self, source: bytes) -> tuple[Face, ...]:
        return tuple(self._faces.find(images.decode(source, where="source")))

    def _is_trusted(self, face: Face) -> bool:
        is_turned = face.turn is not None and face.turn > self._max_turn
        return face.size >= self._min_size and not is_turned

    def _compared(self, wanted: Sequence[Face], found: Sequence[Face]) -> Scored:
        counts = {"source_faces": float(len(wanted)), "faces": float(len(found))}
        if not found:
            return Scored(value=0.0, detail=counts)
        cosines = cosines_of(wanted, found)
        # Refuses what is not finite.
        rows, columns = linear_sum_assignment(cosines, maximize=True)
        matched = cosines[rows, columns]
        shares = ((matched - self._floor) / (self._ceiling - self._floor)).clip(0, 1)
        # Faces without a match add nothing to the sum, but count.
        value = float(shares.sum()) / len(wanted)
        return Scored(value=value, detail={**counts, "cosine": float(matched.min())})


def cosines_of(wanted: Sequence[Face], found: Sequence[Face]) -> np.ndarray:
    """Cosine of every face of the source with every face of the picture, `source picture`."""
    first = torch.stack([face.embedding for face in wanted])
    second = torch.stack([face.embedding for face in found])
    return (first @ second.T).double().cpu().numpy()


def _check(floor: float, ceiling: float) -> None:
    if not -1 <= floor < ceiling <= 1:
        raise ValueError(
            f"need -1 <= cosine_floor < cosine_ceiling <= 1, got {floor} and {ceiling}; "
            "set both or neither"
        )


def _told(what: str, error: Exception) -> str:
    return f"{what}: {type(error).__name__}: {brief(error, names_file=True)}"
