"""GEdit-Bench (arXiv 2504.17761): real edits of eleven tasks, graded from 0 to 10 as in VIEScore.

Read from the user's disk: the data set as Parquet and a checkout of the official repository, for
the judge's words. As in the official code, semantic consistency SC and perceptual quality PQ are
each the lower of two grades, a picture's score is sqrt(SC PQ), a task's the mean of its pictures,
and the whole the mean of the tasks; the picture is brought to the size of its source before it is
judged. The official code draws a random grade where a reply cannot be read after a second try; here
that is a failure.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from burnish import images, records
from burnish.bench.base import OVERALL, Bench, BenchConfig, Node, Share, ancestors
from burnish.chat_judge import ChatJudge, ChatJudgeConfig, Decoding, Preparation
from burnish.config import ConfigError
from burnish.literals import constants
from burnish.questions import Item, Judge, Question, Slot
from burnish.types import Failed, Prompt, Task

TASKS = (
    "background_change", "color_alter", "material_alter", "motion_change", "ps_human",
    "style_change", "subject-add", "subject-remove", "subject-replace", "text_change",
    "tone_transfer",
)  # fmt: skip
MEASURES = ("Semantic consistency", "Perceptual quality")
_OTHER, _SHARED = "Other means", "Overall, intersection"
_OTHERS: tuple[Node, ...] = (
    *((_OTHER, measure) for measure in MEASURES),
    *((_OTHER, _SHARED, task) for task in TASKS),
)
_INSTRUCTION = "<instruction>"
_WORDS = {
    MEASURES[0]: (
        "_context_no_delimit", "_prompts_0shot_two_image_edit_rule", "_prompts_0shot_tie_rule_SC",
    ),
    MEASURES[1]: ("_context_no_delimit", "_prompts_0shot_rule_PQ"),
}  # fmt: skip


class GeditConfig(BenchConfig):
    """Where the bench lies, and its language."""

    kind: Literal["gedit"] = "gedit"
    checkout: Path
    """Of github.com/stepfun-ai/Step1X-Edit."""
    data: Path
    """The released data set (stepfun-ai/GEdit-Bench) as one Parquet file or a folder of them."""
    language: Literal["en", "cn"] = "en"
    judge: ChatJudgeConfig | None = None
    """Published rows are of GPT-4.1 or of Qwen2.5-VL-72B; a result is known by its judge."""

    def asks(self) -> Task:
        return "edit"

    def build(self) -> "Gedit":
        return Gedit(self)


class Gedit(Bench):
    """Edits by task, language and key."""

    scale = 10.0

    def __init__(self, config: GeditConfig) -> None:
        self._config = config
        path = config.checkout / "GEdit-Bench" / "viescore" / "vie_prompts.py"
        known = constants(path)
        every = dict.fromkeys(name for names in _WORDS.values() for name in names)
        missing = [name for name in every if not isinstance(known.get(name), str)]
        if missing:
            raise ConfigError(f"need {missing[0]} in {path}, got none; check `checkout`")
        self._words = {name: "\n".join(known[w] for w in own) for name, own in _WORDS.items()}
        self._items = list(self._read())
        self._pictures: dict[str, bytes] | None = None

    def _rows(self, columns: Sequence[str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Place, id and fields of every edit of the language; a key that comes again is counted."""
        data = self._config.data
        files = [data] if data.is_file() else sorted(data.glob("*.parquet"))
        if not files:
            raise ConfigError(f"need Parquet files in {data}, got none; export the data set there")
        seen: dict[str, int] = {}
        wanted = ("task_type", "key", "instruction_language", *columns)
        for file in files:
            for where, row in records.parquet_rows(file, wanted):
                if row.get("instruction_language") != self._config.language:
                    continue
                task = records.text(row, "task_type", where)
                if task not in TASKS:
                    raise records.wrong(where, "task_type", "a known task", task, "check `data`")
                name = f"{task}/{self._config.language}/{records.text(row, 'key', where)}"
                seen[name] = seen.get(name, 0) + 1
                yield where, name if seen[name] == 1 else f"{name}_{seen[name]}", row

    def _read(self) -> Iterator[Item]:
        for where, name, row in self._rows(("instruction", "Intersection_exist")):
            text = records.text(row, "instruction", where)
            facts = {"task": row["task_type"], "is_shared": bool(row.get("Intersection_exist"))}
            yield Item(prompt=Prompt(id=name, text=text, task="edit"), facts=facts)

    def items(self) -> Sequence[Item]:
        """In the order of the data set."""
        return self._items

    def nodes(self) -> Sequence[Node]:
        """The whole, its tasks with their two measures, and other means of all tasks."""
        return ancestors([*((task, m) for task in TASKS for m in MEASURES), *_OTHERS])

    def averages(self) -> Mapping[Node, Sequence[Node]]:
        """Means of the tasks."""
        others = {(_OTHER, m): [(task, m) for task in TASKS] for m in MEASURES}
        shared = {(_OTHER, _SHARED): [(_OTHER, _SHARED, task) for task in TASKS]}
        return {OVERALL: [(task,) for task in TASKS], **others, **shared}

    def layout(self, item: Item, number: int) -> str:
        """`fullset/TASK/LANGUAGE/KEY.png`."""
        return f"fullset/{super().layout(item, number)}"

    def companions(self, items: Sequence[Item]) -> Iterator[tuple[str, bytes]]:
        """The sources beside the edits."""
        for item in items:
            picture = images.decode(*self.sources(item), where=item.id)
            yield f"fullset/{item.id}_SRCIMG.png", images.encode_png(picture)

    def sources(self, item: Item) -> tuple[bytes]:
        """The picture that is edited."""
        if self._pictures is None:
            rows = self._rows(("input_image",))
            self._pictures = {name: _bytes(row, where) for where, name, row in rows}
        return (self._pictures[item.id],)

    def questions(self, item: Item) -> Sequence[Question]:
        """Both pictures and the instruction for consistency, the output alone for quality."""
        asked = self._words[MEASURES[0]].replace(_INSTRUCTION, item.prompt.text)
        return (
            Question(name=MEASURES[0], parts=(Slot.SOURCE, Slot.OUTPUT, asked)),
            Question(name=MEASURES[1], parts=(Slot.OUTPUT, self._words[MEASURES[1]])),
        )

    def judge(self) -> Judge | None:
        """Greedy, as the official open judge."""
        if self._config.judge is None:
            return None
        sized = Preparation("the output at the size of its source", _at_size)
        return ChatJudge(self._config.judge, Decoding(max_tokens=1400, seed=42), sized)

    def parse(self, item: Item, question: str, reply: str) -> Mapping[Node, float] | Failed:
        """The lower of two grades."""
        found = _json_inside(reply)
        grades = found.get("score") if isinstance(found, dict) else None
        given = grades if isinstance(grades, list) else [grades]
        told = [g for g in given if isinstance(g, int | float) and not isinstance(g, bool)]
        if not 0 < len(told) == len(given) or not all(0 <= grade <= self.scale for grade in told):
            return Failed(reason=f"need grades from 0 to {self.scale:g} in the reply, got others")
        return {(question,): float(min(told))}

    def shares(
        self, item: Item, verdicts: Mapping[str, Mapping[Node, float]]
    ) -> Mapping[Node, Share]:
        """Each measure of its task; the overall one only where both are told."""
        task = item.facts["task"]
        told = {name: own[(name,)] for name, own in verdicts.items()}
        found: dict[Node, Share] = {(task, name): Share(value) for name, value in told.items()}
        if len(told) == len(_WORDS):
            overall = Share(math.sqrt(told[MEASURES[0]] * told[MEASURES[1]]))
            found[task,] = overall
            if item.facts["is_shared"]:
                found[_OTHER, _SHARED, task] = overall
        return found


def _at_size(picture: Image.Image, source: Image.Image | None) -> Image.Image:
    return picture if source is None else picture.resize(source.size)


def _bytes(row: records.Row, where: str) -> bytes:
    given = row.get("input_image")
    data = given.get("bytes") if isinstance(given, dict) else given
    if not isinstance(data, bytes):
        raise records.wrong(where, "input_image", "an encoded image", data, "take it with images")
    return data


def _json_inside(reply: str) -> Any:
    """The object between the first and the last brace."""
    start, end = reply.find("{"), reply.rfind("}")
    try:
        return json.loads(reply[start : end + 1].replace("\n", ""))
    except (ValueError, RecursionError):
        return None
