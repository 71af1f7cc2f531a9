"""Qwen-Image-Bench (arXiv 2605.28091): 1,000 prompts, five pillars, 56 facets, judged by Q-Judger.

What is read from the user's disk: a checkout of the official repository (its checklists and its
prompts' facets), and the released data set, which has the prompts. The checklists are read as text,
never run. As in the official code:

* one question for each pillar that a prompt is tagged with, with the whole checklist of the pillar;
* pictures with a side above 1,024 are squashed to 1,024 x 1,024, whatever their shape;
* temperature 0, top_k 1, repetition penalty 1.05, seed 42, 4,096 tokens, thinking;
* grades 0, 1, 2 count 0, 60, 100; what is not applicable is left out; a pillar is the mean of its
  abilities, an ability of its facets, a picture of its pillars, the whole of the pictures.

A checklist that was trimmed, as some forks do to save tokens, has other scores and is refused.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from burnish import records
from burnish.bench.base import (
    Bench,
    BenchConfig,
    Node,
    Response,
    Share,
    ancestors,
    nested_shares,
)
from burnish.chat_judge import ChatJudge, ChatJudgeConfig, Decoding, Preparation
from burnish.config import ConfigError
from burnish.literals import constants, filled
from burnish.questions import Item, Judge, Question, Slot
from burnish.types import Failed, Prompt, Task

SIZES = (5, 23, 56)
"""Pillars, abilities, facets."""
GRADES = {0: 0.0, 1: 60.0, 2: 100.0}
MAX_SIDE = 1024
DECODING = Decoding(
    max_tokens=4096, temperature=0.0, top_p=1.0, top_k=1, repetition_penalty=1.05, seed=42,
    is_thinking=True,
)  # fmt: skip
_RENAMED = {"Feature Mapping": "Feature Matching"}
_IMAGE = "<image>"


class QwenImageBenchConfig(BenchConfig):
    """Where the bench lies, and in which language it is drawn."""

    kind: Literal["qwen_image_bench"] = "qwen_image_bench"
    checkout: Path
    """Of github.com/QwenLM/Qwen-Image-Bench."""
    prompts: Path
    """The released data set (`qwen_image_bench_hf_*.jsonl`), or any JSONL, JSON or CSV file with
    `ID` and `prompt_en`, `prompt_cn` or `prompt`."""
    language: Literal["en", "cn"] = "en"
    judge: ChatJudgeConfig | None = None
    """Where Q-Judger is served, e.g. by `vllm serve Qwen/Qwen-Image-Bench`."""

    def asks(self) -> Task:
        return "t2i"

    def build(self) -> "QwenImageBench":
        return QwenImageBench(self)


class QwenImageBench(Bench):
    """Read from disk; nothing of it is kept in Burnish."""

    def __init__(self, config: QwenImageBenchConfig) -> None:
        self._config = config
        self._words = _Checklists.read(config.checkout / "checklists.py")
        tags = _tags(config.checkout / "metadata" / "bench_metadata.json", self._words)
        self._items = list(_items(config.prompts, config.language, tags))

    def items(self) -> Sequence[Item]:
        """Prompts with the pillars that they are tagged with."""
        return self._items

    def nodes(self) -> Sequence[Node]:
        """Pillars, abilities, facets."""
        return ancestors(self._words.facets)

    def companions(self, items: Sequence[Item]) -> Iterator[tuple[str, bytes]]:
        """The input of the official `judge.py`."""
        rows = [
            {"ID": int(item.id), "prompt": item.prompt.text, "image_path": self.layout(item, 0)}
            for item in items
        ]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        yield "input.jsonl", "".join(lines).encode()

    def questions(self, item: Item) -> Sequence[Question]:
        """One for each tagged pillar."""
        return [self._words.question(pillar, item.prompt.text) for pillar in item.facts["pillars"]]

    def parse(self, item: Item, question: str, reply: str) -> Mapping[Node, float] | Failed:
        """Grades out of the JSON behind the thoughts, with the repairs of the official code."""
        grades = self._words.repaired(_object(reply) or {}, question)
        leaves = dict(_leaves(grades, question))
        if not leaves and not any(_is_left_out(g) for own in grades.values() for g in own.values()):
            return Failed(reason="need a JSON object with grades in the reply, got none")
        return leaves

    def shares(
        self, item: Item, verdicts: Mapping[str, Mapping[Node, float]]
    ) -> Mapping[Node, Share]:
        """Means of means within the picture."""
        return nested_shares({n: v for own in verdicts.values() for n, v in own.items()})

    def judge(self) -> Judge | None:
        """Q-Judger with the official decoding; None where no server is named."""
        if self._config.judge is None:
            return None
        prepared = Preparation(f"squashed to {MAX_SIDE} x {MAX_SIDE} where larger", squashed)
        return ChatJudge(self._config.judge, DECODING, prepared)

    def responses(self, path: Path) -> Iterator[Response]:
        """The replies of the released data set, or of `judge.py`: a column for pillar and model."""
        for where, row in records.table_rows(path):
            item = _id(row, where)
            for pillar in self._words.pillars:
                name = pillar.lower().replace(" ", "_").replace("-", "_")
                for column, reply in row.items():
                    model = _model(column, name)
                    if model is not None and isinstance(reply, str) and reply:
                        yield Response(model, item, 0, pillar, reply)


def _model(column: str, pillar: str) -> str | None:
    """Whose replies a column holds; None for any other column.

    >>> _model("quality_response_GPT Image 2", "quality"), _model("quality_judge_output", "quality")
    ('GPT Image 2', 'judged')
    """
    if column == f"{pillar}_judge_output":
        return "judged"
    prefix = f"{pillar}_response_"
    return column.removeprefix(prefix) if column.startswith(prefix) else None


def squashed(picture: Image.Image, _: Image.Image | None = None) -> Image.Image:
    """The picture as the official judge sees it; its sides do not keep their ratio.

    >>> squashed(Image.new("RGB", (2000, 1000))).size
    (1024, 1024)
    """
    if max(picture.size) <= MAX_SIDE:
        return picture
    return picture.resize((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)


class _Checklists:
    """The words of the official judge, and the tree that they spell."""

    def __init__(self, system: str, template: str, checklists: Mapping[str, str]) -> None:
        self._system, self._template, self._checklists = system, template, checklists
        self.pillars = tuple(checklists)
        self.facets = [
            (pillar, ability, facet)
            for pillar, text in checklists.items()
            for ability, facet in _spelled(text)
        ]
        self._ability = {(pillar, facet): ability for pillar, ability, facet in self.facets}

    @classmethod
    def read(cls, path: Path) -> "_Checklists":
        """The constants of the official `checklists.py`.

        Raises:
            ConfigError: no such file, other constants, or not the whole tree.
        """
        words = constants(path)
        found, system, template = (
            words.get(name)
            for name in ("DIM_TO_CHECKLIST", "SYSTEM_PROMPT", "USER_PROMPT_TEMPLATE")
        )
        is_told = isinstance(found, dict) and isinstance(system, str)
        if not isinstance(template, str) or not is_told or template.count(_IMAGE) != 1:
            raise ConfigError(
                "need the official checklists.py with DIM_TO_CHECKLIST, SYSTEM_PROMPT and "
                f"USER_PROMPT_TEMPLATE, got {path} without; check `checkout`"
            )
        read = cls(
            str(system), template, {pillar: str(text) for pillar, text in dict(found or {}).items()}
        )
        abilities = {facet[:2] for facet in read.facets}
        sizes = (len(read.pillars), len(abilities), len(read.facets))
        if sizes != SIZES:
            raise ConfigError(
                f"need a checklist of {', '.join(map(str, SIZES))} pillars, abilities and facets, "
                f"got {', '.join(map(str, sizes))} in {path}; a trimmed one has other scores: take "
                "the official commit"
            )
        return read

    def question(self, pillar: str, prompt: str) -> Question:
        """What the official judge is asked about one pillar."""
        fields = {
            "prompt": prompt,
            "level1_dim": pillar,
            "format_checklist": self._checklists[pillar],
        }
        # Split first: a prompt may say the word itself.
        before, after = (filled(part, fields) for part in self._template.split(_IMAGE))
        return Question(name=pillar, parts=(before, Slot.OUTPUT, after), system=self._system)

    def repaired(self, found: Mapping[str, Any], pillar: str) -> dict[str, dict[str, Any]]:
        """Grades by ability and facet, however the judge nested them."""
        first = next(iter(found.values()), None)
        nested = found
        if isinstance(first, dict) and "score" in first:
            nested = {"": found}
        repaired: dict[str, dict[str, Any]] = {}
        for given, grades in nested.items():
            if not isinstance(grades, dict):
                continue
            for name, grade in grades.items():
                facet = _RENAMED.get(name, name)
                ability = self._ability.get((pillar, facet), given or facet)
                repaired.setdefault(ability, {})[facet] = grade
        return repaired


def _spelled(checklist: str) -> Iterator[tuple[str, str]]:
    """(ability, facet) of a checklist: `## Ability`, then `- Facet: question`."""
    ability = ""
    for line in checklist.splitlines():
        if line.startswith("## "):
            ability = line.removeprefix("## ").strip()
        elif line.startswith("- ") and ability:
            yield ability, line.removeprefix("- ").partition(":")[0].strip()


def _tags(path: Path, words: _Checklists) -> dict[str, tuple[str, ...]]:
    """The pillars of every prompt."""
    found = {}
    for where, row in records.table_rows(path):
        tags = records.text(row, "dims_en", where)
        pillars = dict.fromkeys(tag.split("/")[0].strip() for tag in tags.split(";"))
        unknown = [pillar for pillar in pillars if pillar not in words.pillars]
        if unknown:
            raise records.wrong(where, "dims_en", "known pillars", unknown[0], "check `checkout`")
        found[_id(row, where)] = tuple(pillars)
    return found


def _items(path: Path, language: str, tags: Mapping[str, tuple[str, ...]]) -> Iterator[Item]:
    for where, row in records.table_rows(path):
        name = _id(row, where)
        key = f"prompt_{language}" if f"prompt_{language}" in row else "prompt"
        if name not in tags:
            raise records.wrong(where, "ID", "a prompt of the bench", name, "check `prompts`")
        prompt = Prompt(id=name, text=records.text(row, key, where))
        yield Item(prompt=prompt, facts={"pillars": tags[name]})


def _id(row: records.Row, where: str) -> str:
    given = row.get("ID")
    if not str(given).isascii() or not str(given).isdigit():
        raise records.wrong(where, "ID", "a whole number", given, "check the file")
    return str(int(str(given)))


def _object(reply: str) -> dict[str, Any] | None:
    """The JSON object behind the thoughts; None where there is none."""
    text = reply.rpartition("</think>")[2].strip()
    for candidate in (text, text[max(text.find("{"), 0) : text.rfind("}") + 1]):
        try:
            found = json.loads(candidate)
        except (ValueError, RecursionError):
            continue
        return found if isinstance(found, dict) else None
    return None


def _is_left_out(given: Any) -> bool:
    """Whether the judge says that a facet does not apply."""
    grade = given.get("score") if isinstance(given, dict) else given
    return isinstance(grade, str) and grade.upper() == "N/A"


def _leaves(grades: Mapping[str, Mapping[str, Any]], pillar: str) -> Iterator[tuple[Node, float]]:
    """Values of what applies; what is no grade counts as not applicable, as officially."""
    for ability, own in grades.items():
        for facet, given in own.items():
            grade = given.get("score") if isinstance(given, dict) else given
            try:
                value = GRADES.get(int(grade))  # type: ignore[arg-type]
            except (TypeError, ValueError, OverflowError):
                continue
            if value is not None:
                yield (pillar, ability, facet), value
