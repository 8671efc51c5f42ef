"""How much memory `compare` takes, told before anything large is loaded.

The two models run one after the other. What counts beside the weights of one is transformers' eager
attention, which holds a number for each pair of patches of a picture, of each head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron.bridge.dtypes import itemsize as bytes_each
from megatron.bridge.errors import InputError
from megatron.bridge.models.catalog import bridge_for
from megatron.bridge.models.hf_pretrained.fp8 import DequantizedTensors
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.text.sizes import format_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Need:
    """Bytes that a forward takes, and what those of a picture depend on.

    Attributes:
        weights: bytes of the weights.
        vision: bytes of attention over a picture.
        text: bytes of attention over the text.
        logits: bytes of the logits.
        patches: of the largest picture or frame.
        per_pair: bytes of vision attention for each pair of patches.
        pixels_per_patch: of the picture.
        unit: pixels that its sides are multiples of.
    """

    weights: int
    vision: int
    text: int
    logits: int
    patches: int
    per_pair: int
    pixels_per_patch: int
    unit: int

    @property
    def bytes(self) -> int:
        """All together; of what is not there at the same time, the largest."""
        return self.weights + max(self.vision, self.text, self.logits)

    def most_pixels(self, available: int) -> int:
        """The most pixels of a picture for which `available` bytes are enough; 0 if none is."""
        left = available - self.weights
        if left <= max(self.text, self.logits):
            return 0
        pixels = isqrt(left // self.per_pair) * self.pixels_per_patch
        # The processor rounds either side to its units, up or down: room is left for that.
        return max(0, isqrt(pixels) - self.unit) ** 2


def needed(hf: PreTrainedVLM, inputs: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Need:
    """What a forward of `inputs` takes in `dtype`. From headers and the config alone."""
    config, itemsize = hf.hf_config, dtype.itemsize
    numbers = sum(spec.nbytes // bytes_each(spec.dtype) for spec in hf.weights.values())
    weights = numbers * itemsize
    if isinstance(hf.weights, DequantizedTensors):  # transformers is given them in BF16
        weights += sum(spec.nbytes for spec in hf.weights.values())
    # Scores and their softmax; in short dtypes the softmax and its argument are in float32.
    per_score = 2 * itemsize if itemsize >= torch.float32.itemsize else itemsize + 2 * 4
    length = inputs["input_ids"].shape[1]
    bridge = bridge_for(config.architecture)
    language, pictures = bridge.language(config), bridge.pictures(config, inputs)
    patches, heads, patch_pixels, unit_pixels = pictures or (0, 0, 0, 0)
    per_pair = heads * per_score
    return Need(
        weights=weights,
        vision=patches**2 * per_pair,
        text=length**2 * language.count("num_attention_heads") * per_score,
        logits=2 * length * language.count("vocab_size") * itemsize,
        patches=patches,
        per_pair=per_pair,
        pixels_per_patch=patch_pixels**2,
        unit=unit_pixels,
    )


def require_memory(source: str, need: Need) -> None:
    """Raise InputError if there is less memory than is needed, with what would fit."""
    available = available_bytes()
    if available is None or need.bytes <= (usable := available * 9 // 10):  # some is for the rest
        return
    heading = (
        f"{source}: compare would take about {format_bytes(need.bytes)} of memory, and "
        f"{format_bytes(available)} are available: {format_bytes(need.weights)} for the weights, "
    )
    if need.vision > max(need.text, need.logits) and (pixels := need.most_pixels(usable)):
        raise InputError(
            f"{heading}{format_bytes(need.vision)} for attention between the {need.patches:,} "
            f"patches of the picture; give a smaller one: --max-pixels {pixels} "
            f"(max_pixels={pixels})"
        )
    raise InputError(
        f"{heading}{format_bytes(need.bytes - need.weights)} for the forward; take a shorter "
        "dtype (--dtype bfloat16), or a machine with more memory"
    )


def available_bytes() -> int | None:
    """Memory that this process may still take, on this machine or in its container, if known."""
    found = []
    try:
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
        limit = (_CGROUP / "memory.max").read_text().strip()
        if limit.isdecimal():
            used = int((_CGROUP / "memory.current").read_text())
            found.append(max(0, int(limit) - used))
    except (OSError, ValueError):
        pass
    return min(found, default=None)


def at_most(picture: Image, max_pixels: int) -> Image:
    """The picture, made smaller where it has more pixels; its proportions stay."""
    width, height = picture.size
    if width * height <= max_pixels:
        return picture
    scale = (max_pixels / (width * height)) ** 0.5
    return picture.resize((max(1, int(width * scale)), max(1, int(height * scale))))
