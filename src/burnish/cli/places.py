"""What several commands take: RUN, whose policies it means, or NAME=FOLDER."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from burnish.config import ConfigError

if TYPE_CHECKING:
    from burnish.run_config import RunConfig


def named(
    places: Sequence[str], of_run: "Callable[[RunConfig, Path], Mapping[str, Path]]"
) -> dict[str, Path]:
    """A folder for each name.

    Of several runs the first shows the base that they share; all else is named RUN-POLICY.

    Args:
        places: as they were given.
        of_run: the folders of a run's policies that are meant.

    Raises:
        ConfigError: a name twice, or one that cannot name a folder.
    """
    from burnish.run_config import BASE, NAME
    from burnish.summary import read_run

    found: dict[str, Path] = {}
    bases: list[Any] = []
    for place in places:
        name, sign, path = place.partition("=")
        own: Mapping[str, Path] = {name: Path(path)}
        if not sign:
            config = read_run(Path(place))
            base = (config.policy, config.deployed(BASE))
            own = of_run(config, Path(place))
            if base in bases:
                own = {policy: folder for policy, folder in own.items() if policy != BASE}
            if len(places) > 1:
                is_first = not bases
                own = {
                    policy if policy == BASE and is_first else f"{config.name}-{policy}": folder
                    for policy, folder in own.items()
                }
            bases.append(base)
        for name, folder in own.items():
            if name in found:
                raise ConfigError(
                    f"need one place for each name, got two for {name!r}; write NAME=FOLDER"
                )
            if not NAME.fullmatch(name):
                raise ConfigError(
                    f"need a name of letters, digits, _ and -, got {name!r}; write NAME=FOLDER"
                )
            found[name] = folder
    return found
