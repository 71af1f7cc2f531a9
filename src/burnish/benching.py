"""Take a bench: draw its pictures, have them judged, and say what came out.

    OUT/pictures/MODEL/           in the layout of the official scorer
    OUT/judged-KEY/MODEL/         every reply as it was given, a line each
    OUT/bench.json, bench.html    the newest result

The key of a result is a digest of the bench, of everything that is asked, and of who answers; the
replies of another judge lie elsewhere. A picture counts for the prompt it was drawn for, and a
reply for the picture and the question it was given to: whatever has changed is drawn or asked
again, and nothing else is. Questions without a reply are asked again by the same command; replies
that cannot be read only where that is wanted, because a judge at temperature 0 says the same.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from burnish import images
from burnish.bench.base import Bench, BenchConfig
from burnish.bench_tree import Replies, Scores, examples, read, tabulate
from burnish.config import Config, ConfigError
from burnish.ledger import Ledger, pin, read_ledger, read_pin
from burnish.policies.base import Policy
from burnish.progress import progress
from burnish.questions import Asked, Item, Question
from burnish.rollout import draw
from burnish.runtime import Runtime, derived_seed
from burnish.shelves import AnyBench
from burnish.tracking import write_atomic
from burnish.types import Failed, Guidance

_BLOCK = 64  # Pictures that are drawn before they are written.
_LARGE = 64 << 20  # Bytes of a file above which its size and time stand for its content.
_REPLIES, _PICTURES = "replies", "pictures"
_EXAMPLES = 6  # Items shown behind the whole and each pillar.


Sources = Callable[[str], tuple[bytes, ...]]
"""The encoded sources of an item by its id; none where nothing is changed."""


class BenchChoice(Config):
    """Which bench, and its settings."""

    bench: AnyBench


@dataclass(frozen=True)
class ChosenBench:
    """A bench with the items that are asked."""

    config: BenchConfig
    bench: Bench
    items: Sequence[Item]

    @classmethod
    def of(cls, config: BenchConfig) -> "ChosenBench":
        """Build it.

        Raises:
            ConfigError: its files are not as they should be.
        """
        bench = config.build()
        return cls(config, bench, config.chosen(bench))

    @property
    def kind(self) -> str:
        """Name of the bench."""
        return str(getattr(self.config, "kind", ""))

    @property
    def name(self) -> str:
        """Of its folder: one kind may be several benches, one for each task."""
        task = getattr(self.config, "task", None)
        return self.kind if task is None else f"{self.kind}-{task}"

    @property
    def judge(self) -> dict[str, Any]:
        """Who answers; empty where nobody is named."""
        judge = self.bench.judge()
        return dict(judge.identity) if judge else {}

    @property
    def replies_folder(self) -> str:
        """Name of the folder of the replies of this judge."""
        return f"judged-{_digest(self.kind, self.judge)}"

    @property
    def sources(self) -> Sources:
        """Reads the pictures that an item changes, by its id."""
        known = {item.id: item for item in self.items}
        return lambda name: self.bench.sources(known[name])

    def places(self) -> Iterator[tuple[Item, int, str]]:
        """Every picture: its item, number and path."""
        for item in self.items:
            for number in range(self.config.num_images):
                yield item, number, self.bench.layout(item, number)

    def identity(self, judge: Mapping[str, Any]) -> dict[str, Any]:
        """What a result depends on, besides the pictures."""
        asked = [
            self.digest_of_question(item, question)
            for item in self.items
            for question in self.bench.questions(item)
        ]
        return {
            "bench": self.kind,
            "items": len(self.items),
            "num_images": self.config.num_images,
            "questions": _digest(*asked),
            "judge": dict(judge),
        }

    def key(self, judge: Mapping[str, Any]) -> str:
        """Short digest of the identity."""
        return _digest(self.identity(judge))

    def digest_of_item(self, item: Item) -> str:
        """Changes with the prompt and with the pictures that it changes."""
        sources = images.digest(self.bench.sources(item))
        return _digest(self.kind, item.id, item.prompt.text, sources)

    def digest_of_question(self, item: Item, question: Question) -> str:
        """Changes with all that a judge is shown, but the output."""
        parts = [part if isinstance(part, str) else part.value for part in question.parts]
        return _digest(self.digest_of_item(item), question.name, question.system, parts)


def _digest(*parts: Any) -> str:
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Drawing:
    """How a model draws its pictures of a bench."""

    guidance: Guidance
    num_steps: int
    seed: int = 0
    dtype: str = ""
    """Precision of its network; pictures of another one are other pictures."""
    sizes: tuple[str, ...] = ()
    """Of its pictures."""


def model_facts(folder: Path, drawing: Drawing) -> dict[str, str]:
    """What a model's pictures depend on, as digests by the words of a message."""
    found = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        about = path.stat()
        found.update(str(path.relative_to(folder)).encode() + b"\0")
        if about.st_size > _LARGE:
            found.update(f"{about.st_size} {about.st_mtime_ns}".encode())
            continue
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    settings = json.dumps([drawing.guidance.settings(), *astuple(drawing)[1:]])
    return {"the model": found.hexdigest()[:16], "how it draws": settings}


