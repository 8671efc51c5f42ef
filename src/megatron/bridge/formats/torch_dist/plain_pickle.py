"""Reading a pickle as plain data: nothing that it names is imported, and no call in it is made.

Python's own unpickler makes every call that a pickle asks for. Restricted to a few harmless names
it can still be made to change the classes that it imported, to hash what takes longer than the
universe lasts, and to ask for memory that the pickle does not fill. This reader is Python's own in
its pure form, with only the operations that tensors and data classes need; those that would call,
hash or change what the pickle names are replaced. Time and memory are proportional to the length
of the pickle, and bounded.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron.bridge.errors import CheckpointError
from megatron.bridge.text.quoting import quoted

type Plain = (
    bool | int | str | Name | Call | Reference | tuple[Plain, ...] | list[Plain] | Entries | None
)
type Entries = dict[str | Call, Plain]
type Runs = Callable[[int, Mapping[int, Plain], list[Plain]], int]
"""``runs(position, noted, stack)``: puts objects on the stack and returns where they end."""

MAX_OPERATIONS = 100_000_000
"""Each makes one object at most; the index of a million pieces takes 67 million."""

_MAX_MARKS = 64
"""Containers that are open at once."""

_UNCHANGED = (
    "NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 "
    "TUPLE EMPTY_LIST APPEND APPENDS EMPTY_DICT SHORT_BINUNICODE BINUNICODE GLOBAL STACK_GLOBAL "
    "MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET STOP"
)


@dataclass(frozen=True, slots=True)
class Name:
    """A class or function that the pickle names."""

    module: str
    name: str


@dataclass(frozen=True, slots=True)
class Reference:
    """An object that lies outside of the pickle, and what is said of it."""

    what: Plain


class Call:
    """An object as it is pickled. It is equal to itself only.

    Attributes:
        callee: what would be called to make it.
        arguments: those of the call.
        entries: what would be put into it as into a dict.
        state: what it would get as its state.
    """

    __slots__ = ("arguments", "callee", "entries", "state")

    def __init__(self, callee: Name, arguments: tuple[Plain, ...]) -> None:
        self.callee = callee
        self.arguments = arguments
        self.entries: Entries = {}
        self.state: Plain = None


def read_plain_pickle(
    data: bytes,
    names: Container[tuple[str, str]],
    what: str,
    *,
    references: bool = False,
    runs: Runs | None = None,
) -> Plain:
    """What a pickle holds; a set is read as a list.

    Args:
        data: the pickle.
        names: the (module, name) that it may name.
        what: what it should be, in messages.
        references: whether it may refer to objects outside of it.
        runs: takes objects of known form at once where a container begins; of the same result.

    Raises:
        CheckpointError: it is damaged, too long, or uses or names anything else.
    """
    machine = _Machine(file := io.BytesIO(data), names, what, references, runs)
    try:
        for _ in range(MAX_OPERATIONS):
            machine.dispatch[machine.read(1)[0]](machine)
    except pickle._Stop as stop:  # type: ignore[attr-defined]
        value: Plain = stop.value
        return value
    except (pickle.UnpicklingError, AttributeError, LookupError, ValueError, struct.error):
        raise CheckpointError(f"its pickle is damaged before byte {file.tell()}") from None
    raise CheckpointError(f"its pickle has more than {MAX_OPERATIONS} operations")


class _Operations(dict[int, Callable[[Any], None]]):
    """What the machine does, by the byte of the operation."""

    def __missing__(self, operation: int) -> Callable[[Any], None]:
        known = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
        name = known.get(operation, f"byte {operation:#04x}")
        return lambda machine: machine.refuse(f"uses {name}")


if TYPE_CHECKING:
    _PurePython = Any
else:
    _PurePython = pickle._Unpickler


def _operations(**replaced: Callable[[Any], None]) -> _Operations:
    steps = {name: _PurePython.dispatch[getattr(pickle, name)[0]] for name in _UNCHANGED.split()}
    return _Operations({getattr(pickle, n)[0]: step for n, step in (steps | replaced).items()})


class _Machine(_PurePython):
    def __init__(
        self,
        file: io.BytesIO,
        names: Container[tuple[str, str]],
        what: str,
        references: bool,
        runs: Runs | None,
    ) -> None:
        super().__init__(file)
        # As `load` begins, but for frames, which say nothing of what is in memory anyway.
        self.read, self.readline = file.read, file.readline
        self.stack: list[Any] = []
        self.metastack: list[list[Any]] = []  # the stacks that each MARK put aside
        self.append = self.stack.append
        self._names = names
        self._what = what
        self._references = references
        self._file, self._runs = file, runs

    def refuse(self, does: str) -> None:
        raise CheckpointError(f"its pickle {does}, which no {self._what} needs")

    def find_class(self, module: str, name: str) -> Name:
        if (module, name) not in self._names:
            self.refuse(f"names {quoted(f'{module}.{name}')}")
        return Name(module, name)

    def refer(self) -> None:
        if not self._references:
            self.refuse("uses BINPERSID")
        self.stack[-1] = Reference(self.stack[-1])

    def protocol(self) -> None:
        if (number := self.read(1)[0]) > pickle.HIGHEST_PROTOCOL:
            raise CheckpointError(f"its pickle is of protocol {number}")

    def skip_frame(self) -> None:
        self.read(8)

    def mark(self) -> None:
        if len(self.metastack) == _MAX_MARKS:
            raise CheckpointError("its pickle is nested too deeply")
        self.load_mark()
        self.take_run()

    def take_run(self) -> None:
        if self._runs is not None:
            self._file.seek(self._runs(self._file.tell(), self.memo, self.stack))

    def call(self) -> None:
        arguments, callee = self.stack.pop(), self.stack.pop()
        if not isinstance(callee, Name) or not isinstance(arguments, tuple):
            raise CheckpointError("its pickle calls what is no name")
        self.stack.append(Call(callee, arguments))

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, Call) or target.state is not None:
            raise CheckpointError("its pickle sets the state of what is no new object")
        target.state = state
        self.take_run()

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def set_marked(self) -> None:
        self._update(self.pop_mark())

    def _update(self, items: list[Plain]) -> None:
        target = self.stack[-1]
        entries = target.entries if isinstance(target, Call) else target
        if not isinstance(entries, dict):
            raise CheckpointError("its pickle puts entries into what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | Call):  # no other hash is bounded in time
                raise CheckpointError(f"a dict has a key of type {type(key).__name__}")
            if key in entries:
                raise CheckpointError(f"a dict has the key {quoted(key)} twice")
            entries[key] = value

    dispatch = _operations(
        PROTO=protocol,
        FRAME=skip_frame,
        MARK=mark,
        BINPERSID=refer,
        REDUCE=call,
        NEWOBJ=call,
        BUILD=build,
        SETITEM=set_item,
        SETITEMS=set_marked,
        EMPTY_SET=_PurePython.load_empty_list,
        ADDITEMS=_PurePython.load_appends,
    )
