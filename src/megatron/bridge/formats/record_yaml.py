"""The YAML of config records. Apart from them, since only a record at hand is worth its import."""

from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from yaml import YAMLError

__all__ = ["YAMLError", "dump", "load", "scalar_pairs"]

_ITEM, _KEY = object(), object()
_Syntax = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def dump(record: Mapping[str, Any]) -> bytes:
    """A mapping of plain values as YAML, in the order of its keys."""
    return yaml.dump(record, Dumper=_Dumper, sort_keys=False, allow_unicode=True).encode()


def load(text: bytes) -> Any:
    """The plain values of one document without aliases. Raises YAMLError, or ValueError."""
    return _Loader(text).get_single_data()


def scalar_pairs(text: bytes) -> Iterator[tuple[str, str]]:
    """Each key and value of all mappings that are both scalars, or aliases of one."""
    scalars: dict[str, str] = {}
    expected: list[object] = []  # by each open collection: an item, a key, or the value of a key
    for event in yaml.parse(text, Loader=_Syntax):
        if isinstance(event, yaml.CollectionEndEvent):
            expected.pop()
        elif isinstance(event, yaml.NodeEvent):
            scalar = scalars.get(event.anchor or "")
            if isinstance(event, yaml.ScalarEvent):
                scalar = event.value
                if event.anchor:
                    scalars[event.anchor] = event.value
            place = expected[-1] if expected else _ITEM
            if place is _KEY:
                expected[-1] = scalar
            elif place is not _ITEM:
                expected[-1] = _KEY
                if isinstance(place, str) and scalar is not None:
                    yield place, scalar
            if isinstance(event, yaml.CollectionStartEvent):
                expected.append(_KEY if isinstance(event, yaml.MappingStartEvent) else _ITEM)


class _Dumper(yaml.SafeDumper):
    """Writes what is shared as often as it stands there."""

    def ignore_aliases(self, data: object) -> bool:
        return True


class _Loader(yaml.SafeLoader):
    """Builds plain values; refuses aliases, by which a few lines stand for gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias, which no record needs")
        return super().compose_node(parent, index)