def draw_pictures(
    chosen: ChosenBench,
    policy: Policy[Any, Any],
    rt: Runtime,
    folder: Path,
    drawing: Drawing,
    *,
    facts: Mapping[str, str],
    label: str,
    micro_batch: int = _BLOCK,
) -> None:
    """Draw the pictures of a bench that are not there yet.

    Args:
        chosen: the bench.
        policy: that draws.
        rt: device and precision.
        folder: for the pictures.
        drawing: guidance, steps and seed.
        facts: of `model_facts`.
        label: name of the model on the screen.
        micro_batch: pictures at once.

    Raises:
        RunError: the folder has pictures of another model, or that were drawn otherwise.
    """
    pin(folder, "drawn", facts)
    wanted, ledger = missing(chosen, folder), Ledger(folder, _PICTURES, rt)
    for path, content in chosen.bench.companions(chosen.items):
        write_atomic(folder / path, content)
    with progress(f"draw {label}", len(wanted)) as bar:
        for first in range(0, len(wanted), _BLOCK):
            block = wanted[first : first + _BLOCK]
            prompts = [
                replace(item.prompt, sources=chosen.bench.sources(item)) for item, _, _ in block
            ]
            seeds = [
                derived_seed(drawing.seed, "bench", chosen.kind, item.id, number)
                for item, number, _ in block
            ]
            with rt.autocast():
                drawn = draw(
                    policy,
                    prompts,
                    num_steps=drawing.num_steps,
                    guidance=drawing.guidance,
                    seeds=seeds,
                    micro_batch=micro_batch,
                )
            for (_, _, name), image in zip(block, drawn, strict=True):
                write_atomic(folder / name, images.encode_png(images.to_pil(image)))
            ledger.add(
                {"path": name, "item": chosen.digest_of_item(item)} for item, _, name in block
            )
            bar.advance(len(block))


def is_model(folder: Path) -> bool:
    """Whether a folder is a pipeline, or a stage of a run."""
    return any((place / "model_index.json").is_file() for place in (folder, folder / "model"))


def are_drawn(chosen: ChosenBench, folder: Path, facts: Mapping[str, str]) -> bool:
    """Whether a model has drawn all its pictures."""
    return read_pin(folder, "drawn") == facts and not missing(chosen, folder)


def missing(chosen: ChosenBench, folder: Path) -> list[tuple[Item, int, str]]:
    """Places without a picture that was drawn for the prompt as it is now."""
    drawn = {row.get("path"): row.get("item") for row in read_ledger(folder, _PICTURES)}
    return [
        (item, number, name)
        for item, number, name in chosen.places()
        if not (folder / name).is_file() or drawn.get(name) != chosen.digest_of_item(item)
    ]


def check_pictures(chosen: ChosenBench, folder: Path) -> None:
    """Look whether a folder has a picture of every item.

    Raises:
        ConfigError: some are missing.
    """
    lost = [path for _, _, path in chosen.places() if not (folder / path).is_file()]
    if lost:
        raise ConfigError(
            f"need every picture of the bench in {folder}, got {len(lost)} missing, such as "
            f"{lost[0]}; draw them, or give a model instead"
        )


