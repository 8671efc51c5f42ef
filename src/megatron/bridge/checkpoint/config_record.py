"""run_config.yaml: how to build the model of a Megatron checkpoint, beside its weights.

`model` names the provider class under `_target_` and its fields as plain values; `hf` holds the
Hugging Face config that the checkpoint was made from, so that the checkpoint describes itself.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron.bridge.errors import CheckpointError
from megatron.bridge.models.hf_pretrained.config import HFConfig
from megatron.bridge.models.hf_pretrained.regular_file import read_regular
from megatron.bridge.models.hf_pretrained.strict_json import parse_object

CONFIG_RECORD = "run_config.yaml"

_MAX_BYTES = 1 << 20


def config_record(provider: str, settings: Mapping[str, Any], hf: HFConfig) -> bytes:
    """The content of the record.

    provider: dotted path of the provider class. settings: its fields as plain values.
    """
    record = {"model": {"_target_": provider, **settings}, "hf": {"config": hf.data}}
    return yaml.dump(record, Dumper=_Dumper, sort_keys=False, allow_unicode=True).encode()


def read_hf_config(folder: Path) -> HFConfig:
    """The Hugging Face config in the record of an iteration's folder.

    Raises CheckpointError if there is no record, or it is damaged or holds more than plain data.
    """
    path = folder / CONFIG_RECORD
    try:
        record = _Loader(read_regular(path, _MAX_BYTES)).get_single_data()
        # YAML knows dates, sets and numbers that JSON does not.
        config = parse_object(json.dumps(record["hf"]["config"]).encode())
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: no {CONFIG_RECORD}, so the model is unknown; name its Hugging Face folder"
        ) from None
    except (OSError, ValueError, LookupError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as a config record: {type(error).__name__}: {error}"
        ) from error
    return HFConfig.from_dict(config, origin=str(path))


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
