"""The YAML that Burnish reads and writes: the 1.2 rules for plain values, and no key twice.

PyYAML follows version 1.1, in which `no` is false, `1e-4` is text and `010` is 8. Both classes
build on its safe ones, so no document can make an object.
"""

import re
from typing import Any, cast

import yaml


class Loader(yaml.SafeLoader):
    """Safe loader by the 1.2 rules; a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping, whose keys must differ."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for place, key in enumerate(keys):
            if key in keys[:place]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", node.value[place][0].start_mark
                )
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Safe dumper by the same rules, so that what is written reads back the same."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write equal parts out instead of naming them."""
        return True


_FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
for _class in (Loader, Dumper):
    _class.yaml_implicit_resolvers = {
        first: [entry for entry in entries if entry[0].endswith((":null", ":merge"))]
        for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    # Integers stand before floats, whose pattern also matches them.
    for _name, _pattern, _firsts in (
        ("bool", "true|True|TRUE|false|False|FALSE", "tTfF"),
        ("int", "[-+]?[0-9]+", "-+0123456789"),
        ("float", _FLOAT, "-+.0123456789"),
    ):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), list(_firsts)
        )
# PyYAML's own constructor reads 010 as 8.
Loader.add_constructor(
    "tag:yaml.org,2002:int", lambda _, node: int(cast(yaml.ScalarNode, node).value)
)
