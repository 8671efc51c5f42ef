"""Which tensors lie in a range of a file of weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron.bridge.errors import CheckpointError
from megatron.bridge.formats.torch_dist.index_format import TORCH_DIST_SUFFIX
from megatron.bridge.models.hf_pretrained.safetensors_header import read_header
from megatron.bridge.models.hf_pretrained.weight_files import is_safetensors

type _Places = Sequence[tuple[str, int, int]]
"""Names, and the bytes [start, stop) of a file that each takes."""


class TensorPlaces:
    """Where tensors lie in the files of a folder, as their headers or the index of torch_dist say.

    Nothing is read before it is asked for, and an index only once.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._index: dict[Path, Mapping[str, _Places]] = {}

    def tensors_in(self, file: str, offset: int, nbytes: int) -> tuple[str, ...]:
        """Names of the tensors with data in a range of bytes, in the order of the file.

        There are none where nothing can be said of the file: it is not a file of weights, or its
        header or index is damaged.

        Args:
            file: relative to the folder.
            offset: where the range begins.
            nbytes: its length.
        """
        path, end = self._folder / file, offset + nbytes
        try:
            places = self._places(path)
        except CheckpointError:
            return ()
        return tuple(
            dict.fromkeys(name for name, start, stop in places if start < end and offset < stop)
        )

    def _places(self, path: Path) -> _Places:
        if is_safetensors(path.name):
            tensors = read_header(path).tensors
            return [
                (tensor.name, tensor.offset, tensor.offset + tensor.nbytes) for tensor in tensors
            ]
        if path.suffix == TORCH_DIST_SUFFIX:
            if path.parent not in self._index:
                self._index[path.parent] = _torch_dist_places(path.parent)
            return self._index[path.parent].get(path.name, ())
        return ()


def _torch_dist_places(folder: Path) -> Mapping[str, _Places]:
    """Places by the name of each file. A saved tensor is a little longer than its data."""
    from megatron.bridge.formats.torch_dist.metadata import read_metadata

    found: dict[str, list[tuple[str, int, int]]] = defaultdict(list)
    for chunk in read_metadata(folder).chunks:
        found[chunk.file].append((chunk.key, chunk.offset, chunk.offset + chunk.length))
    return {name: sorted(places, key=lambda place: place[1]) for name, places in found.items()}
