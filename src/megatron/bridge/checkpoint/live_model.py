"""Weights of live Megatron models: filled from and read as Hugging Face tensors, by the plan.

megatron-core says where every parameter lives: `sharded_state_dict()` gives, on each rank, the
checkpoint key, the box of the global tensor and a view of the parameter's memory, for any layer
spec and any parallel layout. So nothing about sharding is written here.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from megatron.bridge.dtypes import safetensors_dtype
from megatron.bridge.errors import InputError, PlanError
from megatron.bridge.models.conversion.boxes import (
    Box,
    BoxIndex,
    Shape,
    box_shape,
    full_box,
    relative,
    slices,
    tiling_faults,
    volume,
)
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.models.conversion.transfer import Source, read_hf, read_megatron
from megatron.bridge.models.wrapping import unwrapped
from megatron.bridge.progress import Progress, Silent
from megatron.bridge.runtime.cpu import megatron_on_cpu


@dataclass(frozen=True)
class LocalTensor:
    """What one rank holds of a checkpoint tensor: its box, and the memory it lies in.

    is_padded: megatron-core lets its rows differ from the checkpoint's (a padded vocabulary).
    """

    key: str
    key_shape: Shape
    box: Box
    data: torch.Tensor
    is_padded: bool


def local_tensors(model: Sequence[torch.nn.Module]) -> list[LocalTensor]:
    """Everything that this rank's chunks hold; `data` are views of the parameters."""
    found = []
    for chunk in unwrapped(model):
        with megatron_on_cpu():
            state = chunk.sharded_state_dict()
            apply_factories(state)
        for entry in nested_values(state):
            if not isinstance(entry, ShardedTensor):
                continue
            # Axes that stand for the layer or the expert are not part of the local tensor.
            local = (1,) * entry.prepend_axis_num + tuple(entry.local_shape)
            box = tuple(
                (start, start + size)
                for start, size in zip(entry.global_offset, local, strict=True)
            )
            shape = tuple(entry.global_shape)
            found.append(LocalTensor(entry.key, shape, box, entry.data, entry.allow_shape_mismatch))
    return found


def named_parameters(
    model: Sequence[torch.nn.Module],
) -> Iterator[tuple[str, torch.nn.Module, torch.nn.Parameter]]:
    """(name, owning module, parameter) of every parameter of this rank's chunks.

    A layer's number is that in the whole model, not that on this pipeline stage.
    """
    for chunk in unwrapped(model):
        modules = dict(chunk.named_modules())
        for local_name, parameter in chunk.named_parameters():
            module_name, _, own_name = local_name.rpartition(".")
            name, owner = "", chunk
            for part in module_name.split("."):
                owner = owner[int(part)] if part.isdecimal() else getattr(owner, part)
                number = getattr(owner, "layer_number", None) if part.isdecimal() else None
                name += f"{part if number is None else number - 1}."
            yield name + own_name, modules[module_name], parameter


@torch.no_grad()
def load_weights(
    model: Sequence[torch.nn.Module],
    plan: ConversionPlan,
    source: Source,
    progress: Progress | None = None,
) -> None:
    """Fill this rank's parameters; each rank reads only the boxes that it holds.

    model: the chunks of this rank. source: of Hugging Face tensors. Values are cast to the dtype of
    the parameter. Raises PlanError, before anything is written, if the model and the plan do not
    have the same tensors; InputError if a norm's w - 1 does not fit its parameter exactly.
    """
    tensors = local_tensors(model)
    if problems := list(_mismatches(plan, tensors)):
        raise PlanError(problems, heading="the model is not the one that the files hold")
    shown = progress or Silent()
    shown.start("load", sum(local.data.nbytes for local in tensors))
    shifted = {copy.megatron_key for copy in plan.copies if copy.offset}
    for local in tensors:
        tensor = read_megatron(plan, local.key, local.box, source)
        if local.key in shifted:  # the file's own values may not survive in a narrower dtype
            tensor = _exactly(tensor, local.data.dtype, local.key)
        local.data.copy_(tensor.view(local.data.shape))
        shown.advance(local.data.nbytes)


