"""One local judge that writes for many askers: a bounded queue, one thread, small batches.

The model is touched by one thread only. It takes whatever waits, up to a batch, and writes greedily
for all of it at once; questions that were asked differently are written one kind after the other.
Of every written token it notes the log-probabilities that were asked for, out of the model's plain
distribution. A question that breaks its batch is asked again alone, so that it fails alone. Which
questions share a batch changes scores by rounding; with `batch` 1 they are the same every time.
"""

import queue
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from burnish.rewards.vlm import Judge
from burnish.serving.translation import Question, Written
from burnish.vision_build import ensure_torchvision

# Before the import below: it fails where torch and torchvision are unequal builds.
ensure_torchvision()

from transformers import (  # noqa: E402
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)


class Writer:
    """A judge's model as a function from questions of one kind to answers."""

    def __init__(self, judge: Judge) -> None:
        self._model, self._processor = judge.model, judge.processor
        tokenizer = judge.processor.tokenizer
        ends = judge.model.generation_config.eos_token_id
        ends = [ends] if isinstance(ends, int) else list(ends or [])
        turn_end = tokenizer.get_vocab().get("<|im_end|>")
        found = [*ends, tokenizer.eos_token_id, turn_end]
        self._ends = sorted({end for end in found if end is not None})
        self._pad = tokenizer.pad_token_id

    @torch.no_grad()
    def __call__(self, questions: Sequence[Question]) -> list[Written]:
        """Write the answers to questions of one kind."""
        first, tokenizer = questions[0], self._processor.tokenizer
        inputs = self._processor(
            text=[question.text for question in questions],
            images=[list(question.pictures) for question in questions] if first.pictures else None,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(self._model.device)
        width = inputs["input_ids"].shape[1]
        notes, stops = _Notes(first.ids, first.top), _Stops(tokenizer, first.stops, width)
        written = self._model.generate(
            **inputs,
            generation_config=GenerationConfig(
                max_new_tokens=first.max_tokens,
                do_sample=False,
                num_beams=1,
                # A model's own settings may have a penalty, and None would leave it in force.
                repetition_penalty=1.0,
                no_repeat_ngram_size=0,
                eos_token_id=self._ends,
                pad_token_id=self._pad,
            ),
            logits_processor=LogitsProcessorList([notes]),
            stopping_criteria=StoppingCriteriaList([stops]),
        )[:, width:].tolist()
        asked = inputs["attention_mask"].sum(dim=1).tolist()
        return [self._answer(row, ids, notes, stops, asked[row]) for row, ids in enumerate(written)]

    def _answer(
        self, row: int, ids: list[int], notes: "_Notes", stops: "_Stops", num_asked: int
    ) -> Written:
        """One row without what a batch added to it."""
        stop, length = stops.found.get(row, (None, len(ids)))
        ends = [place + 1 for place, token in enumerate(ids[:length]) if token in self._ends]
        is_ended = bool(ends) or stop is not None
        tokens = ids[: ends[0] if ends else length]
        text = self._processor.tokenizer.decode(tokens, skip_special_tokens=True)
        if ends:
            stop = None
        if stop is not None:
            # The last token may reach beyond the stop.
            text = text.partition(stop)[0] + stop
        return Written(
            text=text,
            tokens=tuple(tokens),
            log_probs=tuple(notes.of(row, place) for place in range(len(tokens))),
            stop=stop,
            is_cut_off=not is_ended,
            num_asked=int(num_asked),
        )


class _Notes(LogitsProcessor):
    """Changes nothing; notes the log-probabilities of every place as they go by."""

    def __init__(self, ids: tuple[int, ...], top: int) -> None:
        self._ids, self._top = ids, top
        self._tokens: list[list[list[int]]] = []
        self._values: list[list[list[float]]] = []

    def __call__(
        self, input_ids: Int[Tensor, "row token"], scores: Float[Tensor, "row word"]
    ) -> Float[Tensor, "row word"]:
        log_probs = scores.float().log_softmax(dim=-1)
        # Greedy: the most probable one is the one that is written.
        chosen = scores.argmax(dim=-1, keepdim=True)
        if self._ids:
            wanted = torch.tensor(self._ids, device=scores.device).expand(len(scores), -1)
        else:
            wanted = log_probs.topk(self._top, dim=-1).indices
        tokens = torch.cat([chosen, wanted], dim=-1)
        self._tokens.append(tokens.tolist())
        self._values.append(log_probs.gather(-1, tokens).tolist())
        return scores

    def of(self, row: int, place: int) -> dict[int, float]:
        """Token -> log-probability at one place of one answer."""
        return dict(zip(self._tokens[place][row], self._values[place][row], strict=True))


class _Stops(StoppingCriteria):
    """Ends a row when a stop text stands at the end of its answer."""

    def __init__(self, tokenizer: Any, stops: tuple[str, ...], width: int) -> None:
        self._tokenizer, self._stops, self._width = tokenizer, stops, width
        self._tail = max((len(stop.encode()) for stop in stops), default=0) + 1
        self.found: dict[int, tuple[str, int]] = {}
        """Row -> its stop text, and the tokens up to it."""

    def __call__(self, input_ids: Int[Tensor, "row token"], scores: Any, **kwargs: Any) -> Any:
        """Whether each row is at its end."""
        if self._stops:
            # A token is one byte at least, so the tail holds every stop that has just ended.
            for row, ids in enumerate(input_ids[:, self._width :][:, -self._tail :].tolist()):
                text = self._tokenizer.decode(ids, skip_special_tokens=True)
                stop = next((stop for stop in self._stops if stop in text), None)
                if stop is not None:
                    self.found.setdefault(row, (stop, input_ids.shape[1] - self._width))
        return torch.tensor([row in self.found for row in range(len(input_ids))]).to(
            input_ids.device
        )


@dataclass(frozen=True)
class _Job:
    question: Question
    future: "Future[Written]" = field(default_factory=Future)


class AnswerQueue:
    """The queue in front of one writer, and the thread behind it."""

    def __init__(
        self, write: Callable[[Sequence[Question]], list[Written]], *, places: int, batch: int
    ) -> None:
        self._write, self._batch = write, batch
        self._waiting: queue.Queue[_Job | None] = queue.Queue(maxsize=places)
        self._thread = threading.Thread(target=self._work, name="judge", daemon=True)

    def open(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Finish the batch at hand, give up what waits, end the thread."""
        while self._thread.is_alive():
            try:
                job = self._waiting.get_nowait()
            except queue.Empty:
                self._waiting.put(None)
                self._thread.join()
                return
            if job is not None:
                job.future.cancel()

    @property
    def is_full(self) -> bool:
        """Whether the next question would be refused."""
        return self._waiting.full()

    def ask(self, question: Question) -> "Future[Written]":
        """Put a question into the queue; a cancelled future is not written.

        Raises:
            queue.Full: too many wait already.
        """
        job = _Job(question)
        self._waiting.put_nowait(job)
        return job.future

    def _work(self) -> None:
        while (job := self._waiting.get()) is not None:
            kinds: dict[tuple[object, ...], list[_Job]] = {job.question.kind: [job]}
            is_last = False
            for _ in range(self._batch - 1):
                try:
                    more = self._waiting.get_nowait()
                except queue.Empty:
                    break
                if more is None:
                    is_last = True
                    break
                kinds.setdefault(more.question.kind, []).append(more)
            for jobs in kinds.values():
                self._answer([job for job in jobs if job.future.set_running_or_notify_cancel()])
            if is_last:
                return

    def _answer(self, jobs: list[_Job]) -> None:
        if not jobs:
            return
        answers: list[Written] | None = None
        try:
            answers = self._write([job.question for job in jobs])
        # Whatever a question does to the model, the thread must live on for the others.
        except Exception as error:
            if len(jobs) == 1:
                # Whoever asked keeps the error, and would keep the tensors in its frames, too.
                traceback.clear_frames(error.__traceback__)
                jobs[0].future.set_exception(error)
                return
        if answers is None:
            # Behind the block: inside it the error still holds what the batch had in memory.
            for job in jobs:
                self._answer([job])
            return
        for job, answer in zip(jobs, answers, strict=True):
            job.future.set_result(answer)
