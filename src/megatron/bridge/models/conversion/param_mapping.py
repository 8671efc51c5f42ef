"""Rows of the correspondence: a Megatron parameter, its Hugging Face tensors, a layout.

A row is declared once, with ``*`` where a number stands, and serves every direction: plans of
whole checkpoints read its `layout`, and `hf_to_megatron` / `megatron_to_hf` apply the same layout
to single tensors and the shard that a module holds.

    AutoMapping                 one tensor, unchanged, sharded however the module is
    ReplicatedMapping           one tensor, the same on every tensor-parallel rank
    NormMapping                 the same, of a norm
    ColumnParallelMapping       one tensor, output rows (axis 0) split over ranks
    RowParallelMapping          one tensor, input columns (axis 1) split over ranks
    QKVMapping                  q, k and v, interleaved by key-value group
    ConcatenatedQKVMapping      one tensor [q; k; v], interleaved by head
    GatedMLPMapping             gate and up, each split over ranks
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from copy import copy
from typing import TYPE_CHECKING, ClassVar, Self, cast

from megatron.bridge.models.conversion.group_interleave import gated_qkv, packed_qkv, qkv
from megatron.bridge.models.conversion.layout import HF, Concatenate, Layout, Same
from megatron.bridge.models.conversion.patterns import WILDCARD, fill
from megatron.bridge.models.conversion.structure import (
    LayoutFields,
    RankSection,
    VocabularyFields,
)
from megatron.bridge.models.conversion.wrapped_layouts import PadRows

if TYPE_CHECKING:
    import torch


class ParamMapping(ABC):
    """One row: a parameter and the tensors that it is made of, by role.

    Args:
        megatron_param: name of the parameter where norms are fused into layers, ``*`` for numbers.
        hf_params: Hugging Face name by role, with as many ``*``, in the same order.
        hf_symbols: shape of each tensor in the symbols of ModelStructure.dims ("3 H"); rows that do
            not declare shapes take them from the files, and cannot be planned from a config alone.
        only: the feature of ModelStructure without which the row does not exist.
        layers: the kind of layer of ModelStructure that the first ``*`` is limited to.

    Raises:
        ValueError: wildcards of the names differ, or shapes are given for unknown tensors.
    """

    def __init__(
        self,
        megatron_param: str,
        hf_params: Mapping[str, str],
        hf_symbols: Mapping[str, str] | None = None,
        *,
        only: str | None = None,
        layers: str | None = None,
    ) -> None:
        self.megatron_param = megatron_param
        self.hf_params = dict(hf_params)
        self.hf_symbols = dict(hf_symbols or {})
        self.only = only
        self.layers = layers
        self._validate_patterns()

    def _validate_patterns(self) -> None:
        """All names have the same number of wildcards, and shapes belong to declared tensors."""
        count = self.megatron_param.count(WILDCARD)
        for name in self.hf_params.values():
            if name.count(WILDCARD) != count:
                raise ValueError(f"{self.megatron_param} and {name} differ in their wildcards")
        if unknown := set(self.hf_symbols) - set(self.hf_params):
            raise ValueError(f"{self.megatron_param}: shapes for unknown tensors {sorted(unknown)}")

    @property
    def hf_param(self) -> str | dict[str, str]:
        """The Hugging Face name, or the names by role where there are several."""
        return self.hf_params[HF] if set(self.hf_params) == {HF} else dict(self.hf_params)

    @abstractmethod
    def layout(self, fields: LayoutFields) -> Layout:
        """The layout, for a model with these fields."""

    def rank_sections(self, fields: LayoutFields, rows: int) -> tuple[RankSection, ...]:
        """The parts of the parameter's `rows` rows that tensor parallelism splits one by one."""
        return (RankSection(rows),)

    @property
    def hf_wildcards(self) -> int:
        """How many of a parameter's numbers are in its Hugging Face names, the first of them.

        Any others pick a part of the tensors.
        """
        return next(iter(self.hf_params.values())).count(WILDCARD)

    def resolve(self, numbers: tuple[int | str, ...]) -> Self:
        """The row with its wildcards replaced by `numbers`, in order. Raises ValueError."""
        row = copy(self)
        row.megatron_param = fill(self.megatron_param, numbers)
        in_names = numbers[: self.hf_wildcards]
        row.hf_params = {role: fill(name, in_names) for role, name in self.hf_params.items()}
        return row

    def respelled(self, spelling: Callable[[str], str]) -> Self:
        """The same row for files that have other names: `spelling` gives each of them."""
        row = copy(self)
        row.hf_params = {role: spelling(name) for role, name in self.hf_params.items()}
        return row

    def hf_to_megatron(
        self,
        hf_weights: "torch.Tensor | Mapping[str, torch.Tensor]",
        megatron_module: "torch.nn.Module",
    ) -> "torch.Tensor":
        """This rank's shard of the parameter, from whole Hugging Face tensors.

        Args:
            hf_weights: the tensor, or tensors by role.
            megatron_module: the module that owns the parameter.

        Returns:
            A tensor of the parameter's local shape, in the dtype of the source.

        Raises:
            InputError: the shapes do not fit.
        """
        from megatron.bridge.models.conversion.module_weights import hf_to_megatron

        return hf_to_megatron(self, hf_weights, megatron_module)

    def megatron_to_hf(
        self, megatron_weights: "torch.Tensor", megatron_module: "torch.nn.Module"
    ) -> "dict[str, torch.Tensor]":
        """Whole Hugging Face tensors by name, from this rank's shard of the parameter.

        A collective over the tensor-parallel group where the parameter is split.

        Args:
            megatron_weights: the shard.
            megatron_module: the module that owns the parameter.

        Raises:
            InputError: the shapes do not fit.
        """
        from megatron.bridge.models.conversion.module_weights import megatron_to_hf

        return megatron_to_hf(self, megatron_weights, megatron_module)

    expected_axis: ClassVar[int | None] = None
    """The axis along which tensor parallelism must split the parameter, or None for any."""

    replicated: ClassVar[bool] = False
    """Whether tensor parallelism must not split the parameter at all."""

    saves_state: bool = False
    """Whether the module of this weight saves a state of its own beside it."""

    is_grouped_export: ClassVar[bool] = False
    """Whether several parameters make one Hugging Face tensor, each a part of it."""

    @property
    def group_key(self) -> str | None:
        """The tensor that is made only when all parameters of the same key are given, if any."""
        return self.hf_params[HF] if self.is_grouped_export else None

    @property
    def is_expert(self) -> bool:
        """Whether the parameter is a routed expert's, which has process groups of its own."""
        return ".experts." in self.megatron_param

    @property
    def tp_size(self) -> int:
        """How many ranks tensor parallelism has for the parameter; 1 without process groups."""
        from megatron.bridge.models.conversion.module_weights import tensor_parallel_size

        return tensor_parallel_size(self)

    @property
    def ep_size(self) -> int:
        """How many ranks share the routed experts of a layer; 1 without process groups."""
        from megatron.bridge.models.conversion.module_weights import expert_parallel_size

        return expert_parallel_size()

    @property
    def extra_state(self) -> str | None:
        """Name of the state that the module of this weight saves beside it, if any.

        megatron-core's linear layers save an empty one, TransformerEngine's norms too, and the
        loader of a model that has them asks for it. It has the wildcards of the row.
        """
        module, _, parameter = self.megatron_param.rpartition(".")
        expert = parameter.removeprefix("weight")  # "" but for one of several experts
        is_weight = parameter == f"weight{expert}" and (
            expert in ("", WILDCARD) or expert.isdecimal()
        )
        if not self.saves_state or not is_weight:
            return None
        return f"{module}._extra_state{expert}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.megatron_param!r}, {self.hf_param!r})"


