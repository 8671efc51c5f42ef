"""What a client sets on the transformers object of a config, brought back into its JSON."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from megatron.bridge.errors import ConfigError, InputError
from megatron.bridge.models.hf_pretrained.config import HFConfig
from megatron.bridge.models.hf_pretrained.quantization import CONFIG_KEY

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_OLDER_FORMS = {"rope_parameters": ("rope_scaling", "rope_theta"), "dtype": ("torch_dtype",)}
"""Keys that config.json may have in the place of one that the object has."""

_ABSENT = object()


def with_changes(stated: HFConfig, config: PretrainedConfig, before: Mapping[str, Any]) -> HFConfig:
    """`stated` with every value that `config` has now and had not `before`; itself if none.

    Values that were not touched keep the form that they have in `stated`.

    Args:
        stated: the config.json.
        config: the object.
        before: `config.to_dict()` when it was made.

    Raises:
        ConfigError: the quantization was changed, which is that of the files, or JSON cannot hold a
            value.
    """
    data = stated.data
    changed = [_set(stated, data, *change) for change in _changes(config, before, config.to_dict())]
    if not changed:
        return stated
    return HFConfig.from_dict(data, f"{stated.origin} with {', '.join(changed)} as set on `config`")


def set_values(config: PretrainedConfig, values: Mapping[str, Any], path: str = "") -> None:
    """Set values by name; a dict for a part of a model's config sets values on that part.

    Args:
        config: of transformers.
        values: by name.
        path: of the config in that of the whole model, with a dot behind it.

    Raises:
        InputError: the config has no value of a name.
    """
    known = {*config.to_dict(), *config.attribute_map}
    for name, value in values.items():
        if name not in known:
            raise InputError(
                f"{path}{name} is no value of a {type(config).__name__}, nor an option of "
                f"from_hf_pretrained{_meant(config, name, known)}"
            )
        part = getattr(config, name, None)
        if isinstance(value, Mapping) and hasattr(part, "attribute_map"):
            set_values(part, value, f"{path}{name}.")
        else:
            setattr(config, name, value)


def _meant(config: PretrainedConfig, name: str, known: Collection[str]) -> str:
    for section in config.sub_configs:
        if name in getattr(config, section).to_dict():
            return f"; give {section}={{{name!r}: ...}}"
    close = get_close_matches(name, known, n=1)
    return f"; was {close[0]} meant?" if close else ""


type _Change = tuple[tuple[str, ...], Any, tuple[str, ...]]
"""Path of a key, its value now, and other names of the key beside it."""


def _changes(
    config: PretrainedConfig, before: Mapping[str, Any], now: Mapping[str, Any]
) -> Iterator[_Change]:
    for key in dict.fromkeys((*before, *now)):
        old, new = before.get(key, _ABSENT), now.get(key, _ABSENT)
        if key.startswith("_") or old == new:
            continue
        part = getattr(config, key, None)
        if isinstance(old, dict) and isinstance(new, dict) and hasattr(part, "attribute_map"):
            for path, value, names in _changes(part, old, new):
                yield (key, *path), value, names
        else:
            aliases = [alias for alias, name in config.attribute_map.items() if name == key]
            yield (key,), new, (*aliases, *_OLDER_FORMS.get(key, ()))


def _set(
    stated: HFConfig,
    data: dict[str, Any],
    path: tuple[str, ...],
    value: Any,
    names: tuple[str, ...],
) -> str:
    """Put one value into `data`; its dotted path."""
    dotted = ".".join(path)
    if path[0] == CONFIG_KEY:
        raise ConfigError(
            f"{stated.origin}: {CONFIG_KEY} was changed on `config`, but says how the files are "
            f"quantized; leave it as it is"
        )
    for key in path[:-1]:
        if not isinstance(data.get(key), dict):
            data[key] = {}
        data = data[key]
    for name in (path[-1], *names):
        data.pop(name, None)
    if value is not _ABSENT:
        try:
            data[path[-1]] = json.loads(json.dumps(value))
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{stated.origin}: {dotted} was set on `config` to a value that config.json cannot "
                f"hold: {error}"
            ) from error
    return dotted
