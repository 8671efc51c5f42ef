"""run_config.yaml: how to build the model of a Megatron checkpoint, beside its weights.

`model` names the provider class under `_target_` and its fields as plain values; `hf` holds the
Hugging Face config that the checkpoint was made from, so that the checkpoint describes itself.

Other trainers write a file of this name, too, without `hf`. It does not describe the model; what
is of use in it is `hf_model_id`, where the model came from.
"""

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.bridge.errors import CheckpointError, InputError
from megatron.bridge.models.hf_pretrained.config import HFConfig
from megatron.bridge.models.hf_pretrained.regular_file import read_regular
from megatron.bridge.models.hf_pretrained.strict_json import parse_object
from megatron.bridge.text.quoting import is_name

CONFIG_RECORD = "run_config.yaml"

_MAX_BYTES = 1 << 20
_MODEL_ID = "hf_model_id"
_OURS = re.compile(rb"^hf[ \t]*:", re.MULTILINE)
_NULLS = ("", "~", "null")


@dataclass(frozen=True)
class ConfigRecord:
    """A record beside a checkpoint.

    Attributes:
        hf: the Hugging Face config of the model; None in a record of another program.
        hf_model_id: the Hugging Face model that such a record names: a hub id, or a path on some
            machine.
    """

    hf: HFConfig | None
    hf_model_id: str | None = None


@dataclass(frozen=True)
class TokenizerRecord:
    """The tokenizer that a client trains a checkpoint with; nothing here reads it.

    Attributes:
        path: the Hugging Face folder or hub id that it comes from.
        kwargs: for transformers' AutoTokenizer.
    """

    path: str
    kwargs: Mapping[str, Any]

    @property
    def entry(self) -> dict[str, Any]:
        """As trainers find it in the record."""
        return {
            "tokenizer_type": "HuggingFaceTokenizer",
            "tokenizer_model": self.path,
            "hf_tokenizer_kwargs": dict(self.kwargs),
        }


def config_record(
    provider: str,
    settings: Mapping[str, Any],
    hf: HFConfig,
    tokenizer: TokenizerRecord | None = None,
) -> bytes:
    """The content of the record.

    Args:
        provider: dotted path of the provider class.
        settings: its fields as plain values.
        hf: the Hugging Face config of the model.
        tokenizer: a tokenizer to name beside it.

    Raises:
        InputError: an argument of the tokenizer is no plain value.
    """
    from megatron.bridge.formats import record_yaml

    record: dict[str, Any] = {
        "model": {"_target_": provider, **settings},
        "hf": {"config": hf.data},
    }
    if tokenizer is not None:
        try:
            json.dumps(tokenizer.entry)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"hf_tokenizer_kwargs: {error}; a checkpoint records plain values only"
            ) from error
        record["tokenizer"] = tokenizer.entry
    return record_yaml.dump(record)


def read_record(folder: Path) -> ConfigRecord | None:
    """The record in an iteration's folder; None if there is none.

    A file without an entry `hf`, whatever else it holds, is a record of another program: nothing of
    it is built, and it need not be valid. So is one whose `hf` has no `config`.

    Raises:
        CheckpointError: our record is damaged or holds more than plain data, or cannot be read.
    """
    path = folder / CONFIG_RECORD
    try:
        text = read_regular(path, _MAX_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read as a config record: {error}") from error
    except ValueError:  # longer than ours are
        return ConfigRecord(None)
    if not _OURS.search(text):
        return ConfigRecord(None, _model_id(text))
    from megatron.bridge.formats import record_yaml

    try:
        record = record_yaml.load(text)
        entry = record["hf"]
        if not (isinstance(entry, dict) and "config" in entry):
            return ConfigRecord(None, _model_id(text))  # an entry of that name, but not ours
        # YAML knows dates, sets and numbers that JSON does not.
        config = parse_object(json.dumps(entry["config"]).encode())
    except (ValueError, LookupError, TypeError, RecursionError, record_yaml.YAMLError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(f"{path}: cannot be read as a config record: {reason}") from error
    return ConfigRecord(HFConfig.from_dict(config, origin=str(path)), _model_id(text))


def read_hf_config(folder: Path) -> HFConfig:
    """The Hugging Face config in the record of an iteration's folder.

    Raises:
        CheckpointError: no record holds one. If the record names a Hugging Face model, the message
            does, too.
    """
    record = read_record(folder)
    if record is None:
        reason = f"{folder}: no {CONFIG_RECORD}, so the model is unknown"
    elif record.hf is None:
        reason = f"{folder / CONFIG_RECORD}: a record of another program, so the model is unknown"
    else:
        return record.hf
    raise CheckpointError(f"{reason}; name its Hugging Face model by --hf{_suggestion(record)}")


def _suggestion(record: ConfigRecord | None) -> str:
    if record is None or record.hf_model_id is None:
        return ""
    return f", as in --hf {shlex.quote(record.hf_model_id)}, which the record names"


def _model_id(text: bytes) -> str | None:
    """The first value of `hf_model_id`, wherever it stands.

    Of YAML only the syntax is read: tags are not followed, aliases not expanded, nothing is built.
    """
    if _MODEL_ID.encode() not in text:
        return None
    from megatron.bridge.formats import record_yaml

    try:
        for key, value in record_yaml.scalar_pairs(text):
            if key == _MODEL_ID and value not in _NULLS and is_name(value):
                return value
    except (record_yaml.YAMLError, ValueError, RecursionError):
        pass  # what stands before the fault was looked at
    return None
