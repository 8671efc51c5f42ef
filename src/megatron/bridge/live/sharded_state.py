"""Sharded state dicts, as megatron-core's `dist_checkpointing` gives them to a strategy."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Self

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

from megatron.bridge.dtypes import can_be_cast
from megatron.bridge.errors import InputError, PlanError
from megatron.bridge.exchange.roster import Shard, global_tensors
from megatron.bridge.formats.file_plans import Sides, is_state
from megatron.bridge.live.local_tensors import LocalTensor
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge, PlanOptions
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.tensors.boxes import full_box, intersect
from megatron.bridge.tensors.spec import TensorSpec

_EXTRA_STATE = "_extra_state"
"""In the name of what layers keep beside their weights."""

COMMON_STATE = "common_state"
"""The key under which `dist_checkpointing.save` passes what is not sharded."""


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
