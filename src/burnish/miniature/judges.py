"""The miniature's judges: one tiny model for all dimensions, and its control arm.

A model with random weights first learns to recognise (`miniature/eyes.py`) and to say what it sees
(`miniature/sight.py`), as a judge at full size starts from one that can; then
`burnish.reward_training` trains it on annotated pictures, the same code as at full size.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from burnish import checkpoint
from burnish.annotations.base import read_annotations, split, write_annotations
from burnish.annotations.schema import Annotation
from burnish.judges.rationales import chosen_evenly, write_rationales
from burnish.miniature.annotated import PicturesPlan, annotated_pictures
from burnish.miniature.eyes import EyesPlan, learn_to_recognise
from burnish.miniature.sight import SightPlan, learn_to_see, sample_texts
from burnish.miniature.tokenizer import build_tokenizer
from burnish.policies.parts.qwen_assembly import assemble
from burnish.policies.qwen_image21 import QwenImage21Policy
from burnish.progress import progress
from burnish.reward_training import RewardTrainingConfig, SourceConfig, train_judge
from burnish.rewards.vlm import Judge
from burnish.runtime import Runtime, seeded
from burnish.tracking import atomic_folder

SIZES: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    # 8 x 8 patches, merged two by two: sixteen tokens for a picture of 64 x 64.
    "vision": {
        "patch_size": 8,
        "hidden_size": 160,
        "intermediate_size": 320,
        "depth": 4,
        "num_heads": 5,
        "num_position_embeddings": 64,
    },
}
"""The judge's sizes, as differences from those of `assemble`."""
VOCABULARY = 900
"""Of the judge's tokenizer, without special tokens."""
JUDGES: dict[str, dict[str, Any]] = {
    "judge": {},
    "judge_pairwise": {"loss": "pairwise", "batch_size": 16},
}
"""The judges that ship, by name of their folder, and what is special about their training. Two
pictures make a pair, so the control arm reads as many pictures in a step."""
LAST: dict[str, Any] = {"learning_rate": 3e-4, "steps": 800, "start_share": 0.5}
"""What is special about a judge's last training, on its own reasoning beside raters'."""


def new_judge(texts: Sequence[str]) -> tuple[Any, Any]:
    """A tiny `Qwen3VLForConditionalGeneration` with random weights, and its processor.

    Args:
        texts: what judges write; its tokenizer has words for that.
    """
    with seeded(0, "new judge"):
        pipeline = assemble(build_tokenizer(more=texts, size=VOCABULARY), encoder=SIZES)
    model = pipeline.text_encoder
    # A third faster than the fused kinds at these sizes.
    model.set_attn_implementation("eager")
    return model, pipeline.processor


def judge_config(model: Path, annotations: Path, **changes: Any) -> RewardTrainingConfig:
    """How the miniature's judge is trained; `changes` replace single settings.

    Args:
        model: the folder of `new_judge`.
        annotations: the file of `annotated_pictures`.
        changes: by name of the setting.
    """
    settings: dict[str, Any] = {
        "path": str(model),
        "annotations": (SourceConfig(path=str(annotations)),),
        "rubrics": "embedded:rubrics",
        "lora_rank": 0,
        "learning_rate": 5e-4,
        "warmup_steps": 50,
        "batch_size": 32,
        # About one epoch of two processes.
        "steps": 1000,
        "held_out_limit": 500,
        # A model from nothing has neither mode.
        "skip_reasoning": 0.15,
        "save_every": 250,
    }
    return RewardTrainingConfig(**{**settings, **changes})