@torch.no_grad()
def export_weights(
    model: Sequence[torch.nn.Module], plan: ConversionPlan
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every Hugging Face tensor that the model holds, by name, on the model's device.

    Raises PlanError if the model and the plan do not have the same tensors, InputError if this
    rank does not hold all of the model or if a value does not fit the plan's dtype exactly.
    """
    source = LiveTensors(model, plan)
    for name, spec in plan.hf.items():
        if name in plan.carried:
            continue
        yield name, read_hf(plan, name, full_box(spec.shape), source)


class LiveTensors:
    """Checkpoint tensors read from the parameters of this rank, in the plan's dtypes: a Source."""

    def __init__(self, model: Sequence[torch.nn.Module], plan: ConversionPlan) -> None:
        """Raises PlanError if the model and the plan do not have the same tensors."""
        tensors = local_tensors(model)
        if problems := list(_mismatches(plan, tensors)):
            raise PlanError(problems, heading="the model is not the one that the files hold")
        by_key: dict[str, list[tuple[Box, LocalTensor]]] = defaultdict(list)
        for local in tensors:
            by_key[local.key].append((local.box, local))
        self._plan = plan
        self._indexes = {key: BoxIndex(items) for key, items in by_key.items()}

    def dtype_of(self, name: str) -> str:
        """The dtype that the plan gives a key."""
        return self._plan.megatron[name].dtype

    def read_into(self, name: str, box: Box, out: torch.Tensor) -> None:
        """Copy one box of a key. Raises InputError if this rank does not hold all of it.

        Also if a value does not fit the dtype of the plan exactly.
        """
        index = self._indexes.get(name)
        parts = [] if index is None else list(index.overlapping(box))
        if sum(volume(shared) for shared, _ in parts) != volume(box):
            raise InputError(
                f"{name}: this rank holds only a part of it; exporting from models that are "
                f"split over ranks is not supported yet, save a Megatron checkpoint and export that"
            )
        for shared, local in parts:
            whole = local.data.reshape(box_shape(local.box))
            part = _exactly(whole[slices(relative(shared, local.box))], out.dtype, name)
            out[slices(relative(shared, box))] = part


def in_dtype(plan: ConversionPlan, dtype: torch.dtype) -> ConversionPlan:
    """The same plan for files and checkpoint tensors in one dtype."""
    name = safetensors_dtype(dtype)
    return replace(
        plan,
        hf={key: replace(spec, dtype=name) for key, spec in plan.hf.items()},
        megatron={key: replace(spec, dtype=name) for key, spec in plan.megatron.items()},
    )


def _exactly(tensor: torch.Tensor, dtype: torch.dtype, key: str) -> torch.Tensor:
    """`tensor` in `dtype`. Raises InputError if that changes a value."""
    cast = tensor.to(dtype)
    if tensor.dtype == dtype:
        return cast
    back = cast.to(tensor.dtype)
    if not torch.equal(back.nan_to_num(), tensor.nan_to_num()):
        error = (back - tensor).abs().max().item()
        raise InputError(
            f"{key}: values in {tensor.dtype} do not fit {dtype} exactly "
            f"(off by up to {error:.3g}); export with dtype={tensor.dtype} to keep them, "
            f"or cast the model first"
        )
    return cast


def _mismatches(plan: ConversionPlan, tensors: list[LocalTensor]) -> Iterator[str]:
    held: dict[str, list[Box]] = defaultdict(list)
    for local in tensors:
        spec = plan.megatron.get(local.key)
        if spec is None:
            yield f"{local.key}: no Hugging Face tensor fills it"
        elif spec.shape != local.key_shape:
            yield f"{local.key}: the files make shape {spec.shape}, the model has {local.key_shape}"
        else:
            held[local.key].append(local.box)
    if dist.is_initialized() and dist.get_world_size() > 1:
        return  # other ranks hold the rest
    for key, spec in plan.megatron.items():
        # A tied output layer shows its weight once more under the key of the embedding.
        for fault in tiling_faults(spec.shape, dict.fromkeys(held[key])):
            yield f"{key}: the model does not hold all of it: {fault}"
