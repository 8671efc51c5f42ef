"""Values in another dtype: exact where they are, refused or rounded where they are not."""

import pytest
import torch

from megatron.bridge.dtypes import DTYPE_NAMES, holds_all, weight_dtype, widest
from megatron.bridge.errors import InexactCast, InputError
from megatron.bridge.models.conversion.casting import EXACTLY, ROUNDED, Casting
from megatron.bridge.tensors.torch_views import as_array, as_torch
from tensors_in_memory import bits, numpy_dtype_named


def cast(casting: Casting, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return as_torch(casting.cast(as_array(values), numpy_dtype_named(dtype), "w"))


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
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
    for part in (
        every,
        every[64600:64603],
        every[31741:31742],
    ):  # a few at once are computed otherwise
        values = part.view(dtype)
        back = cast(EXACTLY, cast(EXACTLY, values, wide), dtype)
        assert torch.equal(back.view(torch.int16), part)


def test_a_value_that_does_not_fit_is_refused_with_its_error() -> None:
    values = torch.tensor([1.0, 1 + 2**-12, float("nan")])
    with pytest.raises(InexactCast) as error:
        cast(Casting(ways_out="do something else"), values, torch.bfloat16)
    assert str(error.value) == (
        "w: values in float32 do not fit bfloat16 exactly (off by up to 0.000244); "
        "do something else"
    )
    rounded = cast(ROUNDED, values, torch.bfloat16)
    assert rounded[:2].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("casting", [EXACTLY, ROUNDED])
def test_rounding_makes_no_infinity(casting: Casting) -> None:
    with pytest.raises(InexactCast, match=r"w: a value of 7e\+04 is out of the range of float16"):
        cast(casting, torch.tensor([2.0, -70000.0]), torch.float16)
    infinite = torch.tensor([float("inf")])
    assert cast(casting, infinite, torch.float16).isinf().all()


MANTISSA_BITS = {torch.float16: 10, torch.bfloat16: 7, torch.float32: 23, torch.float64: 52}


def values_of(dtype: torch.dtype) -> torch.Tensor:
    """Every value of 16 bits; of more, such at random and those in the middle between two of 16."""
    if dtype.itemsize == 2:
        return torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    generator = torch.Generator().manual_seed(5)
    drawn = torch.randint(-(1 << 31), 1 << 31, (200_000,), generator=generator)
    found = [drawn.to(torch.int32).view(torch.float32).to(dtype)]
    for narrow in (torch.float16, torch.bfloat16):
        numbers = torch.arange(1 << 15).to(torch.int16).view(narrow).to(dtype)
        middle = (numbers[:-1] + numbers[1:]) / 2
        aside = middle * (1 + 2.0 ** (3 - MANTISSA_BITS[dtype]))
        found += [middle, -middle, aside, 2 * middle - aside]
    if dtype == torch.float64:
        found.append(drawn.double() * 0x1_0000_0001)
        found.append(drawn.bitwise_left_shift(32).bitwise_or(drawn.flip(0)).view(dtype))
    return torch.cat(found)


@pytest.mark.parametrize("narrow", MANTISSA_BITS)
@pytest.mark.parametrize("wide", MANTISSA_BITS)
def test_values_are_rounded_as_torch_rounds_them(wide: torch.dtype, narrow: torch.dtype) -> None:
    values = values_of(wide)
    expected = values.to(narrow)
    in_range = ~values.isnan() & (expected.isinf() == values.isinf())
    values, expected = values[in_range], expected[in_range]
    assert len(values) > 30_000
    found = cast(ROUNDED, values, narrow)
    different = bits(found) != bits(expected)
    if (wide, narrow) == (torch.float64, torch.float16):  # torch rounds to float32 in between
        near, far = ((one.double() - values)[different].abs() for one in (found, expected))
        assert (near < far).all()
    else:
        assert not different.any()


def payload_moved(word: int, wide: torch.dtype, narrow: torch.dtype) -> int | None:
    """The bits of a NaN in another dtype; None where its payload does not fit."""
    here, there = MANTISSA_BITS[wide], MANTISSA_BITS[narrow]
    payload, dropped = word & ((1 << here) - 1), max(0, here - there)
    if payload & ((1 << dropped) - 1) or not payload >> dropped:
        return None
    negative = word >> (8 * wide.itemsize - 1) & 1
    exponent = (1 << (8 * narrow.itemsize - 1 - there)) - 1
    moved = payload >> dropped << max(0, there - here)
    return negative << (8 * narrow.itemsize - 1) | exponent << there | moved


@pytest.mark.parametrize("narrow", MANTISSA_BITS)
@pytest.mark.parametrize("wide", MANTISSA_BITS)
def test_a_nan_keeps_its_sign_and_payload(wide: torch.dtype, narrow: torch.dtype) -> None:
    width = 8 * wide.itemsize
    exponent = (1 << (width - 1)) - (1 << MANTISSA_BITS[wide])
    words = []
    for payload in (1, 2, 3, 5, 0x155, *(1 << bit for bit in range(10, MANTISSA_BITS[wide]))):
        for shift in (0, MANTISSA_BITS[wide] - 7, MANTISSA_BITS[wide] - 10):
            moved = payload << max(0, shift) & ((1 << MANTISSA_BITS[wide]) - 1)
            if moved:
                words += [exponent | moved, exponent | moved | 1 << (width - 1)]
    signed = [word - (1 << width) if word >> (width - 1) else word for word in words]
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[wide.itemsize]
    values = torch.tensor(signed, dtype=integers).view(wide)
    assert values.isnan().all()
    found = cast(EXACTLY, values, narrow)
    assert found.isnan().all()
    whole = (1 << 8 * narrow.itemsize) - 1
    kept = 0
    for word, result in zip(words, bits(found).tolist(), strict=True):
        expected = payload_moved(word, wide, narrow)
        kept += expected is not None
        assert expected is None or result & whole == expected, hex(word)
    assert kept > 9
