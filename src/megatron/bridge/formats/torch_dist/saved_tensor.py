"""The form in which torch_dist stores a tensor: the zip file that torch.save would make of it.

It is made here so that data go straight to their place in an output file, and so that its length is
known before the data are. It equals what torch.save writes byte for byte, but for one record that
is left out because no reader needs it: `.data/serialization_id`, a hash of the others.

Records are stored, not compressed. Each begins at a multiple of 64 bytes: its local header is
padded by an extra field "FB". Checksums and sizes follow the records, as in a stream.

Data that are a range of another file, byte for byte, are not looked at: their CRC-32 is left 0, as
torch.save leaves it where it is told to (`torch.serialization.set_crc32_options`). torch.load looks
at none. Such data may lie transposed, which the strides in the pickle say.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count
from math import prod
from struct import Struct
from typing import NamedTuple

from isal.isal_zlib import crc32

from megatron.bridge.dtypes import TORCH_NAME_OF, itemsize
from megatron.bridge.engine.pieces import FillTensor
from megatron.bridge.errors import CheckpointError
from megatron.bridge.formats.torch_dist.pickle_codes import integer, integers
from megatron.bridge.tensors.arrays import array_over
from megatron.bridge.tensors.boxes import Box, Shape, box_shape

MAX_FRAME_BYTES = 4096
"""No saved tensor is longer than its data by more than this."""

MAX_BLOB_BYTES = (1 << 32) - 2
"""Longer ones need records of 64-bit sizes, which are not written here."""

STORAGES = {
    "BOOL": "BoolStorage",
    "U8": "ByteStorage",
    "I8": "CharStorage",
    "I16": "ShortStorage",
    "I32": "IntStorage",
    "I64": "LongStorage",
    "F16": "HalfStorage",
    "BF16": "BFloat16Storage",
    "F32": "FloatStorage",
    "F64": "DoubleStorage",
    "C64": "ComplexFloatStorage",
}
"""The storage class by the dtype; other dtypes are saved by name, over an UntypedStorage."""

_ROOT = "archive"
_ALIGNMENT = 64
_PROTOCOL = 2
_MAX_AXES = 64

_LOCAL = Struct("<4s5H3L2H")
_DESCRIPTOR = Struct("<4s3L")
_ENTRY = Struct("<4s6H3L5H2L")
_END_64 = Struct("<4sQ2H2L4Q")
_LOCATOR_64 = Struct("<4sLQL")
_END = Struct("<4s4H2LH")
_CRC = Struct("<L")
_CRC_IN_DESCRIPTOR, _CRC_IN_ENTRY = 4, 16
_UTF8, _SIZES_FOLLOW = 1 << 11, 1 << 3


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A box of a tensor in this form: a Part of an output file.

    Raises:
        CheckpointError: the dtype is unknown, or the box has 4 GiB.
    """

    name: str
    box: Box
    dtype: str
    _frame: Frame = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_frame", frame_of(self.dtype, box_shape(self.box)))

    @property
    def nbytes(self) -> int:
        return self._frame.nbytes

    @property
    def tensor_bytes(self) -> int:
        return self._frame.tensor_bytes

    def write_to(self, out: memoryview, fill: FillTensor) -> None:
        frame = self._frame
        begin = len(frame.head)
        end = begin + frame.tensor_bytes
        data = out[begin:end]
        if data:
            fill(self.name, self.box, array_over(data, box_shape(self.box), self.dtype))
        out[:begin] = frame.head
        out[end:] = frame.tail(crc32(data))


