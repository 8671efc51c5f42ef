"""What a mapping must know of one model's config: counts, dimensions and optional parts.

A bridge derives a ModelStructure from a config file; rows are then expanded, their shapes
computed and their checkpoint keys named without building a model.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

from megatron.bridge.errors import ConfigError
from megatron.bridge.models.conversion.layer_keys import (
    SPARSE_NORM,
    SPARSE_NORM_AS_FUSED,
    KeyForms,
)
from megatron.bridge.models.conversion.patterns import WILDCARD, fill
from megatron.bridge.tensors.boxes import Box, Shape, full_box

_RENAMED = ((".mtp_model_layer.", ".transformer_layer."),)
"""Parts of parameter names for which megatron-core keeps an older checkpoint key."""

_EXPERT = re.compile(r"(?P<path>.*\.experts\.)(?P<name>\w+\.\w+?)(?P<expert>\*|\d+)")


class RankSection(NamedTuple):
    """Rows of a parameter that tensor parallelism splits on their own: gate apart from up.

    Attributes:
        rows: how many they are.
        key_suffix: what megatron-core appends to the checkpoint key, where it gives sections keys.
    """

    rows: int
    key_suffix: str = ""


class LayoutFields(Protocol):
    """The fields that layouts read, named as in megatron-core's TransformerConfig.

    A model's own config satisfies this, so a mapping works on a live module as well as on files.
    """

    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_query_groups(self) -> int: ...
    @property
    def kv_channels(self) -> int: ...


class VocabularyFields(LayoutFields, Protocol):
    """The fields of a language model: also the vocabulary, before and after padding."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def padded_vocab_size(self) -> int: ...


@dataclass(frozen=True)
class AttentionFields:
    """LayoutFields without a model: heads, key-value groups, head dimension."""

    num_attention_heads: int
    num_query_groups: int
    kv_channels: int


@dataclass(frozen=True)
class LanguageFields(AttentionFields):
    """VocabularyFields without a model."""

    vocab_size: int
    padded_vocab_size: int


class Placement(NamedTuple):
    """Where the parameters of a row, or a part of each, lie in the checkpoint.

    Attributes:
        key: pattern of the keys.
        key_shape: of the tensor with such a key.
        indexed: which of the row's wildcards, counted from 0, are not in the key: their numbers,
            the layer and the expert, are indexes on the first axes of `key_shape`.
        part: the box of each parameter that the key holds.
    """

    key: str
    key_shape: Shape
    indexed: tuple[int, ...]
    part: Box

    def leading(self, numbers: tuple[int, ...]) -> Box:
        """The box of the parameter with these numbers, along the axes of layer and expert."""
        return tuple([(numbers[axis], numbers[axis] + 1) for axis in self.indexed])

    def key_of(self, numbers: tuple[int, ...]) -> str:
        """The key of the parameter with these numbers."""
        if not self.indexed:
            return fill(self.key, numbers)
        return fill(self.key, [n for axis, n in enumerate(numbers) if axis not in self.indexed])

    def object_key(self, numbers: tuple[int, ...]) -> str:
        """The name under which torch_dist files an object that is not a tensor.

        megatron-core's ShardedObject.unique_key: one entry per layer, offsets then shape.
        """
        offsets = ".".join([str(numbers[axis]) for axis in self.indexed]) or "0"
        sizes = ".".join(map(str, self.key_shape)) or "1"
        return f"{self.key_of(numbers)}/shard_{offsets}_{sizes}"


