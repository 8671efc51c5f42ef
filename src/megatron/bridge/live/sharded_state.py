"""Sharded state dicts, as megatron-core's `dist_checkpointing` gives them to a strategy.

A rank's shards are checked one by one here, and ranks go on together or not at all.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Self

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

from megatron.bridge.dtypes import can_be_cast, safetensors_dtype, widest
from megatron.bridge.errors import InputError, PlanError
from megatron.bridge.formats.file_plans import Sides, is_state
from megatron.bridge.live.local_tensors import LocalTensor
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge, PlanOptions
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.tensors.boxes import Box, Shape, full_box, intersect, tiling_faults
from megatron.bridge.tensors.spec import TensorSpec

_EXTRA_STATE = "_extra_state"
"""In the name of what layers keep beside their weights."""

COMMON_STATE = "common_state"
"""The key under which `dist_checkpointing.save` passes what is not sharded."""


@dataclass(frozen=True)
class Ranks:
    """The ranks that load or save together.

    Attributes:
        group: their process group, None for all of them.
    """

    group: dist.ProcessGroup | None = None

    def together[T](self, step: Callable[[], T]) -> T:
        """What `step` returns here, once every rank has taken it; raises as `all_of`."""
        own: list[T] = []
        self.all_of(lambda: own.append(step()))
        return own[0]

    def all_of[T](self, step: Callable[[], T]) -> list[T]:
        """What every rank's `step` returns, in the order of the ranks.

        Raises:
            Exception: what `step` raises here; InputError if it raises on another rank.
        """
        outcome, error = None, None
        try:
            outcome = step()
        except Exception as raised:  # noqa: BLE001 - the other ranks wait to be told
            error = raised
        message = None if error is None else str(error) or type(error).__name__
        told: list[Any] = [(outcome, message)]
        if dist.is_initialized():
            told *= dist.get_world_size(self.group)
            dist.all_gather_object(told, (outcome, message), self.group)
        if error is not None:
            raise error
        for rank, (_, refusal) in enumerate(told):
            if refusal is not None:
                raise InputError(f"rank {rank} cannot go on: {refusal}")
        return [one for one, _ in told]

    def first(self, step: Callable[[], None]) -> None:
        """One rank takes the step, and the others wait for it; raises as `all_of`."""
        self.together(lambda: step() if self.is_first else None)

    @property
    def is_first(self) -> bool:
        """Whether this is the one that does what is to be done once."""
        return not dist.is_initialized() or dist.get_rank(self.group) == 0


@dataclass(frozen=True)
class Shard:
    """What a rank tells the others of a tensor that it holds a part of.

    Attributes:
        key: of the checkpoint tensor.
        key_shape: the shape of all of it.
        box: the part.
        dtype: safetensors' name.
        is_padded: as of LocalTensor.
    """

    key: str
    key_shape: Shape
    box: Box
    dtype: str
    is_padded: bool

    @classmethod
    def of(cls, local: LocalTensor) -> Self:
        """What is told of a tensor."""
        dtype = safetensors_dtype(local.data.dtype)
        return cls(local.key, local.key_shape, local.box, dtype, local.is_padded)


@dataclass(frozen=True)
class Holding:
    """What ranks have of a sharded state dict.

    Attributes:
        shards: their parts of tensors.
        objects: names of their objects.
    """

    shards: tuple[Shard, ...]
    objects: tuple[str, ...]

    @classmethod
    def of(cls, state: Mapping[str, Any], tensors: Iterable[LocalTensor]) -> Self:
        """What one rank has: these tensors, and the objects of its state."""
        objects = (one for one in nested_values(state) if isinstance(one, ShardedObject))
        names = (one.unique_key for one in objects if one.key != COMMON_STATE)
        return cls(tuple(map(Shard.of, tensors)), tuple(names))

    @classmethod
    def of_all(cls, holdings: Sequence["Holding"]) -> Self:
        """What all ranks have."""
        return cls(
            tuple(chain.from_iterable(one.shards for one in holdings)),
            tuple(chain.from_iterable(one.objects for one in holdings)),
        )

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing at all."""
        return not (self.shards or self.objects)

    def options(self, bridge: MegatronModelBridge) -> PlanOptions:
        """What the keys say of the model that the state is of."""
        objects = {
            name: TensorSpec(name, (), "U8") for name in self.objects
        }  # which have keys, too
        options = bridge.options_of_checkpoint({**objects, **global_tensors(self.shards)})
        rows = (shard.key_shape[0] for shard in self.shards if shard.is_padded)
        return replace(options, padded_vocab_size=options.padded_vocab_size or next(rows, None))


def sharded_tensor(entry: ShardedTensor) -> LocalTensor:
    """A ShardedTensor as what it holds of which box.

    Raises:
        InputError: it has no memory on a device, is flattened, or does not lie in its tensor.
    """
    key, data = entry.key, entry.data
    if entry.flattened_range is not None:
        raise InputError(
            f"{key}: it is flattened, as a distributed optimizer's; give the sharded_state_dict() "
            f"of the model"
        )
    if data is None or data.is_meta:
        raise InputError(f"{key}: it has no memory; give it a tensor on the CPU or a GPU")
    found = LocalTensor.of(entry)
    shape, box = found.key_shape, found.box
    if tuple(data.shape) != tuple(entry.local_shape) or intersect(box, full_box(shape)) != box:
        raise InputError(
            f"{key}: a tensor of shape {tuple(data.shape)} is not the part {box} of shape {shape}"
        )
    return found