MegatronParamMapping = ParamMapping
"""The name that other bridges give it."""


class _OneToOne(ParamMapping):
    """A row with one Hugging Face tensor.

    With `vocabulary`, axis 0 counts tokens, and Megatron pads it so that it divides over ranks.
    """

    def __init__(
        self,
        megatron_param: str,
        hf_param: str,
        shape: str | None = None,
        *,
        vocabulary: bool = False,
        only: str | None = None,
        layers: str | None = None,
    ) -> None:
        self.vocabulary = vocabulary
        if vocabulary:  # the embedding has none, and GPTModel does not save that of its output
            self.saves_state = False
        symbols = None if shape is None else {HF: shape}
        super().__init__(megatron_param, {HF: hf_param}, symbols, only=only, layers=layers)

    def layout(self, fields: LayoutFields) -> Layout:
        if not self.vocabulary:
            return Same()
        language = cast(VocabularyFields, fields)
        return PadRows(Same(), rows=language.vocab_size, padded_rows=language.padded_vocab_size)


class AutoMapping(_OneToOne):
    """One tensor, unchanged; the module says how it is split."""

    @classmethod
    def register_module_type(cls, module_name: str, parallelism: str) -> None:
        """Say how modules of a class split their weight, whose parameters do not say it.

        Args:
            module_name: of the class.
            parallelism: "column" (axis 0), "row" (axis 1) or "replicated".

        Raises:
            InputError: it is none of these.
        """
        from megatron.bridge.models.conversion.module_weights import register_module_type

        register_module_type(module_name, parallelism)


