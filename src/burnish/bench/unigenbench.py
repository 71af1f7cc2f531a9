"""UniGenBench++ (arXiv 2510.18701): 600 prompts, each with test points, four pictures of each.

Read from the user's disk: a checkout of the official repository, for prompts and the judge's words.
As in the official code, one question covers all test points of a picture; a dimension is the share
of its test points that are right, over all pictures. The official code has no whole; here it is the
mean of the ten primary dimensions, as the published table has it. The official code leaves out what
cannot be read after eleven tries; here that is a failure.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from burnish import images, records
from burnish.bench.base import OVERALL, Bench, BenchConfig, Node, Share, ancestors
from burnish.chat_judge import ChatJudge, ChatJudgeConfig, Decoding, Preparation
from burnish.config import ConfigError
from burnish.literals import constants, filled, plain
from burnish.questions import Item, Judge, Question, Slot
from burnish.types import Failed, Prompt, Task

_KEYS = {"en": ("Testpoints", "Testpoint Description"), "zh": ("考点", "考点对应描述")}
_TAGS = ("analysis", "score")
_NAME = "test points"


class UnigenbenchConfig(BenchConfig):
    """Where the bench lies, and which of its four sets."""

    kind: Literal["unigenbench"] = "unigenbench"
    checkout: Path
    """Of github.com/CodeGoat24/UniGenBench."""
    language: Literal["en", "zh"] = "en"
    length: Literal["short", "long"] = "short"
    num_images: int = Field(default=4, ge=1)
    judge: ChatJudgeConfig | None = None
    """The released judge is CodeGoat24/UniGenBench-EvalModel-qwen3vl-32b-v1."""

    def asks(self) -> Task:
        return "t2i"

    def build(self) -> "Unigenbench":
        return Unigenbench(self)


class Unigenbench(Bench):
    """Prompts by their index."""

    def __init__(self, config: UnigenbenchConfig) -> None:
        self._config = config
        path = config.checkout / "eval" / "src" / "eval_common.py"
        found, language = constants(path), config.language.upper()
        template = found.get(f"SYSTEM_PROMPT_{language}_TEMPLATE")
        meanings = found.get(f"EXPLANATION_DICT_{language}")
        configs = found.get("LANG_CONFIGS")
        headers = configs.get(config.language) if isinstance(configs, dict) else None
        headers = headers if isinstance(headers, dict) else {}
        names = ("checkpoint_header", "checkpoint_desc_header")
        is_told = isinstance(meanings, dict) and all(headers.get(name) for name in names)
        if not isinstance(template, str) or not is_told:
            raise ConfigError(
                f"need the official words of the judge for {config.language} in {path}, got none; "
                "check `checkout`"
            )
        self._template, self._headers = template, [str(headers[name]) for name in names]
        self._meanings = {
            str(point): str(meaning) for point, meaning in dict(meanings or {}).items()
        }
        self._items = list(self._read())

    def _read(self) -> Iterator[Item]:
        language = self._config.language
        end = "_long" if self._config.length == "long" else ""
        path = self._config.checkout / "data" / f"test_prompts_{language}{end}.csv"
        for where, row in records.csv_rows(path):
            name = records.text(row, "index", where)
            given = records.text(row, f"sub_dims_{language}", where)
            points, descriptions = _points(given, _KEYS[language], where)
            unknown = [point for point in points if point not in self._meanings]
            if unknown:
                raise records.wrong(where, "test points", "known ones", unknown[0], "check it")
            prompt = Prompt(id=name, text=records.text(row, f"prompt_{language}", where))
            yield Item(prompt=prompt, facts={"points": points, "descriptions": descriptions})

    def items(self) -> Sequence[Item]:
        """In the order of the official file."""
        return self._items

    def nodes(self) -> Sequence[Node]:
        """The whole, ten primary dimensions, 27 with their parts."""
        return ancestors(_node(point) for point in self._meanings)

    def averages(self) -> Mapping[Node, Sequence[Node]]:
        """The whole is the mean of the primary dimensions."""
        return {OVERALL: [node for node in self.nodes() if len(node) == 1]}

    def layout(self, item: Item, number: int) -> str:
        """`INDEX_0.png` to `INDEX_3.png`."""
        return f"{item.id}_{number}.png"

    def questions(self, item: Item) -> Sequence[Question]:
        """One: the picture, then the official words with all test points."""
        points = item.facts["points"]
        meanings = [self._meanings[point] for point in points]
        fields = {
            "prompt": item.prompt.text,
            "testpoint": str(points),
            "explanation": _listed(self._headers[0], points, meanings),
            "test_explanation": _listed(self._headers[1], points, item.facts["descriptions"]),
        }
        return (Question(name=_NAME, parts=(Slot.OUTPUT, filled(self._template, fields))),)

    def judge(self) -> Judge | None:
        """Greedy, with pictures as the official client for served judges sends them."""
        if self._config.judge is None:
            return None
        sent = Preparation("JPEG of quality 95", encode=lambda p: images.encode_jpeg(p, quality=95))
        return ChatJudge(self._config.judge, Decoding(max_tokens=4096), sent)

    def parse(self, item: Item, question: str, reply: str) -> Mapping[Node, float] | Failed:
        """Right and wrong of each test point, by its place: a point may stand there twice."""
        points = item.facts["points"]
        lists = [plain(_inside(reply, tag)) for tag in _TAGS]
        if not all(isinstance(own, list) and len(own) == len(points) for own in lists):
            return Failed(reason="need a score and a reason for every test point, got others")
        scores: Sequence[Any] = lists[-1] or ()
        return {(str(k),): self.scale * (score == 1) for k, score in enumerate(scores)}

    def shares(
        self, item: Item, verdicts: Mapping[str, Mapping[Node, float]]
    ) -> Mapping[Node, Share]:
        """What the test points of one picture add to their dimensions."""
        found: dict[Node, Share] = {}
        for (place,), value in verdicts[_NAME].items():
            leaf = _node(item.facts["points"][int(place)])
            for node in (leaf[:depth] for depth in range(1, len(leaf) + 1)):
                before = found.get(node, Share(0.0, 0.0))
                found[node] = Share(before.total + value, before.weight + 1)
        return found


def _inside(reply: str, tag: str) -> str:
    """What stands in the first element of a name; empty where there is none."""
    _, begun, rest = reply.partition(f"<{tag}>")
    inside, ended, _ = rest.partition(f"</{tag}>")
    return inside if begun and ended else ""


def _points(given: str, keys: tuple[str, str], where: str) -> tuple[list[str], list[str]]:
    """Test points and what each means for the prompt."""
    try:
        found: Any = json.loads(given)
    except (ValueError, RecursionError):
        raise records.wrong(where, "sub_dims", "valid JSON", given, "fix the row") from None
    points, meanings = (
        [str(text) for text in own] if isinstance(own, list) else []
        for own in (found.get(key) if isinstance(found, dict) else None for key in keys)
    )
    if not 0 < len(points) == len(meanings):
        raise records.wrong(where, "sub_dims", "a meaning for each point", given, "fix the row")
    return points, meanings


def _node(point: str) -> Node:
    """Primary dimension and, where there is one, its part.

    >>> _node("Attribute - Color"), _node("Style")
    (('Attribute', 'Color'), ('Style',))
    """
    return tuple(part.strip() for part in point.split("-", 1))


def _listed(header: str, points: Sequence[str], words: Sequence[str]) -> str:
    """The official form of a list of test points."""
    lines = "".join(f"\n{point}: {word}" for point, word in zip(points, words, strict=True))
    return f"{header}:\N{LEFT CORNER BRACKET}{lines}\n\N{RIGHT CORNER BRACKET}"