def judge_pictures(
    chosen: ChosenBench, folder: Path, place: Path, rt: Runtime, *, label: str, again: bool = False
) -> None:
    """Ask the judge whatever has no reply yet, and write each reply down.

    Args:
        chosen: the bench.
        folder: of the pictures, which are all there.
        place: for the replies.
        rt: whose rank this is.
        label: name of the model on the screen.
        again: ask anew where a reply cannot be read.

    Raises:
        ConfigError: the bench has no judge here, or it does not answer.
    """
    known = read_replies(chosen, folder, place)
    digests = _digests(chosen, folder)
    wanted = [
        Asked(
            item, number, question, folder / path, read_sources=partial(chosen.bench.sources, item)
        )
        for item, number, path in chosen.places()
        for question in chosen.bench.questions(item)
        if _is_wanted(chosen, item, question, known.get((item.id, number, question.name)), again)
    ]
    if not wanted:
        return
    judge = chosen.bench.judge()
    if judge is None:
        raise ConfigError(
            f"need a judge for {chosen.kind}, got none; name its server with `judge: {{url: ..., "
            "model: ...}`, or read what the official program leaves with `burnish bench read`"
        )
    ledger = Ledger(place, _REPLIES, rt)
    with progress(f"judge {label}", len(wanted)) as bar:
        for one, reply in judge.answer(wanted):
            item, number, question = one.key
            said = {"failed": reply.reason} if isinstance(reply, Failed) else {"reply": reply}
            row = {"item": item, "number": number, "question": question}
            row["picture"] = digests[item, number]
            row["asked"] = chosen.digest_of_question(one.item, one.question)
            ledger.add([row | said])
            bar.advance(1)


def _is_wanted(
    chosen: ChosenBench, item: Item, question: Question, reply: str | Failed | None, again: bool
) -> bool:
    """Whether a question is to be asked."""
    if reply is None or isinstance(reply, Failed):
        return True
    return again and isinstance(chosen.bench.parse(item, question.name, reply), Failed)


def _digests(chosen: ChosenBench, folder: Path) -> dict[tuple[str, int], str]:
    """Of every picture."""
    return {
        (item.id, number): hashlib.sha256((folder / path).read_bytes()).hexdigest()[:16]
        for item, number, path in chosen.places()
        if (folder / path).is_file()
    }


def read_replies(chosen: ChosenBench, folder: Path, place: Path) -> Replies:
    """The newest reply to every question as it is asked now, about the pictures as they are."""
    digests: dict[Any, str] = dict(_digests(chosen, folder))
    asked: dict[Any, str] = {
        (item.id, question.name): chosen.digest_of_question(item, question)
        for item in chosen.items
        for question in chosen.bench.questions(item)
    }
    found: dict[Any, str | Failed] = {}
    for row in read_ledger(place, _REPLIES):
        item, number, question = (row.get(name) for name in ("item", "number", "question"))
        is_shown = digests.get((item, number)) == row.get("picture", "")
        if is_shown and asked.get((item, question)) == row.get("asked", ""):
            reply = row.get("reply")
            said = reply if isinstance(reply, str) else Failed(reason=str(row.get("failed")))
            found[item, number, question] = said
    return found


def result(
    chosen: ChosenBench, replies: Mapping[str, Replies], *, base: str, judge: Mapping[str, Any]
) -> dict[str, Any]:
    """The tree of several models as plain data.

    Args:
        chosen: the bench.
        replies: by model.
        base: that the others are compared with.
        judge: its identity.
    """
    scores: dict[str, Scores] = {
        name: read(chosen.bench, chosen.items, chosen.config.num_images, own)
        for name, own in replies.items()
    }
    return {
        "format": 1,
        "bench": chosen.kind,
        "key": chosen.key(judge),
        "identity": chosen.identity(judge),
        **tabulate(chosen.bench, scores, base),
        "examples": examples(chosen.bench, chosen.items, scores, base, _EXAMPLES),
    }


def released(chosen: ChosenBench, path: Path) -> Mapping[str, Replies]:
    """Replies out of a file of the official program, by model.

    Raises:
        ConfigError: not such a file, or replies to nothing that the bench asks.
    """
    known = {item.id for item in chosen.items}
    found: dict[str, dict[tuple[str, int, str], str | Failed]] = {}
    for model, item, number, question, reply in chosen.bench.responses(path):
        if item in known:
            found.setdefault(model, {})[item, number, question] = reply
    if not found:
        raise ConfigError(f"need replies to the items of {chosen.kind}, got none in {path}")
    return found
