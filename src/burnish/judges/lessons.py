"""From annotations to what a judge is trained on: which, in what order, and as which tokens.

Up to the digit, a lesson has exactly the tokens with which the judge will be asked: the question as
its processor writes it, then reasoning, marker and digit, put together as token ids and never as
text: a tokenizer may join the end of one with the beginning of the next, and then the marker has
another spelling than the one that is looked for. For the same reason reasoning ends at its last
letter or digit, where text and ids agree.

Answers are aligned on the right, so that a trainer can ask for the logits of the last few columns
alone. Which lessons a step sees is a pure function of the seed and of the place, so that resuming
needs no state.
"""

import hashlib
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor
from torch.utils.data import Dataset

from burnish import images
from burnish.annotations.base import pairs, read_annotations, reader
from burnish.annotations.schema import Annotation
from burnish.config import Config, ConfigError, located
from burnish.judges.judgements import soft_label
from burnish.judging import SCALE, Alphabet, Rubric, answer, question
from burnish.runtime import generator
from burnish.types import Prompt
from burnish.wording import nearest

END = "<|im_end|>"
"""Qwen's token at the end of a turn."""
TARGETS = ("places", "written", "scores", "soft_labels")
"""The keys of a batch that are not for the model."""


class Lesson(NamedTuple):
    """One annotation as it is taught this time."""

    annotation: Annotation
    rubric: Rubric
    reasoning: str
    """Stands before the marker; empty where only the score is taught."""
    is_written: bool
    """Whether the judge learns to write what stands before the digit, or is given it."""


class SourceConfig(Config):
    """One file of annotations."""

    path: str
    reader: str | None = None
    """A public set, by its file on the shelf `annotations`; None reads the schema's own files."""
    limit: int | None = Field(default=None, ge=1)
    """Read only so many comparisons of a public set."""

    def read(self) -> list[Annotation]:
        """The annotations of the file, checked.

        Raises:
            ConfigError: no such set, or what its reader refuses.
        """
        path = located(self.path)
        if self.reader is None:
            return read_annotations(path)
        return reader(self.reader)(path, limit=self.limit)


class AnnotationsWarning(UserWarning):
    """A file gives less than it holds."""


def read_sources(
    sources: Sequence[SourceConfig], dimensions: Sequence[str], *, scored: bool = False
) -> list[Annotation]:
    """The annotations of several files in some dimensions, with ids and pair groups that differ.

    Ranks of two files are of two rankings, whatever their groups are called; scores without a group
    are on one scale, and are compared across files.

    Args:
        sources: at least one.
        dimensions: which; empty takes all that there are.
        scored: whether annotations without a score are of no use, so that a file with some is told
            of (`AnnotationsWarning`).

    Raises:
        ConfigError: no source; a dimension that none of them has; or what a reader refuses.
    """
    if not sources:
        raise ConfigError(
            "annotations: need at least one file, got none; add `annotations: [{path: FILE}]`"
        )
    found: list[Annotation] = []
    for number, source in enumerate(sources):
        part = source.read()
        if scored:
            _tell_of_ranks(
                source, [a for a in part if a.dimension in (dimensions or [a.dimension])]
            )
        if len(sources) > 1:
            part = [_named_apart(annotation, number) for annotation in part]
        found += part
    known = sorted({annotation.dimension for annotation in found})
    for name in dimensions:
        if name not in known:
            hint = nearest(name, known) or known[0]
            raise ConfigError(
                f"dimensions: need dimensions of the annotations ({', '.join(known)}), got "
                f"{name!r}; did you mean {hint!r}?"
            )
    return [annotation for annotation in found if annotation.dimension in (dimensions or known)]


def _tell_of_ranks(source: SourceConfig, annotations: Sequence[Annotation]) -> None:
    """Warn of annotations of a file that only compare."""
    if count := sum(annotation.score_mean is None for annotation in annotations):
        warnings.warn(
            f"{source.path}: {count} of {len(annotations)} annotations have a rank and no score, "
            "and are left out; use loss=pairwise to learn from them",
            AnnotationsWarning,
            stacklevel=3,
        )


def _named_apart(annotation: Annotation, number: int) -> Annotation:
    """Ids and pair groups are unique in their file only."""
    group = annotation.pair_group
    return replace(
        annotation,
        id=f"{number}-{annotation.id}",
        pair_group=None if group is None else f"{number}-{group}",
    )


def prompt_of(annotation: Annotation) -> Prompt:
    """What the judged picture was made from, as a reward sees it."""
    return Prompt(
        id=annotation.id,
        text=annotation.prompt,
        task=annotation.task,
        category=annotation.category,
        sources=annotation.sources,
    )


