"""Saved tensors: byte for byte what torch.save writes, and found again whoever wrote them."""

import io
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.bridge.dtypes import DTYPE_NAMES, itemsize, torch_dtype
from megatron.bridge.errors import CheckpointError
from megatron.bridge.formats.torch_dist.saved_tensor import (
    MAX_FRAME_BYTES,
    SavedTensor,
    frame_of,
    saved_object,
)
from megatron.bridge.formats.torch_dist.saved_tensor_reader import FoundTensor, find_saved_tensor
from megatron.bridge.tensors.arrays import Array
from megatron.bridge.tensors.boxes import full_box
from tensors_in_memory import put

SHAPES = [(), (7,), (2, 3), (5, 1, 11), (1, 300, 233), (0, 3), (4, 0), (70000,)]


def tensor_of(dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    count = prod(shape) * itemsize(dtype)
    numbers = torch.arange(1, count + 1, dtype=torch.int64) * 37 % (2 if dtype == "BOOL" else 113)
    return numbers.to(torch.uint8).view(torch_dtype(dtype)).view(shape)


def torch_saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def our_saved(tensor: torch.Tensor, dtype: str) -> bytes:
    def fill(name: str, box: object, out: Array) -> None:
        assert (name, box) == (part.name, part.box)
        assert out.flags.c_contiguous
        put(tensor, out)

    part = SavedTensor("a.weight", full_box(tensor.shape), dtype)
    out = bytearray(b"\xee" * part.nbytes)
    part.write_to(memoryview(out), fill)
    return bytes(out)


def find(blob: bytes, dtype: str = "BF16", shape: tuple[int, ...] = (2, 3)) -> FoundTensor:
    return find_saved_tensor(lambda at, count: blob[at : at + count], len(blob), dtype, shape)


def data_at(blob: bytes, found: FoundTensor) -> bytes:
    nbytes = prod(found.shape) * itemsize(found.dtype)
    assert found.offset + nbytes <= len(blob)
    return blob[found.offset : found.offset + nbytes]


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_what_torch_save_writes(dtype: str, shape: tuple[int, ...]) -> None:
    """Up to its last record, `.data/serialization_id`; so the directory has one entry less."""
    tensor = tensor_of(dtype, shape)
    ours, stock = our_saved(tensor, dtype), torch_saved(tensor)
    left_out = stock.index(b"archive/.data/serialization_id")
    begin_of_record = stock.rindex(b"PK\3\4", 0, left_out)
    assert ours[:begin_of_record] == stock[:begin_of_record]
    left_out = stock.rindex(b"archive/.data/serialization_id")
    directory = stock[stock.index(b"PK\1\2") : stock.rindex(b"PK\1\2", 0, left_out)]
    assert ours[begin_of_record : ours.index(b"PK\6\6")] == directory


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_torch_and_zip_read_it(dtype: str, shape: tuple[int, ...]) -> None:
    tensor = tensor_of(dtype, shape)
    ours = our_saved(tensor, dtype)
    found = torch.load(io.BytesIO(ours), weights_only=True)
    assert (found.dtype, found.shape, found.stride()) == (tensor.dtype, shape, tensor.stride())
    assert bytes_of(found) == bytes_of(tensor)
    with zipfile.ZipFile(io.BytesIO(ours)) as archive:
        assert archive.testzip() is None
        assert archive.read("archive/data/0") == bytes_of(tensor)


def test_lengths_are_known_without_data() -> None:
    part = SavedTensor("a", ((4, 9), (0, 3)), "F32")
    assert part.tensor_bytes == 60
    assert part.nbytes == len(our_saved(torch.zeros(5, 3), "F32"))
    longest = frame_of("F8_E4M3FNUZ", tuple([1] * 60 + [70001, 1, 3, 1]))
    assert longest.nbytes - longest.tensor_bytes < MAX_FRAME_BYTES


def test_data_are_aligned() -> None:
    for dtype in DTYPE_NAMES:
        assert len(frame_of(dtype, (3, 5)).head) % 64 == 0


def test_what_cannot_be_saved() -> None:
    with pytest.raises(CheckpointError, match=r"F32 of shape \(65536, 16384\).*less than 4 GiB"):
        SavedTensor("a", ((0, 65536), (0, 16384)), "F32")
    with pytest.raises(CheckpointError, match="dtype 'F4' is not supported"):
        SavedTensor("a", ((0, 3),), "F4")


@pytest.mark.parametrize(
    "shape",
    [
        (255, 257),
        (256, 256),
        (1, 2, 3, 4, 5),
        (0, 1 << 16),
        (1 << 33, 0, 7),
        (0, 1 << 40, 3),
        (0,) * 9,
    ],
    ids=str,
)
def test_the_pickle_is_that_of_torch_save(shape: tuple[int, ...]) -> None:
    """Sizes and strides of every length, and lengths of up to 2**18."""
    for dtype in DTYPE_NAMES:
        tensor = torch.empty(shape, dtype=torch_dtype(dtype))
        ours, stock = frame_of(dtype, shape), zipfile.ZipFile(io.BytesIO(torch_saved(tensor)))
        assert stock.read("archive/data.pkl") in ours.head + ours.tail_without_crc, dtype


@pytest.mark.parametrize(
    "value",
    [
        [{"iteration": 3}],
        [None],
        [{"checkpoint_version": 3.0, "iteration": 1 << 40}],
        [{"größe": [-7, 2.5, True, "x" * 300], "empty": [{}, (), "", None]}],
        ["again", "again", ("again", ["again"])],
    ],
    ids=str,
)
def test_an_object(value: object) -> None:
    ours, stock = saved_object(value), torch_saved(value)
    assert torch.load(io.BytesIO(ours), weights_only=True) == value
    with zipfile.ZipFile(io.BytesIO(ours)) as archive:
        assert archive.testzip() is None
    left_out = stock.index(b"archive/.data/serialization_id")
    begin_of_record = stock.rindex(b"PK\3\4", 0, left_out)
    assert ours[:begin_of_record] == stock[:begin_of_record]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_found_whoever_wrote_it_and_whatever_was_expected(
    dtype: str, shape: tuple[int, ...]
) -> None:
    tensor = tensor_of(dtype, shape)
    for blob in (our_saved(tensor, dtype), torch_saved(tensor)):
        for expected in ((dtype, shape), ("F64", (3, 2))):
            found = find(blob, *expected)
            assert (found.dtype, found.shape) == (dtype, shape)
            assert data_at(blob, found) == bytes_of(tensor)


def test_found_without_parsing_if_it_is_as_expected() -> None:
    """The fast way compares all bytes around the data, and the CRC-32 must be the same twice."""
    blob = our_saved(tensor_of("BF16", (2, 3)), "BF16")
    data = find(blob)

    def reads_of(blob: bytes) -> list[int]:
        reads: list[int] = []

        def read_at(at: int, count: int) -> bytes:
            reads.append(count)
            return blob[at : at + count]

        assert find_saved_tensor(read_at, len(blob), "BF16", (2, 3)) == data
        return reads

    assert len(reads_of(blob)) == 2
    assert sum(reads_of(blob)) == len(blob) - 12
    padding = data.offset - 1
    crc = data.offset + 12 + 4
    crc_of_version = blob.index(b"3\nPK") + 2 + 4
    crc_in_directory = blob.rindex(b"archive/data/0") - 46 + 16
    for place in (padding, crc, crc_of_version, crc_in_directory):
        assert len(reads_of(blob[:place] + b"\0" + blob[place + 1 :])) > 4, place


def test_a_part_of_a_longer_storage() -> None:
    whole = tensor_of("BF16", (6, 5))
    for part in (whole[2:4], whole[5, 4], whole[3:3], whole[1:2].view(5, 1)):
        blob = torch_saved(part)
        found = find(blob)
        assert found.shape == tuple(part.shape)
        assert data_at(blob, found) == bytes_of(part)


def rezipped(
    blob: bytes,
    change: Callable[[dict[str, bytes]], None] = lambda records: None,
    compression: int = zipfile.ZIP_STORED,
    force_zip64: bool = False,
) -> bytes:
    with zipfile.ZipFile(io.BytesIO(blob)) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    change(records)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in records.items():
            with archive.open(name, "w", force_zip64=force_zip64) as record:
                record.write(content)
    return buffer.getvalue()


@pytest.mark.parametrize("force_zip64", [False, True])
def test_a_zip_file_of_another_writer(force_zip64: bool) -> None:
    tensor = tensor_of("F32", (4, 3))

    def forget_the_order(records: dict[str, bytes]) -> None:
        del records["archive/byteorder"]

    blob = rezipped(torch_saved(tensor), forget_the_order, force_zip64=force_zip64)
    found = find(blob, "F32", (4, 3))
    assert data_at(blob, found) == bytes_of(tensor)


def refusal(blob: bytes) -> str:
    with pytest.raises(CheckpointError) as error:
        find(blob)
    return str(error.value)


def test_compressed() -> None:
    blob = rezipped(torch_saved(tensor_of("BF16", (2, 3))), compression=zipfile.ZIP_DEFLATED)
    assert "compressed" in refusal(blob)


def test_big_endian() -> None:
    blob = rezipped(
        torch_saved(tensor_of("BF16", (2, 3))),
        lambda records: records.update({"archive/byteorder": b"big"}),
    )
    assert "byte order is b'big'" in refusal(blob)


@pytest.mark.parametrize("cut", [0, 11, 13, 400])
def test_more_or_less_data_than_the_pickle_says(cut: int) -> None:
    blob = rezipped(
        torch_saved(tensor_of("BF16", (2, 3))),
        lambda records: records.update({"archive/data/0": bytes(cut)}),
    )
    assert f"its data should be 12 bytes, the record has {cut}" in refusal(blob)


@pytest.mark.parametrize("missing", ["data.pkl", "data/0"])
def test_a_missing_record(missing: str) -> None:
    blob = rezipped(
        torch_saved(tensor_of("BF16", (2, 3))), lambda records: records.pop(f"archive/{missing}")
    )
    assert f"no record archive/{missing}" in refusal(blob)


def test_two_records_of_one_name() -> None:
    buffer = io.BytesIO(torch_saved(tensor_of("BF16", (2, 3))))
    with zipfile.ZipFile(buffer, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("archive/data/0", bytes(12))
    assert "two records have one name" in refusal(buffer.getvalue())


def test_data_that_lie_elsewhere_than_the_directory_says() -> None:
    blob = torch_saved(tensor_of("BF16", (2, 3)))
    entry = blob.rindex(b"archive/data/0") - 4
    [place] = struct.unpack_from("<L", blob, entry)
    for wrong in (0, place + 1, len(blob) - 20, len(blob) + 50, 0xFFFFFFFE):
        assert refusal(blob[:entry] + struct.pack("<L", wrong) + blob[entry + 4 :])


def test_a_padding_that_pushes_the_data_out() -> None:
    blob = bytearray(torch_saved(tensor_of("BF16", (2, 3))))
    header = blob.index(b"archive/data/0") - 30
    struct.pack_into("<H", blob, header + 28, 0xFFF0)
    assert "sticks out" in refusal(bytes(blob))


def test_a_directory_of_gigabytes_is_not_read() -> None:
    length, directory = 4 << 30, 3 << 30
    blob = torch_saved(tensor_of("BF16", (2, 3)))
    begin, end_64 = length - len(blob), blob.rindex(b"PK\6\6")
    blob = (
        blob[: end_64 + 40]
        + struct.pack("<2Q", directory, begin + end_64 - directory)
        + blob[end_64 + 56 :]
    )

    def read_at(at: int, count: int) -> bytes:
        assert at >= begin
        return blob[at - begin : at - begin + count]

    with pytest.raises(CheckpointError, match=f"a directory of {directory} bytes"):
        find_saved_tensor(read_at, length, "BF16", (2, 3))


def with_pickle(data: bytes) -> bytes:
    return rezipped(
        torch_saved(tensor_of("BF16", (2, 3))),
        lambda records: records.update({"archive/data.pkl": data}),
    )


class Runs:
    """Unpickling it makes a call."""

    def __init__(self, call: Callable[..., object], *arguments: object) -> None:
        self.call = (call, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("call", [eval, exec, __import__, getattr, print, torch.load])
def test_a_pickle_that_calls(call: Callable[..., object], capsys: Any) -> None:
    message = refusal(with_pickle(pickle.dumps(Runs(call, "raise SystemExit"), protocol=2)))
    assert "its pickle names" in message
    assert call.__name__ in message
    assert capsys.readouterr().out == ""


def test_a_pickle_that_sets_attributes() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.note = "a state, which needs BUILD"  # type: ignore[attr-defined]
    assert "_rebuild_parameter_with_state" in refusal(torch_saved(parameter))


def test_a_pickle_that_asks_for_memory() -> None:
    """Python's own reader in C takes 32 GiB for the last place of a memo."""
    program = with_pickle(b"\x80\x02)r\xff\xff\xff\x7f.")
    tracemalloc.start()
    try:
        message = refusal(program)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "no tensor but another object" in message
    assert peak < 1_000_000


def test_a_pickle_of_megabytes() -> None:
    assert "its data.pkl of 5000002 bytes is no tensor's" in refusal(
        with_pickle(b"\x80\x02" + b"N" * 5000000)
    )


@pytest.mark.parametrize(
    "value", [1, (), "x", torch.bfloat16, [torch.zeros(2)], {"a": torch.zeros(2)}, torch.Size([2])]
)
def test_another_object(value: object) -> None:
    assert refusal(torch_saved(value))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(3, 4)[:, 1:3],
        torch.zeros(3, 4)[:, 1:3].t(),
        torch.zeros(4).expand(3, 4),
        torch.zeros(3, 4, dtype=torch.uint16)[::2],
        torch.zeros(12).as_strided((3, 4), (1, 1)),
    ],
)
def test_strided(tensor: torch.Tensor) -> None:
    assert "whose elements lie one after the other" in refusal(torch_saved(tensor))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(3, 4).to_sparse(),
        torch.zeros(3, 4, device="meta"),
        torch.zeros(3, dtype=torch.complex64).conj(),
    ],
)
def test_a_tensor_that_is_not_plain(tensor: torch.Tensor) -> None:
    assert refusal(torch_saved(tensor))


