"""Chunks and their places in the pickle of an index, recognised as a whole.

A large model has a hundred thousand of each. Those that `metadata_writer` wrote are matched by one
expression each, and give what their operations one by one would give in a tenth of the time.
Anything else is left to the operations.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from megatron.bridge.formats.torch_dist.metadata_classes import CHUNK, INDEX, PLACE, SIZE
from megatron.bridge.formats.torch_dist.plain_pickle import Call, Plain

_REFERENCE = rb"(h.|j.{4})"
_NUMBER = rb"(?:K.|M..|J...[\0-\x7f]|\x8a(?:\x05.{4}|\x06.{5}|\x07.{6})[\0-\x7f])"
_SIZE = _REFERENCE + rb"(\)|(?:N)\x85|(?:N){2}\x86|(?:N){3}\x87|\((?:N)*t)\x85R".replace(
    b"N", _NUMBER
)
_CHUNK = _REFERENCE + rb"\)\x81\}\(" + (_REFERENCE + _SIZE) * 2 + b"ub"
_INDEX = _REFERENCE + rb"\)\x81\}\(" + _REFERENCE * 3 + b"N" + _REFERENCE + _SIZE + b"ub"
_PLACE = _REFERENCE + rb"\)\x81\}\(" + _REFERENCE * 2 + (_REFERENCE + b"(" + _NUMBER + b")") * 2
_CHUNKS = re.compile(_CHUNK, re.DOTALL)
_PLACES = re.compile(_INDEX + _PLACE + b"ub", re.DOTALL)

_CHUNK_NAMES = CHUNK, "offsets", SIZE, "sizes", SIZE
_PLACE_NAMES = INDEX, "fqn", "index", "offset", SIZE, PLACE, "relative_path", "offset", "length"


class MetadataRuns:
    """Takes runs of one form; used for one pickle.

    Args:
        data: the pickle.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._sizes: dict[bytes, Call] = {}

    def __call__(self, position: int, noted: Mapping[int, Plain], stack: list[Plain]) -> int:
        """Put the objects of a run on the stack.

        Args:
            position: where the run may begin.
            noted: what was mentioned before, by number.
            stack: of the machine that reads the pickle.

        Returns:
            Where the first operation lies that was not taken.
        """
        end = self._take_chunks(position, noted, stack)
        return end if end != position else self._take_places(position, noted, stack)

    def _take_chunks(self, position: int, noted: Mapping[int, Plain], stack: list[Plain]) -> int:
        names: tuple[bytes, ...] | None = None
        while match := _CHUNKS.match(self._data, position):
            name, first, size, offsets, second, too, sizes = match.groups()
            if names != (name, first, size, second, too):
                names = name, first, size, second, too
                if tuple(_referred(names, noted)) != _CHUNK_NAMES:
                    break
            chunk = Call(CHUNK, ())
            chunk.state = {"offsets": self._size(offsets), "sizes": self._size(sizes)}
            stack.append(chunk)
            position = match.end()
        return position

    def _take_places(self, position: int, noted: Mapping[int, Plain], stack: list[Plain]) -> int:
        names: tuple[bytes, ...] | None = None
        while match := _PLACES.match(self._data, position):
            index, a, key, b, c, size, offsets, place, d, file, e, offset, f, length = (
                match.groups()
            )
            if names != (index, a, b, c, size, place, d, e, f):
                names = index, a, b, c, size, place, d, e, f
                if tuple(_referred(names, noted)) != _PLACE_NAMES:
                    break
            fqn, path = _referred((key, file), noted)
            where = Call(INDEX, ())
            where.state = {"fqn": fqn, "index": None, "offset": self._size(offsets)}
            what = Call(PLACE, ())
            what.state = {
                "relative_path": path,
                "offset": _number(offset),
                "length": _number(length),
            }
            stack += where, what
            position = match.end()
        return position

    def _size(self, numbers: bytes) -> Call:
        known = self._sizes.get(numbers)
        if known is None:
            found = tuple(
                _number(one)
                for one in re.findall(_NUMBER, numbers[numbers[:1] == b"(" :], re.DOTALL)
            )
            known = self._sizes[numbers] = Call(SIZE, (found,))
        return known


def _number(code: bytes) -> int:
    return int.from_bytes(code[2 if code[0] == 0x8A else 1 :], "little")


def _referred(codes: tuple[bytes, ...], noted: Mapping[int, Plain]) -> list[Plain]:
    return [noted[int.from_bytes(code[1:], "little")] for code in codes]
