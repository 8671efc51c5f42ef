"""torch_dist files: laid out by us and read by PyTorch, saved by PyTorch and read by us."""

import io
import json
import pickle
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import checkpoint as dcp

from megatron.bridge.dtypes import safetensors_dtype, torch_dtype
from megatron.bridge.engine.pieces import OutputFile
from megatron.bridge.errors import CheckpointError, InputError
from megatron.bridge.formats.torch_dist.file_layout import COMMON_STATE, torch_dist_files
from megatron.bridge.formats.torch_dist.reader import TorchDistCheckpoint
from megatron.bridge.formats.torch_dist.saved_tensor import MAX_FRAME_BYTES, frame_of
from megatron.bridge.tensors.arrays import Array, empty
from megatron.bridge.tensors.boxes import Box, box_shape, full_box, slices
from megatron.bridge.tensors.spec import TensorSpec
from megatron.bridge.tensors.torch_views import as_array
from tensors_in_memory import put
from written_pieces import content_of

PIECE = MAX_FRAME_BYTES + 600
MAX_FILE = 5 * PIECE


def numbers(shape: tuple[int, ...], dtype: torch.dtype, first: int) -> torch.Tensor:
    count = int(torch.Size(shape).numel())
    return torch.arange(first, first + count).remainder(251).to(dtype).view(shape)


TENSORS = {
    "experts.weight": numbers((3, 2, 17, 40), torch.bfloat16, 1),
    "embedding.weight": numbers((130, 24), torch.float32, 2),
    "norm.weight": numbers((29,), torch.float32, 3),
    "row.weight": numbers((2, 700), torch.int64, 4),
    "scale": numbers((), torch.float64, 5),
    "mask": numbers((5, 7), torch.bool, 6),
    "counts": numbers((9, 4), torch.uint16, 7),
    "bytes": numbers((11, 101), torch.uint8, 8),
}
SPECS = {
    key: TensorSpec(key, tuple(tensor.shape), safetensors_dtype(tensor.dtype))
    for key, tensor in TENSORS.items()
}
STATES = ("decoder.layers.0._extra_state/shard_0_1", "decoder.layers.1._extra_state/shard_0_1")


def chunks_of_parameters() -> Iterator[tuple[str, Box]]:
    """One box per parameter: an expert of a layer, half of the embedding, and whole tensors."""
    for key, spec in SPECS.items():
        if key == "experts.weight":
            for layer in range(3):
                for expert in range(2):
                    yield key, ((layer, layer + 1), (expert, expert + 1), (0, 17), (0, 40))
        elif key == "embedding.weight":
            yield key, ((0, 61), (0, 24))
            yield key, ((61, 130), (0, 24))
        else:
            yield key, full_box(spec.shape)


def files_of(**changes: Any) -> tuple[OutputFile, ...]:
    settings = {"max_file_bytes": MAX_FILE, "piece_bytes": PIECE, "iteration": 12}
    return torch_dist_files(
        SPECS, [chunks_of_parameters()], extra_states=STATES, **{**settings, **changes}
    )


def fill(key: str, box: Box, out: Array) -> None:
    put(TENSORS[key][slices(box)], out)


