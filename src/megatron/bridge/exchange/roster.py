"""Which rank holds which part of which tensor."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import chain, compress
from typing import Any, NamedTuple, Protocol, Self

from megatron.bridge.dtypes import safetensors_dtype, widest
from megatron.bridge.errors import InputError, PlanError
from megatron.bridge.tensors.boxes import Box, Shape, joined, tiling_faults
from megatron.bridge.tensors.spec import TensorSpec


class Addition(Protocol):
    """What is added to values, see `low_rank.LowRank`."""

    def added_to(self, values: Any, rows: slice, columns: slice) -> Any: ...


class Held(Protocol):
    """What a rank holds of a checkpoint tensor, see `live.local_tensors.LocalTensor`."""

    @property
    def key(self) -> str: ...
    @property
    def key_shape(self) -> Shape: ...
    @property
    def box(self) -> Box: ...
    @property
    def data(self) -> Any: ...
    @property
    def is_padded(self) -> bool: ...
    @property
    def is_main(self) -> bool: ...
    @property
    def added(self) -> "Addition | None": ...


class Telling(Protocol):
    """Ranks that tell one another, see `runtime.ranks.Ranks`."""

    @property
    def numbers(self) -> Sequence[int]: ...
    def all_once[T](self, own: T) -> list[T]: ...
    def all_of[T](self, step: Callable[[], T]) -> list[T]: ...


class Shard(NamedTuple):
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
    def of(cls, local: Held) -> "Shard":
        """What is told of a tensor."""
        dtype = safetensors_dtype(local.data.dtype)
        return cls(local.key, local.key_shape, local.box, dtype, local.is_padded)


@dataclass(frozen=True)
class Roster:
    """What the ranks hold of a model.

    Attributes:
        by_rank: the shards of each rank, in the order of the ranks. Replicas share one tuple.
        main: of which of these a rank holds the main replica, by rank.
    """

    by_rank: tuple[tuple[Shard, ...], ...]
    main: tuple[tuple[bool, ...], ...]

    @classmethod
    def of(cls, ranks: Telling, tensors: Sequence[Held]) -> Self:
        """What all ranks hold, once each has told it. Of replicas one tells all.

        Args:
            ranks: all call this.
            tensors: those of this rank.
        """
        own = _shared(map(Shard.of, tensors))
        main = ranks.all_of(lambda: tuple(one.is_main for one in tensors))
        return cls(tuple(ranks.all_once(own)), tuple(main))

    @classmethod
    def alone(cls, tensors: Sequence[Held]) -> Self:
        """What one rank holds, without the others."""
        return cls((tuple(map(Shard.of, tensors)),), (tuple(one.is_main for one in tensors),))

    @property
    def shards(self) -> Iterator[Shard]:
        """Those of all ranks; what replicas hold once."""
        return chain.from_iterable({id(own): own for own in self.by_rank}.values())

    def main_of(self, rank: int) -> Iterator[Shard]:
        """Of what a rank holds the main replica; those of all ranks are the model, once."""
        return compress(self.by_rank[rank], self.main[rank])

    @property
    def main_shards(self) -> Iterator[Shard]:
        """The main replicas of all ranks."""
        return chain.from_iterable(map(self.main_of, range(len(self.by_rank))))

    @cached_property
    def holders(self) -> dict[str, dict[Box, tuple[int, ...]]]:
        """The ranks that hold each box, in ascending order, by key and box.

        Neighbours that the same ranks hold are one box, such as experts that follow one another.
        """
        replicas: dict[int, list[int]] = defaultdict(list)
        for rank, own in enumerate(self.by_rank):
            replicas[id(own)].append(rank)
        of_key: dict[str, dict[Box, list[int]]] = defaultdict(dict)
        for number in replicas:
            for shard in self.by_rank[replicas[number][0]]:
                of_key[shard.key].setdefault(shard.box, []).append(number)

        # There are few sets of ranks and many boxes.
        @cache
        def ranks_of(numbers: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(sorted({rank for number in numbers for rank in replicas[number]}))

        return {
            key: dict(_joined((box, ranks_of(tuple(numbers))) for box, numbers in boxes.items()))
            for key, boxes in of_key.items()
        }

    def check_held(self, tensors: Mapping[str, TensorSpec]) -> None:
        """Refuse ranks that together do not hold all of some tensors.

        Raises:
            PlanError: with each fault.
        """
        _refuse(
            (spec, fault)
            for key, spec in tensors.items()
            for fault in _faults(spec, [*self.holders.get(key, ())])
        )

    def check_held_once(self, tensors: Mapping[str, TensorSpec]) -> None:
        """Refuse ranks whose main replicas are not some tensors, each element once.

        Raises:
            PlanError: with each fault.
        """
        check_held_once(tensors, self.main_shards)


def _shared(shards: Iterable[Shard]) -> tuple[Shard, ...]:
    """The same shards; of equal keys, shapes and boxes there is one object, told and kept once."""
    known: dict[object, Any] = {}
    return tuple(Shard(*(known.setdefault(field, field) for field in one)) for one in shards)


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


def check_held_once(tensors: Mapping[str, TensorSpec], shards: Iterable[Shard]) -> None:
    """Refuse shards that are not some tensors, each element once.

    Raises:
        PlanError: with each fault.
    """
    held = _boxes(tensors, shards)
    _refuse((spec, fault) for key, spec in tensors.items() for fault in _faults(spec, held[key]))


def _joined(
    boxes: Iterable[tuple[Box, tuple[int, ...]]],
) -> Iterator[tuple[Box, tuple[int, ...]]]:
    """Boxes and the ranks that hold them; neighbours that the same ranks hold are one."""
    by_ranks: dict[tuple[int, ...], list[Box]] = defaultdict(list)
    for box, ranks in boxes:
        by_ranks[ranks].append(box)
    return ((box, ranks) for ranks, own in by_ranks.items() for box in joined(own))


def _boxes(tensors: Mapping[str, TensorSpec], shards: Iterable[Shard]) -> dict[str, list[Box]]:
    """What is held of each tensor."""
    boxes: dict[str, list[Box]] = {key: [] for key in tensors}
    for shard in shards:
        if shard.key in boxes:
            boxes[shard.key].append(shard.box)
    return boxes


def _faults(spec: TensorSpec, boxes: Sequence[Box]) -> Iterable[str]:
    return tiling_faults(spec.shape, boxes) if boxes else ["no rank holds it"]


def _refuse(faults: Iterable[tuple[TensorSpec, str]]) -> None:
    if problems := [f"{spec.name}: {fault}" for spec, fault in faults]:
        raise PlanError(problems, heading="the ranks do not hold the model once")
