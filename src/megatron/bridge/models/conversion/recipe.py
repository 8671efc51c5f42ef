"""How the parameters of one row are made, worked out once for all of them.

The tensors of a row have the same shapes in all layers, so its layout and its place in the
checkpoint are worked out once, and for each fused expert once. What is left for each of the many
parameters are its names and its indexes on the axes of layer and expert.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from megatron.bridge.models.conversion.layout import Piece
from megatron.bridge.models.conversion.param_mapping import ParamMapping
from megatron.bridge.models.conversion.structure import ModelStructure, Placement
from megatron.bridge.tensors.box_pairs import hf_part
from megatron.bridge.tensors.boxes import (
    Box,
    Shape,
    box_shape,
    full_box,
    intersect,
    relative,
)


class PartRecipe(NamedTuple):
    """How every parameter, or the part of it that has its own key, is made.

    Attributes:
        placement: the key, and where the part lies in it.
        box: the whole part.
        pieces: the boxes that tensors fill.
        padding: the box that none fills, if there is one. As `box` and `pieces` it is in
            coordinates of the part; in the key, the indexes of layer and expert stand before them.
    """

    placement: Placement
    box: Box
    pieces: tuple[Piece, ...]
    padding: Box | None


class Recipe(NamedTuple):
    """How a row makes a parameter of tensors with certain shapes.

    Attributes:
        layout: one or two words for tables.
        shifted: whether a constant is added anywhere.
        parts: by checkpoint key.
        extra_state: where the object lies that is saved beside each parameter, if there is one.
    """

    layout: str
    shifted: bool
    parts: tuple[PartRecipe, ...]
    extra_state: Placement | None


class RecipeBook:
    """The recipes of one row in one model, by the shapes of the tensors."""

    def __init__(self, row: ParamMapping, structure: ModelStructure) -> None:
        self._row = row
        self._hf_wildcards = row.hf_wildcards
        self._structure = structure
        self._known: dict[tuple[object, ...], Recipe] = {}

    def find(self, numbers: tuple[int, ...], shapes: Mapping[str, Shape]) -> Recipe:
        """The recipe of the parameter with these numbers, from tensors of these shapes by role.

        Raises:
            LayoutError: the shapes do not fit.
        """
        # Numbers that are in no Hugging Face name say which part of a tensor is meant.
        key = (numbers[self._hf_wildcards :], *shapes.values())
        if key not in self._known:
            self._known[key] = self._work_out(numbers, shapes)
        return self._known[key]

    def _work_out(self, numbers: tuple[int, ...], shapes: Mapping[str, Shape]) -> Recipe:
        row, place = self._row, self._structure.place
        fields = self._structure.fields_for(row.megatron_param)
        layout = row.resolve(numbers).layout(fields)
        shape = layout.megatron_shape(shapes)
        pieces, padding = layout.pieces(shapes), layout.padding(shape)
        sections = row.rank_sections(fields, shape[0]) if shape else ()
        return Recipe(
            layout.describe(),
            any(piece.offset for piece in pieces),
            tuple(
                _part_recipe(placement, pieces, padding)
                for placement in place(row.megatron_param, shape, sections)
            ),
            None if row.extra_state is None else place(row.extra_state, ())[0],
        )


def _part_recipe(
    placement: Placement, pieces: tuple[Piece, ...], padding: Box | None
) -> PartRecipe:
    part = placement.part
    return PartRecipe(
        placement,
        full_box(box_shape(part)),
        tuple(
            replace(piece, hf_box=hf_part(piece, shared), megatron_box=relative(shared, part))
            for piece in pieces
            if (shared := intersect(piece.megatron_box, part)) is not None
        ),
        None if padding is None else relative(padding, part),
    )
