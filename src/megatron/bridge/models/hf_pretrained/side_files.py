"""Which files of a model folder are not weights: they accompany the weights unchanged."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from megatron.bridge.errors import CheckpointError
from megatron.bridge.models.hf_pretrained.weight_files import weight_file_names
from megatron.bridge.text.quoting import printable

_OTHER_WEIGHTS = frozenset(
    {".bin", ".pt", ".pth", ".ckpt", ".distcp", ".gguf", ".h5", ".msgpack", ".onnx"}
)
"""Weights in another format: of the same model as a rule, and out of date once it was trained."""


def side_files(folder: Path) -> tuple[Path, ...]:
    """Every file below `folder` that is neither the model's weights, their index, nor hidden.

    Safetensors files that are not the model's, such as a value head's or an adapter's, accompany
    it; weights in other formats do not. A file may be a symlink, as in the hub's cache.

    Returns:
        Paths relative to `folder`, sorted.

    Raises:
        CheckpointError: something cannot be copied as a file (a link that leads nowhere or to a
            folder, a pipe, a device), or a folder cannot be read.
    """
    try:
        return tuple(sorted(_walk(folder, weight_file_names(folder))))
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read: {error.strerror}") from error


def replace_file(path: Path, content: bytes) -> None:
    """Write a file; whatever happens, it is there as it was, or whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _walk(folder: Path, weights: frozenset[str]) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not _is_hidden(name)]
        here = Path(parent)
        for name in folders:
            if (here / name).is_symlink():
                raise _unusable(here / name, "a link to a folder")
        for name in files:
            own = (here / name).relative_to(folder).as_posix() in weights
            if own or _is_hidden(name) or _is_in_another_format(name):
                continue
            if not (here / name).is_file():
                raise _unusable(here / name, "a pipe, a device, or a link that leads nowhere")
            yield (here / name).relative_to(folder)


def _raise(error: OSError) -> None:
    raise error


def _unusable(path: Path, kind: str) -> CheckpointError:
    return CheckpointError(
        f"{printable(str(path))}: it should be a file that accompanies the weights, but is {kind}; "
        "put the real thing in its place, or remove it"
    )


def _is_hidden(name: str) -> bool:
    return name.startswith(".")


_SETTINGS_OF_TRAINERS = frozenset({"training_args.bin"})
"""Named like weights, and none: copied as they are, never opened."""


def _is_in_another_format(name: str) -> bool:
    if name in _SETTINGS_OF_TRAINERS:
        return False
    path = Path(name.removesuffix(".index.json"))
    return path.suffix.lower() in _OTHER_WEIGHTS
