"""The scales of FP8 weights: how they are named, and weights that lack them."""

SCALE_SUFFIX = "_scale_inv"
"""What the name of a weight's scales has behind that of the weight."""

NO_SCALES = (
    "FP8 weights without scales have no known values; use the whole FP8 release, or the one in BF16"
)


def lacks_scales(name: str, dtype: str) -> str:
    """What is wrong with a weight of a dequantized model that has this dtype; empty for nothing."""
    if not dtype.startswith("F8_"):
        return ""
    return f"{name}: {dtype}, but its scale {name}{SCALE_SUFFIX} is missing"
