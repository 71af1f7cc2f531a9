"""Transformers' `Trainer` with the losses of a judge, its metrics, and its checkpoints.

The loss has three parts, each a mean of its own and each logged: cross-entropy on the reasoning,
the loss at the digit, and the penalty that keeps the probability there on the digits. Reasoning has
hundreds of tokens for one digit, so a common mean would drown the score.

The pairwise loss compares expected scores and has no head of its own: same backbone, same data,
same read-out, so that what is compared with the pointwise losses is the format of the labels alone,
and any judge can be a reward. Its scale is learnt as a parameter of the model while that is trained
and is no part of the judge.
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import SequentialSampler

from burnish.judges.judgements import (
    expected_score,
    expected_score_loss,
    mass_penalty,
    ordinal_loss,
    pair_loss,
    soft_label_loss,
)
from burnish.judges.lessons import TARGETS
from burnish.progress import Progress
from burnish.tracking import Run, RunError
from burnish.vision_build import ensure_torchvision

# Before the imports below: they fail where torch and torchvision are unequal builds.
ensure_torchvision()

from transformers import (  # noqa: E402
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback  # noqa: E402

ScoreLoss = Literal["expected", "soft_label", "ordinal", "pairwise"]
"""What is asked of the digit: see `burnish.judges.judgements`."""
SCALE_NAME = "pair_scale"
"""The parameter that holds the scale of the pairwise loss, and its file in a checkpoint."""
SCALE_STEP = 0.01
"""How far one optimizer step can move the logarithm of that scale."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a judge is trained for."""

    loss: ScoreLoss
    reasoning_weight: float
    score_weight: float
    mass_weight: float
    digits: tuple[int, ...]
    """Token ids of the digits 1 to 5."""
    learning_rate: float


def judge_loss(
    log_probs: Float[Tensor, "row column token"],
    ids: Int[Tensor, "row column"],
    targets: Mapping[str, Tensor],
    objective: Objective,
    log_scale: Float[Tensor, ""] | None = None,
) -> tuple[Float[Tensor, ""], dict[str, float]]:
    """The loss of one batch and what to log of it.

    Args:
        log_probs: of every token at every column, given what stands before it.
        ids: the tokens that stand there.
        targets: `places`, `written`, `scores`, `soft_labels` of a `Collator`, for these columns.
        objective: which loss at the digit, and the weights.
        log_scale: of the pairwise loss, whose rows are the better and the worse picture in turn.

    Returns:
        The weighted sum, and its parts and some facts as numbers.
    """
    written: Bool[Tensor, "row column"] = targets["written"]
    of_tokens = log_probs.gather(2, ids.unsqueeze(2)).squeeze(2)
    reasoning = -(of_tokens * written).sum() / written.sum().clamp_min(1)
    rows = torch.arange(len(ids), device=ids.device)
    digits = log_probs[rows, targets["places"]][:, list(objective.digits)]
    scores, wanted = expected_score(digits), targets["scores"]
    metrics: dict[str, Tensor] = {}
    if objective.loss == "pairwise":
        if log_scale is None:
            raise ValueError("need the scale of the pairwise loss, got none; pass log_scale")
        score = pair_loss(scores[0::2], scores[1::2], log_scale).mean()
        metrics["score/pair_accuracy"] = (scores[0::2] > scores[1::2]).float().mean()
        metrics["score/pair_scale"] = log_scale.exp()
    elif objective.loss == "expected":
        score = expected_score_loss(digits, wanted).mean()
    elif objective.loss == "ordinal":
        score = ordinal_loss(digits, targets["soft_labels"]).mean()
    else:
        score = soft_label_loss(digits, targets["soft_labels"]).mean()
    mass = mass_penalty(digits).mean()
    total = (
        objective.reasoning_weight * reasoning
        + objective.score_weight * score
        + objective.mass_weight * mass
    )
    metrics |= {"loss/reasoning": reasoning, "loss/score": score, "loss/mass": mass}
    metrics["score/absolute_error"] = (scores - wanted).abs().nanmean()
    metrics["score/mass"] = digits.exp().sum(dim=1).mean()
    return total, {name: float(value.detach()) for name, value in metrics.items()}


