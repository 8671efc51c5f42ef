"""Whether and how the weights of a model are quantized, by its config and by its files.

Supported is FP8 by block, see `fp8`. For everything else there is one error that says what it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from megatron.bridge.errors import CheckpointError, ConfigError, UnsupportedModel
from megatron.bridge.models.hf_pretrained.config import MAX_COUNT, TEXT, HFConfig
from megatron.bridge.models.hf_pretrained.other_quantization import (
    is_plain,
    other_quantization,
    scaled_as_a_whole,
)
from megatron.bridge.models.hf_pretrained.scales import SCALE_SUFFIX
from megatron.bridge.tensors.boxes import Box
from megatron.bridge.tensors.spec import TensorSpec
from megatron.bridge.text.quoting import quoted

CONFIG_KEY = "quantization_config"
STORED_DTYPE = "F8_E4M3"
"""Of quantized weights."""

SCALE_DTYPES = ("F32", "BF16")
"""That scales may have."""

_OTHER_RELEASE = "Use the release in BF16, or in FP8 by block"


LARGEST_E4M3 = 448.0
"""The largest number of the dtype that weights are quantized to."""


@dataclass(frozen=True, slots=True)
class BlockFP8:
    """How a model is quantized: the rows and columns that share a scale."""

    rows: int
    columns: int
    method: str = field(default="fp8", init=False)

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the scales of a weight [..., out, in]."""
        *leading, rows, columns = shape
        return (*leading, -(-rows // self.rows), -(-columns // self.columns))

    def scale_box(self, box: Box) -> Box:
        """The box of the scales of all blocks that a box of a weight touches."""
        *leading, (row, row_end), (column, column_end) = box
        return (
            *leading,
            (row // self.rows, -(-row_end // self.rows)),
            (column // self.columns, -(-column_end // self.columns)),
        )

    def first(self, box: Box) -> tuple[int, int]:
        """Where the first value of a box of a weight lies inside of its block: row and column."""
        *_, (row, _), (column, _) = box
        return row % self.rows, column % self.columns

    def __str__(self) -> str:
        return f"fp8, one scale for each block of {self.rows}x{self.columns}"


def quantization_of(
    config: HFConfig, tensors: Mapping[str, TensorSpec] | None = None
) -> BlockFP8 | None:
    """How the weights of a model are quantized, by its config; None if they are not.

    Args:
        config: of the model.
        tensors: those of the files, where they are at hand.

    Raises:
        UnsupportedModel: the quantization is any other.
        ConfigError: it is incomplete, or the files do not have it.
    """
    stated = [key for key in (CONFIG_KEY, f"{TEXT}.{CONFIG_KEY}") if _states(config, key)]
    if stated and tensors is not None and _is_plain(tensors):
        raise ConfigError(
            f"{config.origin}: {stated[0]} was left behind: the weights are not quantized, all are "
            f"{', '.join(sorted({tensor.dtype for tensor in tensors.values()}))}. Remove "
            f"{stated[0]} from it"
        )
    if CONFIG_KEY not in stated and stated:
        raise UnsupportedModel(
            f"{config.origin}: {CONFIG_KEY} stands in {TEXT}; a model that is quantized in "
            f"part is not supported. {_OTHER_RELEASE} as a whole"
        )
    if not stated:
        return None
    section = config.section(CONFIG_KEY)
    method = section.require("quant_method", str)
    if method != "fp8":
        raise UnsupportedModel(
            f"{config.origin}: the weights are quantized by {quoted(method)}; supported is 'fp8' "
            f"with blocks (weight_block_size). {_OTHER_RELEASE}"
        )
    for key, only in (("fmt", "e4m3"), ("activation_scheme", "dynamic")):
        if section.has(key) and section.require(key, str) != only:
            raise UnsupportedModel(
                f"{config.origin}: {CONFIG_KEY}.{key} is {quoted(section.require(key, str))}; "
                f"supported is {only!r}"
            )
    block = section.list_of("weight_block_size", int)
    if len(block) != 2 or not all(0 < size <= MAX_COUNT for size in block):
        raise ConfigError(
            f"{config.origin}: {CONFIG_KEY}.weight_block_size must be two counts, as in "
            f"[128, 128]; found {quoted(block)}"
        )
    return BlockFP8(*block)


def _states(config: HFConfig, key: str) -> bool:
    """Whether a config states a quantization. One without entries is none, as in transformers."""
    section, _, name = key.rpartition(".")
    data = config.data.get(section) if section else config.data
    return isinstance(data, dict) and data.get(name) not in (None, {})


def states_quantization(config: HFConfig) -> bool:
    """Whether a config says at its top level that the weights are quantized."""
    return _states(config, CONFIG_KEY)


def _is_plain(tensors: Mapping[str, TensorSpec]) -> bool:
    return all(is_plain(tensor.dtype) for tensor in tensors.values()) and not any(
        name.endswith(SCALE_SUFFIX) for name in tensors
    )


def check_tensors(
    tensors: Mapping[str, TensorSpec], quantization: BlockFP8 | None, origin: str
) -> None:
    """Check that files are quantized as their config says, and in no other way.

    A tensor in FP8 that has no scales may lie beside the model: see `lacks_scales`.

    Args:
        tensors: those of the files.
        quantization: by the config.
        origin: of the files, to begin a message with.

    Raises:
        UnsupportedModel: they are quantized in another way.
        CheckpointError: they are quantized, and the config does not say so; or scales do not fit
            their weights. The message has the one cause, with a few of the tensors.
    """
    if (other := _other_method(tensors, quantization)) is not None:
        method, name = other
        raise UnsupportedModel(
            f"{origin}: the weights are quantized by {method}, which is not supported: {name} "
            f"belongs to it. {_OTHER_RELEASE}"
        )
    causes: dict[str, list[str]] = {}
    for cause, problem in _problems(tensors, quantization):
        causes.setdefault(cause, []).append(problem)
    if causes:
        cause = max(causes, key=lambda cause: len(causes[cause]))
        problems = causes.pop(cause)
        others = (problem for of_cause in causes.values() for problem in of_cause)
        raise CheckpointError.of_problems(f"{origin}: {cause}", problems, others)


def _other_method(
    tensors: Mapping[str, TensorSpec], quantization: BlockFP8 | None
) -> tuple[str, str] | None:
    """A quantization that is not by block, and a tensor that only it has.

    Names alone do not say it: where all dtypes are those of weights, nothing is quantized.
    """
    if all(is_plain(tensor.dtype) for tensor in tensors.values()):
        return None
    if (other := other_quantization(tensors)) is not None:
        return other
    in_fp8 = any(tensor.dtype.startswith("F8_") for tensor in tensors.values())
    by_block = any(name.endswith(SCALE_SUFFIX) for name in tensors)
    if in_fp8 and not by_block and quantization is None:
        return scaled_as_a_whole(tensors)
    return None


_NOT_SAID = (
    f"the weights are quantized, and config.json has no {CONFIG_KEY}; take the config.json that "
    "belongs to them"
)
_DISAGREE = (
    f"scales and weights do not fit each other; check that config.json ({CONFIG_KEY}) belongs to "
    "these files, and that they are all of one release"
)


def _problems(
    tensors: Mapping[str, TensorSpec], quantization: BlockFP8 | None
) -> Iterator[tuple[str, str]]:
    """Causes, each with a problem."""
    said = quantization is not None or any(name.endswith(SCALE_SUFFIX) for name in tensors)
    for name, tensor in tensors.items():
        if name.endswith(SCALE_SUFFIX):
            weight = name.removesuffix(SCALE_SUFFIX)
            if weight not in tensors:
                yield _DISAGREE, f"{name}: its weight {weight} is missing"
            elif quantization is not None:
                for problem in _scale_problems(name, tensor, tensors[weight], quantization):
                    yield _DISAGREE, problem
            elif not tensors[weight].dtype.startswith("F8_"):
                yield (
                    _DISAGREE,
                    f"{name}: its weight is {tensors[weight].dtype}, not {STORED_DTYPE}",
                )
        elif tensor.dtype.startswith("F8_"):
            if quantization is None and said:
                yield _NOT_SAID, f"{name}: {tensor.dtype}, but config.json has no {CONFIG_KEY}"
            elif quantization is not None and tensor.dtype != STORED_DTYPE:
                yield _DISAGREE, f"{name}: {tensor.dtype}; quantized weights are {STORED_DTYPE}"


def _scale_problems(
    name: str, scale: TensorSpec, weight: TensorSpec, quantization: BlockFP8
) -> Iterator[str]:
    if weight.dtype != STORED_DTYPE:
        yield f"{name}: its weight is {weight.dtype}, not {STORED_DTYPE}"
    if scale.dtype not in SCALE_DTYPES:
        yield f"{name}: {scale.dtype}; scales are {' or '.join(SCALE_DTYPES)}"
    if len(weight.shape) < 2:
        yield f"{name}: its weight has shape {tuple(weight.shape)}; blocks need two axes"
        return
    expected, found = quantization.scale_shape(tuple(weight.shape)), tuple(scale.shape)
    if expected != found:
        yield (
            f"{name}: a weight of shape {tuple(weight.shape)} in blocks of {quantization.rows}x"
            f"{quantization.columns} has scales of shape {expected}, found {found}"
        )
