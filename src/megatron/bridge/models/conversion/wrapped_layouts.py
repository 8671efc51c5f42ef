"""Layouts of a part of the tensors that another layout takes, or of another form of them.

PickExpert           one expert of tensors that hold all of them on their first axis
Transposed           of tensors stored with their last two axes swapped
Offset               plus a constant (zero-centred norms: minus 1)
PadRows              with rows added after the last one (vocabulary padding)
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from megatron.bridge.models.conversion.layout import Layout, LayoutError, Piece
from megatron.bridge.tensors.boxes import Box, Shape, full_box


@dataclass(frozen=True)
class _Wrapped(Layout):
    """A layout built on another one, which sees other shapes and gives other pieces."""

    inner: Layout

    @property
    def roles(self) -> tuple[str, ...]:
        return self.inner.roles

    def _inside(self, hf_shapes: Mapping[str, Shape]) -> Mapping[str, Shape]:
        """The shapes that the inner layout sees. Raises LayoutError."""
        return hf_shapes

    def _outside(self, piece: Piece) -> Piece:
        """A piece of the inner layout as one of this."""
        return piece

    def megatron_shape(self, hf_shapes: Mapping[str, Shape]) -> Shape:
        return self.inner.megatron_shape(self._inside(hf_shapes))

    def hf_shapes(self, megatron_shape: Shape) -> dict[str, Shape]:
        return self.inner.hf_shapes(megatron_shape)

    def pieces(self, hf_shapes: Mapping[str, Shape]) -> tuple[Piece, ...]:
        return tuple(map(self._outside, self.inner.pieces(self._inside(hf_shapes))))


@dataclass(frozen=True)
class PickExpert(_Wrapped):
    """Expert number `expert` of tensors that hold all `experts` of them on a leading axis.

    The pieces of all experts together tile the tensors; each layout gives its own expert's part.
    """

    expert: int
    experts: int

    def _inside(self, hf_shapes: Mapping[str, Shape]) -> Mapping[str, Shape]:
        for role, shape in hf_shapes.items():
            if not shape or shape[0] != self.experts:
                raise LayoutError(f"{role} should hold {self.experts} experts, found {shape}")
        return {role: shape[1:] for role, shape in hf_shapes.items()}

    def _outside(self, piece: Piece) -> Piece:
        return replace(piece, hf_box=((self.expert, self.expert + 1), *piece.hf_box))

    def hf_shapes(self, megatron_shape: Shape) -> dict[str, Shape]:
        inner = super().hf_shapes(megatron_shape)
        return {role: (self.experts, *shape) for role, shape in inner.items()}

    def describe(self) -> str:
        return f"expert of {self.experts}, {self.inner.describe()}"


@dataclass(frozen=True)
class Transposed(_Wrapped):
    """Tensors stored with their last two axes swapped."""

    def _inside(self, hf_shapes: Mapping[str, Shape]) -> Mapping[str, Shape]:
        return {role: _swapped(shape) for role, shape in hf_shapes.items()}

    def _outside(self, piece: Piece) -> Piece:
        *leading, rows, columns = piece.hf_box
        return replace(piece, hf_box=(*leading, columns, rows), transpose=not piece.transpose)

    def hf_shapes(self, megatron_shape: Shape) -> dict[str, Shape]:
        inner = super().hf_shapes(megatron_shape)
        return {role: _swapped(shape) for role, shape in inner.items()}

    def describe(self) -> str:
        return f"transposed, {self.inner.describe()}"


def _swapped(shape: Shape) -> Shape:
    if len(shape) < 2:
        raise LayoutError(f"shape {shape} has no two axes to swap")
    return (*shape[:-2], shape[-1], shape[-2])


class TransposedToFit(Transposed):
    """Transposed where shapes tell: square tensors, whose shapes fit as they are, are so taken."""

    def pieces(self, hf_shapes: Mapping[str, Shape]) -> tuple[Piece, ...]:
        if self._inside(hf_shapes) == hf_shapes:
            return self.inner.pieces(hf_shapes)
        return super().pieces(hf_shapes)


@dataclass(frozen=True)
class Offset(_Wrapped):
    """``megatron = hf + value``, the one arithmetic there is."""

    value: float

    def _outside(self, piece: Piece) -> Piece:
        return replace(piece, offset=piece.offset + self.value)

    def describe(self) -> str:
        return f"{self.inner.describe()} {self.value:+g}"


@dataclass(frozen=True)
class PadRows(_Wrapped):
    """`rows` rows of the inner layout, followed by padding up to `padded_rows`.

    The pieces leave the padding open; a plan fills it with zeros and says so.
    """

    rows: int
    padded_rows: int

    def megatron_shape(self, hf_shapes: Mapping[str, Shape]) -> Shape:
        shape = super().megatron_shape(hf_shapes)
        if not shape or shape[0] != self.rows:
            raise LayoutError(f"expected {self.rows} rows, found shape {shape}")
        if self.padded_rows < self.rows:
            raise LayoutError(f"{self.rows} rows do not fit into {self.padded_rows}")
        return (self.padded_rows, *shape[1:])

    def hf_shapes(self, megatron_shape: Shape) -> dict[str, Shape]:
        if not megatron_shape or megatron_shape[0] != self.padded_rows:
            raise LayoutError(f"expected {self.padded_rows} rows, found shape {megatron_shape}")
        return super().hf_shapes((self.rows, *megatron_shape[1:]))

    def pieces(self, hf_shapes: Mapping[str, Shape]) -> tuple[Piece, ...]:
        self.megatron_shape(hf_shapes)
        return super().pieces(hf_shapes)

    def padding(self, megatron_shape: Shape) -> Box | None:
        if self.rows == self.padded_rows:
            return None
        return ((self.rows, self.padded_rows), *full_box(megatron_shape[1:]))

    def describe(self) -> str:
        padding = self.padded_rows - self.rows
        added = f", {padding} rows of padding" if padding else ""
        return f"{self.inner.describe()}{added}"
