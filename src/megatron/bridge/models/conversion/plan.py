"""The plan of a conversion: every copy, and the proof that they lose and invent nothing.

    Copy(hf name, hf box, megatron key, megatron box, transpose, offset)

From the same list follow import, export (read backwards), the shard of any rank (intersect with
its box), the bytes that move, and the proof: on both sides the boxes tile every tensor exactly,
shapes and dtypes agree, and every name is used. A plan that is not a proof is never returned:
`build_plan` gathers all problems into one PlanError, before anything was written.
"""

import difflib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Protocol

from megatron.bridge.dtypes import itemsize
from megatron.bridge.errors import PlanError
from megatron.bridge.models.conversion.box_pairs import hf_part
from megatron.bridge.models.conversion.boxes import (
    Box,
    BoxIndex,
    Shape,
    intersect,
    tiling_faults,
)
from megatron.bridge.models.conversion.layout import Layout, LayoutError, Piece
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.param_mapping import ParamMapping
from megatron.bridge.models.conversion.structure import ModelStructure, Placement


class TensorLike(Protocol):
    """What a plan must know of a tensor; dtypes are safetensors names ("BF16")."""

    @property
    def shape(self) -> Shape: ...
    @property
    def dtype(self) -> str: ...


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor without its data."""

    name: str
    shape: Shape
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return prod(self.shape) * itemsize(self.dtype)


@dataclass(frozen=True, slots=True)
class Copy:
    """One box of a Megatron checkpoint tensor and the Hugging Face box that fills it."""

    hf_name: str
    hf_box: Box
    megatron_key: str
    megatron_box: Box
    transpose: bool = False
    offset: float = 0.0


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of the Megatron model, or the part of it that has its own key, by box."""

    name: str
    key: str
    box: Box
    row: str


@dataclass(frozen=True, slots=True)
class RowUse:
    """A declared row, how it lays out its tensors and how many parameters it makes."""

    megatron_param: str
    hf_params: tuple[str, ...]
    layout: str
    count: int


@dataclass(frozen=True)
class ConversionPlan:
    """The copies of a whole model.

    hf: every Hugging Face tensor by name. megatron: every tensor of the Megatron checkpoint by
    key. padding: boxes of Megatron tensors that are zero because no tensor fills them.
    extra_states: names of the empty objects that megatron-core saves beside its linear layers.
    carried: Hugging Face tensors without a place in the Megatron model, and why; an export takes
        them from its reference, so that nothing of the source is lost.
    """

    hf: Mapping[str, TensorSpec]
    megatron: Mapping[str, TensorSpec]
    parameters: tuple[Parameter, ...]
    copies: tuple[Copy, ...]
    padding: tuple[tuple[str, Box], ...]
    extra_states: tuple[str, ...]
    carried: Mapping[str, str]
    rows: tuple[RowUse, ...]

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
        return self._by_key[key].overlapping(box)

    def copies_from(self, name: str, box: Box) -> Iterator[tuple[Box, Copy]]:
        """(shared Hugging Face box, copy) for every copy that reads part of a box of a tensor."""
        return self._by_name[name].overlapping(box)

    def padding_in(self, key: str, box: Box) -> Iterator[Box]:
        """The parts of a box of a key that are padding."""
        if key in self._padding_by_key:
            for shared, _ in self._padding_by_key[key].overlapping(box):
                yield shared

    @cached_property
    def _by_key(self) -> dict[str, BoxIndex[Copy]]:
        groups = defaultdict(list)
        for copy in self.copies:
            groups[copy.megatron_key].append((copy.megatron_box, copy))
        return {key: BoxIndex(items) for key, items in groups.items()}

    @cached_property
    def _by_name(self) -> dict[str, BoxIndex[Copy]]:
        groups = defaultdict(list)
        for copy in self.copies:
            groups[copy.hf_name].append((copy.hf_box, copy))
        return {name: BoxIndex(items) for name, items in groups.items()}

    @cached_property
    def _padding_by_key(self) -> dict[str, BoxIndex[None]]:
        groups = defaultdict(list)
        for key, box in self.padding:
            groups[key].append((box, None))
        return {key: BoxIndex(items) for key, items in groups.items()}

    def faults(self) -> Iterator[str]:
        """Why this is not a proof; nothing for a plan that `build_plan` returned."""
        hf_boxes: dict[str, list[Box]] = {name: [] for name in self.hf}
        megatron_boxes: dict[str, list[Box]] = {key: [] for key in self.megatron}
        for copy in self.copies:
            hf_boxes[copy.hf_name].append(copy.hf_box)
            megatron_boxes[copy.megatron_key].append(copy.megatron_box)
            if _extents(copy.hf_box, copy.transpose) != _extents(copy.megatron_box):
                yield f"{copy.hf_name}: its box and that of {copy.megatron_key} differ in shape"
        for key, box in self.padding:
            megatron_boxes[key].append(box)
        for side, specs, boxes in (
            ("Hugging Face tensor", self.hf, hf_boxes),
            ("Megatron tensor", self.megatron, megatron_boxes),
        ):
            for name, spec in specs.items():
                if name in self.carried:
                    continue
                for fault in tiling_faults(spec.shape, boxes[name]):
                    yield f"{side} {name} of shape {spec.shape}: {fault}"


