"""Opening and drawing from sets of prompts of several sizes, in every form.

    python benchmarks/data.py [--sizes 1000 10000 100000] [--side 96] [--draws 240] [--json]

Each set is half text to image and half edits, whose sources are JPEG photographs of noise. It is
opened, its labels are sorted into pools, and prompts are drawn in steps of twelve, at random as in
training. `busy` is the processor's share of `open`. `grown` is the resident memory that this adds
to a process that has imported everything, mapped pages of files included. Every set is measured in
a process of its own, its files being in the cache of the system.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from burnish import images
from burnish.prompts import GroupSampler, read_prompts

FORMS = ("jsonl + images", "parquet", "arrow")
SCHEMA = pyarrow.schema(
    [
        ("id", pyarrow.string()),
        ("text", pyarrow.string()),
        ("category", pyarrow.string()),
        ("source", pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])),
    ]
)
ROWS = 100
"""In a row group or batch, as `datasets` writes images."""


def rows(count: int, photos: list[bytes]) -> Iterator[dict[str, Any]]:
    """So many prompts, every second one an edit."""
    for number in range(count):
        # What follows the end of a JPEG is not read; so no two are equal, and none is stored once.
        photo = photos[number % len(photos)] + b"%d" % number if number % 2 else None
        yield {
            "id": f"prompt-{number}",
            "text": f"a photograph, number {number}, of something that takes some words to tell",
            "category": ("general", "portrait", "landscape")[number % 3],
            "source": photo and {"bytes": photo, "path": f"{number}.jpg"},
        }


def write(form: str, folder: Path, count: int, photos: list[bytes]) -> Path:
    """The set in one form; returns its path."""
    folder.mkdir()
    if form == "jsonl + images":
        with (folder / "set.jsonl").open("w") as file:
            for row in rows(count, photos):
                if row["source"] is not None:
                    (folder / row["source"]["path"]).write_bytes(row["source"]["bytes"])
                    row["source"] = row["source"]["path"]
                file.write(json.dumps(row) + "\n")
        return folder / "set.jsonl"
    if form == "arrow":
        (folder / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
        writer: Any = pyarrow.ipc.new_stream(folder / "data.arrow", SCHEMA)
    else:
        writer = pyarrow.parquet.ParquetWriter(folder / "set.parquet", SCHEMA)
    with writer:
        every = rows(count, photos)
        while batch := [row for _, row in zip(range(ROWS), every, strict=False)]:
            writer.write_batch(pyarrow.RecordBatch.from_pylist(batch, schema=SCHEMA))
    return folder


def measure(path: Path, draws: int) -> Mapping[str, float]:
    """Seconds to open, bytes of memory, prompts drawn a second."""

    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    before, start, busy = resident(), time.perf_counter(), time.process_time()
    sampler = GroupSampler(read_prompts(path), per_step=12, seed=0, pool=lambda p: p.task)
    opened, grown = time.perf_counter() - start, resident() - before
    busy = time.process_time() - busy
    start = time.perf_counter()
    for step in range(draws // 12):
        sampler.prompts(step)
    spent = time.perf_counter() - start
    after = resident() - before
    return {
        "open": opened,
        "busy": busy,
        "opened": grown,
        "drawn": after,
        "rate": draws // 12 * 12 / spent,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--side", type=int, default=96, help="pixels of a source")
    parser.add_argument("--draws", type=int, default=240)
    parser.add_argument("--json", action="store_true", help="one object as the last line")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(Path(arguments.one), arguments.draws)))
        return
    noise = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), dtype=np.uint8)
    size = (arguments.side, arguments.side)
    photos = [
        images.encode_jpeg(Image.fromarray(n).resize(size, Image.Resampling.BICUBIC)) for n in noise
    ]
    kilobytes = sum(map(len, photos)) / len(photos) / 1e3
    print(f"Sources of {arguments.side} x {arguments.side} pixels, {kilobytes:.1f} kB each\n")
    print("| prompts | form | on disk MB | open s | busy s | grown MB | with draws MB | draws/s |")
    print("|---|---|---|---|---|---|---|---|")
    found = []
    for count in arguments.sizes:
        for form in FORMS:
            with tempfile.TemporaryDirectory() as place:
                path = write(form, Path(place) / "set", count, photos)
                disk = sum(f.stat().st_size for f in (Path(place) / "set").iterdir())
                command = [sys.executable, __file__, "--one", str(path)]
                command += ["--draws", str(arguments.draws)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
            row = json.loads(done.stdout.splitlines()[-1])
            found.append({"prompts": count, "form": form, "disk": disk, **row})
            cells = [
                f"{count:,}",
                form,
                f"{disk / 1e6:.0f}",
                f"{row['open']:.2f}",
                f"{row['busy']:.2f}",
            ]
            cells += [f"{row['opened'] / 1e6:.0f}", f"{row['drawn'] / 1e6:.0f}"]
            print(f"| {' | '.join([*cells, format(row['rate'], '.0f')])} |", flush=True)
    if arguments.json:
        print(json.dumps({"rows": found}))


if __name__ == "__main__":
    main()