def train_miniature_judge(
    out: Path,
    base_folder: Path,
    rt: Runtime,
    *,
    name: str = "judge",
    pictures: PicturesPlan | None = None,
    eyes: EyesPlan | None = None,
    sight: SightPlan | None = None,
    rationales: int = 8000,
    **changes: Any,
) -> Path:
    """Make the annotations, teach a new model to see, then train a judge of all dimensions: from
    raters' reasoning first, then from that and its own.

    What is there already is not made again, so a call that was cut off goes on where it stood.

    Args:
        out: made if missing; gets `annotations/`, `sighted/` (what judges start from), and the runs
            of the judge, `NAME-first` and `NAME`.
        base_folder: the base model, as its pipeline is written.
        rt: precision and ranks.
        name: of the last run's folder.
        pictures: how many annotated pictures.
        eyes: how its vision tower learns to recognise.
        sight: how it learns to say what it sees.
        rationales: pictures of each dimension about which the first judge writes.
        changes: settings of both trainings that differ from `judge_config`.

    Returns:
        The judge's folder.
    """
    annotations, sighted = out / "annotations" / "pictures.jsonl", out / "sighted"
    base = QwenImage21Policy.load(base_folder, resolution=64)
    if rt.is_main and not annotations.is_file():
        write_annotations(annotations, annotated_pictures(base, pictures or PicturesPlan()))
    rt.barrier()
    config = judge_config(sighted, annotations, **changes)
    if not (sighted / "config.json").is_file():
        known, _ = split(read_annotations(annotations), held_out=config.held_out, seed=config.seed)
        _teach_to_see(out, base, known, eyes or EyesPlan(), sight or SightPlan(), rt)
    rt.barrier()
    first = train_judge(config, out / f"{name}-first", rt)
    lessons = out / "annotations" / f"{name}.jsonl"
    _write_lessons(lessons, first, annotations, config, rationales, rt)
    last = judge_config(first, lessons, **{**LAST, **changes})
    return train_judge(last, out / name, rt)


def _write_lessons(
    path: Path,
    judge: Path,
    annotations: Path,
    config: RewardTrainingConfig,
    count: int,
    rt: Runtime,
) -> None:
    """Write what a judge is trained on last: pictures with its own reasoning beside raters', and
    those that are held out."""
    if not path.is_file():
        everything = read_annotations(annotations)
        known, held_out = split(everything, held_out=config.held_out, seed=config.seed)
        chosen = chosen_evenly(known, count)
        own = write_rationales(
            Judge.load(judge, rt.device),
            chosen,
            path.with_suffix(""),
            rt,
            batch_size=4 * config.batch_size,
        )
        if rt.is_main:
            write_annotations(path, [*chosen, *own, *held_out])
    rt.barrier()


def _teach_to_see(
    out: Path,
    base: QwenImage21Policy,
    annotations: Sequence[Annotation],
    eyes: EyesPlan,
    sight: SightPlan,
    rt: Runtime,
) -> None:
    """Write `out/sighted`: a model that recognises, describes, checks, and never scored."""
    model, processor = new_judge(list(sample_texts(sight.texts)))
    folder = out / "checkpoints"
    with _shown("eyes", eyes.steps, folder / "eyes") as show:
        learn_to_recognise(
            model.model.visual,
            processor,
            base,
            eyes,
            rt,
            folder=folder / "eyes",
            on_step=lambda found: show({"loss": found["loss"]}),
        )
    with _shown("sight", sight.steps, folder / "sight") as show:
        learn_to_see(
            model, processor, base, annotations, sight, rt, folder=folder / "sight", on_step=show
        )
    if rt.is_main:
        with atomic_folder(out / "sighted") as unfinished:
            model.save_pretrained(unfinished)
            processor.save_pretrained(unfinished)


@contextlib.contextmanager
def _shown(label: str, steps: int, folder: Path) -> Iterator[Callable[[dict[str, float]], None]]:
    """Progress of a training with checkpoints in a folder; takes the figures of each step."""
    with progress(label, steps, done=max(checkpoint.steps(folder), default=0)) as bar:
        yield lambda found: bar.advance(
            note=", ".join(f"{name} {value:.3f}" for name, value in found.items())
        )
