"""What a mapping must know of one model's config: counts, dimensions and optional parts.

A bridge derives a ModelStructure from a config file; rows are then expanded, their shapes
computed and their checkpoint keys named without building a model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from megatron.bridge.models.conversion.boxes import Box, Shape, full_box


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


@dataclass(frozen=True)
class Placement:
    """Where a whole parameter lies in the checkpoint: the key, its shape, the parameter's box."""

    key: str
    key_shape: Shape
    leading: Box

    def key_box(self, box: Box) -> Box:
        """A box of the parameter as a box of the key."""
        return self.leading + box

    @property
    def object_key(self) -> str:
        """The name under which torch_dist files an object that is not a tensor.

        megatron-core's ShardedObject.unique_key: one entry per layer, offsets then shape.
        """
        shape = self.key_shape or (1,)
        offsets = [start for start, _ in self.leading] or [0]
        return f"{self.key}/shard_{'.'.join(map(str, offsets))}_{'.'.join(map(str, shape))}"


@dataclass(frozen=True)
class ModelStructure:
    """Counts, dimensions and optional parts of one model.

    dims: the symbols that rows write their Hugging Face shapes with, e.g. ``{"H": 2048}``.
    fields: what layouts read, by Megatron prefix (``"language_model."``).
    indices: which numbers a wildcard takes, by the Megatron path before it
        (``"language_model.decoder.layers."``).
    stacked: layer paths whose checkpoint keys carry all layers on a leading axis, as
        megatron-core's TransformerBlock.sharded_state_dict does for layers that are all alike.
    features: optional parts that are present; a row with ``only="..."`` exists with its feature.
    """

    dims: Mapping[str, int]
    fields: Mapping[str, LayoutFields]
    indices: Mapping[str, tuple[int, ...]]
    stacked: frozenset[str]
    features: frozenset[str]

    def fields_for(self, megatron_param: str) -> LayoutFields:
        """The fields of the part of the model that a parameter belongs to."""
        for prefix, fields in self.fields.items():
            if megatron_param.startswith(prefix):
                return fields
        raise KeyError(f"{megatron_param}: no part of the model has this prefix")

    def shape(self, symbols: str) -> Shape:
        """``"3 H"`` as numbers; a word is a symbol of `dims` or a number."""
        return tuple(int(word) if word.isdecimal() else self.dims[word] for word in symbols.split())

    def place(self, megatron_param: str, shape: Shape) -> Placement:
        """Checkpoint key of a parameter: layers that are all alike share one key.

        ``decoder.layers.7.mlp.linear_fc2.weight`` of 28 layers is row 7 of
        ``decoder.layers.mlp.linear_fc2.weight``, whose first axis is the layer.
        """
        for path in self.stacked:
            if megatron_param.startswith(path):
                number, _, rest = megatron_param.removeprefix(path).partition(".")
                layers = len(self.indices[path])
                layer = int(number)
                return Placement(path + rest, (layers, *shape), ((layer, layer + 1),))
        return Placement(megatron_param, shape, full_box(()))
