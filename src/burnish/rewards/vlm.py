"""A vision-language judge in this process: it reasons, writes a marker, and is read at one digit.

A judge is a folder: a Qwen-VL model and processor as transformers write them, `rubrics/*.md`, one
for each dimension, and `judge.json` with what training found out about it (the calibration of each
dimension, the longest answer). Two calls make a score, as with a server that knows no better: the
first writes the reasoning greedily, the second reads the five digits' probabilities right after the
marker. Without reasoning the second call is the only one, which is many times cheaper.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from PIL import Image
from pydantic import Field
from torch import Tensor

from burnish import images
from burnish.activations import Live, hollow, weights
from burnish.config import ConfigError, located
from burnish.headers import stored_bytes
from burnish.judging import (
    SCALE,
    Alphabet,
    Calibration,
    Rubric,
    control_token,
    question,
    read_score,
)
from burnish.rewards.base import DeviceKind, Reward, RewardConfig
from burnish.runtime import own_device
from burnish.types import Failed, Prompt, Score, Scored, ScoreRequest
from burnish.vision_build import ensure_torchvision
from burnish.wording import brief, nearest

# Before the import below: it fails where torch and torchvision are unequal builds.
ensure_torchvision()

from safetensors import SafetensorError  # noqa: E402
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

# What loads a judge shows its own progress; this would show a bar for every load.
transformers_logging.disable_progress_bar()


class VlmConfig(RewardConfig):
    """One dimension of one judge."""

    span: ClassVar[float] = 4.0  # From 1 to 5.
    kind: Literal["vlm"] = "vlm"
    path: str
    """The judge's folder, or `embedded:...`."""
    dimension: str
    reasoning: bool = True
    """Write the chain of thought first; False asks for the score at once."""
    batch_size: int = Field(default=32, ge=1)
    device: DeviceKind = "cpu"
    """Where it answers; on a GPU it stands beside what is trained there."""

    @property
    def runs_on(self) -> DeviceKind:
        return self.device

    def check(self) -> None:
        folder = located(self.path)
        judge_facts(folder)
        _known(self.dimension, [path.stem for path in folder.glob("rubrics/*.md")])

    def inputs(self) -> Sequence[Path]:
        folder = located(self.path)
        rubric = folder / "rubrics" / f"{self.dimension}.md"
        return [*folder.glob("*.safetensors"), folder / "judge.json", rubric]

    def build(self) -> "Vlm":
        judge = _shared(located(self.path), own_device(self.device))
        return Vlm(judge, self.dimension, reasoning=self.reasoning, batch_size=self.batch_size)

    def footprint(self, resolution: int) -> Mapping[str, int]:
        name, folder = f"judge {self.path}", located(self.path)
        answering = self.batch_size * _question_bytes(folder, resolution)
        # The model is shared; a dimension has a thread of its own, which keeps what it has freed on
        # a CPU, and one of them reads at a time.
        asked = self.dimension if self.device == "cpu" else "all dimensions"
        return {name: stored_bytes(folder).total(), f"questions of {asked}": answering}


@dataclass(frozen=True)
class Judge:
    """A model that was trained to judge, and how it is read."""

    model: Any
    processor: Any
    rubrics: dict[str, Rubric]
    calibrations: dict[str, Calibration]
    longest_answer: int
    """Most tokens of an answer: reasoning, marker and digit."""
    turn: Lock = field(default_factory=Lock, compare=False)
    """Held by whoever reads: dimensions share the model, and threads would only slow each other."""

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> "Judge":
        """Read a judge's folder.

        Raises:
            ConfigError: it is no judge's folder, or its tokenizer's digits are not single tokens.
        """
        facts = judge_facts(folder)
        try:
            model: Any = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True)
            processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
            rubrics = {path.stem: Rubric.read(path) for path in sorted(folder.glob("rubrics/*.md"))}
        except (OSError, ValueError, SafetensorError) as error:
            reason = brief(error, names_file=True)
            raise ConfigError(
                f"need a judge's folder with a Qwen-VL model and rubrics, got {folder}: {reason}; "
                "restore the folder"
            ) from None
        Alphabet.of(processor.tokenizer)
        knots = facts.get("calibrations", {})
        return cls(
            model=model.to(device).eval().requires_grad_(False),
            processor=processor,
            rubrics=rubrics,
            calibrations={
                name: Calibration(tuple(k["raw"]), tuple(k["calibrated"]))
                for name, k in knots.items()
            },
            longest_answer=int(facts["longest_answer"]),
        )

    def rubric(self, dimension: str) -> Rubric:
        """The rubric of a dimension.

        Raises:
            ConfigError: the judge does not know it; the nearest it knows is named.
        """
        _known(dimension, list(self.rubrics))
        return self.rubrics[dimension]


def _known(dimension: str, known: Sequence[str]) -> None:
    """Raise unless a judge has a rubric for a dimension."""
    if not known:
        raise ConfigError(
            f"need a judge with rubrics, got one without any for {dimension!r}; restore its "
            "folder's rubrics/"
        )
    if dimension not in known:
        hint = nearest(dimension, known) or min(known)
        raise ConfigError(
            f"need a dimension of this judge ({', '.join(sorted(known))}), got {dimension!r}; "
            f"did you mean {hint!r}?"
        )


