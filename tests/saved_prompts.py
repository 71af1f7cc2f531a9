"""Writes `saved_prompts/`: fifty prompts as the package `datasets` saves them, in three files.

    pip install datasets && python tests/saved_prompts.py

Burnish reads such folders without that package, and the tests hold it to the real thing. The
pictures are PNG, JPEG and WebP, in columns of the feature `Image`; every third prompt has none.
"""

import io
import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_suffix("")
COUNT = 50


def picture(number: int, kind: str) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (9, 7), (5 * number, 250 - 5 * number, 77)).save(buffer, kind)
    return buffer.getvalue()


def row(number: int) -> dict[str, Any]:
    is_edit = number % 3 > 0
    kind = ("PNG", "JPEG", "WEBP")[number % 5 % 3]
    return {
        "id": f"p-{number}",
        "text": f"a {number}\u2028th thing",
        "task": "edit" if is_edit else "t2i",
        "category": ("general", "portrait")[number % 2],
        "source": {"bytes": picture(number, kind), "path": None} if is_edit else None,
        "target": {"bytes": picture(number, "PNG"), "path": "t.png"} if number % 7 == 0 else None,
        "tags": ["a", "b"][: number % 3],
        "facts": json.dumps({"number": number} if number % 2 else {}),
    }


def main() -> None:
    import datasets

    rows = [row(number) for number in range(COUNT)]
    found = datasets.Dataset.from_list(rows)
    for name in ("source", "target"):
        found = found.cast_column(name, datasets.Image(decode=False))
    found.save_to_disk(FOLDER, num_shards=3)


if __name__ == "__main__":
    main()