def pictures_of(annotation: Annotation) -> list[Image.Image]:
    """The sources of an edit, and the picture that was judged."""
    files = (*annotation.sources, annotation.output)
    return [images.decode(data, where=annotation.id) for data in files]


def spoken(annotation: Annotation) -> str:
    """The reasoning as it is taught: up to its last letter or digit.

    Raises:
        ConfigError: it holds the marker.
    """
    reasoning = re.sub(r"[\W_]+\Z", "", annotation.reasoning).lstrip()
    try:
        answer(reasoning, SCALE[0])
    except ValueError as error:
        raise ConfigError(f"annotation {annotation.id}: {error}; reword it") from None
    return reasoning


def compared(annotations: Sequence[Annotation]) -> list[tuple[Annotation, Annotation]]:
    """Every two pictures of one prompt of which one is better in some dimension, the better first.

    Pair groups are kept as they are. Annotations without one are compared by their scores with
    those of the same prompt and sources.
    """
    return pairs([replace(a, pair_group=comparison_group(a)) for a in annotations])


def comparison_group(annotation: Annotation) -> str:
    """The name that an annotation shares with those it may be compared with."""
    return prompt_group(annotation) if annotation.pair_group is None else annotation.pair_group


def prompt_group(annotation: Annotation) -> str:
    """The name that an annotation shares with all of its task, prompt and sources.

    One prompt may stand in many comparisons of a public set; they are one unit all the same.
    """
    parts = (annotation.task.encode(), annotation.prompt.encode(), *annotation.sources)
    digests = b"".join(hashlib.sha256(part).digest() for part in parts)
    # No file can name a group like this, as names there are not blank.
    return f" {hashlib.sha256(digests).hexdigest()}"


def exercises(annotations: Sequence[Annotation], *, in_pairs: bool) -> list[tuple[Annotation, ...]]:
    """What one place of a batch holds: an annotation with a score, or two, the better one first.

    Raises:
        ConfigError: none of the annotations can be used this way.
    """
    if not annotations:
        raise ConfigError(
            "held_out: need prompts to train on, got all of them held out; lower held_out or add "
            "annotations"
        )
    if in_pairs:
        found: list[tuple[Annotation, ...]] = list(compared(annotations))
        if not found:
            raise ConfigError(
                "need annotations that compare pictures of one prompt for loss=pairwise, got none "
                f"among {len(annotations)}; choose another loss"
            )
        return found
    found = [(annotation,) for annotation in annotations if annotation.score_mean is not None]
    if not found:
        raise ConfigError(
            f"need annotations with a score, got none among {len(annotations)}; use loss=pairwise "
            "for comparisons"
        )
    return found


class Curriculum(Dataset[tuple[Lesson, ...]]):
    """All places of a training in order, each with the lessons that stand there."""

    def __init__(
        self,
        chosen: Sequence[tuple[Annotation, ...]],
        rubrics: Sequence[Rubric],
        *,
        length: int,
        skip_reasoning: float,
        seed: int,
    ) -> None:
        """Decide order and draws.

        Args:
            chosen: from `exercises`; each is seen once before any is seen again.
            rubrics: one for each dimension.
            length: places in all.
            skip_reasoning: probability that a place teaches the score without its reasoning, where
                that is raters'.
            seed: decides the order, and where reasoning is skipped.

        Raises:
            ConfigError: reasoning that holds the marker.
        """
        self._chosen, self._length = chosen, length
        self._rubrics = {rubric.dimension: rubric for rubric in rubrics}
        self._skip, self._seed = skip_reasoning, seed
        together = [annotation for exercise in chosen for annotation in exercise]
        self._spoken = {id(annotation): spoken(annotation) for annotation in together}
        # Where nobody ever reasons the judge learns to answer at once, so that it can be asked
        # either way. Elsewhere an annotation without reasoning would teach it to leave it out.
        self._is_silent = not any(self._spoken.values())
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, place: int) -> tuple[Lesson, ...]:
        epoch, row = divmod(place, len(self._chosen))
        if epoch != self._epoch:
            draws = generator(self._seed, "order of lessons", epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self._chosen), generator=draws)
        draw = torch.rand(1, generator=generator(self._seed, "skip reasoning", place))
        is_skipped = float(draw) < self._skip
        return tuple(
            self._lesson(annotation, is_skipped)
            for annotation in self._chosen[int(self._order[row])]
        )

    def _lesson(self, annotation: Annotation, is_skipped: bool) -> Lesson:
        is_own = annotation.reasoned_by == "judge"
        reasoning = "" if is_skipped and not is_own else self._spoken[id(annotation)]
        is_written = not (is_skipped or is_own) and (bool(reasoning) or self._is_silent)
        return Lesson(annotation, self._rubrics[annotation.dimension], reasoning, is_written)


