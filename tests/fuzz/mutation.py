"""Structure-aware damage: an honest file with values, keys or operations exchanged."""

from __future__ import annotations

import copy
import json
import struct
from typing import Any

from hypothesis import strategies as st

NUMBERS = st.sampled_from(
    [0, -1, 1, 2, 255, 1 << 31, 1 << 32, 10**9, (1 << 63) - 1, 1 << 63, 1 << 64, 10**40, 10**600]
)
VALUES: st.SearchStrategy[Any] = st.one_of(
    NUMBERS,
    st.integers(-10, 50),
    st.sampled_from([True, False, None, 1.0, 0.5, -0.0, float("nan"), float("inf"), 1e300]),
    st.sampled_from(
        ["", "BF16", "F32", "F4", "\ud800", "\x1b[2J", "a\nb", "../x", "\0", "x" * 3000]
    ),
    st.sampled_from([[], {}, [[]], [{}], {"": {}}, [0, 1], [1, 0], ["a"], [True]]),
)


@st.composite
def damaged(draw: st.DrawFn, honest: Any) -> Any:
    """A copy of a JSON value with a few places changed, removed, doubled or renamed."""
    value = copy.deepcopy(honest)
    for _ in range(draw(st.integers(1, 3))):
        value = _damage(draw, value)
    return value


def _damage(draw: st.DrawFn, value: Any) -> Any:
    places = [*_places(value)]
    if not places:
        return copy.deepcopy(draw(VALUES))
    parent, key = draw(st.sampled_from(places))
    match draw(st.sampled_from(["change", "change", "number", "remove", "copy", "rename"])):
        case "remove":
            del parent[key]
        case "copy":
            parent[key] = copy.deepcopy(draw(st.sampled_from(places))[0])
        case "rename" if isinstance(parent, dict):
            parent[draw(st.text(max_size=3))] = parent.pop(key)
        case "number" if type(parent[key]) is int:
            parent[key] += draw(st.integers(-2, 2))
        case _:
            parent[key] = copy.deepcopy(draw(VALUES))
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) inside of a value."""
    if not isinstance(value, dict | list):
        return []
    keys = list(value) if isinstance(value, dict) else range(len(value))
    return [place for key in keys for place in ((value, key), *_places(value[key]))]


def json_text(value: Any) -> bytes:
    """JSON as a careless program writes it: with NaN, and with half of a surrogate pair."""
    return json.dumps(value).encode()


@st.composite
def spliced(draw: st.DrawFn, honest: bytes) -> bytes:
    """The bytes with pieces of them removed, doubled, moved or overwritten."""
    data = bytearray(honest)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        stop = draw(st.integers(start, min(len(data), start + 40)))
        match draw(st.sampled_from(["cut", "move", "write"])):
            case "cut":
                del data[start:stop]
            case "move":
                piece = data[start:stop]
                place = draw(st.integers(0, len(data)))
                data[place:place] = piece
            case "write":
                data[start:stop] = draw(st.binary(max_size=16))
    return bytes(data)


_TEXTS = st.sampled_from(["", "torch", "Size", "a.weight", "os", "system", "size", "chunks"])
_OPERATIONS = st.one_of(
    st.sampled_from([bytes([code]) for code in b"(.0125KNR}]abehjlqrstu\x81\x85\x86\x87\x88\x89\x8f"
                     b"\x90\x91\x92\x93\x94)"]),
    st.integers(0, 255).map(lambda n: b"K" + bytes([n])),
    st.integers(0, 3).map(lambda n: b"h" + bytes([n])),
    st.sampled_from([0, 7, (1 << 32) - 1]).map(lambda n: b"r" + struct.pack("<I", n)),
    st.sampled_from([0, 7, (1 << 32) - 1]).map(lambda n: b"X" + struct.pack("<I", n)),
    _TEXTS.map(lambda text: b"\x8c" + bytes([len(text)]) + text.encode()),
    st.tuples(_TEXTS, _TEXTS).map(lambda pair: f"c{pair[0]}\n{pair[1]}\n".encode()),
    st.binary(min_size=1, max_size=3),
)  # fmt: skip
PICKLES = st.lists(_OPERATIONS, max_size=40).map(lambda steps: b"\x80\x04" + b"".join(steps) + b".")
"""Programs of the pickle machine that nobody would write."""
