"""Layouts: how one Megatron parameter is made of Hugging Face tensors, as boxes.

A layout is pure data. It knows neither names nor files nor processes: the Hugging Face tensors
of a row have *roles* ("q", "gate", ...), and the layout says which box of which role fills which
box of the Megatron parameter. Import, export, the shard of any rank and the proof that nothing is
lost all follow from the same list of pieces, so a layout cannot be right in one direction only.

    Same                 one tensor, unchanged
    Concatenate          several tensors end to end along an axis, such as [gate; up]

Rows dealt out group by group are in `group_interleave`, layouts of a part or another form of the
tensors in `wrapped_layouts`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from megatron.bridge.tensors.boxes import Box, Shape, full_box

HF = "hf"
"""The role of the only tensor of a row that has just one."""


class LayoutError(ValueError):
    """Shapes that do not fit a layout; the message says what was expected and found."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One box of a Megatron parameter and the box of a Hugging Face tensor that fills it.

    Both boxes hold the same elements in the same row-major order once axes of extent 1 are left
    out and, if `transpose` is set, the last two axes of the Hugging Face box are swapped.
    ``megatron = hf + offset``.
    """

    role: str
    hf_box: Box
    megatron_box: Box
    transpose: bool = False
    offset: float = 0.0


class Layout(ABC):
    """How one Megatron parameter is made of the tensors named by `roles`."""

    @property
    @abstractmethod
    def roles(self) -> tuple[str, ...]:
        """The Hugging Face tensors that take part, in the order in which rows declare them."""

    @abstractmethod
    def megatron_shape(self, hf_shapes: Mapping[str, Shape]) -> Shape:
        """Shape of the parameter that tensors of these shapes make. Raises LayoutError."""

    @abstractmethod
    def hf_shapes(self, megatron_shape: Shape) -> dict[str, Shape]:
        """Shapes of the tensors that make a parameter of this shape. Raises LayoutError."""

    @abstractmethod
    def pieces(self, hf_shapes: Mapping[str, Shape]) -> tuple[Piece, ...]:
        """The boxes; together they tile every tensor, and the parameter but for padding."""

    @abstractmethod
    def describe(self) -> str:
        """One or two words for tables."""

    def padding(self, megatron_shape: Shape) -> Box | None:
        """The box of the parameter that no tensor fills, or None if there is none."""
        return None

    def check_roles(self, hf_shapes: Mapping[str, Shape]) -> None:
        """Raise LayoutError unless there is a shape for each role and for no other."""
        if set(hf_shapes) != set(self.roles):
            raise LayoutError(f"expected the tensors {self.roles}, found {tuple(hf_shapes)}")


@dataclass(frozen=True)
class Same(Layout):
    """The Hugging Face tensor as it is."""

    role: str = HF

    @property
    def roles(self) -> tuple[str, ...]:
        return (self.role,)

    def megatron_shape(self, hf_shapes: Mapping[str, Shape]) -> Shape:
        self.check_roles(hf_shapes)
        return hf_shapes[self.role]

    def hf_shapes(self, megatron_shape: Shape) -> dict[str, Shape]:
        return {self.role: megatron_shape}

    def pieces(self, hf_shapes: Mapping[str, Shape]) -> tuple[Piece, ...]:
        box = full_box(self.megatron_shape(hf_shapes))
        return (Piece(self.role, box, box),)

    def describe(self) -> str:
        return "same"


@dataclass(frozen=True)
class Concatenate(Layout):
    """Tensors end to end along `axis`, in the order of `names`.

    `sizes` fixes the extent of each part along the axis; without it the parts are equal.
    """

    names: tuple[str, ...]
    axis: int = 0
    sizes: tuple[int, ...] | None = None

    @property
    def roles(self) -> tuple[str, ...]:
        return self.names

    def megatron_shape(self, hf_shapes: Mapping[str, Shape]) -> Shape:
        self.check_roles(hf_shapes)
        shapes = [hf_shapes[name] for name in self.names]
        if self.axis >= len(shapes[0]):
            raise LayoutError(f"shape {shapes[0]} has no axis {self.axis} to concatenate along")
        extents = tuple(shape[self.axis] for shape in shapes if self.axis < len(shape))
        rests = {shape[: self.axis] + shape[self.axis + 1 :] for shape in shapes}
        if len(rests) != 1 or len(extents) != len(shapes):
            raise LayoutError(f"parts {self.names} do not fit end to end: shapes {shapes}")
        if self.sizes is None and len(set(extents)) != 1:
            raise LayoutError(f"parts {self.names} should be equal: shapes {shapes}")
        if self.sizes is not None and extents != self.sizes:
            raise LayoutError(f"parts {self.names} should have extents {self.sizes}, not {extents}")
        first = shapes[0]
        return (*first[: self.axis], sum(extents), *first[self.axis + 1 :])

    def hf_shapes(self, megatron_shape: Shape) -> dict[str, Shape]:
        if self.axis >= len(megatron_shape):
            raise LayoutError(f"shape {megatron_shape} has no axis {self.axis} to split")
        total = megatron_shape[self.axis]
        sizes = self.sizes
        if sizes is None:
            part, rest = divmod(total, len(self.names))
            if rest:
                raise LayoutError(f"extent {total} does not split into {len(self.names)} parts")
            sizes = (part,) * len(self.names)
        if sum(sizes) != total:
            raise LayoutError(f"extent {total} is not the sum of {sizes}")
        before, after = megatron_shape[: self.axis], megatron_shape[self.axis + 1 :]
        return {name: (*before, size, *after) for name, size in zip(self.names, sizes, strict=True)}

    def pieces(self, hf_shapes: Mapping[str, Shape]) -> tuple[Piece, ...]:
        self.megatron_shape(hf_shapes)
        pieces, start = [], 0
        for name in self.names:
            box = full_box(hf_shapes[name])
            stop = start + hf_shapes[name][self.axis]
            megatron_box = (*box[: self.axis], (start, stop), *box[self.axis + 1 :])
            pieces.append(Piece(name, box, megatron_box))
            start = stop
        return tuple(pieces)

    def describe(self) -> str:
        return "[" + "; ".join(self.names) + "]"