class JudgeTrainer(Trainer):
    """Trains a judge on lessons, in the order in which they stand."""

    loss_is_scaled_for_ga = False

    def __init__(self, objective: Objective, **given: Any) -> None:
        """A trainer; `given` is what `Trainer` takes.

        Args:
            objective: the loss.
            given: its collator and data set are those of `burnish.judges.lessons`.
        """
        super().__init__(**given)
        self.remove_callback(PrinterCallback)
        self._objective = objective
        self._metrics: list[dict[str, float]] = []

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch; logits are computed for the columns of the answers alone."""
        targets = {name: inputs[name] for name in TARGETS}
        given = {name: value for name, value in inputs.items() if name not in TARGETS}
        ids = given["input_ids"]
        # Answers stand on the right; this is the first column that is taught or holds a digit.
        taught = targets["written"].any(dim=0).nonzero()
        first = int(min([*taught[:1].flatten().tolist(), int(targets["places"].min())]))
        kept = ids.shape[1] - first + 1
        outputs = model(**given, logits_to_keep=kept, use_cache=False)
        # The logits of a column are those of the token in the next one.
        log_probs = outputs.logits[:, :-1].float().log_softmax(dim=-1)
        targets["written"] = targets["written"][:, first:]
        targets["places"] = targets["places"] - first
        loss, metrics = judge_loss(
            log_probs, ids[:, first:], targets, self._objective, self.log_scale()
        )
        self._metrics.append(metrics)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts of the loss, as means since the last call, to what is logged."""
        if "loss" in logs and self._metrics:
            for name in self._metrics[0]:
                logs[name] = sum(found[name] for found in self._metrics) / len(self._metrics)
            self._metrics = []
        super().log(logs, start_time)

    def log_scale(self) -> Tensor | None:
        """Logarithm of the scale of the pairwise loss; None for another loss."""
        scale = self._pair_scale()
        if scale is None:
            return None
        # AdamW moves a parameter by about the learning rate, which for weights is far too little
        # for a scale.
        return scale * (SCALE_STEP / self._objective.learning_rate)

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        lessons: Any = train_dataset or self.train_dataset
        return SequentialSampler(lessons)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or str(self.args.output_dir))
        scale = self._pair_scale()
        if scale is not None and self.args.should_save:
            # An adapter's checkpoint would leave it out.
            save_file({SCALE_NAME: scale.detach().cpu()}, folder / f"{SCALE_NAME}.safetensors")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        scale = self._pair_scale()
        if scale is not None:
            found = load_file(Path(resume_from_checkpoint) / f"{SCALE_NAME}.safetensors")
            scale.data.copy_(found[SCALE_NAME])

    def _pair_scale(self) -> nn.Parameter | None:
        model: Any = self.model
        return dict(model.named_parameters(recurse=False)).get(SCALE_NAME)


def add_pair_scale(model: nn.Module) -> None:
    """Give a model the scale of the pairwise loss as a parameter, for the time of its training."""
    scale = torch.zeros((), device=next(model.parameters()).device)
    model.register_parameter(SCALE_NAME, nn.Parameter(scale))


class Reporter(TrainerCallback):
    """Writes the metrics of every step, shows progress, and stops a training that is lost."""

    def __init__(
        self, run: Run | None, bar: Progress, on_step: Callable[[int], None] = lambda step: None
    ) -> None:
        """Report to a run.

        Args:
            run: where metrics go; None on all ranks but one.
            bar: advanced by every step.
            on_step: called with the number of steps done, after they were logged.
        """
        self._run, self._bar, self._on_step = run, bar, on_step
        self._start = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the time."""
        self._start = time.perf_counter()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write one row.

        Raises:
            RunError: the loss or the gradient is not finite.
        """
        logs: dict[str, float] = kwargs.get("logs") or {}
        if "loss" not in logs:
            # The summary at the end, which says how fast the machine was.
            return
        step = state.global_step - 1
        if not math.isfinite(logs["loss"] + logs.get("grad_norm", 0.0)):
            raise RunError(
                f"need a finite loss, got {logs['loss']} with a gradient of "
                f"{logs.get('grad_norm')} at step {step}; lower learning_rate and start again, the "
                "last checkpoint is as it was"
            )
        if self._run is not None:
            row = {name: value for name, value in logs.items() if "/" in name}
            row |= {
                "loss/total": logs["loss"],
                "optimizer/grad_norm": logs.get("grad_norm"),
                "optimizer/learning_rate": logs.get("learning_rate"),
                "time/step": round(time.perf_counter() - self._start, 6),
            }
            self._run.log(step, row)
        self._bar.advance(note=f"loss {logs['loss']:.3f}, score {logs['loss/score']:.3f}")
        self._on_step(state.global_step)


def latest_checkpoint(folder: Path) -> tuple[Path, int] | None:
    """The newest whole checkpoint of a `Trainer` and its step; None where there is none.

    The state is the last file that it writes, so a checkpoint without it was cut off.
    """
    found: list[tuple[int, Path]] = []
    for path in folder.glob("checkpoint-*/trainer_state.json"):
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            found.append((int(state["global_step"]), path.parent))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    if not found:
        return None
    step, path = max(found)
    return path, step
