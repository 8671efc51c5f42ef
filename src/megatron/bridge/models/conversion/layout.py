"""Layouts: how one Megatron parameter is made of Hugging Face tensors, as boxes.

A layout is pure data. It knows neither names nor files nor processes: the Hugging Face tensors
of a row have *roles* ("q", "gate", ...), and the layout says which box of which role fills which
box of the Megatron parameter. Import, export, the shard of any rank and the proof that nothing is
lost all follow from the same list of pieces, so a layout cannot be right in one direction only.

    Same                 one tensor, unchanged
    Concatenate          several tensors end to end along an axis, such as [gate; up]
    GroupInterleave      rows dealt out group by group: QKV, gated QKV, packed QKV
    PickExpert           one expert of a tensor that holds all of them on its first axis
    Transposed           the same, of tensors stored with their last two axes swapped
    Offset               the same plus a constant (zero-centred norms: minus 1)
    PadRows              the same with rows added after the last one (vocabulary padding)
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace

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


def _sole(hf_shapes: Mapping[str, Shape], layout: Layout) -> tuple[str, Shape]:
    if set(hf_shapes) != set(layout.roles):
        raise LayoutError(f"expected the tensors {layout.roles}, found {tuple(hf_shapes)}")
    return next(iter(hf_shapes.items()))


@dataclass(frozen=True)
class Same(Layout):
    """The Hugging Face tensor as it is."""

    role: str = HF

    @property
    def roles(self) -> tuple[str, ...]:
        return (self.role,)

    def megatron_shape(self, hf_shapes: Mapping[str, Shape]) -> Shape:
        return _sole(hf_shapes, self)[1]

    def hf_shapes(self, megatron_shape: Shape) -> dict[str, Shape]:
        return {self.role: megatron_shape}

    def pieces(self, hf_shapes: Mapping[str, Shape]) -> tuple[Piece, ...]:
        box = full_box(_sole(hf_shapes, self)[1])
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
        _sole(hf_shapes, self)
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


@dataclass(frozen=True)
class Section:
    """The rows that one tensor gives to each group of a GroupInterleave.

    Group ``g`` takes `blocks` runs of `rows` rows from tensor `role`; run ``b`` starts at row
    ``base + (g * blocks + b) * stride``.
    """

    role: str
    rows: int
    stride: int
    blocks: int = 1
    base: int = 0


@dataclass(frozen=True)
class GroupInterleave(Layout):
    """Rows (axis 0) dealt out group by group: each group holds its part of every section."""

    groups: int
    sections: tuple[Section, ...]
    title: str

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(section.role for section in self.sections))

    def _rows(self) -> dict[str, int]:
        """Rows that each tensor must have."""
        rows = dict.fromkeys(self.roles, 0)
        for section in self.sections:
            rows[section.role] += self.groups * section.blocks * section.rows
        return rows

    def megatron_shape(self, hf_shapes: Mapping[str, Shape]) -> Shape:
        _, first = _sole(hf_shapes, self)
        expected = {role: (rows, *first[1:]) for role, rows in self._rows().items()}
        if dict(hf_shapes) != expected:
            raise LayoutError(f"{self.title} needs shapes {expected}, found {dict(hf_shapes)}")
        return (sum(self._rows().values()), *first[1:])

    def hf_shapes(self, megatron_shape: Shape) -> dict[str, Shape]:
        rows = self._rows()
        if not megatron_shape or megatron_shape[0] != sum(rows.values()):
            raise LayoutError(
                f"{self.title} needs {sum(rows.values())} rows, found shape {megatron_shape}"
            )
        return {role: (count, *megatron_shape[1:]) for role, count in rows.items()}

    def pieces(self, hf_shapes: Mapping[str, Shape]) -> tuple[Piece, ...]:
        rest = full_box(self.megatron_shape(hf_shapes)[1:])
        pieces, megatron_row = [], 0
        for group in range(self.groups):
            for section in self.sections:
                for block in range(section.blocks):
                    row = section.base + (group * section.blocks + block) * section.stride
                    pieces.append(
                        Piece(
                            section.role,
                            ((row, row + section.rows), *rest),
                            ((megatron_row, megatron_row + section.rows), *rest),
                        )
                    )
                    megatron_row += section.rows
        return tuple(pieces)

    def describe(self) -> str:
        return self.title


def qkv(heads: int, groups: int, head_dim: int) -> GroupInterleave:
    """Roles q, k, v; per key-value group: its query heads, its key head, its value head."""
    queries = _heads_per_group(heads, groups) * head_dim
    return GroupInterleave(
        groups,
        (
            Section("q", queries, queries),
            Section("k", head_dim, head_dim),
            Section("v", head_dim, head_dim),
        ),
        "qkv by group",
    )


def gated_qkv(heads: int, groups: int, head_dim: int) -> GroupInterleave:
    """Roles q, k, v; each head of q is [query; gate], each group [queries, gates, key, value]."""
    per_group = _heads_per_group(heads, groups)
    return GroupInterleave(
        groups,
        (
            Section("q", head_dim, 2 * head_dim, per_group),
            Section("q", head_dim, 2 * head_dim, per_group, base=head_dim),
            Section("k", head_dim, head_dim),
            Section("v", head_dim, head_dim),
        ),
        "gated qkv by group",
    )


def packed_qkv(heads: int, head_dim: int) -> GroupInterleave:
    """One tensor [all queries; all keys; all values]; per head [query, key, value]."""
    width = heads * head_dim
    return GroupInterleave(
        heads,
        tuple(Section(HF, head_dim, head_dim, base=base) for base in (0, width, 2 * width)),
        "packed qkv by head",
    )


def _heads_per_group(heads: int, groups: int) -> int:
    per_group, rest = divmod(heads, groups)
    if rest or not per_group:
        raise LayoutError(f"{heads} attention heads do not divide into {groups} key-value groups")
    return per_group


@dataclass(frozen=True)
class _Wrapped(Layout):
    """A layout built on another one."""

    inner: Layout

    @property
    def roles(self) -> tuple[str, ...]:
        return self.inner.roles


@dataclass(frozen=True)
class PickExpert(_Wrapped):
    """Expert number `expert` of tensors that hold all `experts` of them on a leading axis.

    The pieces of all experts together tile the tensors; each layout gives its own expert's part.
    """

    expert: int
    experts: int

    def _of_one(self, hf_shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        for role, shape in hf_shapes.items():
            if not shape or shape[0] != self.experts:
                raise LayoutError(f"{role} should hold {self.experts} experts, found {shape}")
        return {role: shape[1:] for role, shape in hf_shapes.items()}

    def megatron_shape(self, hf_shapes: Mapping[str, Shape]) -> Shape:
        return self.inner.megatron_shape(self._of_one(hf_shapes))

    def hf_shapes(self, megatron_shape: Shape) -> dict[str, Shape]:
        inner = self.inner.hf_shapes(megatron_shape)
        return {role: (self.experts, *shape) for role, shape in inner.items()}

    def pieces(self, hf_shapes: Mapping[str, Shape]) -> tuple[Piece, ...]:
        index = (self.expert, self.expert + 1)
        return tuple(
            replace(piece, hf_box=(index, *piece.hf_box))
            for piece in self.inner.pieces(self._of_one(hf_shapes))
        )

    def describe(self) -> str:
        return f"expert of {self.experts}, {self.inner.describe()}"


@dataclass(frozen=True)
class Transposed(_Wrapped):
    """Tensors stored with their last two axes swapped."""

    @staticmethod
    def _swap(shape: Shape) -> Shape:
        if len(shape) < 2:
            raise LayoutError(f"shape {shape} has no two axes to swap")
        return (*shape[:-2], shape[-1], shape[-2])

    def megatron_shape(self, hf_shapes: Mapping[str, Shape]) -> Shape:
        return self.inner.megatron_shape({k: self._swap(v) for k, v in hf_shapes.items()})

    def hf_shapes(self, megatron_shape: Shape) -> dict[str, Shape]:
        return {k: self._swap(v) for k, v in self.inner.hf_shapes(megatron_shape).items()}

    def pieces(self, hf_shapes: Mapping[str, Shape]) -> tuple[Piece, ...]:
        inner = self.inner.pieces({k: self._swap(v) for k, v in hf_shapes.items()})
        return tuple(
            replace(
                piece,
                hf_box=(*piece.hf_box[:-2], piece.hf_box[-1], piece.hf_box[-2]),
                transpose=not piece.transpose,
            )
            for piece in inner
        )

    def describe(self) -> str:
        return f"transposed, {self.inner.describe()}"


class TransposedToFit(Transposed):
    """As Transposed, but what is square is stored as it is: its shape fits, and is all one sees."""

    def pieces(self, hf_shapes: Mapping[str, Shape]) -> tuple[Piece, ...]:
        if all(shape == self._swap(shape) for shape in hf_shapes.values()):
            return self.inner.pieces(hf_shapes)
        return super().pieces(hf_shapes)


@dataclass(frozen=True)
class Offset(_Wrapped):
    """``megatron = hf + value``, the one arithmetic there is."""

    value: float

    def megatron_shape(self, hf_shapes: Mapping[str, Shape]) -> Shape:
        return self.inner.megatron_shape(hf_shapes)

    def hf_shapes(self, megatron_shape: Shape) -> dict[str, Shape]:
        return self.inner.hf_shapes(megatron_shape)

    def pieces(self, hf_shapes: Mapping[str, Shape]) -> tuple[Piece, ...]:
        return tuple(
            replace(piece, offset=piece.offset + self.value)
            for piece in self.inner.pieces(hf_shapes)
        )

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
        shape = self.inner.megatron_shape(hf_shapes)
        if not shape or shape[0] != self.rows:
            raise LayoutError(f"expected {self.rows} rows, found shape {shape}")
        if self.padded_rows < self.rows:
            raise LayoutError(f"{self.rows} rows do not fit into {self.padded_rows}")
        return (self.padded_rows, *shape[1:])

    def hf_shapes(self, megatron_shape: Shape) -> dict[str, Shape]:
        if not megatron_shape or megatron_shape[0] != self.padded_rows:
            raise LayoutError(f"expected {self.padded_rows} rows, found shape {megatron_shape}")
        return self.inner.hf_shapes((self.rows, *megatron_shape[1:]))

    def pieces(self, hf_shapes: Mapping[str, Shape]) -> tuple[Piece, ...]:
        self.megatron_shape(hf_shapes)
        return self.inner.pieces(hf_shapes)

    def padding(self, megatron_shape: Shape) -> Box | None:
        if self.rows == self.padded_rows:
            return None
        return ((self.rows, self.padded_rows), *full_box(megatron_shape[1:]))

    def describe(self) -> str:
        padding = self.padded_rows - self.rows
        return (
            f"{self.inner.describe()}, {padding} rows of padding"
            if padding
            else self.inner.describe()
        )
