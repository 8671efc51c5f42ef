"""What a live Megatron model holds, as the tensors of a checkpoint.

megatron-core says where every parameter lives: `sharded_state_dict()` gives, on each rank, the
checkpoint key, the box of the global tensor and a view of the parameter's memory, for any layer
spec and any parallel layout. So nothing about sharding is written here.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    apply_factories,
    is_main_replica,
)

from megatron.bridge.dtypes import safetensors_dtype, widest
from megatron.bridge.errors import InputError, PlanError
from megatron.bridge.exchange.low_rank import LowRank
from megatron.bridge.models.conversion.casting import EXACTLY
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.models.wrapping import unwrapped
from megatron.bridge.runtime.cpu import megatron_on_cpu
from megatron.bridge.tensors.arrays import Array, copy
from megatron.bridge.tensors.boxes import (
    Box,
    BoxIndex,
    Shape,
    box_shape,
    relative,
    slices,
    volume,
)
from megatron.bridge.tensors.spec import TensorSpec
from megatron.bridge.tensors.torch_views import as_array


@dataclass(frozen=True)
class LocalTensor:
    """What one rank holds of a checkpoint tensor: its box, and the memory it lies in.

    Attributes:
        key: of the checkpoint tensor.
        key_shape: the shape of all of it.
        box: the part that this rank holds.
        data: the memory, a view of the parameter.
        is_padded: whether megatron-core lets its rows differ from the checkpoint's (a padded
            vocabulary).
        is_main: whether this is the replica that is saved, of the same part on several ranks.
        added: what is merged into its values where they are moved.
    """

    key: str
    key_shape: Shape
    box: Box
    data: torch.Tensor
    is_padded: bool
    is_main: bool
    added: LowRank | None = None

    def copy(self) -> Self:
        """The same in memory of its own."""
        added = None if self.added is None else self.added.copy()
        data = self.data.detach().clone(memory_format=torch.contiguous_format)
        return replace(self, data=data, added=added)

    @property
    def memory(self) -> Iterator[torch.Tensor]:
        """All that its values are made of."""
        yield self.data
        if self.added is not None:
            yield from (self.added.a, self.added.b)

    @classmethod
    def of(cls, entry: ShardedTensor) -> Self:
        """What a tensor of a sharded state dict says of itself."""
        # Axes that stand for the layer or the expert are not part of the local tensor.
        local = (1,) * entry.prepend_axis_num + tuple(entry.local_shape)
        box = tuple(
            (start, start + size) for start, size in zip(entry.global_offset, local, strict=True)
        )
        shape = tuple(entry.global_shape)
        return cls(
            entry.key,
            shape,
            box,
            entry.data.detach(),
            entry.allow_shape_mismatch,
            is_main_replica(entry.replica_id),
        )


def local_tensors(
    model: Sequence[torch.nn.Module], merge: Sequence[LowRank] = ()
) -> list[LocalTensor]:
    """Everything that this rank's chunks hold; `data` are views of the parameters.

    Args:
        model: the chunks.
        merge: adapters; they are no tensors of the model, but added to those of their weights.

    Raises:
        InputError: an adapter does not fit, or is of no parameter of the model.
        PlanError: the model's `sharded_state_dict()` does not show all of a parameter, so nothing
            would fill it, nor save it.
    """
    found: list[LocalTensor] = []
    for chunk in unwrapped(model):
        with megatron_on_cpu():
            state = chunk.sharded_state_dict()
            apply_factories(state)
        for entry in nested_values(state):
            if not isinstance(entry, ShardedTensor):
                continue
            found.append(LocalTensor.of(entry))
    factors = {id(factor) for one in merge for factor in (one.a, one.b)}
    if problems := list(_hidden(model, found, factors)):
        raise PlanError(problems, heading="the model keeps parameters from its checkpoints")
    return _merged(model, found, merge) if merge else found


def _merged(
    model: Sequence[torch.nn.Module], tensors: Iterable[LocalTensor], merge: Sequence[LowRank]
) -> list[LocalTensor]:
    """The tensors without the adapters, which are added to those of their weights."""
    names = {id(parameter): name for name, _, parameter in named_parameters(model)}
    factors = {_Place.of(factor).start() for one in merge for factor in (one.a, one.b)}
    for one in merge:
        if (name := names.get(id(one.weight))) is None:
            raise InputError(
                f"merge has a weight of shape {tuple(one.weight.shape)} that is no parameter of "
                f"the model; give the parameters themselves"
            )
        one.check(name)
    found = []
    for local in tensors:
        place = _Place.of(local.data)
        if place.start() in factors:
            continue
        for one in merge:
            whole, inputs = _Place.of(one.weight), one.weight.shape[1]
            first = place.offset - whole.offset
            if place.storage == whole.storage and 0 <= first < one.weight.numel():
                row, column = divmod(first, inputs)
                if local.added is not None or column or local.data.shape[-1:] != (inputs,):
                    raise InputError(
                        f"{names[id(one.weight)]}: {local.key} is not rows of it, or has two "
                        f"adapters; merge them before"
                    )
                local = replace(local, added=one.rows(row, row + local.data.numel() // inputs))
        found.append(local)
    return found


def _hidden(
    model: Sequence[torch.nn.Module], tensors: Sequence[LocalTensor], without: Collection[int]
) -> Iterator[str]:
    """Parameters that the tensors are not all of the memory of, one by one.

    Those whose ids are in `without` may be hidden.
    """
    # A tied weight has two keys and the same memory.
    views = {_Place.of(local.data): local.data.numel() for local in tensors}
    places = sorted(views, key=_Place.start)
    starts = [place.start() for place in places]
    for name, _, parameter in named_parameters(model):
        whole = _Place.of(parameter)
        if whole in views or id(parameter) in without:
            continue
        storage, offset = whole.start()
        first = bisect_left(starts, (storage, offset))
        last = bisect_left(starts, (storage, offset + parameter.numel()))
        shown = sum(views[place] for place in places[first:last])
        if shown != parameter.numel():
            yield (
                f"{name}: {shown} of its {parameter.numel()} values are in the model's "
                f"sharded_state_dict()"
            )


class _Place(NamedTuple):
    """Where the elements of a tensor are; equal for views of the same ones."""

    storage: int
    offset: int
    shape: Shape
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Self:
        # Also on the meta device, where nothing has an address.
        storage = tensor.untyped_storage()._cdata
        return cls(storage, int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride())

    def start(self) -> tuple[int, int]:
        return self.storage, self.offset


def named_parameters(
    model: Sequence[torch.nn.Module],
) -> Iterator[tuple[str, torch.nn.Module, torch.nn.Parameter]]:
    """(name, owning module, parameter) of every parameter of this rank's chunks.

    A layer's number is that in the whole model, not that on this pipeline stage.
    """
    for chunk in unwrapped(model):
        seen: set[int] = set()  # a tied weight has the name of its first owner
        prefixes = {"": ""}
        for path, module in chunk.named_modules():
            if path:
                parent, _, part = path.rpartition(".")
                number = getattr(module, "layer_number", None) if part.isdecimal() else None
                part = part if number is None else str(number - 1)
                prefixes[path] = f"{prefixes[parent]}{part}."
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield prefixes[path] + name, module, parameter


class LiveTensors:
    """Checkpoint tensors read from the parameters of this rank, in their own dtypes: a Source.

    Attributes:
        tensors: by key. Where parameters that share a key differ in dtype, it has the widest.
    """

    def __init__(self, tensors: Iterable[LocalTensor]) -> None:
        by_key: dict[str, list[tuple[Box, LocalTensor]]] = defaultdict(list)
        for local in tensors:
            by_key[local.key].append((local.box, local))
        self._indexes = {key: BoxIndex(items) for key, items in by_key.items()}
        self.tensors = {
            key: TensorSpec(key, parts[0][1].key_shape, _common_dtype(key, parts))
            for key, parts in by_key.items()
        }

    def dtype_of(self, name: str) -> str:
        """The dtype of a key. Raises InputError if this rank holds nothing of it."""
        return self._known(name).dtype

    def read_into(self, name: str, box: Box, out: Array) -> None:
        """Copy one box of a key. Raises InputError if this rank does not hold all of it."""
        self._known(name)
        parts = list(self._indexes[name].overlapping(box))
        if sum(volume(shared) for shared, _ in parts) != volume(box):
            raise self._split(name)
        for shared, local in parts:
            whole = local.data.detach().reshape(box_shape(local.box))
            part = as_array(whole[slices(relative(shared, local.box))].cpu())
            copy(EXACTLY.cast(part, out.dtype, name), out[slices(relative(shared, box))])

    def _known(self, name: str) -> TensorSpec:
        if name not in self.tensors:
            raise self._split(name)
        return self.tensors[name]

    def _split(self, name: str) -> InputError:
        return InputError(
            f"{name}: this rank holds only a part of it, and export_hf_weights gives whole "
            f"tensors; save_hf_pretrained writes models that are split over ranks"
        )


def _common_dtype(key: str, parts: Sequence[tuple[Box, LocalTensor]]) -> str:
    dtypes = {safetensors_dtype(local.data.dtype) for _, local in parts}
    dtype = widest(*dtypes)
    if dtype is None:
        raise InputError(
            f"{key}: parameters of the model that share this key are in {sorted(dtypes)}, and no "
            f"dtype holds the values of all; cast them to one"
        )
    return dtype


def with_memory(tensors: list[LocalTensor]) -> list[LocalTensor]:
    """The tensors. Raises InputError where one has no memory."""
    for local in tensors:
        if local.data.is_meta:
            raise InputError(
                f"{local.key}: its parameter is on the meta device and holds no values; give the "
                f"chunks memory first, as by chunk.to_empty(device='cpu')"
            )
    return tensors


def check_planned(plan: ConversionPlan, tensors: Iterable[LocalTensor]) -> None:
    """Refuse what this rank holds and the plan does not fill.

    Raises:
        PlanError: with each difference.
    """
    if problems := list(_mismatches(plan, tensors)):
        raise PlanError(problems, heading="the model is not the one that the files hold")


def _mismatches(plan: ConversionPlan, tensors: Iterable[LocalTensor]) -> Iterator[str]:
    for local in tensors:
        spec = plan.megatron.get(local.key)
        if spec is None:
            yield f"{local.key}: no Hugging Face tensor fills it"
        elif spec.shape != local.key_shape:
            yield f"{local.key}: the files make shape {spec.shape}, the model has {local.key_shape}"
        else:
            filled = sum(
                volume(shared) for shared, _ in plan.joined_copies_to(local.key, local.box)
            )
            filled += sum(map(volume, plan.padding_in(local.key, local.box)))
            if filled != volume(local.box):
                yield (
                    f"{local.key}: the files fill {filled} of the {volume(local.box)} values of "
                    f"{local.box}"
                )