class Frame(NamedTuple):
    """Everything of a saved tensor but its data.

    Attributes:
        head: what lies before the data.
        tensor_bytes: length of the data.
        tail_without_crc: what lies behind the data, but for their checksum.
        crc_places: where the CRC-32 of the data goes in `tail_without_crc`.
    """

    head: bytes
    tensor_bytes: int
    tail_without_crc: bytes
    crc_places: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Length of the whole saved tensor."""
        return len(self.head) + self.tensor_bytes + len(self.tail_without_crc)

    def tail(self, crc: int) -> bytes:
        """What lies behind data of this CRC-32."""
        tail = bytearray(self.tail_without_crc)
        for place in self.crc_places:
            _CRC.pack_into(tail, place, crc)
        return bytes(tail)

    def is_tail(self, found: bytes) -> bool:
        """Whether these bytes lie behind data of any CRC-32."""
        if not self.crc_places or len(found) != len(self.tail_without_crc):
            return found == self.tail_without_crc
        [crc] = _CRC.unpack_from(found, self.crc_places[0])
        return found == self.tail(crc)


@dataclass(frozen=True, slots=True)
class SavedHead:
    """A Part: what lies before the data of a saved tensor, and a gap before that.

    Attributes:
        gap: bytes between this saved tensor and what lies before it in the file, so that the data
            begin where they should; all are 0.
        dtype: see `frame_of`; and so for the others.
    """

    gap: int
    dtype: str
    shape: Shape
    transposed: bool

    @property
    def nbytes(self) -> int:
        return self.gap + len(frame_of(self.dtype, self.shape, self.transposed).head)

    @property
    def tensor_bytes(self) -> int:
        return 0

    def write_to(self, out: memoryview, fill: FillTensor) -> None:
        out[: self.gap] = bytes(self.gap)
        out[self.gap :] = frame_of(self.dtype, self.shape, self.transposed).head


@dataclass(frozen=True, slots=True)
class SavedTail:
    """A Part: what lies behind the data of a saved tensor, whose checksum is not taken."""

    dtype: str
    shape: Shape
    transposed: bool

    @property
    def nbytes(self) -> int:
        return len(frame_of(self.dtype, self.shape, self.transposed).tail_without_crc)

    @property
    def tensor_bytes(self) -> int:
        return 0

    def write_to(self, out: memoryview, fill: FillTensor) -> None:
        out[:] = frame_of(self.dtype, self.shape, self.transposed).tail_without_crc


@lru_cache(maxsize=4096)
def frame_of(dtype: str, shape: Shape, transposed: bool = False) -> Frame:
    """The frame of a tensor.

    Args:
        dtype: of the tensor.
        shape: of the tensor.
        transposed: whether the data are in the order of the tensor with its last two axes swapped.

    Raises:
        CheckpointError: the dtype is unknown, or the data have 4 GiB.
    """
    if len(shape) > _MAX_AXES:
        raise CheckpointError(f"a tensor of {len(shape)} axes cannot be saved")
    nbytes = prod(shape) * itemsize(dtype)
    if nbytes > MAX_BLOB_BYTES - MAX_FRAME_BYTES:
        raise CheckpointError(
            f"{dtype} of shape {shape}: {nbytes} bytes are too many for one saved tensor; "
            "store it in pieces of less than 4 GiB"
        )
    return _Archive(_pickled(dtype, shape, _strides(shape, transposed))).framed("data/0", nbytes)


def saved_object(value: object) -> bytes:
    """What torch.save makes of an object without tensors, but for the record that is left out."""
    return _Archive(pickle.dumps(value, protocol=_PROTOCOL)).without_data()


class _Archive:
    """A zip file that grows record by record; it begins with a pickle."""

    def __init__(self, pickled: bytes) -> None:
        self._records = bytearray()
        self._directory = bytearray()
        self._count = 0
        self._left_out = 0
        self._add("data.pkl", pickled)
        self._add(".format_version", b"1")
        self._add(".storage_alignment", str(_ALIGNMENT).encode())
        self._add("byteorder", b"little")

    @property
    def _position(self) -> int:
        return len(self._records) + self._left_out

    def _add(self, name: str, content: bytes) -> None:
        self._begin(name, len(content), crc32(content))
        self._records += content
        self._end(len(content), crc32(content))

    def framed(self, name: str, nbytes: int) -> Frame:
        """Complete it with a record of `nbytes` bytes whose content is to be filled in."""
        crc_in_entry = len(self._directory) + _CRC_IN_ENTRY
        self._begin(name, nbytes, 0)
        head = bytes(self._records)
        self._left_out = nbytes
        self._end(nbytes, 0)
        directory = self._finish()
        tail = bytes(self._records[len(head) :])
        places = (_CRC_IN_DESCRIPTOR, directory - len(head) - nbytes + crc_in_entry)
        return Frame(head, nbytes, tail, places if nbytes else ())

    def _begin(self, name: str, nbytes: int, crc: int) -> None:
        path = f"{_ROOT}/{name}".encode()
        flags = _UTF8 | (_SIZES_FOLLOW if nbytes else 0)
        begin = self._position
        self._directory += _ENTRY.pack(
            b"PK\1\2", 0, 0, flags, 0, 0, 0, crc, nbytes, nbytes, len(path), 0, 0, 0, 0, 0, begin
        )
        self._directory += path
        self._count += 1
        padding = -(begin + _LOCAL.size + len(path) + 4) % _ALIGNMENT
        self._records += _LOCAL.pack(b"PK\3\4", 0, flags, 0, 0, 0, 0, 0, 0, len(path), 4 + padding)
        self._records += path + b"FB" + padding.to_bytes(2, "little") + b"Z" * padding

    def _end(self, nbytes: int, crc: int) -> None:
        if nbytes:
            self._records += _DESCRIPTOR.pack(b"PK\7\10", crc, nbytes, nbytes)

    def without_data(self) -> bytes:
        """Complete it as it is."""
        self._finish()
        return bytes(self._records)

    def _finish(self) -> int:
        """Append the last record, the directory and its ends: of 64 bits, a locator, of 32 bits.

        Returns where the directory begins.
        """
        self._add("version", b"3\n")
        begin, length, entries = self._position, len(self._directory), self._count
        self._records += self._directory
        end_64 = self._position
        self._records += _END_64.pack(
            b"PK\6\6", _END_64.size - 12, 0x031E, 45, 0, 0, entries, entries, length, begin
        )
        self._records += _LOCATOR_64.pack(b"PK\6\7", 0, end_64, 1)
        self._records += _END.pack(b"PK\5\6", 0, 0, entries, entries, length, begin, 0)
        return begin


def _strides(shape: Shape, transposed: bool) -> tuple[int, ...]:
    if transposed:
        *outer, inner, last = _strides((*shape[:-2], shape[-1], shape[-2]), False)
        return (*outer, last, inner)
    return tuple(prod(max(1, size) for size in shape[axis:]) for axis in range(1, len(shape) + 1))


def _pickled(dtype: str, shape: Shape, strides: tuple[int, ...]) -> bytes:
    """How torch.save pickles a tensor of the CPU, without its data.

    The pickler notes every object under the next number, for a second mention that there is not.
    """
    numbers = count()

    def noted(code: bytes) -> bytes:
        return code + b"q" + bytes([next(numbers)])

    def name(module: str, name: str) -> bytes:
        return noted(f"c{module}\n{name}\n".encode())

    def text(word: str) -> bytes:
        return noted(b"X" + len(word).to_bytes(4, "little") + word.encode())

    def sizes(of: Shape) -> bytes:
        return noted(integers(of)) if of else integers(of)

    storage = STORAGES.get(dtype)
    version, kind, length = (
        ("v2", ("torch", storage), prod(shape))
        if storage
        else ("v3", ("torch.storage", "UntypedStorage"), prod(shape) * itemsize(dtype))
    )
    return b"".join(
        (
            b"\x80\x02" + name("torch._utils", f"_rebuild_tensor_{version}"),
            b"((" + text("storage") + name(*kind) + text("0") + text("cpu"),
            noted(integer(length) + b"t") + b"Q",
            integer(0) + sizes(shape) + sizes(strides) + b"\x89",
            noted(name("collections", "OrderedDict") + b")R"),
            b"" if storage else name("torch", TORCH_NAME_OF[dtype]),
            noted(noted(b"t") + b"R") + b".",
        )
    )
