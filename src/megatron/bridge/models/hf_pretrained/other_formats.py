"""Folders of other programs: what each is, by the names of its files, and the way out.

Only names are looked at, in the folder and one level below, and nothing is opened but the small
config.json and adapter_config.json. What an index of tensors tells is in
`formats.torch_dist.index_format`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from megatron.bridge.models.hf_pretrained.regular_file import read_regular
from megatron.bridge.models.hf_pretrained.strict_json import parse_object
from megatron.bridge.text.quoting import is_name, printable

_ADAPTER_CONFIG = "adapter_config.json"
_CONFIG = "config.json"
_MAX_CONFIG_BYTES = 1 << 20
_CLASS = re.compile(r"[A-Za-z_]\w{0,99}", re.ASCII)
_MOST_PATHS = 20_000

_SAVE_AS_TORCH_DIST = (
    "save it as torch_dist with the program that wrote it (in Megatron-LM: --ckpt-convert-format "
    "torch_dist --ckpt-convert-save FOLDER)"
)
EXPORT_IT = "and a Hugging Face model is asked for; `megatron-bridge export` makes one of it"
_TAKE_SAFETENSORS = "take the safetensors files of the model that it was made from"


@dataclass(frozen=True, slots=True)
class _Format:
    """A format of other programs.

    Attributes:
        what: the format, as a noun.
        paths: those of its files, relative to the folder.
        way_out: what to do instead; {folder} stands for the folder, {model_class} for the class of
            transformers.
    """

    what: str
    paths: re.Pattern[str]
    way_out: str


def _format(what: str, paths: str, way_out: str) -> _Format:
    return _Format(what, re.compile(paths, re.IGNORECASE | re.ASCII), way_out)


MEGATRON_MARKS = re.compile(
    r"latest_checkpointed_iteration\.txt|\.metadata|(iter_\d{7,}|release)/(\.metadata|metadata\.json)"
)
"""Files that a Megatron checkpoint has, and a folder of Hugging Face files has not."""

_NOT_WEIGHTS = re.compile(
    r"(training_args|optimizer|scheduler|scaler|rng_state|random_states|trainer_state)[^/]*",
    re.IGNORECASE,
)
"""What trainers of Hugging Face models leave beside the weights."""

_MEGATRON = (
    _format(
        "a checkpoint of Megatron-LM's older format torch (a file for each rank)",
        r"((iter_\d{7,}|release)/)?mp_rank_\d+(_\d+)*(/(model_optim_rng|model_rng|distrib_optim)\.pt)?",
        _SAVE_AS_TORCH_DIST,
    ),
    _format(
        "a checkpoint of megatron-core's older format zarr", r"[^/]+/\.zarray", _SAVE_AS_TORCH_DIST
    ),
)
_DEEPSPEED = _format(
    "a checkpoint of DeepSpeed (ZeRO shards)",
    r"zero_to_fp32\.py|global_step\d+|(global_step\d+/)?[^/]*mp_rank_\d+_(model|optim)_states\.pt",
    "gather its weights with the zero_to_fp32.py of DeepSpeed and --safe_serialization, and put "
    "the model's config.json beside them",
)
_HUGGINGFACE = (
    _format(
        "weights for llama.cpp (GGUF), which are stored in another form",
        r"[^/]+\.gguf",
        _TAKE_SAFETENSORS,
    ),
    _format(
        "weights in the layout of the model's authors, not that of transformers",
        r"(original/)?consolidated[^/]*\.(pth|pt|safetensors)",
        "take the files in the layout of transformers",
    ),
    _format(
        "weights that torch.save pickled (.bin)",
        r"[^/]+\.bin",
        "convert them to safetensors with {model_class} of transformers: {model_class}."
        "from_pretrained({folder}, dtype='auto').save_pretrained(NEW_FOLDER)",
    ),
    _format(
        "weights that torch.save pickled",
        r"[^/]+\.(pt|pth|ckpt)",
        "save them as safetensors with the program that wrote them (save_pretrained of "
        "transformers does)",
    ),
    _format("weights for TensorFlow", r"[^/]+\.h5", _TAKE_SAFETENSORS),
    _format("weights for Flax", r"[^/]+\.msgpack", _TAKE_SAFETENSORS),
    _format("a model exported to ONNX", r"(onnx/)?[^/]+\.onnx", _TAKE_SAFETENSORS),
    _format("an archive of NeMo", r"[^/]+\.nemo", "export it with NeMo to a Hugging Face folder"),
    _DEEPSPEED,
    *_MEGATRON,
)


def other_weights(folder: Path) -> str | None:
    """What a folder without a model in safetensors files holds instead, and the way out.

    None where safetensors files are there, or no weights at all: a config alone is a model without
    weights. An adapter, which changes the weights of another model, is not a model.
    """
    paths = _paths(folder)
    if _ADAPTER_CONFIG in paths and not _holds_a_model(paths):
        return _adapter(folder)
    return other_files(str(folder), paths, folder)


def other_files(name: str, paths: Sequence[str], folder: Path | None = None) -> str | None:
    """As `other_weights`, by the names of files.

    Args:
        name: of the folder or repository.
        paths: of all files in it.
        folder: where its config.json lies, if that is at hand.
    """
    files = [path for path in paths if path.endswith(".safetensors") and "/" not in path]
    if any(not path.startswith("consolidated") for path in files):
        return None
    if "model.safetensors.index.json" in paths:
        return None  # the shards that it names are missing, and their reader says so
    if not files and (mark := _first(MEGATRON_MARKS, paths)) is not None:
        return f"{printable(name)} is a Megatron checkpoint ({mark}), {EXPORT_IT}"
    return _described(name, paths, _HUGGINGFACE, "safetensors weights", folder)


def bare_adapter(folder: Path) -> str | None:
    """What to do with a hub id whose small files are of an adapter without a config; else None."""
    if (folder / _ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
        return _adapter(folder)
    return None


def other_checkpoint(folder: Path) -> str | None:
    """What a folder without a torch_dist index holds of another trainer, and the way out."""
    forms = (*_MEGATRON, _DEEPSPEED)
    return _described(str(folder), _paths(folder), forms, "torch_dist checkpoint")


def is_older_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a checkpoint of Megatron's older formats, here or in iterations."""
    paths = _paths(folder)
    return any(_first(form.paths, paths) is not None for form in _MEGATRON)


