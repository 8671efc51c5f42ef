"""What callers of AutoBridge give, as what is made of it; refused by value where it is nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from megatron.bridge.dtypes import DType
from megatron.bridge.errors import InputError
from megatron.bridge.models.conversion.casting import Casting
from megatron.bridge.models.hf_pretrained.config import HFConfig
from megatron.bridge.models.hf_pretrained.quantization import CONFIG_KEY, BlockFP8, quantization_of
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.paths import PathLike
from megatron.bridge.text.quoting import quoted

if TYPE_CHECKING:
    import torch

type Rounding = bool | str | Collection[str]
"""Whether values that do not fit are rounded, or the names of the tensors whose values are, with
``*`` for anything."""


def check_device_map(method: str, given: Any) -> None:
    """Raise InputError for a device that nothing will be on."""
    if given not in (None, "cpu", "auto"):
        raise InputError(
            f"device_map={given!r}: {method} loads no model of transformers, files are read as "
            "they are; leave it out"
        )


def require_process_group(asked: str) -> None:
    """Raise InputError for what is asked of ranks that do not know one another."""
    import torch.distributed as dist

    if not dist.is_initialized():
        raise InputError(
            f"{asked}: torch.distributed is not initialized; call "
            "torch.distributed.init_process_group() first, or leave it out"
        )


def unless_auto(dtype: DType | None) -> DType | None:
    """A dtype; None for that of the files, which "auto" asks for, too."""
    return None if dtype == "auto" else dtype


def check_dtype(given: torch.dtype | str | None, source: PreTrainedVLM) -> None:
    """Raise InputError for a dtype that the weights of an import will not have."""
    from megatron.bridge.dtypes import torch_dtype

    if given is None or given == "auto":
        return
    name, main = str(given).removeprefix("torch."), torch_dtype(source.main_dtype)
    if name != str(main).removeprefix("torch."):
        raise InputError(
            f"torch_dtype={given!r}: import_ckpt keeps the dtype of every tensor, and most of "
            f"{source.name_or_path} are {main}; leave it out"
        )


def quantization_of_targets(
    hf: PreTrainedVLM, given: PathLike | Mapping[str, Any] | None
) -> BlockFP8 | None:
    """How targets in FP8 are quantized.

    Args:
        hf: the model; as it is quantized, if nothing else is given.
        given: a release that is quantized so, or its `quantization_config`.

    Raises:
        InputError: the release is not quantized.
    """
    if given is None:
        return hf.quantization
    if isinstance(given, Mapping):
        return quantization_of(HFConfig.from_dict({CONFIG_KEY: given}, "fp8"))
    release = PreTrainedVLM.from_pretrained(given)
    if release.quantization is None:
        raise InputError(f"fp8={quoted(given)}: it is not quantized; give the release in FP8")
    return release.quantization


def casting_of(
    round: Rounding,  # noqa: A002 - the name of the option
    names: Iterable[str] = (),
) -> Casting:
    """What becomes of values that do not fit.

    Args:
        round: whether they are rounded, or the names or patterns of tensors of which they are.
        names: of all tensors.

    Raises:
        InputError: a pattern is of none of them.
    """
    ways_out = "round=True rounds them, dtype=torch.float32 keeps them"
    if isinstance(round, bool):
        return Casting(round, ways_out)
    patterns = (round,) if isinstance(round, str) else tuple(round)
    casting = Casting(
        False, f"{ways_out}; round={quoted(list(patterns))} has no such name", patterns
    )
    casting.check_names(names)
    return casting
