"""Small benches in the form of the official repositories, with words of our own."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from burnish import images

REFERENCE = Path(__file__).parent / "shelves" / "qwen_image_bench_reference.json"


def reference() -> dict[str, Any]:
    """What the official code of Qwen-Image-Bench makes of random replies."""
    return json.loads(REFERENCE.read_text())


def picture(seed: int, side: int = 32) -> Image.Image:
    """Noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def qwen_image_bench(folder: Path, *, trimmed: bool = False) -> dict[str, Any]:
    """Checkout and data set; the settings that read them."""
    known = reference()
    lists = {}
    for pillar, tree in known["tree"].items():
        lines = []
        for ability, facets in tree.items():
            lines += [f"## {ability}", *(f"- {facet}: Is it right?" for facet in facets)]
        lists[pillar] = "\n".join(lines[:-1] if trimmed else lines)
    names = {pillar: f"LIST_{place}" for place, pillar in enumerate(lists)}
    code = "".join(f"{names[pillar]} = {text!r}\n" for pillar, text in lists.items())
    table = ", ".join(f"{pillar!r}: {name}" for pillar, name in names.items())
    code += f"DIM_TO_CHECKLIST = {{{table}}}\nSYSTEM_PROMPT = ('Grade ' 'pictures.')\n"
    template = '{prompt}\n<image>\n{level1_dim}\n{format_checklist}\nAnswer {{ "{{ability}}": 1 }}'
    code += f"USER_PROMPT_TEMPLATE = {template!r}\nraise SystemExit('nobody runs this')\n"
    (folder / "metadata").mkdir(parents=True, exist_ok=True)
    (folder / "checklists.py").write_text(code)
    tags = [{"ID": row["ID"], "dims_en": row["dims_en"]} for row in known["records"]]
    (folder / "metadata" / "bench_metadata.json").write_text(json.dumps(tags))
    rows = [
        {**row, "prompt_en": f"a picture <image> {row['ID']}", "prompt_cn": f"图 {row['ID']}"}
        for row in known["records"]
    ]
    path = folder / "released.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"kind": "qwen_image_bench", "checkout": str(folder), "prompts": str(path)}


def geneval(folder: Path) -> dict[str, Any]:
    """Two prompts of each task."""
    tasks = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
    rows = [
        {"tag": task, "include": [{"class": "cup", "count": 1}], "prompt": f"{task} {number}"}
        for task in tasks
        for number in range(2)
    ]
    (folder / "prompts").mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "prompts" / "evaluation_metadata.jsonl").write_text(text)
    return {"kind": "geneval", "checkout": str(folder)}


def unigenbench(folder: Path) -> dict[str, Any]:
    """Three prompts; the last has one test point twice."""
    meanings = {"Style": "how", "Attribute - Color": "hue", "Attribute - Size": "extent"}
    code = f"EXPLANATION_DICT_EN = {meanings!r}\n"
    code += "SYSTEM_PROMPT_EN_TEMPLATE = '{prompt} {testpoint} {explanation} {test_explanation}'\n"
    code += (
        "LANG_CONFIGS = {'en': {'explanation_dict': EXPLANATION_DICT_EN, "
        "'checkpoint_header': 'Means', 'checkpoint_desc_header': 'Here'}}\n"
    )
    (folder / "eval" / "src").mkdir(parents=True, exist_ok=True)
    (folder / "eval" / "src" / "eval_common.py").write_text(code)
    points = (["Style"], ["Style", "Attribute - Color"], ["Attribute - Size", "Attribute - Size"])
    (folder / "data").mkdir(exist_ok=True)
    with (folder / "data" / "test_prompts_en.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["index", "prompt_en", "sub_dims_en"])
        for number, own in enumerate(points):
            told = {"Testpoints": own, "Testpoint Description": [f"{p} here" for p in own]}
            writer.writerow([number, f"prompt, {number}", json.dumps(told)])
    return {"kind": "unigenbench", "checkout": str(folder)}


def gedit(folder: Path) -> dict[str, Any]:
    """Three edits in English, two of one key, and one in Chinese."""
    names = (
        "_context_no_delimit",
        "_prompts_0shot_two_image_edit_rule",
        "_prompts_0shot_tie_rule_SC",
        "_prompts_0shot_rule_PQ",
    )
    code = "".join(f"{name} = {name + ' <instruction>'!r}\n" for name in names)
    (folder / "GEdit-Bench" / "viescore").mkdir(parents=True, exist_ok=True)
    (folder / "GEdit-Bench" / "viescore" / "vie_prompts.py").write_text(code)
    rows = [("subject-add", "k1", "en"), ("subject-add", "k1", "en"), ("text_change", "k2", "en")]
    table = [
        {
            "task_type": task,
            "key": key,
            "instruction": f"change {place}",
            "instruction_language": language,
            "input_image": {"bytes": images.encode_png(picture(place, 24)), "path": None},
            "Intersection_exist": place == 0,
        }
        for place, (task, key, language) in enumerate([*rows, ("text_change", "k2", "cn")])
    ]
    pq.write_table(pa.Table.from_pylist(table), folder / "data.parquet")
    return {"kind": "gedit", "checkout": str(folder), "data": str(folder / "data.parquet")}


def imgedit(folder: Path) -> dict[str, Any]:
    """Two edits of each type."""
    kinds = (
        "add", "adjust", "extract", "replace", "remove", "background", "style", "compose", "action",
    )  # fmt: skip
    place = folder / "Benchmark" / "Basic"
    (folder / "sources" / "daily object").mkdir(parents=True, exist_ok=True)
    place.mkdir(parents=True, exist_ok=True)
    words = {kind: f"Grade this {kind}: <edit_prompt>" for kind in kinds}
    (place / "prompts.json").write_text(json.dumps(words))
    edits = {}
    for number, kind in enumerate(kinds * 2):
        name = f"daily object/{number}.jpg"
        picture(number).save(folder / "sources" / name)
        edits[str(1000 + number)] = {"id": name, "prompt": f"edit {number}", "edit_type": kind}
    (place / "basic_edit.json").write_text(json.dumps(edits))
    return {"kind": "imgedit", "checkout": str(folder), "pictures": str(folder / "sources")}


def miniature(folder: Path) -> dict[str, Any]:
    """Of the embedded world itself."""
    return {"kind": "miniature", "limit": 12}


CHECKOUTS = {
    make.__name__: make
    for make in (gedit, geneval, imgedit, miniature, qwen_image_bench, unigenbench)
}
"""By bench: writes its files below a folder, and tells its settings."""
