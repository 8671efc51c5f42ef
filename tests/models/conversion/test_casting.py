"""Values in another dtype: exact where they are, refused or rounded where they are not."""

import pytest
import torch

from megatron.bridge.dtypes import DTYPE_NAMES, holds_all, weight_dtype, widest
from megatron.bridge.errors import InexactCast, InputError
from megatron.bridge.models.conversion.casting import EXACTLY, ROUNDED, Casting


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (["BF16"], "BF16"),
        (["BF16", "BF16"], "BF16"),
        (["BF16", "F16"], "F32"),
        (["F32", "BF16", "F16"], "F32"),
        (["F16", "F64"], "F64"),
        (["I32"], "I32"),
        (["I32", "BF16"], None),
        (["F8_E4M3", "BF16"], None),
    ],
)
def test_the_dtype_that_holds_all(dtypes: list[str], expected: str | None) -> None:
    assert widest(*dtypes) == expected
    assert expected is None or all(holds_all(expected, dtype) for dtype in dtypes)


def test_dtypes_that_may_be_asked_for() -> None:
    assert weight_dtype("bfloat16") == weight_dtype(torch.bfloat16) == "BF16"
    for dtype in ("int8", torch.float64, "BF16", "x" * 5000):
        with pytest.raises(InputError, match="expected one of bfloat16, float16, float32") as error:
            weight_dtype(dtype)
        assert len(str(error.value)) < 120
    assert len(DTYPE_NAMES) == 19


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_all_values_of_16_bits_come_back(dtype: torch.dtype, wide: torch.dtype) -> None:
    """Zeros of both signs, infinities and every NaN among them."""
    bits = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
    for part in (
        bits,
        bits[64600:64603],
        bits[31741:31742],
    ):  # a few at once are computed otherwise
        values = part.view(dtype)
        back = EXACTLY.cast(EXACTLY.cast(values, wide, "a"), dtype, "a")
        assert torch.equal(back.view(torch.int16), part)


def test_a_value_that_does_not_fit_is_refused_with_its_error() -> None:
    values = torch.tensor([1.0, 1 + 2**-12, float("nan")])
    with pytest.raises(InexactCast) as error:
        Casting(ways_out="do something else").cast(values, torch.bfloat16, "w")
    assert str(error.value) == (
        "w: values in torch.float32 do not fit torch.bfloat16 exactly (off by up to 0.000244); "
        "do something else"
    )
    rounded = ROUNDED.cast(values, torch.bfloat16, "w")
    assert rounded[:2].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("casting", [EXACTLY, ROUNDED])
def test_rounding_makes_no_infinity(casting: Casting) -> None:
    with pytest.raises(InexactCast, match=r"w: a value of 7e\+04 is out of the range of torch.flo"):
        casting.cast(torch.tensor([2.0, -70000.0]), torch.float16, "w")
    infinite = torch.tensor([float("inf")])
    assert casting.cast(infinite, torch.float16, "w").isinf().all()
