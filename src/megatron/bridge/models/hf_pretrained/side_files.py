"""Which files of a model folder are not weights: they accompany the weights unchanged."""

from __future__ import annotations

from pathlib import Path

_WEIGHT_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx"}
)


def _is_weights(name: str) -> bool:
    path = Path(name.removesuffix(".index.json"))
    return path.suffix.lower() in _WEIGHT_SUFFIXES


def side_files(folder: Path) -> tuple[Path, ...]:
    """Every file below `folder` that is neither weights, an index of weights, nor hidden.

    Sorted, relative to `folder`. A file may be a symlink, as in the hub's cache.
    """
    relative = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return tuple(
        path
        for path in relative
        if not _is_weights(path.name) and not any(part.startswith(".") for part in path.parts)
    )