def sharded_tensors(state: Mapping[str, Any]) -> Iterator[ShardedTensor]:
    """The tensors of a sharded state dict whose factories are applied.

    Raises:
        InputError: it holds the state of an optimizer, or what is no part of a checkpoint.
    """
    for entry in nested_values(state):
        if isinstance(entry, ShardedTensor | ShardedObject):
            if is_state(entry.key):
                raise InputError(
                    f"{entry.key}: it is the state of training, and Hugging Face files hold "
                    f"weights alone; give the model's part of the sharded state dict"
                )
        else:
            raise InputError(
                f"the sharded state dict holds an object of type {type(entry).__name__}; expected "
                f"ShardedTensor or ShardedObject"
            )
        if isinstance(entry, ShardedTensor):
            yield entry


def check_objects(plan: ConversionPlan, state: Mapping[str, Any]) -> None:
    """Refuse objects that hold more than the weights say.

    Raises:
        InputError: naming the first.
    """
    known = set(plan.extra_states)
    for entry in nested_values(state):
        if not isinstance(entry, ShardedObject) or entry.key == COMMON_STATE:
            continue
        if entry.unique_key in known:
            continue
        if _EXTRA_STATE not in entry.unique_key or not _is_empty(entry.data):
            raise InputError(
                f"{entry.unique_key}: Hugging Face files have no place for an object of type "
                f"{type(entry.data).__name__}; leave it out of the sharded state dict"
            )


def _is_empty(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 0
    return value is None or (hasattr(value, "getvalue") and not value.getvalue())


def global_tensors(shards: Iterable[Shard]) -> dict[str, TensorSpec]:
    """What the shards of all ranks are parts of, by key.

    Raises:
        InputError: two parts differ on a shape, or no dtype holds the values of all parts.
    """
    found: dict[str, TensorSpec] = {}
    for shard in shards:
        known = found.setdefault(shard.key, TensorSpec(shard.key, shard.key_shape, shard.dtype))
        if known.shape != shard.key_shape:
            raise InputError(
                f"{shard.key}: one part is of shape {known.shape}, another of {shard.key_shape}"
            )
        if known.dtype != shard.dtype:
            wide = widest(known.dtype, shard.dtype)
            if wide is None:
                raise InputError(
                    f"{shard.key}: parts of it are in {known.dtype} and {shard.dtype}, and no "
                    f"dtype holds the values of both"
                )
            found[shard.key] = TensorSpec(shard.key, known.shape, wide)
    return found


def check_tensors(sides: Sides, plan: ConversionPlan, found: Mapping[str, TensorSpec]) -> None:
    """Refuse a state that has other tensors than the plan.

    Raises:
        PlanError: for keys that the plan does not have, and for other shapes.
        InputError: no key is one of the model's, or keys are formed as no checkpoint here has them.
    """
    if found and not found.keys() & plan.megatron.keys():
        raise InputError(_of_another_model(sides, plan, found))
    for key in found:
        if key not in plan.megatron and key.endswith("_w") and f"{key[:-2]}_v" in found:
            raise InputError(
                f"{key}: halves of gated layers have keys of their own; make the sharded state "
                f"dict without singleton_local_shards in its metadata"
            )
    problems = [
        f"{key}: no Hugging Face tensor fills it ({spec.form})"
        if (planned := plan.megatron.get(key)) is None
        else f"{key}: the files make {planned.form}, the sharded state dict has {spec.form}"
        for key, spec in found.items()
        if not _is_planned(plan.megatron.get(key), spec)
    ]
    if problems:
        raise PlanError(problems, heading="the sharded state dict is not of the files' model")


def _is_planned(planned: TensorSpec | None, found: TensorSpec) -> bool:
    return (
        planned is not None
        and planned.shape == found.shape
        and can_be_cast(found.dtype, planned.dtype)
    )


def _of_another_model(sides: Sides, plan: ConversionPlan, found: Mapping[str, TensorSpec]) -> str:
    expected, other = next(iter(plan.megatron)), next(iter(found))
    message = (
        f"no key of the sharded state dict is one of {sides.files.name_or_path} in megatron-core: "
        f"expected such as {expected}, found such as {other}"
    )
    for name in sides.bridge.separable:
        root = sides.bridge.part(name, sides.config).root
        if any(root + key in plan.megatron for key in found):
            return f'{message}; it is of the {name} part: give part="{name}"'
    before = [key.removesuffix(expected) for key in found if key.endswith(f".{expected}")]
    if before and sides.config is not sides.files.hf_config:
        return f"{message}; they are of the whole model: leave out part="
    if before:
        return f"{message}; take {before[0]} from the keys"
    return f"{message}; give the sharded_state_dict() of the model itself"


def check_common_state(state: Mapping[str, Any]) -> None:
    """Refuse what megatron-core saves beside the shards.

    Raises:
        InputError: there is any.
    """
    for entry in nested_values(state):
        if isinstance(entry, ShardedObject) and entry.key == COMMON_STATE and entry.data:
            raise InputError(
                f"{', '.join(map(str, entry.data))}: Hugging Face files have no place for this "
                f"part of the state dict; save it elsewhere"
            )


def check_whole(plan: ConversionPlan, shards: Iterable[Shard]) -> None:
    """Refuse ranks that together do not hold every tensor, or hold something twice.

    Raises:
        PlanError: with each fault.
    """
    boxes: dict[str, list[Box]] = {key: [] for key in plan.megatron}
    for shard in shards:
        boxes[shard.key].append(shard.box)
    problems = [
        f"{key}: {fault}"
        for key, spec in plan.megatron.items()
        for fault in (
            ["no rank holds it"] if not boxes[key] else tiling_faults(spec.shape, boxes[key])
        )
    ]
    if problems:
        raise PlanError(problems, heading="the ranks do not hold the model once")
