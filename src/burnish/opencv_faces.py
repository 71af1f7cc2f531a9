"""Faces of photographs: YuNet finds them, SFace tells them apart, both through OpenCV.

Neither network ships with Burnish: the user downloads the two ONNX files from OpenCV's model zoo
and gives their paths. A picture is searched at several sizes, with a margin around it, because
YuNet misses a face that fills the picture at one size and a small one at another.

This was never run on the real ONNX files: the tests drive it with a stand-in for `cv2`, which
checks what is asked of OpenCV and where the boxes end up, not that people are told apart. The two
cosines of `STANDARD` stand around 0.363, the threshold that OpenCV's documentation gives for SFace;
they were not measured here.
"""

import importlib
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from burnish.config import ConfigError
from burnish.identity import Face, Standard

STANDARD = Standard(cosine_floor=0.15, cosine_ceiling=0.6, min_size=48.0)
"""How SFace's vectors are read; see the module's own words on where this comes from."""
SIZES = (160, 320, 640)
"""Longer sides, in pixels, at which a picture with its margin is searched."""
MARGIN = 0.15
"""Margin around the picture, as a share of its sides."""
LICENCES = (
    "faces: YuNet (MIT) finds them and SFace (Apache-2.0) compares them, from your ONNX files"
)
_MIN_CONFIDENCE = 0.8
_MAX_OVERLAP = 0.3
"""Of two boxes, as intersection over union, for them to be two faces."""
_X, _Y = 0, 1


class OpenCvFaces:
    """YuNet and SFace behind `burnish.identity.Faces`."""

    standard = STANDARD

    def __init__(self, cv2: Any, detector: str, recognizer: str) -> None:
        """Take the module, or what behaves like it, and the paths of both networks."""
        self._cv2 = cv2
        self._detector = cv2.FaceDetectorYN.create(
            detector, "", (SIZES[0], SIZES[0]), _MIN_CONFIDENCE, _MAX_OVERLAP, 5000
        )
        self._recognizer = cv2.FaceRecognizerSF.create(recognizer, "")
        # Both keep the size of the last picture between calls.
        self._lock = threading.Lock()

    @classmethod
    def load(cls, detector: str, recognizer: str) -> "OpenCvFaces":
        """Read both ONNX files and say under which licences they stand.

        Raises:
            ConfigError: a file or the extra `face` is missing, or OpenCV cannot read a file.
        """
        for setting, network, path in (
            ("detector", "YuNet", detector),
            ("recognizer", "SFace", recognizer),
        ):
            if not Path(path).is_file():
                raise ConfigError(
                    f"need the ONNX file of {network}, got {path!r} as `{setting}`; download it "
                    f"from OpenCV's model zoo and set `{setting}` to its path"
                )
        try:
            cv2 = importlib.import_module("cv2")
        except ImportError as error:
            raise ConfigError(
                f"need OpenCV for the backend opencv, got {' '.join(str(error).split())[:120]}; "
                "install the extra: pip install 'burnish[face]'"
            ) from None
        try:
            found = cls(cv2, detector, recognizer)
        except Exception as error:
            # OpenCV raises a class of its own, which is not there before the import.
            raise ConfigError(
                f"need ONNX files that OpenCV reads, got {detector} and {recognizer}: "
                f"{' '.join(str(error).split())[:160]}; download them again"
            ) from None
        print(LICENCES, file=sys.stderr, flush=True)
        return found

    def find(self, picture: Image.Image) -> list[Face]:
        """Every face once, the surest first, with sizes in pixels of the picture given."""
        padded = with_margin(picture.convert("RGB"))
        bgr = np.ascontiguousarray(np.asarray(padded)[:, :, ::-1])
        with self._lock:
            rows = distinct([row for size in SIZES for row in self._search(padded, size)])
            return [self._face(bgr, row) for row in rows]

    def _search(self, padded: Image.Image, size: int) -> list[np.ndarray]:
        """Rows of YuNet at one size, in pixels of the padded picture: x, y, width, height of the
        box, x and y of both eyes, the nose and both corners of the mouth, and the confidence."""
        scale = size / max(padded.size)
        width, height = (max(1, round(scale * side)) for side in padded.size)
        small = np.asarray(padded.resize((width, height), Image.Resampling.BILINEAR))
        self._detector.setInputSize((width, height))
        _, found = self._detector.detect(np.ascontiguousarray(small[:, :, ::-1]))
        back = np.tile([padded.width / width, padded.height / height], 7)
        rows = [] if found is None else np.asarray(found, dtype=np.float32)
        return [np.concatenate([row[:14] * back, row[14:]]).astype(np.float32) for row in rows]

    def _face(self, bgr: np.ndarray, row: np.ndarray) -> Face:
        aligned = self._recognizer.alignCrop(bgr, row)
        feature = np.asarray(self._recognizer.feature(aligned), dtype=np.float32).ravel()
        vector = torch.from_numpy(feature.copy())
        return Face(
            embedding=torch.nn.functional.normalize(vector, dim=0),
            size=float(min(row[2], row[3])),
            turn=turn_of(row),
        )


def with_margin(picture: Image.Image) -> Image.Image:
    """The picture with a grey margin of `MARGIN` of its sides all around."""
    dx, dy = (round(MARGIN * side) for side in picture.size)
    sheet = Image.new("RGB", (picture.width + 2 * dx, picture.height + 2 * dy), (128, 128, 128))
    sheet.paste(picture, (dx, dy))
    return sheet


def distinct(rows: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Rows of YuNet without those whose box covers that of a surer one; the surest first."""
    kept: list[np.ndarray] = []
    for row in sorted(rows, key=lambda row: -float(row[14])):
        if all(_overlap(row, other) <= _MAX_OVERLAP for other in kept):
            kept.append(row)
    return kept


def _overlap(first: np.ndarray, second: np.ndarray) -> float:
    """Intersection over union of two boxes."""
    shared = 1.0
    for axis in (_X, _Y):
        start = max(first[axis], second[axis])
        end = min(first[axis] + first[axis + 2], second[axis] + second[axis + 2])
        shared *= max(float(end - start), 0.0)
    union = float(first[2] * first[3] + second[2] * second[3]) - shared
    return shared / union if union > 0 else 0.0


def turn_of(row: np.ndarray) -> float:
    """`Face.turn` of a row of YuNet: infinite where both eyes coincide, as in a profile."""
    eyes = row[4:8].reshape(2, 2)
    across = eyes[1] - eyes[0]
    distance = float(np.hypot(*across))
    if distance == 0:
        return float("inf")
    # Along the line of the eyes, so that a tilted head is not a turned one.
    along = float((row[8:10] - eyes.mean(axis=0)) @ across) / distance
    return abs(along) / (distance / 2)