def _extents(box: Box, transpose: bool = False) -> list[int]:
    extents = [stop - start for start, stop in box]
    if transpose:
        extents[-2:] = extents[-1], extents[-2]
    return [extent for extent in extents if extent != 1]


def expected_tensors(
    registry: MegatronMappingRegistry, structure: ModelStructure, dtype: Callable[[str], str]
) -> dict[str, TensorSpec]:
    """The Hugging Face tensors that a config asks for; `dtype` gives each one's by its name.

    Raises PlanError for rows that do not declare shapes.
    """
    specs: dict[str, TensorSpec] = {}
    for _, row in registry.expand(structure):
        for role, name in row.hf_params.items():
            if role not in row.hf_symbols:
                raise PlanError([f"{row.megatron_param}: the row declares no shape for {name}"])
            specs[name] = TensorSpec(name, structure.shape(row.hf_symbols[role]), dtype(name))
    return specs


def build_plan(
    registry: MegatronMappingRegistry,
    structure: ModelStructure,
    tensors: Mapping[str, TensorLike],
    carried: Mapping[str, str] | None = None,
) -> ConversionPlan:
    """The proven plan between `tensors` and the Megatron model of the same structure.

    tensors: what the Hugging Face side holds, by name; a TensorIndex or `expected_tensors`.
    carried: those of them that the Megatron model has no place for, with the reason.
    Raises PlanError with every missing, unexpected, misshapen or mixed-dtype tensor.
    """
    return _Builder(registry, structure, tensors, carried or {}).build()


