"""The plan of a conversion: every copy, and the proof that they lose and invent nothing.

    Copy(hf name, hf box, megatron key, megatron box, transpose, offset)

From the same list follow import, export (read backwards), the shard of any rank (intersect with
its box), the bytes that move, and the proof: on both sides the boxes tile every tensor exactly,
shapes and dtypes agree, and every name is used. A plan that is not a proof is never returned:
`build_plan` gathers all problems into one PlanError, before anything was written.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from math import prod
from typing import NamedTuple

from megatron.bridge.tensors.boxes import Box, BoxIndex, tiling_faults
from megatron.bridge.tensors.spec import TensorSpec


class Copy(NamedTuple):
    """One box of a Megatron checkpoint tensor and the Hugging Face box that fills it."""

    hf_name: str
    hf_box: Box
    megatron_key: str
    megatron_box: Box
    transpose: bool = False
    offset: float = 0.0


class Parameter(NamedTuple):
    """A parameter of the Megatron model, or the part of it that has its own key, by box."""

    name: str
    key: str
    box: Box
    row: str


@dataclass(frozen=True, slots=True)
class RowUse:
    """A declared row and how it lays out its tensors.

    Attributes:
        megatron_param: the pattern of its parameters' names.
        hf_params: the patterns of its tensors' names. They have the same wildcards, or the first of
            them.
        layout: one or two words for tables.
        numbers: what each wildcard of the Megatron name stands for; each combination is a
            parameter.
    """

    megatron_param: str
    hf_params: tuple[str, ...]
    layout: str
    numbers: tuple[tuple[int, ...], ...]

    @property
    def count(self) -> int:
        """How many parameters it makes."""
        return prod(map(len, self.numbers))


class CopyOf(NamedTuple):
    """What a tensor must equal.

    Attributes:
        name: of the other tensor.
        otherwise: why, and what to do if it does not.
    """

    name: str
    otherwise: str


@dataclass(frozen=True)
class ConversionPlan:
    """The copies of a whole model.

    Attributes:
        hf: every Hugging Face tensor by name.
        megatron: every tensor of the Megatron checkpoint by key.
        parameters: of the Megatron model, with their places in the checkpoint.
        copies: every box that is copied.
        padding: boxes of Megatron tensors that are zero because no tensor fills them.
        extra_states: names of the empty objects that megatron-core saves beside its linear layers.
        carried: Hugging Face tensors without a place in the Megatron model, and why; an export
            takes them from its reference, so that nothing of the source is lost.
        rows: the rows that the plan was made of.
        absent: those of `carried` that belong to a part which this Megatron model was built
            without.
        equal: those of `carried` that must equal another tensor: a condition of the plan which
            headers cannot prove (see `equal_copies.check_equal`). An export writes them from the
            other one.
    """

    hf: Mapping[str, TensorSpec]
    megatron: Mapping[str, TensorSpec]
    parameters: tuple[Parameter, ...]
    copies: tuple[Copy, ...]
    padding: tuple[tuple[str, Box], ...]
    extra_states: tuple[str, ...]
    carried: Mapping[str, str]
    rows: tuple[RowUse, ...]
    absent: frozenset[str] = frozenset()
    equal: Mapping[str, CopyOf] = field(default_factory=dict)

    @property
    def hf_bytes(self) -> int:
        """Bytes of tensor data on the Hugging Face side."""
        return sum(spec.nbytes for spec in self.hf.values())

    @property
    def megatron_bytes(self) -> int:
        """Bytes of tensor data in the Megatron checkpoint, padding included."""
        return sum(spec.nbytes for spec in self.megatron.values())

    def copies_to(self, key: str, box: Box) -> Iterator[tuple[Box, Copy]]:
        """(shared Megatron box, copy) for every copy that fills part of a box of a key."""
        if key in self._by_key:
            yield from self._by_key[key].overlapping(box)

    def copies_from(self, name: str, box: Box) -> Iterator[tuple[Box, Copy]]:
        """(shared Hugging Face box, copy) for every copy that reads part of a box of a tensor."""
        return self._by_name[name].overlapping(box)

    def joined_copies_to(self, key: str, box: Box) -> Iterator[tuple[Box, Copy]]:
        """As `copies_to`; copies that continue one another on both sides are one: all experts."""
        if key in self._joined_by_key:
            yield from self._joined_by_key[key].overlapping(box)

    def padding_in(self, key: str, box: Box) -> Iterator[Box]:
        """The parts of a box of a key that are padding."""
        if key in self._padding_by_key:
            for shared, _ in self._padding_by_key[key].overlapping(box):
                yield shared

    @cached_property
    def _by_key(self) -> dict[str, BoxIndex[Copy]]:
        return _indexed((copy.megatron_key, copy.megatron_box, copy) for copy in self.copies)

    @cached_property
    def _joined_by_key(self) -> dict[str, BoxIndex[Copy]]:
        joined = joined_copies(self.copies)
        return _indexed((copy.megatron_key, copy.megatron_box, copy) for copy in joined)

    @cached_property
    def _by_name(self) -> dict[str, BoxIndex[Copy]]:
        return _indexed((copy.hf_name, copy.hf_box, copy) for copy in self.copies)

    @cached_property
    def _padding_by_key(self) -> dict[str, BoxIndex[None]]:
        return _indexed((key, box, None) for key, box in self.padding)

    def faults(self) -> Iterator[str]:
        """Why this is not a proof; nothing for a plan that `build_plan` returned."""
        hf_boxes: dict[str, list[Box]] = {name: [] for name in self.hf}
        megatron_boxes: dict[str, list[Box]] = {key: [] for key in self.megatron}
        extents = cache(_extents)
        for copy in self.copies:
            hf_boxes[copy.hf_name].append(copy.hf_box)
            megatron_boxes[copy.megatron_key].append(copy.megatron_box)
            if extents(copy.hf_box, copy.transpose) != extents(copy.megatron_box):
                yield f"{copy.hf_name}: its box and that of {copy.megatron_key} differ in shape"
        for key, box in self.padding:
            megatron_boxes[key].append(box)
        tilings = cache(lambda shape, boxes: list(tiling_faults(shape, boxes)))
        for side, specs, boxes in (
            ("Hugging Face tensor", self.hf, hf_boxes),
            ("Megatron tensor", self.megatron, megatron_boxes),
        ):
            for name, spec in specs.items():
                if name in self.carried:
                    continue
                for fault in tilings(spec.shape, tuple(boxes[name])):
                    yield f"{side} {name} of shape {spec.shape}: {fault}"


def joined_copies(copies: Iterable[Copy]) -> Iterator[Copy]:
    """Copies of the same elements; those that continue one another on both sides are one."""
    alike: dict[tuple[object, ...], list[Copy]] = defaultdict(list)
    for copy in copies:
        name, box, key, _, *how = copy
        alike[name, key, box[1:], *how].append(copy)
    for own in alike.values():
        first = last = own[0]
        along: int | None = None
        for copy in own[1:]:
            axis = _continued_along(last, copy)
            if axis is None or along not in (None, axis):
                yield _run(first, last)
                first, axis = copy, None
            last, along = copy, axis
        yield _run(first, last)


def _continued_along(one: Copy, other: Copy) -> int | None:
    """The axis of the Megatron box along which a copy continues one that is alike.

    On the other side it does so along the first axis; here no axis before it has an extent, so that
    the elements follow one another in the same order.
    """
    if len(one.hf_box) < (3 if one.transpose else 1) or one.hf_box[0][1] != other.hf_box[0][0]:
        return None
    pairs = zip(one.megatron_box, other.megatron_box, strict=True)
    for axis, (own, following) in enumerate(pairs):
        if own != following:
            is_rest_equal = one.megatron_box[axis + 1 :] == other.megatron_box[axis + 1 :]
            return axis if own[1] == following[0] and is_rest_equal else None
        if own[1] - own[0] > 1:
            return None
    return None


def _run(first: Copy, last: Copy) -> Copy:
    """All copies from one to another as one."""
    if first is last:
        return first
    hf_box, megatron_box = (
        tuple((start, stop) for (start, _), (_, stop) in zip(*boxes, strict=True))
        for boxes in ((first.hf_box, last.hf_box), (first.megatron_box, last.megatron_box))
    )
    return first._replace(hf_box=hf_box, megatron_box=megatron_box)


def _indexed[Item](items: Iterable[tuple[str, Box, Item]]) -> dict[str, BoxIndex[Item]]:
    """The items of each tensor, by its name."""
    groups = defaultdict(list)
    for name, box, item in items:
        groups[name].append((box, item))
    return {name: BoxIndex(boxed) for name, boxed in groups.items()}


def _extents(box: Box, transpose: bool = False) -> list[int]:
    extents = [stop - start for start, stop in box]
    if transpose:
        extents[-2:] = extents[-1], extents[-2]
    return [extent for extent in extents if extent != 1]