def _described(
    name: str,
    paths: Sequence[str],
    forms: Sequence[_Format],
    readable: str,
    folder: Path | None = None,
) -> str | None:
    for form in forms:
        if (found := _first(form.paths, paths)) is not None:
            way_out = form.way_out.replace("{folder}", repr(name))
            way_out = way_out.replace("{model_class}", _model_class(folder))
            return f"{printable(name)}: no {readable}: it holds {form.what}, {found}; {way_out}"
    return None


def _model_class(folder: Path | None) -> str:
    """The class of transformers that config.json names; in words where it is not at hand."""
    found = _config_in(folder, _CONFIG).get("architectures") if folder is not None else None
    named = str(found[0]) if isinstance(found, list) and found else ""
    return named if _CLASS.fullmatch(named) else "CLASS_IN_ITS_CONFIG"


def _config_in(folder: Path, name: str) -> Mapping[str, Any]:
    """What a small JSON file says; nothing where it cannot be read."""
    try:
        return parse_object(read_regular(folder / name, _MAX_CONFIG_BYTES))
    except (OSError, ValueError):
        return {}


def _adapter(folder: Path) -> str:
    config = _config_in(folder, _ADAPTER_CONFIG)
    kind, base = config.get("peft_type"), config.get("base_model_name_or_path")
    shown_kind = f" ({kind})" if kind and is_name(kind) else ""
    shown_base = shlex.quote(base) if base and is_name(base) else "its base model"
    return (
        f"{printable(str(folder))}: it holds an adapter{shown_kind}, not a whole model; merge it "
        f"into {shown_base} first, with PEFT: PeftModel.from_pretrained(BASE, FOLDER)."
        "merge_and_unload().save_pretrained(NEW_FOLDER)"
    )


def _holds_a_model(paths: Sequence[str]) -> bool:
    """Whether there are weights beside those of an adapter."""
    weights = (".safetensors", ".bin", ".gguf", ".pth", ".pt", ".index.json")
    return any(
        path.endswith(weights)
        and "/" not in path
        and not path.startswith("adapter_")
        and not _NOT_WEIGHTS.fullmatch(path)
        for path in paths
    )


def _first(pattern: re.Pattern[str], paths: Sequence[str]) -> str | None:
    found = (path for path in paths if pattern.fullmatch(path) and not _NOT_WEIGHTS.fullmatch(path))
    path = next(found, None)
    return None if path is None else printable(path)


def _paths(folder: Path) -> list[str]:
    """Names in a folder and one level below, sorted; of very many, some."""
    try:
        return sorted(islice(_walk(folder), _MOST_PATHS))
    except OSError:
        return []  # who reads the files says what is wrong with the folder


def _walk(folder: Path) -> Iterator[str]:
    entries = list(folder.iterdir())
    yield from (entry.name for entry in entries)
    for entry in entries:
        if entry.is_dir():
            yield from (f"{entry.name}/{inner.name}" for inner in entry.iterdir())
