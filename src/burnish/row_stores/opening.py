"""Which store a path is: a file of JSON lines or Parquet, a folder of shards, a saved data set."""

import re
from pathlib import Path

from burnish.config import ConfigError
from burnish.row_stores.arrow import ParquetRows, SavedRows
from burnish.row_stores.base import Fields, RowStore
from burnish.row_stores.json_lines import JsonRows

_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})")
"""Names of the shards of a split, as the Hub has them."""
_HUB_NAME = re.compile(r"(hf://.*|[\w-][\w.-]*/[\w-][\w-]*)")


def open_rows(path: Path, fields: Fields) -> RowStore:
    """The rows of a file of JSON lines or Parquet, of a folder of Parquet files, or of a folder
    that `datasets` has saved.

    Args:
        path: where it is; the last part may be a pattern such as `train-*.parquet`.
        fields: what is wanted.

    Raises:
        ConfigError: nothing of that kind, a column that is missing or unknown, or no `pyarrow`.
    """
    if path.is_dir():
        if (path / "state.json").is_file():
            return SavedRows(path, fields)
        return ParquetRows(path, _shards(path), fields)
    if "*" in path.name and (files := sorted(path.parent.glob(path.name))):
        return ParquetRows(path.parent, files, fields)
    if not path.is_file():
        name = str(path).replace("hf:/", "hf://")
        is_of_hub = _HUB_NAME.fullmatch(name) is not None
        advice = (
            f"download a data set of the Hub first (`hf download {name} --repo-type dataset "
            "--local-dir DIR`) and give its folder, or check the path"
            if is_of_hub
            else "check the path"
        )
        raise ConfigError(f"need a file or folder of prompts, got {path}, which is none; {advice}")
    if path.suffix == ".parquet":
        return ParquetRows(path.parent, [path], fields)
    if path.suffix == ".arrow":
        raise ConfigError(
            f"{path}: need the folder that `save_to_disk` has written, got a file of it; give "
            f"{path.parent}"
        )
    return JsonRows(path, fields)


def _shards(folder: Path) -> list[Path]:
    """The Parquet files of a folder, all of them and of one split."""
    files = sorted(folder.glob("*.parquet"))
    if not files:
        inside = sorted({file.parent for file in folder.glob("*/*.parquet")})
        inside += sorted({file.parent for file in folder.glob("*/state.json")})
        advice = f"give {inside[0]}" if inside else "check the path"
        raise ConfigError(
            f"{folder}: need a folder with .parquet files, or one that `datasets` has saved, got "
            f"neither; {advice}"
        )
    numbered = [found for file in files if (found := _SHARD.fullmatch(file.stem))]
    splits = sorted({found[1] for found in numbered})
    if len(splits) > 1:
        raise ConfigError(
            f"{folder}: need the files of one split, got {', '.join(splits)}; give "
            f"{folder / f'{splits[0]}-*.parquet'}"
        )
    for found in numbered[:1]:
        if int(found[2]) != len(numbered):
            raise ConfigError(
                f"{folder}: need {int(found[2])} files of {found[1]}, as their names tell, got "
                f"{len(numbered)}; copy the others, too"
            )
    return files
