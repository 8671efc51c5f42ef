"""run_config.yaml: how to build the model of a Megatron checkpoint, beside its weights.

`model` names the provider class under `_target_` and its fields as plain values; `hf` holds the
Hugging Face config that the checkpoint was made from, so that the checkpoint describes itself.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron.bridge.errors import CheckpointError
from megatron.bridge.models.hf_pretrained.config import HFConfig

CONFIG_RECORD = "run_config.yaml"


def write_config_record(folder: Path, target: str, model: Mapping[str, Any], hf: HFConfig) -> None:
    """Write the record into the folder of an iteration.

    target: dotted path of the provider class. model: its fields as plain values.
    """
    record = {"model": {"_target_": target, **model}, "hf": {"config": hf.data}}
    text = yaml.safe_dump(record, sort_keys=False, allow_unicode=True)
    (folder / CONFIG_RECORD).write_text(text, encoding="utf-8")


def read_hf_config(folder: Path) -> HFConfig:
    """The Hugging Face config in the record of an iteration's folder. Raises CheckpointError."""
    path = folder / CONFIG_RECORD
    try:
        record = yaml.safe_load(path.read_text(encoding="utf-8"))
        config = record["hf"]["config"]
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: no {CONFIG_RECORD}, so the model is unknown; name its Hugging Face folder"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path}: cannot be read as a config record: {error!r}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: hf.config should be an object, found {config!r}")
    return HFConfig.from_dict(config, origin=str(path))
