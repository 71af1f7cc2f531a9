"""Options that several commands share, so that they mean the same everywhere."""

from pathlib import Path
from typing import Annotated

import typer

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings to change, as dotted.key=value."),
]
Out = Annotated[
    Path | None, typer.Option("--out", help="Run folder; runs/NAME if left out.", metavar="DIR")
]
Force = Annotated[
    bool, typer.Option("--force", help="Drop the results in the folder and start over.")
]
Again = Annotated[bool, typer.Option("--again", help="Ask anew where a reply cannot be read.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]
