"""The face reward as a table, the embedded finder as measured, the photographs' finder as asked."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from burnish import images, opencv_faces
from burnish.config import ConfigError, located
from burnish.identity import EmbeddedFaces, Face, FaceNetwork, Standard, save
from burnish.miniature.faces import (
    FacesPlan,
    contrast,
    draw_portraits,
    look_of,
    looks,
    measure_faces,
    portrait_of,
    train_faces,
)
from burnish.miniature.pictures import to_bytes
from burnish.opencv_faces import OpenCvFaces, turn_of
from burnish.policies.qwen_image21 import QwenImage21Policy
from burnish.rewards.face import CHANGES_IDENTITY, FaceConfig, FaceIdentity
from burnish.types import Failed, NotApplicable, Prompt, Score, Scored, ScoreRequest
from burnish.world.render import render
from burnish.world.scenes import sample_scene

SHIPPED = located("embedded:weights/face")
STANDARD = Standard(cosine_floor=0.2, cosine_ceiling=0.6, min_size=48.0)


def at(degrees: float, size: float = 100.0, turn: float | None = None) -> Face:
    """A face whose vector points that way in a plane."""
    angle = torch.tensor(degrees).deg2rad()
    return Face(embedding=torch.stack([angle.cos(), angle.sin()]), size=size, turn=turn)


def alike(cosine: float) -> Face:
    """A face with this cosine to the one at 0 degrees."""
    return at(float(torch.tensor(cosine).acos().rad2deg()))


class Known:
    """Finds what it was told is in a picture of each grey level; an error is raised."""

    standard = STANDARD

    def __init__(self, source: list[Face] | Exception, output: list[Face] | Exception) -> None:
        self._found = {0: source, 255: output}
        self.asked: list[int] = []

    def find(self, picture: Image.Image) -> list[Face]:
        level = int(np.asarray(picture)[0, 0, 0])
        self.asked.append(level)
        found = self._found[level]
        if isinstance(found, Exception):
            raise found
        return found


WHITE = torch.ones(3, 8, 8)
BLACK = images.encode_png(Image.new("RGB", (8, 8)))
EDIT = Prompt(id="edit", text="add a hat", task="edit", sources=(BLACK,))
TEXT = Prompt(id="text", text="a portrait")


def judged(
    source: list[Face] | Exception,
    output: list[Face] | Exception,
    prompt: Prompt = EDIT,
    image: Tensor = WHITE,
) -> Score:
    """What the reward says of one picture."""
    reward = FaceIdentity(Known(source, output))
    return reward.score([ScoreRequest(prompt=prompt, image=image)])[0]


def test_of_several_sources_the_first_has_the_face_to_keep() -> None:
    other = images.encode_png(Image.new("RGB", (8, 8), (99, 99, 99)))
    faces = Known([at(0)], [at(0)])
    request = ScoreRequest(prompt=replace(EDIT, sources=(BLACK, other)), image=WHITE)
    score = FaceIdentity(faces).score([request])[0]
    assert isinstance(score, Scored) and score.value == 1 and faces.asked == [0, 255]


BROKEN = RuntimeError("out of\nmemory")
NAN = torch.full((3, 8, 8), torch.nan)
TAGGED = replace(EDIT, tags=("person", CHANGES_IDENTITY))


@pytest.mark.parametrize(
    ("source", "output", "prompt", "image", "expected"),
    [
        ([], [at(0)], EDIT, WHITE, "no face"),
        ([at(0, size=47.0)], [at(0)], EDIT, WHITE, "too small"),
        ([at(0, turn=0.9)], [at(0)], EDIT, WHITE, "turned"),
        ([at(0)], [at(0)], TAGGED, WHITE, "who is shown"),
        ([at(0)], [at(0)], TEXT, WHITE, "only an edit"),
        # What has no say has none for a broken picture either: it is the same for the whole group.
        ([], BROKEN, EDIT, NAN, "no face"),
        (BROKEN, BROKEN, TAGGED, NAN, "who is shown"),
        ([at(0)], [], TEXT, NAN, "only an edit"),
    ],
)
def test_no_say_is_a_function_of_the_prompt(
    source: Any, output: Any, prompt: Prompt, image: Tensor, expected: str
) -> None:
    score = judged(source, output, prompt, image)
    assert isinstance(score, NotApplicable) and expected in score.reason


@pytest.mark.parametrize(
    ("source", "output", "prompt", "image", "expected"),
    [
        (BROKEN, [at(0)], EDIT, WHITE, "RuntimeError: out of memory"),
        ([at(0)], BROKEN, EDIT, WHITE, "RuntimeError: out of memory"),
        ([at(0)], [at(0)], EDIT, NAN, "not finite"),
        ([at(0)], [at(float("nan"))], EDIT, WHITE, "could not be compared"),
        ([at(0)], [at(0)], replace(EDIT, sources=(b"no image",)), WHITE, "ImageError"),
    ],
)
def test_a_failure_has_a_reason_and_no_number(
    source: Any, output: Any, prompt: Prompt, image: Tensor, expected: str
) -> None:
    score = judged(source, output, prompt, image)
    assert isinstance(score, Failed) and expected in score.reason
    assert "\n" not in score.reason


@pytest.mark.parametrize(
    ("source", "output", "expected"),
    [
        ([at(0)], [at(0)], 1.0),
        ([at(0)], [alike(0.6001)], 1.0),
        ([at(0)], [alike(0.4)], 0.5),
        ([at(0)], [alike(0.1999)], 0.0),
        ([at(0)], [at(180)], 0.0),
        # Hiding the face is the worst that an edit can do.
        ([at(0)], [], 0.0),
        # In another order, and with a bystander, the people are still there.
        ([at(0), at(90)], [at(90), at(0)], 1.0),
        ([at(0)], [at(90), at(0)], 1.0),
        # One of two is gone.
        ([at(0), at(90)], [at(0)], 0.5),
        ([at(0), at(90)], [], 0.0),
        # One face cannot stand for two.
        ([at(0), at(0)], [at(0), at(90)], 0.5),
        # A bystander in the source who is too small to be known has no say.
        ([at(0), at(90, size=20.0)], [at(0)], 1.0),
        # A turned or small face in the picture is no excuse.
        ([at(0)], [at(90, size=5.0, turn=2.0)], 0.0),
    ],
)
def test_faces_that_are_found_are_compared(
    source: list[Face], output: list[Face], expected: float
) -> None:
    score = judged(source, output)
    assert isinstance(score, Scored) and score.value == pytest.approx(expected, abs=1e-3)


def test_the_score_rises_with_the_cosine_and_saturates() -> None:
    cosines = torch.linspace(-1, 1, 41).tolist()
    scores = [judged([at(0)], [alike(cosine)]) for cosine in cosines]
    values = [score.value for score in scores if isinstance(score, Scored)]
    assert len(values) == 41 and values == sorted(values)
    assert values[0] == 0.0 and values[-1] == 1.0


def test_the_best_match_is_that_of_all_faces_together() -> None:
    # Greedily, the first would take the face that is the only hope of the second.
    score = judged([at(0), at(-50)], [at(0), at(50)])
    assert isinstance(score, Scored)
    assert score.detail["cosine"] == pytest.approx(np.cos(np.radians(50)), abs=1e-4)
    assert score.value == pytest.approx(1.0)


def test_a_source_is_searched_once_for_all_its_pictures() -> None:
    faces = Known([at(0)], [at(0)])
    FaceIdentity(faces).score([ScoreRequest(prompt=EDIT, image=WHITE)] * 4)
    assert sorted(faces.asked) == [0, 255, 255, 255, 255]


def test_settings_replace_the_finders_standard() -> None:
    faces = Known([at(0, size=30.0, turn=0.9)], [alike(0.4)])
    request = ScoreRequest(prompt=EDIT, image=WHITE)
    reward = FaceIdentity(faces, cosine_floor=0.0, cosine_ceiling=0.5, min_size=20.0, max_turn=1.0)
    (score,) = reward.score([request])
    assert isinstance(score, Scored) and score.value == pytest.approx(0.8, abs=1e-3)
    with pytest.raises(ValueError, match="cosine_floor < cosine_ceiling"):
        FaceConfig(backend="miniature", cosine_floor=0.5, cosine_ceiling=0.5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"backend": "opencv"}, "need the ONNX file of YuNet, got '' as `detector`"),
        ({"backend": "opencv", "detector": "FILE"}, "need the ONNX file of SFace"),
        ({"backend": "opencv", "detector": "FILE", "recognizer": "FILE"}, "install the extra"),
        ({"backend": "miniature", "path": "nowhere"}, "embedded:weights/face"),
    ],
)
def test_what_is_missing_is_one_line(
    settings: dict[str, str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # None is what Python takes for a module that cannot be imported.
    monkeypatch.setitem(sys.modules, "cv2", None)
    file = tmp_path / "network.onnx"
    file.write_bytes(b"")
    given: Any = {name: str(file) if v == "FILE" else v for name, v in settings.items()}
    with pytest.raises(ConfigError) as caught:
        FaceConfig(**given).build()
    assert words in str(caught.value) and "\n" not in str(caught.value)


class FakeCv2:
    """What `burnish.opencv_faces` uses of cv2: finds red boxes between 20 and 130 pixels high
    that do not touch the edge, so that neither one size nor no margin would do.

    A box's eyes lie a quarter of its width left and right of its nose, and its vector is the mean
    colour of the face's box in what the recognizer is given.
    """

    def __init__(self) -> None:
        self.sizes: list[tuple[int, int]] = []
        self.paths: list[str] = []
        self.FaceDetectorYN = SimpleNamespace(create=self._detector)
        self.FaceRecognizerSF = SimpleNamespace(create=self._recognizer)

    def _detector(self, path: str, *_: Any) -> Any:
        self.paths.append(path)
        return SimpleNamespace(setInputSize=self.sizes.append, detect=self._detect)

    def _recognizer(self, path: str, _: str) -> Any:
        self.paths.append(path)
        return SimpleNamespace(alignCrop=self._crop, feature=lambda crop: crop)

    def _detect(self, bgr: np.ndarray) -> tuple[int, np.ndarray | None]:
        assert bgr.shape[1::-1] == self.sizes[-1]
        red = (bgr[..., 2] > 200) & (bgr[..., 0] < 60)
        ys, xs = np.nonzero(red)
        if not len(ys) or not 20 <= np.ptp(ys) + 1 <= 130 or min(ys.min(), xs.min()) == 0:
            return 1, None
        x, y, w, h = xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1
        middle = x + w / 2
        points = [middle - w / 4, y, middle + w / 4, y, middle, y + h / 2, x, y, x, y]
        return 1, np.array([[x, y, w, h, *points, 0.9]], dtype=np.float32)

    def _crop(self, bgr: np.ndarray, row: np.ndarray) -> np.ndarray:
        x, y, w, h = (round(float(value)) for value in row[:4])
        return bgr[y : y + h, x : x + w].astype(np.float32).mean(axis=(0, 1))[None]


def boxed(side: int, left: int, top: int, width: int, height: int) -> Image.Image:
    """A blue picture with a red box."""
    picture = Image.new("RGB", (side, side), (0, 0, 255))
    picture.paste((255, 0, 0), (left, top, left + width, top + height))
    return picture


@pytest.mark.parametrize(
    "box",
    [(0, 0, 300, 300), (60, 40, 150, 200), (200, 220, 30, 40)],
    ids=["close up", "half", "small"],
)
def test_faces_of_every_size_are_found_once_and_where_they_are(
    box: tuple[int, int, int, int],
) -> None:
    cv2 = FakeCv2()
    (face,) = OpenCvFaces(cv2, "yunet", "sface").find(boxed(300, *box))
    assert face.size == pytest.approx(min(box[2:]), rel=0.1)
    # Red, in the order of OpenCV's channels: the box was cut out of the right place.
    assert torch.allclose(face.embedding, torch.tensor([0.0, 0.0, 1.0]), atol=0.1)
    assert face.turn == pytest.approx(0.0, abs=1e-5)
    assert cv2.sizes == [(size, size) for size in opencv_faces.SIZES]
    assert cv2.paths == ["yunet", "sface"]


def test_no_face_is_no_face_and_the_long_side_is_scaled() -> None:
    cv2 = FakeCv2()
    assert OpenCvFaces(cv2, "", "").find(Image.new("RGB", (400, 100))) == []
    assert cv2.sizes == [(160, 40), (320, 80), (640, 160)]


def test_opencv_is_told_its_licences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "network.onnx"
    file.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "cv2", FakeCv2())
    FaceConfig(backend="opencv", detector=str(file), recognizer=str(file)).build()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "YuNet (MIT)" in said[0] and "SFace (Apache-2.0)" in said[0]


@pytest.mark.parametrize("tilt", [0.0, 30.0, -75.0])
@pytest.mark.parametrize("turn", [0.0, 0.5, 1.2])
def test_a_tilted_head_is_not_a_turned_one(tilt: float, turn: float) -> None:
    points = np.array([[-10.0, 0.0], [10.0, 0.0], [10.0 * turn, 12.0]])
    angle = np.radians(tilt)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    row = np.zeros(15, dtype=np.float32)
    row[4:10] = (points @ rotation.T + 50).ravel()
    assert turn_of(row) == pytest.approx(turn, abs=1e-4)


@pytest.fixture(scope="module")
def base() -> QwenImage21Policy:
    return QwenImage21Policy.load(located("embedded:weights/base"), resolution=64)


def network_of(folder: Path) -> FaceNetwork:
    return EmbeddedFaces.load(folder)._network


def test_the_shipped_weights_tell_people_apart_that_were_never_trained_on(
    base: QwenImage21Policy,
) -> None:
    rng = np.random.default_rng(5)
    held = draw_portraits(base, looks(is_held=True), rng, portraits=300, others=120)
    measured = measure_faces(network_of(SHIPPED), held)
    assert measured["auc"] >= 0.97, measured
    assert measured["auc_one_attribute"] >= 0.93, measured
    assert measured["faces_found"] >= 0.98 and measured["others_refused"] >= 0.95, measured


def test_the_card_tells_what_was_measured() -> None:
    facts = json.loads((SHIPPED / "face.json").read_text())
    card = (SHIPPED / "README.md").read_text()
    for name in ("auc", "auc_one_attribute", "faces_found", "others_refused"):
        assert f"| `{name}` | {facts['measured'][name]} |" in card
    assert facts["measured"]["auc"] >= 0.97 and "Apache-2.0" in card
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < 1e6


def edited(**changes: str | int) -> ScoreRequest:
    """A portrait with changes, asked for by an edit of it."""
    source = portrait_of(
        ("tan", "short", "brown", "blue", "none"), np.random.default_rng(1)
    ).changed({"style": "flat", "fingers": 0, "hat": "none"})
    data = images.encode_png(Image.fromarray(to_bytes(render(source))))
    shown = torch.from_numpy(render(source.changed(changes)).copy()).permute(2, 0, 1)
    prompt = replace(EDIT, id=str(changes), sources=(data,))
    return ScoreRequest(prompt=prompt, image=shown.contiguous())


def test_the_embedded_reward_keeps_to_the_person() -> None:
    reward = FaceConfig(backend="miniature").build()
    requests = [
        edited(),
        edited(hat="red", background="mint"),
        edited(skin="dark", hair="long", hair_colour="black", eyes="brown"),
    ]
    same, dressed, other = [s.value for s in reward.score(requests) if isinstance(s, Scored)]
    assert same == 1.0 and dressed > 0.7 and other < 0.3
    lost = replace(requests[0], image=torch.full((3, 64, 64), 0.5))
    (score,) = reward.score([lost])
    assert isinstance(score, Scored) and score.value == 0.0


def test_hidden_hair_makes_nobody_else() -> None:
    rng = np.random.default_rng(0)
    scene = sample_scene(rng, category="portrait").changed({"hair": "bald", "mark": "none"})
    grey, black = (scene.changed({"hair_colour": colour}) for colour in ("grey", "black"))
    assert look_of(grey) == look_of(black)
    # A beard shows the colour.
    assert look_of(grey.changed({"mark": "beard"})) != look_of(black.changed({"mark": "beard"}))
    assert {look_of(portrait_of(look, rng)) == look for look in looks(is_held=False)} == {True}


def test_nobody_who_is_measured_was_trained_on() -> None:
    trained, held = looks(is_held=False), looks(is_held=True)
    assert held and not set(trained) & set(held)
    assert len(set(trained)) == len(trained)


def test_contrast_prefers_one_person_in_one_place() -> None:
    people = torch.tensor([0, 0, 1, 1])
    apart = torch.eye(64)[[0, 0, 1, 1]]
    mixed = torch.eye(64)[[0, 1, 0, 1]]
    low, high = (float(contrast(vectors, people, 0.1)) for vectors in (apart, mixed))
    assert low == pytest.approx(2 * np.exp(-10), rel=0.1) and high > 5


def test_training_is_a_function_of_its_seed(base: QwenImage21Policy, tmp_path: Path) -> None:
    def trained(seed: int) -> Sequence[Tensor]:
        plan = FacesPlan(portraits=12, others=4, steps=2, people=6, seed=seed)
        return list(train_faces(base, plan).state_dict().values())

    first, again, other = trained(1), trained(1), trained(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_finder_is_read_as_it_was_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = FaceNetwork().half().float()
    standard = {"cosine_floor": 0.1, "cosine_ceiling": 0.9, "min_size": 0.0}
    save(network, {"standard": standard}, tmp_path)
    found = EmbeddedFaces.load(tmp_path)
    assert found.standard == Standard(**standard)
    pairs = zip(network.parameters(), found._network.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