def described(
    *, offset: object = 0, shape: object = (2, 3), strides: object = (3, 1), count: object = 6
) -> bytes:
    """A tensor's pickle with arguments of choice."""

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: object) -> object:
            if isinstance(value, Storage):
                return ("storage", torch.BFloat16Storage, "0", "cpu", count)
            return None

    from collections import OrderedDict

    from torch import _utils

    buffer = io.BytesIO()
    arguments = (Storage(), offset, shape, strides, False, OrderedDict())
    Pickler(buffer, protocol=2).dump(Runs(_utils._rebuild_tensor_v2, *arguments))
    return buffer.getvalue()


def test_arguments_that_are_right() -> None:
    assert find(with_pickle(described())).shape == (2, 3)
    assert find(with_pickle(described(shape=(1, 6), strides=(99, 1)))).shape == (1, 6)


@pytest.mark.parametrize(
    "wrong",
    [
        {"offset": 1},
        {"offset": -1},
        {"offset": "0"},
        {"offset": True},
        {"shape": (2, 4), "strides": (4, 1)},
        {"shape": (2, -3)},
        {"shape": (2,)},
        {"shape": (2.0, 3)},
        {"shape": 6},
        {"shape": (1 << 60, 3)},
        {"strides": (1, 3)},
        {"strides": (1, 1)},
        {"strides": (2, 1)},
        {"strides": (0, 0)},
        {"strides": (1,)},
        {"strides": (3, 1, 1)},
        {"count": 7},
        {"count": "6"},
        {"count": -6},
    ],
    ids=str,
)
def test_arguments_that_are_wrong(wrong: dict[str, object]) -> None:
    assert refusal(with_pickle(described(**wrong)))


BLOBS = [our_saved(tensor_of("F32", (4, 3)), "F32"), torch_saved(tensor_of("U16", (5, 2)))]


@given(st.sampled_from(BLOBS), st.data())
@settings(deadline=None)
def test_damaged_anywhere(blob: bytes, data: st.DataObject) -> None:
    """Cut, or with a few bytes changed: refused, or the data found lie inside."""
    changed = bytearray(blob[: data.draw(st.integers(0, len(blob)))])
    if len(changed) == len(blob) or data.draw(st.booleans()):
        changed = bytearray(blob)
        for _ in range(data.draw(st.integers(1, 3))):
            changed[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = find(bytes(changed), "F32", (4, 3))
    except CheckpointError:
        return
    data_at(bytes(changed), found)