def judge_facts(folder: Path) -> dict[str, Any]:
    """What is in a judge's `judge.json`, as far as it is read.

    Raises:
        ConfigError: no such file, or not in that form.
    """
    path = folder / "judge.json"
    if not path.is_file():
        raise ConfigError(
            f"need the folder of a judge, with its judge.json, got {folder}; train one with "
            "`burnish reward train`, or the miniature's with `burnish miniature build`"
        )
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        _ = int(facts["longest_answer"])
        for knots in facts.get("calibrations", {}).values():
            _ = [float(value) for name in ("raw", "calibrated") for value in knots[name]]
        if facts.get("split") is not None:
            _ = float(facts["split"]["held_out"]), int(facts["split"]["seed"])
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise ConfigError(
            f"need a judge.json as a training writes it, got {path}: {type(error).__name__} "
            f"{brief(error)}; restore the file"
        ) from None
    return facts


@lru_cache(maxsize=2)
def _shared(folder: Path, device: torch.device) -> Judge:
    """One model in memory for all the dimensions of a judge."""
    return Judge.load(folder, device)


@lru_cache
def _question_bytes(folder: Path, resolution: int) -> int:
    """What an answer to one question needs: reading its longest rubric with two pictures, up to the
    logits of the last token, and the keys and values of question and answer."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    kind = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    network = hollow(lambda: AutoModelForImageTextToText.from_config(config), kind).eval()
    processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True)
    rubrics = [Rubric.read(path) for path in sorted(folder.glob("rubrics/*.md"))]
    longest = max(rubrics, key=lambda rubric: len(rubric.text))
    answer = int(judge_facts(folder)["longest_answer"])
    judge = Judge(network, processor, {longest.dimension: longest}, {}, answer)
    source = images.encode_png(Image.new("RGB", (resolution, resolution)))
    prompt = Prompt(id="", text="", task="edit", sources=(source,))
    request = ScoreRequest(prompt=prompt, image=torch.zeros(3, resolution, resolution))
    with torch.no_grad(), Live(ignored=weights(network), is_hollow=True) as live:
        asked = Vlm(judge, longest.dimension).digit_logits(request)
    text = config.get_text_config()
    width = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * kind.itemsize
    return live.peak + width * (asked + answer)


@dataclass(frozen=True)
class _Asked:
    """Questions as tensors, padded on the left."""

    inputs: dict[str, Tensor]
    patches: list[int]
    """Rows of `pixel_values` of each picture, question by question."""
    pictures: int
    """Pictures of each question."""

    def pictures_of(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """The pictures of some questions."""
        chosen = [row * self.pictures + n for row in rows for n in range(self.pictures)]
        parts = self.inputs["pixel_values"].split(self.patches)
        return {
            "pixel_values": torch.cat([parts[n] for n in chosen]),
            "image_grid_thw": self.inputs["image_grid_thw"][chosen],
        }


class Vlm(Reward):
    """A judge as a reward: the value is its calibrated score, 1 to 5, the note its reasoning."""

    def __init__(
        self, judge: Judge, dimension: str, *, reasoning: bool = True, batch_size: int = 32
    ) -> None:
        self._judge, self._reasoning, self._batch_size = judge, reasoning, batch_size
        self._rubric = judge.rubric(dimension)
        self._calibration = judge.calibrations.get(dimension, Calibration())
        self._alphabet = Alphabet.of(judge.processor.tokenizer)

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        scores: dict[int, Score] = {}
        for count in sorted({len(request.prompt.sources) for request in requests}):
            rows = [n for n, r in enumerate(requests) if len(r.prompt.sources) == count]
            for start in range(0, len(rows), self._batch_size):
                chunk = rows[start : start + self._batch_size]
                answers = self._score_alike([requests[row] for row in chunk])
                scores |= zip(chunk, answers, strict=True)
        return [scores[row] for row in range(len(requests))]

    @torch.no_grad()
    def _score_alike(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """Score requests with the same number of pictures in one batch."""
        with self._judge.turn:
            shown = [self._pictures(request) for request in requests]
            sound = [
                (request, pictures)
                for request, pictures in zip(requests, shown, strict=True)
                if not isinstance(pictures, Failed)
            ]
            answers = iter(self._read(self._questions(sound)) if sound else ())
        return [one if isinstance(one, Failed) else next(answers) for one in shown]

    def digit_logits(self, request: ScoreRequest) -> int:
        """Ask one question without reasoning, forget the answer; returns the question's tokens."""
        asked = self._ask([request])
        self._digit_log_probs(asked, {0: self._alphabet.marker})
        return asked.inputs["input_ids"].shape[1]

    def _pictures(self, request: ScoreRequest) -> list[Image.Image] | Failed:
        """The pictures of a request, or why it cannot be asked."""
        if not bool(request.image.isfinite().all()):
            return Failed(reason="the image is not finite")
        token = control_token(request.prompt.text, self._judge.processor.tokenizer)
        if token is not None:
            return Failed(reason=f"the prompt holds the token {token}")
        try:
            pictures = pictures_of(request)
            for picture in pictures:
                # The processor refuses a shape for all questions together, so it is asked before.
                self._judge.processor.image_processor.get_number_of_image_patches(
                    picture.height, picture.width
                )
        except ValueError as error:
            return Failed(reason=brief(error))
        return pictures

    def _read(self, asked: _Asked) -> list[Score]:
        marker = list(self._alphabet.marker)
        prefixes: list[list[int] | Failed] = [marker for _ in asked.inputs["input_ids"]]
        if self._reasoning:
            prefixes = [self._up_to_digit(ids) for ids in self._answers(asked)]
        sound = {row: ids for row, ids in enumerate(prefixes) if not isinstance(ids, Failed)}
        found = iter(self._digit_log_probs(asked, sound).tolist() if sound else [])
        return [
            prefix if isinstance(prefix, Failed) else self._scored(prefix, next(found))
            for prefix in prefixes
        ]

    def _scored(self, prefix: Sequence[int], log_probs: Sequence[float]) -> Score:
        score = read_score(dict(zip(SCALE, log_probs, strict=True)), self._calibration)
        if not isinstance(score, Scored):
            return score
        words = prefix[: -len(self._alphabet.marker)]
        note = self._judge.processor.tokenizer.decode(words, skip_special_tokens=True)
        return Scored(value=score.value, detail=score.detail, note=note.strip())

    def _ask(self, requests: Sequence[ScoreRequest]) -> _Asked:
        return self._questions([(request, pictures_of(request)) for request in requests])

    def _questions(self, shown: Sequence[tuple[ScoreRequest, list[Image.Image]]]) -> _Asked:
        """Requests with as many pictures each, in one batch."""
        processor = self._judge.processor
        texts, pictures = [], []
        for request, own in shown:
            prompt = request.prompt
            asked = question(self._rubric, prompt.text, num_sources=len(prompt.sources))
            turn = [{"role": "user", "content": asked}]
            texts.append(
                processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            )
            pictures.append(own)
        inputs = processor(
            text=texts, images=pictures, padding=True, padding_side="left", return_tensors="pt"
        ).to(self._judge.model.device)
        patches = inputs["image_grid_thw"].prod(dim=1).tolist()
        return _Asked(dict(inputs), patches, len(pictures[0]))

    def _answers(self, asked: _Asked) -> list[list[int]]:
        """Greedy answers as token ids, without the question."""
        written = self._judge.model.generate(
            **asked.inputs,
            max_new_tokens=self._judge.longest_answer,
            do_sample=False,
            # Whatever the folder's own settings say: a penalty would bend the score.
            repetition_penalty=1.0,
            pad_token_id=self._judge.processor.tokenizer.pad_token_id,
        )
        return written[:, asked.inputs["input_ids"].shape[1] :].tolist()

    def _up_to_digit(self, ids: Sequence[int]) -> list[int] | Failed:
        place = self._alphabet.place_of_digit(ids)
        return place if isinstance(place, Failed) else list(ids[:place])

    def _digit_log_probs(
        self, asked: _Asked, answers: Mapping[int, Sequence[int]]
    ) -> Float[Tensor, "row 5"]:
        """Log-probabilities of the five digits after the answers of some rows."""
        longest = max(len(ids) for ids in answers.values())
        tokens, device = asked.inputs["input_ids"], asked.inputs["input_ids"].device
        pad = self._judge.processor.tokenizer.pad_token_id
        rows = list(answers)
        extended: dict[str, list[Tensor]] = {}
        for row, ids in answers.items():
            fill = longest - len(ids)
            added = torch.tensor(list(ids), dtype=tokens.dtype, device=device)
            for name, value, start, end in (
                ("input_ids", tokens[row], pad, added),
                ("attention_mask", asked.inputs["attention_mask"][row], 0, torch.ones_like(added)),
                (
                    "mm_token_type_ids",
                    asked.inputs.get("mm_token_type_ids", torch.zeros_like(tokens))[row],
                    0,
                    torch.zeros_like(added),
                ),
            ):
                extended.setdefault(name, []).append(
                    torch.cat([value.new_full((fill,), start), value, end.to(value)])
                )
        inputs = {name: torch.stack(values) for name, values in extended.items()}
        if "mm_token_type_ids" not in asked.inputs:
            del inputs["mm_token_type_ids"]
        logits = self._judge.model(
            **inputs, **asked.pictures_of(rows), logits_to_keep=1, use_cache=False
        ).logits[:, -1]
        digits = torch.tensor(self._alphabet.digits, device=device)
        return logits.float().log_softmax(dim=-1)[:, digits]


def pictures_of(request: ScoreRequest) -> list[Image.Image]:
    """The sources of an edit, and the picture to be judged.

    Raises:
        ImageError: bytes that are no image, or pixels that are not finite.
    """
    sources = [images.decode(data, where=request.prompt.id) for data in request.prompt.sources]
    return [*sources, images.to_pil(request.image)]
