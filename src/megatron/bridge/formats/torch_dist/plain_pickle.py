"""Reading a pickle as plain data: nothing that it names is imported, and no call in it is made.

Python's own unpickler makes every call that a pickle asks for. Restricted to a few harmless names
it can still be made to change the classes that it imported, to hash what takes longer than the
universe lasts, and to ask for memory that the pickle does not fill. This reader knows the
operations that data classes need and refuses all others. Time and memory are proportional to the
length of the pickle.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Container
from dataclasses import dataclass
from functools import partial

from megatron.bridge.errors import CheckpointError
from megatron.bridge.text.quoting import quoted

type Plain = bool | int | str | Name | Call | tuple[Plain, ...] | list[Plain] | Entries | None
type Entries = dict[str | Call, Plain]

_HIGHEST_PROTOCOL = 5
_MAX_MARKS = 64
"""Containers that are open at once."""


@dataclass(frozen=True, slots=True)
class Name:
    """A class or function that the pickle names."""

    module: str
    name: str


class Call:
    """An object as it is pickled: what would be called to make it, and the state it would get.

    entries: what would be put into it as into a dict. Equal to itself only.
    """

    __slots__ = ("arguments", "callee", "entries", "state")

    def __init__(self, callee: Name, arguments: tuple[Plain, ...]) -> None:
        self.callee = callee
        self.arguments = arguments
        self.entries: Entries = {}
        self.state: Plain = None


def read_plain_pickle(data: bytes, names: Container[tuple[str, str]]) -> Plain:
    """What a pickle holds; a set is read as a list.

    Raises CheckpointError if it is damaged, uses operations that data classes do not need, or
    names anything but the (module, name) in `names`.
    """
    machine = _Machine(data, names)
    try:
        return machine.run()
    except (IndexError, KeyError, ValueError, struct.error):
        raise CheckpointError(f"it is damaged before byte {machine.position}") from None


class _Machine:
    """The machine that a pickle is a program of. `position` is that of the next byte."""

    def __init__(self, data: bytes, names: Container[tuple[str, str]]) -> None:
        self.position = 0
        self._data = data
        self._names = names
        self._memo: dict[int, Plain] = {}
        self._stack: list[Plain] = []
        self._below: list[list[Plain]] = []  # the stacks that each MARK put aside

    def run(self) -> Plain:
        data = self._data
        while (operation := data[self.position]) != pickle.STOP[0]:
            self.position += 1
            step = _STEPS.get(operation)
            if step is None:
                raise CheckpointError(f"it uses {_name_of(operation)}, which no index needs")
            step(self)
        return self._stack.pop()

    # --- what stands behind an operation ---

    def _take(self, count: int) -> bytes:
        begin, self.position = self.position, self.position + count
        if self.position > len(self._data):
            raise ValueError("cut off")
        return self._data[begin : self.position]

    def _number(self, form: struct.Struct) -> int:
        number: int = form.unpack_from(self._data, self.position)[0]
        self.position += form.size
        return number

    def _line(self) -> str:
        end = self._data.index(b"\n", self.position)
        line = self._take(end - self.position)
        self.position += 1
        return line.decode()

    # --- operations ---

    def protocol(self) -> None:
        if (number := self._take(1)[0]) > _HIGHEST_PROTOCOL:
            raise CheckpointError(f"it is a pickle of protocol {number}")

    def skip(self, count: int) -> None:
        self._take(count)

    def constant(self, value: Plain) -> None:
        self._stack.append(value)

    def byte(self) -> None:
        self._stack.append(self._data[self.position])
        self.position += 1

    def integer(self, form: struct.Struct) -> None:
        self._stack.append(self._number(form))

    def long_integer(self) -> None:
        self._stack.append(int.from_bytes(self._take(self._number(_U8)), "little", signed=True))

    def text(self, length: struct.Struct) -> None:
        self._stack.append(self._take(self._number(length)).decode())

    def new_list(self) -> None:
        self._stack.append([])

    def new_dict(self) -> None:
        self._stack.append({})

    def mark(self) -> None:
        if len(self._below) == _MAX_MARKS:
            raise CheckpointError("it is nested too deeply")
        self._below.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[Plain]:
        items, self._stack = self._stack, self._below.pop()
        return items

    def marked_tuple(self) -> None:
        items = self._since_mark()
        self._stack.append(tuple(items))

    def short_tuple(self, length: int) -> None:
        items = self._stack[-length:]
        if len(items) < length:
            raise ValueError("stack too short")
        self._stack[-length:] = [tuple(items)]

    def append(self) -> None:
        self._extend([self._stack.pop()])

    def append_marked(self) -> None:
        self._extend(self._since_mark())

    def _extend(self, items: list[Plain]) -> None:
        target = self._stack[-1]
        if not isinstance(target, list):
            raise CheckpointError("it appends to what is no list")
        target.extend(items)

    def set_item(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._update([key, value])

    def set_marked(self) -> None:
        self._update(self._since_mark())

    def _update(self, items: list[Plain]) -> None:
        target = self._stack[-1]
        entries = target.entries if isinstance(target, Call) else target
        if not isinstance(entries, dict):
            raise CheckpointError("it puts entries into what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | Call):  # no other hash is bounded in time
                raise CheckpointError(f"a dict has a key of type {type(key).__name__}")
            if key in entries:
                raise CheckpointError(f"a dict has the key {quoted(key)} twice")
            entries[key] = value

    def name_in_lines(self) -> None:
        self._name(self._line(), self._line())

    def name_on_stack(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._name(module, name)

    def _name(self, module: Plain, name: Plain) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("no name")
        if (module, name) not in self._names:
            raise CheckpointError(f"it names {quoted(f'{module}.{name}')}, which no index needs")
        self._stack.append(Name(module, name))

    def call(self) -> None:
        arguments, callee = self._stack.pop(), self._stack.pop()
        if not isinstance(callee, Name) or not isinstance(arguments, tuple):
            raise CheckpointError("it calls what is no name")
        self._stack.append(Call(callee, arguments))

    def build(self) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if not isinstance(target, Call) or target.state is not None:
            raise CheckpointError("it sets the state of what is no new object")
        target.state = state

    def remember_next(self) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def remember(self, number: struct.Struct) -> None:
        self._memo[self._number(number)] = self._stack[-1]

    def recall(self, number: struct.Struct) -> None:
        self._stack.append(self._memo[self._number(number)])


_U8, _U16, _U32, _I32 = (struct.Struct(form) for form in ("<B", "<H", "<I", "<i"))

type _Step = Callable[[_Machine], None]


def _with(step: Callable[..., None], **argument: object) -> _Step:
    return partial(step, **argument)


_STEPS: dict[int, _Step] = {
    code[0]: step
    for code, step in (
        (pickle.PROTO, _Machine.protocol),
        (pickle.FRAME, _with(_Machine.skip, count=8)),
        (pickle.NONE, _with(_Machine.constant, value=None)),
        (pickle.NEWTRUE, _with(_Machine.constant, value=True)),
        (pickle.NEWFALSE, _with(_Machine.constant, value=False)),
        (pickle.BININT, _with(_Machine.integer, form=_I32)),
        (pickle.BININT1, _Machine.byte),
        (pickle.BININT2, _with(_Machine.integer, form=_U16)),
        (pickle.LONG1, _Machine.long_integer),
        (pickle.SHORT_BINUNICODE, _with(_Machine.text, length=_U8)),
        (pickle.BINUNICODE, _with(_Machine.text, length=_U32)),
        (pickle.EMPTY_TUPLE, _with(_Machine.constant, value=())),
        (pickle.TUPLE1, _with(_Machine.short_tuple, length=1)),
        (pickle.TUPLE2, _with(_Machine.short_tuple, length=2)),
        (pickle.TUPLE3, _with(_Machine.short_tuple, length=3)),
        (pickle.MARK, _Machine.mark),
        (pickle.TUPLE, _Machine.marked_tuple),
        (pickle.EMPTY_LIST, _Machine.new_list),
        (pickle.EMPTY_SET, _Machine.new_list),
        (pickle.APPEND, _Machine.append),
        (pickle.APPENDS, _Machine.append_marked),
        (pickle.ADDITEMS, _Machine.append_marked),
        (pickle.EMPTY_DICT, _Machine.new_dict),
        (pickle.SETITEM, _Machine.set_item),
        (pickle.SETITEMS, _Machine.set_marked),
        (pickle.GLOBAL, _Machine.name_in_lines),
        (pickle.STACK_GLOBAL, _Machine.name_on_stack),
        (pickle.REDUCE, _Machine.call),
        (pickle.NEWOBJ, _Machine.call),
        (pickle.BUILD, _Machine.build),
        (pickle.MEMOIZE, _Machine.remember_next),
        (pickle.BINPUT, _with(_Machine.remember, number=_U8)),
        (pickle.LONG_BINPUT, _with(_Machine.remember, number=_U32)),
        (pickle.BINGET, _with(_Machine.recall, number=_U8)),
        (pickle.LONG_BINGET, _with(_Machine.recall, number=_U32)),
    )
}


def _name_of(operation: int) -> str:
    import pickletools

    known = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
    return known.get(operation, f"byte {operation:#04x}")