@dataclass(frozen=True)
class Collator:
    """Lessons as one batch of tensors."""

    processor: Any
    alphabet: Alphabet
    end: int
    """Token id of `END`."""

    @classmethod
    def of(cls, processor: Any) -> "Collator":
        """The collator of a judge's processor.

        Raises:
            ConfigError: its tokenizer's digits are not single tokens, or it ends turns otherwise.
        """
        alphabet = Alphabet.of(processor.tokenizer)
        vocabulary = processor.tokenizer.get_vocab()
        if END not in vocabulary:
            raise ConfigError(
                f"need a tokenizer with {END}, got one of {len(vocabulary)} tokens without it; "
                "choose a judge of the Qwen-VL line"
            )
        return cls(processor, alphabet, vocabulary[END])

    def __call__(self, items: Sequence[tuple[Lesson, ...]]) -> dict[str, Tensor]:
        """One row for each lesson, those of an exercise one after the other, padded on the left.

        Returns:
            What the model takes, and besides: `places`, the column of each row's digit; `written`,
            which tokens the judge learns to write, those of the digit left out; `scores`, NaN where
            only ranks are known; `soft_labels`, five shares a row, uniform where only ranks are
            known.
        """
        lessons = [lesson for item in items for lesson in item]
        asked = self._questions(lessons)
        answers = [self.answer(lesson) for lesson in lessons]
        rows = [self._row(asked, row, answers[row]) for row in range(len(lessons))]
        width = max(len(row["input_ids"]) for row in rows)
        pad = {"input_ids": self.processor.tokenizer.pad_token_id}
        batch = {
            name: torch.stack([_left_padded(row[name], width, pad.get(name, 0)) for row in rows])
            for name in rows[0]
        }
        whole = ("pixel_values", "image_grid_thw")
        return (
            batch | {name: asked[name] for name in whole} | self._targets(lessons, answers, width)
        )

    def answer(self, lesson: Lesson) -> list[int]:
        """Token ids of reasoning, marker, digit and end; the digit is the nearest to the score."""
        tokenizer = self.processor.tokenizer
        said = tokenizer(lesson.reasoning, add_special_tokens=False)["input_ids"]
        score = lesson.annotation.score_mean
        # Without a score any digit will do: only what stands before it is read.
        nearest = 3 if score is None else int(score + 0.5)
        return [*said, *self.alphabet.marker, self.alphabet.digits[nearest - 1], self.end]

    def _questions(self, lessons: Sequence[Lesson]) -> dict[str, Tensor]:
        texts: list[str] = []
        for annotation, rubric, *_ in lessons:
            asked = question(rubric, annotation.prompt, num_sources=len(annotation.sources))
            turn = [{"role": "user", "content": asked}]
            texts.append(
                self.processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            )
        pictures = [pictures_of(lesson.annotation) for lesson in lessons]
        return dict(
            self.processor(
                text=texts, images=pictures, padding=True, padding_side="left", return_tensors="pt"
            )
        )

    def _row(self, asked: dict[str, Tensor], row: int, ids: Sequence[int]) -> dict[str, Tensor]:
        """Question and answer of one row, without padding."""
        there = asked["attention_mask"][row].bool()
        question_ids = asked["input_ids"][row][there]
        found = {"input_ids": torch.cat([question_ids, question_ids.new_tensor(ids)])}
        found["attention_mask"] = torch.ones_like(found["input_ids"])
        if "mm_token_type_ids" in asked:
            kinds = asked["mm_token_type_ids"][row][there]
            found["mm_token_type_ids"] = torch.cat([kinds, kinds.new_zeros(len(ids))])
        return found

    def _targets(
        self, lessons: Sequence[Lesson], answers: Sequence[Sequence[int]], width: int
    ) -> dict[str, Tensor]:
        written = torch.zeros(len(lessons), width, dtype=torch.bool)
        for row, (lesson, ids) in enumerate(zip(lessons, answers, strict=True)):
            written[row, width - len(ids) :] = lesson.is_written
        # Every answer ends with its digit and one token more.
        written[:, width - 2] = False
        annotations = [lesson.annotation for lesson in lessons]
        means = [annotation.score_mean for annotation in annotations]
        known = torch.tensor([mean is not None for mean in means])
        labels = soft_label(
            torch.tensor([3.0 if mean is None else mean for mean in means]),
            torch.tensor([float(annotation.score_std or 0.0) for annotation in annotations]),
        )
        return {
            "places": torch.full((len(lessons),), width - 2),
            "written": written,
            "scores": torch.tensor([torch.nan if mean is None else mean for mean in means]),
            "soft_labels": torch.where(known[:, None], labels, torch.full_like(labels, 0.2)),
        }


def _left_padded(values: Tensor, width: int, fill: int) -> Tensor:
    return torch.cat([values.new_full((width - len(values),), fill), values])
