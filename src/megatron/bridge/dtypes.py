"""The one table of dtypes: safetensors name, name in torch and numpy, and bytes per element.

Names are those of the safetensors format. Libraries are imported only where a dtype of theirs is
asked for, so that file headers can be read without. Types of less than one byte are not supported.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from megatron.bridge.errors import CheckpointError, InputError

if TYPE_CHECKING:
    import numpy as np
    import torch

type DType = str | torch.dtype
"""A dtype of weights as callers give it: of torch, or its name ("bfloat16")."""

_TORCH_NAME_AND_BYTES: dict[str, tuple[str, int]] = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "U16": ("uint16", 2),
    "I16": ("int16", 2),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "U32": ("uint32", 4),
    "I32": ("int32", 4),
    "F32": ("float32", 4),
    "U64": ("uint64", 8),
    "I64": ("int64", 8),
    "F64": ("float64", 8),
    "C64": ("complex64", 8),
}
TORCH_NAMES = {torch_name: name for name, (torch_name, _) in _TORCH_NAME_AND_BYTES.items()}
"""The safetensors name by the name of the torch dtype ("bfloat16": "BF16")."""

TORCH_NAME_OF = {name: torch_name for name, (torch_name, _) in _TORCH_NAME_AND_BYTES.items()}
"""The name of the torch dtype by the safetensors name ("BF16": "bfloat16")."""

DTYPE_NAMES: tuple[str, ...] = tuple(_TORCH_NAME_AND_BYTES)
"""The safetensors dtype names that can be read and written."""


_WIDENS = {("BF16", "F32"), ("F16", "F32"), ("BF16", "F64"), ("F16", "F64"), ("F32", "F64")}

MIXABLE = ("F16", "BF16", "F32", "F64")
"""The dtypes of weights that may stand beside one another, from the narrowest on."""


def holds_all(wide: str, narrow: str) -> bool:
    """Whether dtype `wide` holds every value of dtype `narrow` exactly."""
    return wide == narrow or (narrow, wide) in _WIDENS


def can_be_cast(to: str, of: str) -> bool:
    """Whether values of dtype `of` may be looked at as dtype `to`: the same, or both of weights."""
    return to == of or (to in MIXABLE and of in MIXABLE)


def widest(first: str, *others: str) -> str | None:
    """The narrowest dtype that holds all values of all of them exactly; None if there is none."""
    dtypes = {first, *others}
    if len(dtypes) == 1:
        return first
    if not dtypes <= set(MIXABLE):
        return None
    return next(wide for wide in MIXABLE if all(holds_all(wide, one) for one in dtypes))


def _row(name: str) -> tuple[str, int]:
    try:
        return _TORCH_NAME_AND_BYTES[name]
    except KeyError:
        raise CheckpointError(
            f"dtype {name!r} is not supported; supported are {', '.join(DTYPE_NAMES)}"
        ) from None


def itemsize(name: str) -> int:
    """Bytes per element of the safetensors dtype `name`; CheckpointError if it is unknown."""
    return _row(name)[1]


@cache
def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype of the safetensors dtype `name`; CheckpointError if it is unknown.

    What numpy itself does not have (bfloat16, FP8) is a dtype of ml_dtypes.
    """
    import ml_dtypes
    import numpy as np

    library_name = _row(name)[0]
    return np.dtype(getattr(ml_dtypes, library_name, library_name))


def dtype_of(dtype: np.dtype[Any]) -> str:
    """The safetensors name of a numpy dtype that `numpy_dtype` gave."""
    return TORCH_NAMES[dtype.name]


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of the safetensors dtype `name`; CheckpointError if it is unknown."""
    import torch

    dtype: torch.dtype = getattr(torch, _row(name)[0])
    return dtype


def weight_dtype(dtype: str | torch.dtype) -> str:
    """The safetensors name of a dtype that is asked for: "bfloat16" or torch.bfloat16 is "BF16".

    Raises:
        InputError: it is none of the three that models have.
    """
    names = {TORCH_NAME_OF[name]: name for name in ("BF16", "F16", "F32")}
    asked = str(dtype).removeprefix("torch.")
    if asked not in names:
        raise InputError(f"dtype is {asked[:40]!r}; expected one of {', '.join(names)}")
    return names[asked]


def safetensors_dtype(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype; CheckpointError if the format has none."""
    torch_name = str(dtype).removeprefix("torch.")
    try:
        return TORCH_NAMES[torch_name]
    except KeyError:
        raise CheckpointError(
            f"torch dtype {torch_name} has no safetensors name; "
            f"supported are {', '.join(TORCH_NAMES)}"
        ) from None
