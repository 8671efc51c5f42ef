"""Values in another dtype: exactly, or rounded where that was asked for."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import inf, isfinite
from typing import Any, Self

import numpy as np

from megatron.bridge.dtypes import dtype_of, holds_all
from megatron.bridge.errors import InexactCast, InputError
from megatron.bridge.tensors.arrays import Array, words
from megatron.bridge.text.quoting import quoted

_MANTISSA_BITS = {"F16": 10, "BF16": 7, "F32": 23, "F64": 52}


@dataclass(frozen=True)
class Casting:
    """What becomes of values that their new dtype does not hold.

    Attributes:
        rounds: whether they are rounded; what the dtype has no finite number for is refused all the
            same.
        ways_out: for the message of a refusal: options and arguments of what was called.
        rounded: names of tensors whose values are rounded, with ``*`` for anything, where those of
            others are not; see `of`.
    """

    rounds: bool = False
    ways_out: str = "cast them first"
    rounded: tuple[str, ...] = ()

    def of(self, name: str) -> Self:
        """What becomes of the values of one Hugging Face tensor."""
        if self.rounds or not any(fnmatchcase(name, pattern) for pattern in self.rounded):
            return self
        return replace(self, rounds=True)

    def check_names(self, names: Iterable[str]) -> None:
        """Refuse a pattern that is of no tensor. Raises InputError."""
        known = list(names)
        for pattern in self.rounded:
            if not any(fnmatchcase(name, pattern) for name in known):
                raise InputError(
                    f"round has {quoted(pattern)}, and no tensor is of such a name; give names as "
                    f"in the files, with * for anything, such as {quoted(known[0])}"
                )

    def cast(self, array: Array, dtype: np.dtype[Any], culprit: str) -> Array:
        """`array` in `dtype`; bits of a NaN are kept where they fit.

        Args:
            array: the values.
            dtype: the new dtype.
            culprit: whose values they are, to begin a message with.

        Raises:
            InexactCast: values do not fit and are not to be rounded, or are out of range.
        """
        if array.dtype == dtype:
            return array
        here, there = dtype_of(array.dtype), dtype_of(dtype)
        with np.errstate(over="ignore", invalid="ignore"):  # the check looks at what comes out
            result = array.astype(dtype)
            if _MANTISSA_BITS.keys() >= {here, there}:
                _carry_nans(array, result)
            if not holds_all(there, here):
                back = result.astype(array.dtype)
                self.check(array, result, (back == array) | np.isnan(array), dtype, culprit)
        return result

    def check(
        self, array: Array, back: Array, exact: Array, dtype: np.dtype[Any], culprit: str
    ) -> None:
        """Check values whose new dtype is made elsewhere.

        Args:
            array: the values.
            back: the values after they had `dtype`, in that or a wider one.
            exact: which of them are as they were.
            dtype: the new dtype.
            culprit: whose values they are, to begin a message with.

        Raises:
            InexactCast: values are not `exact` and not to be rounded, or are out of range.
        """
        if exact.all():
            return
        before, after = (values[~exact].astype(np.float64) for values in (array, back))
        with np.errstate(invalid="ignore"):
            error = float(np.nan_to_num(np.abs(after - before), nan=inf, posinf=inf).max())
        if not isfinite(error):
            raise InexactCast(
                f"{culprit}: a value of {np.abs(before).max():.3g} is out of the range of {dtype}; "
                f"choose a dtype with a wider range"
            )
        if not self.rounds:
            raise InexactCast(
                f"{culprit}: values in {array.dtype} do not fit {dtype} exactly (off by up to "
                f"{error:.3g}); {self.ways_out}"
            )


EXACTLY = Casting()
ROUNDED = Casting(rounds=True)


def _carry_nans(source: Array, result: Array) -> None:
    """Give NaNs of `result` sign and payload as in `source`: libraries keep them now and then."""
    nans = np.isnan(source)
    if not nans.any():
        return
    here, there = (_MANTISSA_BITS[dtype_of(array.dtype)] for array in (source, result))
    bits = words(source)[nans].astype(np.uint64)
    sign = bits >> np.uint64(8 * source.itemsize - 1) << np.uint64(8 * result.itemsize - 1)
    payload = bits & np.uint64((1 << here) - 1)
    wider, narrower = np.uint64(max(there - here, 0)), np.uint64(max(here - there, 0))
    moved = payload << wider >> narrower
    kept = (moved != 0) & (moved << narrower >> wider == payload)
    exponent = np.uint64((1 << (8 * result.itemsize - 1)) - (1 << there))
    out = words(result)
    out[nans] = np.where(kept, (moved | exponent | sign).astype(out.dtype), out[nans])
