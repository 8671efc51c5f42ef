"""The tensors of a model on disk: names, shapes and dtypes, and which random matrices they hold.

Whatever the layout on disk, a seed makes the same model: a random matrix belongs to a parameter,
or to one projection of one expert, and the layout only says how these are put together.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.bridge.dtypes import TORCH_NAMES
from megatron.bridge.errors import InputError
from megatron.bridge.models.conversion.expert_layout import ExpertLayout
from megatron.bridge.models.hf_pretrained.scales import SCALE_SUFFIX
from megatron.bridge.models.small_model import SmallModel
from megatron.bridge.synthetic import quantize
from megatron.bridge.synthetic.config_settings import ORIGIN, Settings
from megatron.bridge.tensors.spec import TensorSpec

_EXPERTS = re.compile(r"(?P<module>.*\.mlp\.experts)\.(?P<projection>gate_up_proj|down_proj)")


@dataclass(frozen=True, slots=True)
class RandomTensor:
    """A tensor to be drawn.

    Attributes:
        name: name of the parameter, or of one projection of one expert.
        shape: shape of the tensor.
        dtype: safetensors name of the dtype.
        zero_centred: whether the weights of this norm lie around 0; those of others lie around 1.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    zero_centred: bool = False


@dataclass(frozen=True, slots=True)
class DiskTensor(TensorSpec):
    """A tensor on disk, put together from random ones.

    Attributes:
        experts: the matrices of each expert, which are joined along their first axis (gate above
            up); one entry, the tensor itself, where the tensor is not `fused`.
        fused: whether the experts are stacked.
        transposed: whether the joined matrix of each expert is transposed.
        content: what of a matrix is stored: the "values", the "fp8-values" of its quantized form or
            the "fp8-scales" of that.
        scale_dtype: safetensors name of the dtype of the scales; empty without scales.
    """

    experts: tuple[tuple[RandomTensor, ...], ...]
    fused: bool = False
    transposed: bool = False
    content: str = "values"
    scale_dtype: str = ""


def disk_tensors(family: SmallModel, settings: Settings) -> list[DiskTensor]:
    """The tensors on disk of a model with these settings, before quantization.

    Names and shapes in memory are those of transformers' classes, built without memory on the
    meta device, its tied head left out.
    """
    return [
        tensor
        for name, shape in _parameters(family, settings.config)
        for tensor in _in_layout(family, settings.options, name, shape)
    ]


def in_precision(
    family: SmallModel, settings: Settings, tensors: Iterable[DiskTensor]
) -> list[DiskTensor]:
    """Tensors in the precision that the settings ask for: FP8 values have scales beside them."""
    if not settings.options["fp8"]:
        return list(tensors)
    scale_dtype = TORCH_NAMES[settings.options["fp8_scale_dtype"]]
    return [stored for tensor in tensors for stored in _quantized(family, tensor, scale_dtype)]


def _parameters(
    family: SmallModel, config: Mapping[str, Any]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all parameters, also of those that transformers' class does not have."""
    parameters = partial(_transformers_parameters, family.auto_model)
    tied = config["tie_word_embeddings"]
    for name, shape in parameters(config):
        if not (tied and name == "lm_head.weight"):
            yield name, shape
    yield from family.further_parameters(config, parameters)


def _transformers_parameters(
    auto_model: str, config: Mapping[str, Any]
) -> list[tuple[str, tuple[int, ...]]]:
    import torch
    import transformers
    from transformers.initialization import no_init_weights

    values = copy.deepcopy(dict(config))  # transformers changes what it is given
    try:
        model_config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
        with torch.device("meta"), no_init_weights():
            model = getattr(transformers, auto_model).from_config(model_config)
    except Exception as error:  # its checks raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{ORIGIN} make no model: transformers refuses: {reason}") from error
    return [(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()]


def _in_layout(
    family: SmallModel, options: Mapping[str, Any], name: str, shape: tuple[int, ...]
) -> Iterator[DiskTensor]:
    """One parameter as it is laid out on disk, before quantization."""

    def drawn(name: str, shape: tuple[int, ...]) -> RandomTensor:
        dtype = options["ssm_dtype" if _matches(family.ssm_tensors, name) else "dtype"]
        zero_centred = _matches(family.zero_centred_norms, name)
        return RandomTensor(name, shape, TORCH_NAMES[dtype], zero_centred)

    def stored(tensor: RandomTensor) -> DiskTensor:
        return DiskTensor(tensor.name, tensor.shape, tensor.dtype, ((tensor,),))

    match = _EXPERTS.fullmatch(name)
    if match is None:
        yield stored(drawn(name, shape))
        return
    count, rows, columns = shape
    gated = match["projection"] == "gate_up_proj"
    projections = ("gate_proj", "up_proj") if gated else ("down_proj",)
    matrix = (rows // len(projections), columns)
    experts = tuple(
        tuple(
            drawn(f"{match['module']}.{number}.{projection}.weight", matrix)
            for projection in projections
        )
        for number in range(count)
    )
    further = (o for start, o in family.expert_options.items() if name.startswith(start))
    layout = options[next(further, "experts")]
    if layout == ExpertLayout.PER_EXPERT:
        yield from (stored(part) for expert in experts for part in expert)
        return
    transposed = layout == ExpertLayout.FUSED_TRANSPOSED
    yield DiskTensor(
        name,
        (count, columns, rows) if transposed else shape,
        experts[0][0].dtype,
        experts,
        fused=True,
        transposed=transposed,
    )


def _quantized(family: SmallModel, tensor: DiskTensor, scale_dtype: str) -> Iterator[DiskTensor]:
    """One tensor as it is, or as FP8 values and their scales."""
    if not _matches(family.fp8_matrices, tensor.experts[0][0].name):
        yield tensor
        return
    leading, matrix = tensor.shape[:-2], tensor.shape[-2:]
    for content, suffix, shape, dtype in (
        ("fp8-values", "", matrix, "F8_E4M3"),
        ("fp8-scales", SCALE_SUFFIX, quantize.scale_shape(matrix), scale_dtype),
    ):
        yield DiskTensor(
            tensor.name + suffix,
            (*leading, *shape),
            dtype,
            tensor.experts,
            fused=tensor.fused,
            transposed=tensor.transposed,
            content=content,
            scale_dtype=scale_dtype,
        )


def _matches(pattern: str | None, name: str) -> bool:
    return pattern is not None and re.search(pattern, name) is not None
