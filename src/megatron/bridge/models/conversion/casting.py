"""Values in another dtype: exactly, or rounded where that was asked for."""

from dataclasses import dataclass
from math import inf, isfinite

import torch

from megatron.bridge.errors import InexactCast

_MANTISSA_BITS = {torch.float16: 10, torch.bfloat16: 7, torch.float32: 23, torch.float64: 52}
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Casting:
    """What becomes of values that their new dtype does not hold.

    Attributes:
        rounds: whether they are rounded; what the dtype has no finite number for is refused all the
            same.
        ways_out: for the message of a refusal: options and arguments of what was called.
    """

    rounds: bool = False
    ways_out: str = "cast them first"

    def cast(self, tensor: torch.Tensor, dtype: torch.dtype, culprit: str) -> torch.Tensor:
        """`tensor` in `dtype`; bits of a NaN are kept where they fit.

        Args:
            tensor: the values.
            dtype: the new dtype.
            culprit: whose values they are, to begin a message with.

        Raises:
            InexactCast: values do not fit and are not to be rounded, or are out of range.
        """
        if tensor.dtype == dtype:
            return tensor
        result = tensor.to(dtype)
        if _MANTISSA_BITS.keys() >= {tensor.dtype, dtype}:
            _carry_nans(tensor, result)
        if torch.promote_types(tensor.dtype, dtype) != dtype:
            back = result.to(tensor.dtype)
            self.check(tensor, back, (back == tensor) | tensor.isnan(), dtype, culprit)
        return result

    def check(
        self,
        tensor: torch.Tensor,
        back: torch.Tensor,
        exact: torch.Tensor,
        dtype: torch.dtype,
        culprit: str,
    ) -> None:
        """Check values whose new dtype is made elsewhere.

        Args:
            tensor: the values.
            back: the values after they had `dtype`.
            exact: which of them are as they were.
            dtype: the new dtype.
            culprit: whose values they are, to begin a message with.

        Raises:
            InexactCast: values are not `exact` and not to be rounded, or are out of range.
        """
        if bool(exact.all()):
            return
        distance = (back[~exact].double() - tensor[~exact].double()).abs()
        distance = distance.nan_to_num(inf, posinf=inf)
        error = float(distance.max())
        if not isfinite(error):
            largest = float(tensor[~exact].double().abs().max())
            raise InexactCast(
                f"{culprit}: a value of {largest:.3g} is out of the range of {dtype}; choose "
                f"a dtype with a wider range"
            )
        if not self.rounds:
            raise InexactCast(
                f"{culprit}: values in {tensor.dtype} do not fit {dtype} exactly (off by up to "
                f"{error:.3g}); {self.ways_out}"
            )


EXACTLY = Casting()
ROUNDED = Casting(rounds=True)


def _carry_nans(source: torch.Tensor, result: torch.Tensor) -> None:
    """Give NaNs of `result` sign and payload as in `source`: libraries keep them now and then."""
    nans = source.isnan()
    if not bool(nans.any()):
        return
    # As integers throughout: filling in a float may go through a double, which has one NaN.
    width, out = 8 * result.element_size(), result.view(_INTEGERS[result.element_size()])
    here, there = _MANTISSA_BITS[source.dtype], _MANTISSA_BITS[result.dtype]
    bits = source.view(_INTEGERS[source.element_size()])[nans].long()
    payload = bits & ((1 << here) - 1)
    moved = payload << (there - here) if there >= here else payload >> (here - there)
    kept = (moved != 0) & ((moved >> max(there - here, 0)) << max(here - there, 0) == payload)
    exponent = (1 << (width - 1)) - (1 << there)
    sign = torch.where(bits < 0, -1 << (width - 1), 0)
    out[nans] = torch.where(kept, (moved | exponent | sign).to(out.dtype), out[nans])