class ReplicatedMapping(_OneToOne):
    """One tensor that every tensor-parallel rank holds whole."""

    replicated = True


class NormMapping(ReplicatedMapping):
    """Weight or bias of a norm that is a module of its own, not fused into a linear layer.

    TransformerEngine's save a state; the loader of a model without it leaves what it does not need.
    """

    saves_state = True


class ColumnParallelMapping(_OneToOne):
    """One tensor whose rows (output features, vocabulary entries) are split over ranks."""

    expected_axis = 0
    saves_state = True


class RowParallelMapping(_OneToOne):
    """One tensor whose columns (input features) are split over ranks."""

    expected_axis = 1
    saves_state = True


class QKVMapping(ParamMapping):
    """Separate q, k and v projections; Megatron holds [queries, key, value] per key-value group.

    Args:
        megatron_param: name of the parameter.
        q: name of the query projection.
        k: name of the key projection.
        v: name of the value projection.
        shapes: symbols of the shape of q, and of that of k and v.
        gated: each head of q is [query; gate], and Megatron's group is [queries, gates, key,
            value].
        only: see `ParamMapping`.
        layers: see `ParamMapping`.
    """

    expected_axis = 0
    saves_state = True

    def __init__(
        self,
        megatron_param: str,
        q: str,
        k: str,
        v: str,
        shapes: tuple[str, str] | None = None,
        *,
        gated: bool = False,
        only: str | None = None,
        layers: str | None = None,
    ) -> None:
        self.gated = gated
        symbols = None if shapes is None else {"q": shapes[0], "k": shapes[1], "v": shapes[1]}
        super().__init__(
            megatron_param, {"q": q, "k": k, "v": v}, symbols, only=only, layers=layers
        )

    def layout(self, fields: LayoutFields) -> Layout:
        make = gated_qkv if self.gated else qkv
        return make(fields.num_attention_heads, fields.num_query_groups, fields.kv_channels)


class ConcatenatedQKVMapping(_OneToOne):
    """One tensor [all q; all k; all v]; Megatron holds [q, k, v] per head."""

    expected_axis = 0
    saves_state = True

    def layout(self, fields: LayoutFields) -> Layout:
        return packed_qkv(fields.num_attention_heads, fields.kv_channels)


class GatedMLPMapping(ParamMapping):
    """Separate gate and up projections; Megatron holds [gate; up], each split over ranks."""

    expected_axis = 0
    saves_state = True

    def __init__(
        self,
        megatron_param: str,
        gate: str,
        up: str,
        shape: str | None = None,
        *,
        only: str | None = None,
        layers: str | None = None,
    ) -> None:
        symbols = None if shape is None else {"gate": shape, "up": shape}
        names = {"gate": gate, "up": up}
        super().__init__(megatron_param, names, symbols, only=only, layers=layers)

    def layout(self, fields: LayoutFields) -> Layout:
        return Concatenate(("gate", "up"))

    def rank_sections(self, fields: LayoutFields, rows: int) -> tuple[RankSection, ...]:
        return (RankSection(rows // 2), RankSection(rows // 2))