@dataclass(frozen=True)
class ModelStructure:
    """Counts, dimensions and optional parts of one model.

    Attributes:
        dims: the symbols that rows write their Hugging Face shapes with, e.g. ``{"H": 2048}``.
        fields: what layouts read, by Megatron prefix (``""`` for all).
        indices: which numbers a wildcard takes, by the Megatron path before it
            (``"decoder.layers."``).
        stacked: layer paths whose checkpoint keys carry all layers on a leading axis; see KeyForms.
        features: optional parts that are present; a row with ``only="..."`` exists with its
            feature.
        layer_kinds: the layers of each kind, for rows that are declared with ``layers="..."``.
        experts: routed experts of a layer; 0 for a dense model.
        sparse_norm_as_fused: see KeyForms.
    """

    dims: Mapping[str, int]
    fields: Mapping[str, LayoutFields]
    indices: Mapping[str, tuple[int, ...]]
    stacked: frozenset[str]
    features: frozenset[str]
    layer_kinds: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    experts: int = 0
    sparse_norm_as_fused: bool = False

    def with_keys(self, keys: KeyForms) -> "ModelStructure":
        """The same model with checkpoint keys of these forms; what they leave open stays."""
        shared = {path for path, is_shared in keys.stacked.items() if is_shared}
        return replace(
            self,
            stacked=(self.stacked - keys.stacked.keys()) | shared,
            sparse_norm_as_fused=self.sparse_norm_as_fused or keys.sparse_norm_as_fused,
        )

    def fields_for(self, megatron_param: str) -> LayoutFields:
        """The fields of the part of the model that a parameter belongs to."""
        for prefix, fields in self.fields.items():
            if megatron_param.startswith(prefix):
                return fields
        raise KeyError(f"{megatron_param}: no part of the model has this prefix")

    def shape(self, symbols: str) -> Shape:
        """``"3 H"`` as numbers; a word is a symbol of `dims` or a number.

        Raises:
            ConfigError: the config has no size for a symbol.
        """
        if unknown := [w for w in symbols.split() if not w.isdecimal() and w not in self.dims]:
            raise ConfigError(
                f"rows of this family ask for shape [{symbols}], but nothing in the config gives "
                f"{' and '.join(unknown)}"
            )
        return tuple(int(word) if word.isdecimal() else self.dims[word] for word in symbols.split())

    def numbers(self, path: str, layers: str | None) -> tuple[int, ...]:
        """What the wildcard behind `path` stands for, in rows for one kind of layer or for all."""
        if layers is None:
            return self.indices[path]
        return self.layer_kinds[layers]

    def place(
        self, megatron_param: str, shape: Shape, sections: Sequence[RankSection] = ()
    ) -> tuple[Placement, ...]:
        """Checkpoint keys of a row's parameters, as megatron-core's sharded_state_dict names them.

        Layers that are stacked share one key, whose first axis is the layer:
        ``decoder.layers.7.mlp.linear_fc2.weight`` of 28 layers is row 7 of
        ``decoder.layers.mlp.linear_fc2.weight``. The experts of a layer share one in the same way.
        Sections with a suffix have keys of their own.

        Args:
            megatron_param: the pattern of the parameters' names.
            shape: of each of them.
            sections: see `ParamMapping.rank_sections`.

        Raises:
            ValueError: the number of such a layer or expert is written out.
        """
        key = megatron_param
        indexed: tuple[int, ...] = ()
        first: Shape = ()
        for path in self.stacked:
            if key.startswith(path):
                layer, _, rest = key.removeprefix(path).partition(".")
                _check_wildcard(layer, megatron_param)
                key, indexed, first = path + rest, (0,), (len(self.indices[path]),)
        for name, stored in _RENAMED:
            key = key.replace(name, stored)
        if self.sparse_norm_as_fused:
            key = key.replace(SPARSE_NORM, SPARSE_NORM_AS_FUSED)
        if match := _EXPERT.fullmatch(key):
            _check_wildcard(match["expert"], megatron_param)
            key = f"{match['path']}experts.{match['name']}"
            indexed += (megatron_param.count(WILDCARD) - 1,)
            first += (self.experts,)
        if not any(section.key_suffix for section in sections):
            return (Placement(key, first + shape, indexed, full_box(shape)),)
        placements, start = [], 0
        for section in sections:
            part = ((start, start + section.rows), *full_box(shape[1:]))
            key_shape = (*first, section.rows, *shape[1:])
            placements.append(Placement(f"{key}.{section.key_suffix}", key_shape, indexed, part))
            start += section.rows
        return tuple(placements)


def _check_wildcard(number: str, megatron_param: str) -> None:
    if number != WILDCARD:
        raise ValueError(
            f"{megatron_param}: layers and experts share a key; declare one row for all"
        )