def write(file: OutputFile, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content_of(file.parts, fill))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as `torch_dist_files` lays it out."""
    folder = tmp_path_factory.mktemp("ours")
    for file in files_of():
        write(file, folder / file.name)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tensors as PyTorch saves them, some of them views of larger ones."""
    folder = tmp_path_factory.mktemp("saved")
    state = dict(TENSORS)
    state["norm.weight"] = torch.cat([state["norm.weight"], torch.ones(4)])[:29]
    state["experts.weight"] = torch.stack([state["experts.weight"]] * 2)[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({**state, "object": {"a": 1}}, checkpoint_id=folder, no_dist=True)
    return folder


def test_pytorch_loads_it(folder: Path) -> None:
    state = {key: torch.full_like(tensor, 99) for key, tensor in TENSORS.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=folder, no_dist=True)
    for key, tensor in TENSORS.items():
        assert torch.equal(state[key], tensor), key


def test_objects(folder: Path) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    found = {}
    for index, info in metadata.storage_data.items():
        if index.fqn not in SPECS:
            data = (folder / info.relative_path).read_bytes()[info.offset :][: info.length]
            found[index.fqn] = torch.load(io.BytesIO(data), weights_only=True)
    common = {"checkpoint_version": 3.0, "iteration": 12}
    assert found == {STATES[0]: [None], STATES[1]: [None], COMMON_STATE: [common]}
    assert json.loads((folder / "metadata.json").read_text())["sharded_backend"] == "torch_dist"


def test_no_part_is_longer_than_a_piece_and_no_file_than_its_limit() -> None:
    *files, backend, index = files_of()
    assert len(files) > 4
    assert [file.name for file in files] == [f"__0_{n}.distcp" for n in range(len(files))]
    assert (backend.name, index.name) == ("metadata.json", ".metadata")
    parts = [part for file in files for part in file.parts]
    assert max(part.nbytes for part in parts) <= PIECE
    assert max(file.nbytes for file in files) <= MAX_FILE
    assert min(file.nbytes for file in files) > MAX_FILE // 3  # filled evenly
    assert sum(part.tensor_bytes for part in parts) == sum(s.nbytes for s in SPECS.values())


@pytest.mark.parametrize("max_file_bytes", [1, PIECE, 2 * PIECE, 3 * PIECE, 1 << 30])
def test_any_limit(max_file_bytes: int, tmp_path: Path) -> None:
    files = files_of(max_file_bytes=max_file_bytes)
    assert max(file.nbytes for file in files[:-2]) <= max(max_file_bytes, 2 * PIECE)
    assert all(file.parts for file in files)
    assert (len(files) == 3) == (max_file_bytes == 1 << 30)
    for file in files:
        write(file, tmp_path / file.name)
    assert_all_read(TorchDistCheckpoint(tmp_path))


def test_the_index_is_of_the_files(folder: Path) -> None:
    """What it says of offsets and lengths fills every file without a gap."""
    sizes: dict[str, int] = {}
    places = list(pickle.loads((folder / ".metadata").read_bytes()).storage_data.values())
    for place in sorted(places, key=lambda place: (place.relative_path, place.offset)):
        assert sizes.get(place.relative_path, 0) == place.offset
        sizes[place.relative_path] = place.offset + place.length
    assert sizes == {path.name: path.stat().st_size for path in folder.glob("*.distcp")}


def test_in_a_folder() -> None:
    plain, inside = files_of(), files_of(folder="a/iter_0000012")
    assert [f"a/iter_0000012/{file.name}" for file in plain] == [file.name for file in inside]


def test_the_same_bytes_whatever_objects_are_given() -> None:
    """Pickles tell objects by identity: strings and sizes of the caller must not show."""
    files = files_of()
    specs = {
        str(key.encode(), "ascii"): TensorSpec(key, (*spec.shape,), spec.dtype)
        for key, spec in SPECS.items()
    }
    chunks = [(str(key.encode(), "ascii"), box) for key, box in chunks_of_parameters()]
    interned = [(sys.intern(key), box) for key, box in chunks_of_parameters()]
    for given_chunks in (chunks, interned):
        again = torch_dist_files(
            specs,
            [given_chunks],
            max_file_bytes=MAX_FILE,
            piece_bytes=PIECE,
            extra_states=[str(state.encode(), "ascii") for state in STATES],
            iteration=12,
        )
        assert again == files


def test_pieces_without_room() -> None:
    with pytest.raises(InputError, match="pieces of 4096 bytes have no room for data"):
        files_of(piece_bytes=MAX_FRAME_BYTES)


def assert_all_read(checkpoint: TorchDistCheckpoint) -> None:
    assert checkpoint.tensors == SPECS
    for key, tensor in TENSORS.items():
        assert torch.equal(checkpoint.read(key, full_box(tensor.shape)), tensor), key


def test_all_is_read(folder: Path, saved: Path) -> None:
    for where in (folder, saved):
        checkpoint = TorchDistCheckpoint(where)
        assert_all_read(checkpoint)
        assert set(checkpoint.data_files) == set(where.glob("*.distcp"))
        assert checkpoint.metadata_file == where / ".metadata"
        checkpoint.close()
        assert_all_read(checkpoint)


@st.composite
def boxes(draw: st.DrawFn) -> tuple[str, Box, tuple[int, ...]]:
    """A tensor, a box of it that may be empty, and an order of the axes."""
    key = draw(st.sampled_from(list(SPECS)))
    bounds = [sorted(draw(st.tuples(*[st.integers(0, n)] * 2))) for n in SPECS[key].shape]
    return key, tuple((a, b) for a, b in bounds), tuple(draw(st.permutations(range(len(bounds)))))


@given(boxes(), st.booleans())
@settings(deadline=None)
def test_any_box_into_any_memory(
    folder: Path, saved: Path, chosen: tuple[str, Box, tuple[int, ...]], by_pytorch: bool
) -> None:
    key, box, order = chosen
    checkpoint = TorchDistCheckpoint(saved if by_pytorch else folder)
    shape = box_shape(box)
    # Axes in another order, and every second element of the last one: a view of larger memory.
    dtype = torch_dtype(SPECS[key].dtype)
    memory = torch.zeros(*(shape[axis] for axis in order), 2, dtype=dtype)
    out = memory[..., 0].permute([order.index(axis) for axis in range(len(order))])
    checkpoint.read_into(key, box, as_array(out))
    assert torch.equal(out, TENSORS[key][slices(box)])
    assert not memory[..., 1].any()
    assert torch.equal(checkpoint.read(key, box), TENSORS[key][slices(box)])


def test_many_threads(folder: Path) -> None:
    checkpoint = TorchDistCheckpoint(folder)

    def rows(row: int) -> bool:
        box = ((row, row + 1), (3, 21))
        return torch.equal(
            checkpoint.read("embedding.weight", box), TENSORS["embedding.weight"][slices(box)]
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(rows, [row for _ in range(20) for row in range(130)]))


@pytest.mark.parametrize(
    ("key", "box", "out", "message"),
    [
        ("nothing", ((0, 1),), empty((1,), "F32"), "there is no tensor 'nothing'"),
        ("norm.weight", ((0, 30),), empty((30,), "F32"), r"does not fit into shape \(29,\)"),
        ("norm.weight", ((-1, 3),), empty((4,), "F32"), r"does not fit into shape \(29,\)"),
        ("norm.weight", ((4, 3),), empty((0,), "F32"), r"does not fit into shape \(29,\)"),
        ("norm.weight", ((0, 3), (0, 1)), empty((3, 1), "F32"), r"does not fit into shape \(29,\)"),
        ("norm.weight", ((2, 5),), empty((4,), "F32"), r"does not fill \(4,\)"),
        ("norm.weight", ((2, 5),), empty((3,), "BF16"), r"\(3,\), bfloat16"),
    ],
)
def test_what_does_not_fit(folder: Path, key: str, box: Box, out: Array, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        TorchDistCheckpoint(folder).read_into(key, box, out)


def test_dtype_of(folder: Path) -> None:
    assert TorchDistCheckpoint(folder).dtype_of("experts.weight") == "BF16"
    with pytest.raises(CheckpointError, match=r"there is no tensor .expert\.weight."):
        TorchDistCheckpoint(folder).dtype_of("expert.weight")


def bytes_read() -> int:
    """By this process, from files that are in memory or not."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_only_the_box_is_read(tmp_path: Path) -> None:
    """A row of a chunk of 64 MiB; the file is a hole but for that row."""
    shape, row = (1 << 15, 1 << 10), (1 << 15) - 7
    data, *index = torch_dist_files(
        {"a": TensorSpec("a", shape, "BF16")},
        [[("a", full_box(shape))]],
        max_file_bytes=1 << 30,
        piece_bytes=1 << 28,
    )
    frame = frame_of("BF16", shape)
    expected = numbers((1, shape[1]), torch.bfloat16, 9)
    with (tmp_path / data.name).open("wb") as file:
        file.write(frame.head)
        file.seek(len(frame.head) + row * shape[1] * 2)
        file.write(expected.view(torch.uint8).numpy().tobytes())
        file.seek(len(frame.head) + frame.tensor_bytes)
        file.write(frame.tail(0))
        file.truncate(data.nbytes)
    for file_of_index in index:
        write(file_of_index, tmp_path / file_of_index.name)
    checkpoint = TorchDistCheckpoint(tmp_path)
    before = bytes_read()
    found = checkpoint.read("a", ((row, row + 1), (0, shape[1])))
    assert bytes_read() - before < 10_000
    assert torch.equal(found, expected)


def test_the_index_is_what_pytorch_unpickles(folder: Path) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    assert metadata.storage_meta is not None
    for key, spec in SPECS.items():
        entry = metadata.state_dict_metadata[key]
        assert (tuple(entry.size), entry.properties.dtype) == (spec.shape, torch_dtype(spec.dtype))
