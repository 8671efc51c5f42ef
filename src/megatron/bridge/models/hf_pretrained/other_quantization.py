"""Quantizations that are not read: what each is, by the names of its tensors."""

from __future__ import annotations

import re
from collections.abc import Collection

# By the last component of a name. The first method that has a tensor is it: GPTQ has scales, too.
_METHODS = tuple(
    (method, re.compile(component))
    for method, component in (
        ("bitsandbytes in 4 bits", r"(nested_)?(absmax|quant_map)|bitsandbytes__\w+"),
        ("bitsandbytes in 8 bits", r"SCB|weight_format"),
        ("GPTQ or AWQ", r"qweight|qzeros|g_idx"),
        (
            "compressed-tensors",
            r"weight_(packed|shape|zero_point|g_idx|global_scale)|input_global_scale",
        ),
        ("NVFP4", r"weight_scale_2"),
        ("MXFP4", r"\w+_blocks"),
        ("HQQ", r"W_q"),
        ("quanto", r"_(data|scale|shift)"),
        ("torchao", r"\w*_weight_(qdata|tensor_data)"),
        ("MLX", r"scales"),
        ("FP8 with scales of activations", r"input_scale|activation_scale"),
    )
)

# Of a file with blocks it would be a scale under a wrong name.
_WHOLE_SCALE = re.compile(r"(\w+_)?weight_scale")
_WHOLE_METHOD = "FP8 with a scale for each tensor or each row"

_PLAIN_DTYPES = frozenset(("BF16", "F16", "F32", "F64", "BOOL", "I64"))


def other_quantization(names: Collection[str]) -> tuple[str, str] | None:
    """The method that tensors of these names belong to, and one of them; None if to none."""
    components = _components(names)
    for method, pattern in _METHODS:
        if found := next(filter(pattern.fullmatch, components), None):
            return method, components[found]
    return None


def scaled_as_a_whole(names: Collection[str]) -> tuple[str, str] | None:
    """As `other_quantization`, for FP8 weights without blocks."""
    components = _components(names)
    found = next(filter(_WHOLE_SCALE.fullmatch, components), None)
    return None if found is None else (_WHOLE_METHOD, components[found])


def _components(names: Collection[str]) -> dict[str, str]:
    """The last components of names, tens where there are 100,000 names, each with one of them."""
    return {name.rpartition(".")[2]: name for name in names}


def is_plain(dtype: str) -> bool:
    """Whether a tensor of this dtype ("BF16") can be a weight or buffer that is not quantized."""
    return dtype in _PLAIN_DTYPES
