"""Operations of a pickle as bytes: what the writers here have in common.

Python's own pickler imports every class and function that it names. These are named without.
"""

from functools import lru_cache

_SHORT_TUPLES = b"\x85", b"\x86", b"\x87"
"""Of one, two and three elements."""


def integer(number: int) -> bytes:
    """The operation that puts a number on the stack, as Python's own pickler writes it."""
    if 0 <= number < 1 << 8:
        return b"K" + number.to_bytes(1, "little")
    if 0 <= number < 1 << 16:
        return b"M" + number.to_bytes(2, "little")
    if -(1 << 31) <= number < 1 << 31:
        return b"J" + number.to_bytes(4, "little", signed=True)
    length = (number.bit_length() >> 3) + 1
    return b"\x8a" + bytes([length]) + number.to_bytes(length, "little", signed=True)


@lru_cache(maxsize=1 << 14)
def integers(numbers: tuple[int, ...]) -> bytes:
    """The operations that put a tuple of numbers on the stack."""
    each = b"".join(map(integer, numbers))
    if len(numbers) > len(_SHORT_TUPLES):
        return b"(" + each + b"t"
    return each + _SHORT_TUPLES[len(numbers) - 1] if numbers else b")"
