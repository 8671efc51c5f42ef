"""Rows of the Gated DeltaNet layers, whose projections are several sections in one parameter."""

from typing import Protocol, cast

from megatron.bridge.models.conversion.layout import Concatenate, Layout, Same
from megatron.bridge.models.conversion.param_mapping import (
    ColumnParallelMapping,
    NormMapping,
    ParamMapping,
)
from megatron.bridge.models.conversion.structure import LayoutFields, RankSection
from megatron.bridge.models.conversion.wrapped_layouts import Offset


class GatedDeltaFields(LayoutFields, Protocol):
    """The fields of a model with Gated DeltaNet layers, named as in megatron-core."""

    @property
    def linear_num_key_heads(self) -> int: ...
    @property
    def linear_num_value_heads(self) -> int: ...
    @property
    def linear_key_head_dim(self) -> int: ...
    @property
    def linear_value_head_dim(self) -> int: ...


def _conv_sections(fields: LayoutFields) -> tuple[RankSection, ...]:
    delta = cast(GatedDeltaFields, fields)
    keys = delta.linear_num_key_heads * delta.linear_key_head_dim
    values = delta.linear_num_value_heads * delta.linear_value_head_dim
    return (
        RankSection(keys, "query"),
        RankSection(keys, "key"),
        RankSection(values, "value"),
    )


class GatedDeltaInProjMapping(ParamMapping):
    """Four projections; Megatron holds [query; key; value; z; beta; alpha], each split alone.

    Args:
        megatron_param: name of the parameter.
        qkv: name of the projection to queries, keys and values.
        z: name of the projection to z.
        b: name of the projection to beta.
        a: name of the projection to alpha.
        shapes: symbols of the shapes of qkv, of z, and of b and a alike.
    """

    expected_axis = 0
    saves_state = True

    def __init__(
        self,
        megatron_param: str,
        qkv: str,
        z: str,
        b: str,
        a: str,
        shapes: tuple[str, str, str],
    ) -> None:
        names = {"qkv": qkv, "z": z, "b": b, "a": a}
        symbols = {"qkv": shapes[0], "z": shapes[1], "b": shapes[2], "a": shapes[2]}
        super().__init__(megatron_param, names, symbols)

    def layout(self, fields: LayoutFields) -> Layout:
        query, key, value, z, beta, alpha = (s.rows for s in self.rank_sections(fields, 0))
        return Concatenate(("qkv", "z", "b", "a"), sizes=(query + key + value, z, beta, alpha))

    def rank_sections(self, fields: LayoutFields, rows: int) -> tuple[RankSection, ...]:
        heads = cast(GatedDeltaFields, fields).linear_num_value_heads
        conv = _conv_sections(fields)
        return (
            *conv,
            RankSection(conv[-1].rows, "z"),
            RankSection(heads, "beta"),
            RankSection(heads, "alpha"),
        )


class GatedDeltaConvMapping(ColumnParallelMapping):
    """The convolution over [query; key; value], each split over ranks."""

    saves_state = False

    def rank_sections(self, fields: LayoutFields, rows: int) -> tuple[RankSection, ...]:
        return _conv_sections(fields)


class ZeroCenteredNormMapping(NormMapping):
    """A norm's weight w that Megatron keeps as w - 1, in F32 so that the difference is exact."""

    def layout(self, fields: LayoutFields) -> Layout:
        return Offset(Same(), -1.0)
