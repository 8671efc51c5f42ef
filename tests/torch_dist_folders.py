"""Making torch_dist checkpoints of any tensors."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from megatron.bridge.engine.pieces import FillTensor
from megatron.bridge.engine.stream import write_files
from megatron.bridge.formats.torch_dist.file_layout import torch_dist_files
from megatron.bridge.tensors.boxes import Box, full_box
from megatron.bridge.tensors.spec import TensorSpec


def write_torch_dist(
    folder: Path,
    tensors: Mapping[str, TensorSpec],
    fill: FillTensor,
    chunks: Iterable[tuple[str, Box]] | None = None,
    extra_states: Iterable[str] = (),
) -> None:
    """Write the folder of one iteration. chunks: boxes that tile the tensors, or whole ones."""
    if chunks is None:
        chunks = ((key, full_box(spec.shape)) for key, spec in tensors.items())
    files = torch_dist_files(tensors, [chunks], extra_states=extra_states, max_file_bytes=1 << 29)
    folder.mkdir(parents=True, exist_ok=True)
    write_files(folder, files, fill)
