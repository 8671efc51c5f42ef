"""Which format the index of a distributed checkpoint belongs to: torch_dist, or another.

Files of the same kind, `.metadata` and `*.distcp`, are written by megatron-core (torch_dist), by
its FSDP (fsdp_dtensor) and by every program that uses torch's distributed checkpoints.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from megatron.bridge.models.hf_pretrained.regular_file import read_regular
from megatron.bridge.models.hf_pretrained.strict_json import parse_object
from megatron.bridge.text.quoting import quoted

BACKEND_FILE = "metadata.json"
"""Names the backend that wrote the tensors; megatron-core writes it, torch alone does not."""

TORCH_DIST, TORCH_DIST_VERSION = "torch_dist", 1
TORCH_DIST_SUFFIX = ".distcp"
"""Of the files of data."""

_MAX_BACKEND_BYTES = 1 << 20
_FSDP_PREFIX = "model.module."
_SAVE_AGAIN = "save it as torch_dist with the program that wrote it"


@dataclass(frozen=True, slots=True)
class IndexFormat:
    """The format that an index belongs to.

    Attributes:
        name: of the format.
        why: how it is recognised, and the way out; None for torch_dist.
    """

    name: str
    why: str | None = None

    @property
    def is_torch_dist(self) -> bool:
        """Whether its tensors are those of a Megatron model, by megatron-core's keys."""
        return self.why is None


def index_format(folder: Path, keys: Collection[str]) -> IndexFormat:
    """The format of a checkpoint with these tensors.

    Args:
        folder: of the iteration.
        keys: of the tensors.
    """
    backend, version = _backend(folder)
    if backend not in (None, TORCH_DIST):
        why = f"{BACKEND_FILE} names the backend {quoted(backend)}; {_SAVE_AGAIN}"
        return IndexFormat(backend if isinstance(backend, str) else "unknown", why)
    if fsdp := next((key for key in keys if key.startswith(_FSDP_PREFIX)), None):
        return IndexFormat(
            "fsdp_dtensor",
            f"its keys begin with {_FSDP_PREFIX} ({fsdp}), as Megatron's FSDP saves them, which "
            f"keeps the two halves of an MLP's first matrix apart; {_SAVE_AGAIN}",
        )
    if backend is not None and version != TORCH_DIST_VERSION:
        why = (
            f"{BACKEND_FILE} names version {quoted(version)}, and version {TORCH_DIST_VERSION} is "
            "read; save it with the megatron-core that this version of megatron-bridge is made for"
        )
        return IndexFormat(f"{TORCH_DIST}, version {quoted(version)}", why)
    if backend is None and (prefix := _wrapper(keys)):
        return IndexFormat(
            "torch DCP",
            f"its keys begin with {prefix}, and there is no {BACKEND_FILE}, as torch's own "
            f"distributed checkpoints have them, not megatron-core's; {_SAVE_AGAIN}, or if that is "
            "not Megatron, save a Hugging Face folder with it",
        )
    return IndexFormat(TORCH_DIST)


def _wrapper(keys: Collection[str]) -> str | None:
    """What other programs put before the names of a model's tensors; most have it."""
    weights = [key for key in keys if not key.startswith(("optimizer.", "optim."))]
    for prefix in ("model.", "module.", "state_dict.", "app."):
        if 2 * sum(key.startswith(prefix) for key in weights) > len(weights):
            return prefix
    return None


def _backend(folder: Path) -> tuple[object, object]:
    """Name and version of the backend; None where no readable file names one."""
    try:
        stated = parse_object(read_regular(folder / BACKEND_FILE, _MAX_BACKEND_BYTES))
    except (OSError, ValueError):
        return None, None
    return stated.get("sharded_backend"), stated.get("sharded_backend_version", 1)