class _Builder:
    def __init__(
        self,
        registry: MegatronMappingRegistry,
        structure: ModelStructure,
        tensors: Mapping[str, TensorLike],
        carried: Mapping[str, str],
    ) -> None:
        self.carried = carried
        self.registry = registry
        self.structure = structure
        self.tensors = tensors
        self.problems: list[str] = []
        self.missing: dict[str, str] = {}
        self.used: set[str] = set()
        self.megatron: dict[str, TensorSpec] = {}
        self.parameters: list[Parameter] = []
        self.copies: list[Copy] = []
        self.padding: list[tuple[str, Box]] = []
        self.extra_states: list[str] = []
        self.rows: dict[str, RowUse] = {}

    def build(self) -> ConversionPlan:
        for declared, row in self.registry.expand(self.structure):
            self._add(declared, row)
        self._report_names()
        if self.problems:
            # All experts of a layer find the same fault in the tensor that they share.
            raise PlanError(dict.fromkeys(self.problems))
        plan = ConversionPlan(
            hf={n: TensorSpec(n, tuple(t.shape), t.dtype) for n, t in self.tensors.items()},
            megatron=self.megatron,
            parameters=tuple(self.parameters),
            copies=tuple(self.copies),
            padding=tuple(self.padding),
            extra_states=tuple(self.extra_states),
            carried=self.carried,
            rows=tuple(self.rows.values()),
        )
        if faults := list(plan.faults()):
            raise PlanError(faults)
        return plan

    def _add(self, declared: ParamMapping, row: ParamMapping) -> None:
        """One parameter: look up its tensors, check them, place it, copy."""
        self.used.update(row.hf_params.values())
        absent = [name for name in row.hf_params.values() if name not in self.tensors]
        self.missing.update(dict.fromkeys(absent, row.megatron_param))
        as_declared = self._shapes_as_declared(row)
        if absent or not as_declared:
            return
        found = {role: self.tensors[name] for role, name in row.hf_params.items()}
        shapes = {role: tuple(tensor.shape) for role, tensor in found.items()}
        try:
            layout = row.layout(self.structure.fields_for(row.megatron_param))
            shape = layout.megatron_shape(shapes)
            pieces = layout.pieces(shapes)
        except LayoutError as error:
            self.problems.append(f"{row.megatron_param} from {_names(row)}: {error}")
            return
        dtypes = {tensor.dtype for tensor in found.values()}
        if len(dtypes) > 1:
            self.problems.append(
                f"{row.megatron_param}: {_names(row)} should have one dtype, found "
                f"{sorted(dtypes)}; convert the files to one dtype first"
            )
            return
        # A constant added in BF16 would lose bits of the result: such parameters are kept in F32.
        dtype = "F32" if any(piece.offset for piece in pieces) else dtypes.pop()
        fields = self.structure.fields_for(row.megatron_param)
        sections = row.rank_sections(fields, shape[0]) if shape else ()
        placements = self.structure.place(row.megatron_param, shape, sections)
        if all(self._agrees_with_other_layers(row, one, dtype) for one in placements):
            for placement in placements:
                self._place(declared, row, placement, pieces, layout.padding(shape))
            self._count(declared, row, layout)

    def _shapes_as_declared(self, row: ParamMapping) -> bool:
        good = True
        for role, symbols in row.hf_symbols.items():
            name = row.hf_params[role]
            if name not in self.tensors:
                continue
            expected, found = self.structure.shape(symbols), tuple(self.tensors[name].shape)
            if expected != found:
                good = False
                self.problems.append(
                    f"{name}: the config asks for shape {expected} [{symbols}], found {found}; "
                    f"check that config.json belongs to these files"
                )
        return good

    def _agrees_with_other_layers(
        self, row: ParamMapping, placement: Placement, dtype: str
    ) -> bool:
        spec = TensorSpec(placement.key, placement.key_shape, dtype)
        known = self.megatron.setdefault(placement.key, spec)
        if known == spec:
            return True
        self.problems.append(
            f"{row.megatron_param} from {_names(row)}: layers share the checkpoint tensor "
            f"{known.name} of shape {known.shape} and dtype {known.dtype}, but this one needs "
            f"shape {spec.shape} and dtype {spec.dtype}"
        )
        return False

    def _place(
        self,
        declared: ParamMapping,
        row: ParamMapping,
        placement: Placement,
        pieces: tuple[Piece, ...],
        padding: Box | None,
    ) -> None:
        """The copies of one parameter into one checkpoint key."""
        key, part = placement.key, placement.part
        box = placement.key_box(part)
        pattern = declared.megatron_param
        self.parameters.append(Parameter(row.megatron_param, key, box, pattern))
        for piece in pieces:
            shared = intersect(piece.megatron_box, part)
            if shared is None and part:
                continue
            megatron_box = piece.megatron_box if shared is None else shared
            self.copies.append(
                Copy(
                    row.hf_params[piece.role],
                    hf_part(piece, megatron_box),
                    key,
                    placement.key_box(megatron_box),
                    piece.transpose,
                    piece.offset,
                )
            )
        if padding is not None:
            self.padding.append((key, placement.key_box(padding)))

    def _count(self, declared: ParamMapping, row: ParamMapping, layout: Layout) -> None:
        """What tables and extra states need to know of one more parameter of a row."""
        if row.extra_state is not None:
            self.extra_states.append(self.structure.place(row.extra_state, ())[0].object_key)
        pattern = declared.megatron_param
        known = self.rows.get(pattern)
        self.rows[pattern] = RowUse(
            pattern,
            tuple(declared.hf_params.values()),
            layout.describe(),
            known.count + 1 if known else 1,
        )

    def _report_names(self) -> None:
        known = self.used | set(self.carried)
        unexpected = [name for name in self.tensors if name not in known]
        for name, parameter in self.missing.items():
            hint = difflib.get_close_matches(name, unexpected, n=1, cutoff=0.8)
            like = f"; was it renamed to {hint[0]}?" if hint else ""
            self.problems.append(f"{name}: missing, needed for {parameter}{like}")
        for name in unexpected:
            tensor = self.tensors[name]
            why = ", tied to the embedding by the config" if name == "lm_head.weight" else ""
            self.problems.append(
                f"{name}: no row maps it{why} (shape {tuple(tensor.shape)}, dtype {tensor.dtype}); "
                f"converting would lose it"
            )


def _names(row: ParamMapping) -> str:
    return ", ".join(row.hf_params.values())
