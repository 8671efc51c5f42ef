"""Rows dealt out group by group: how Megatron holds queries, keys and values in one parameter.

qkv                  three tensors, by key-value group
gated_qkv            the same, where every head of queries comes with a gate
packed_qkv           one tensor of all three, by head
"""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron.bridge.models.conversion.layout import HF, Layout, LayoutError, Piece
from megatron.bridge.tensors.boxes import Shape, full_box


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
        self.check_roles(hf_shapes)
        first = hf_shapes[self.roles[0]]
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
