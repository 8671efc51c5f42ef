"""Which layers share checkpoint keys: megatron-core has two ways to key a block of layers.

    decoder.layers.mlp.linear_fc2.weight       of all layers; the first axis is the layer
    decoder.layers.7.mlp.linear_fc2.weight     of one layer

TransformerBlock.sharded_state_dict decides by the config, and by what a training loop asks for. So
the keys that are there tell which of the two they have, and either is read.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron.bridge.tensors.boxes import Box

SPARSE_NORM, SPARSE_NORM_AS_FUSED = ".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_"
"""The norm before routed experts, and its key by megatron-core's local layer spec."""

_ROUTER = ".mlp.router.weight"


@dataclass(frozen=True)
class KeyForms:
    """How the keys of a checkpoint or a model are formed, where there is more than one way.

    Attributes:
        stacked: by layer path (``"decoder.layers."``), whether its layers share keys; a path that
            is absent has the form that megatron-core gives the model of the config.
        sparse_norm_as_fused: whether the norm before routed experts has a key as if it were fused
            with what follows it.
    """

    stacked: Mapping[str, bool] = field(default_factory=dict)
    sparse_norm_as_fused: bool = False

    @classmethod
    def of(cls, keys: Collection[str], paths: Iterable[str]) -> "KeyForms":
        """The forms of `keys` that are there, in a model whose layers have these `paths`."""
        stacked = {}
        for path in paths:
            start = len(path)
            numbered = [key[start : start + 1].isdecimal() for key in keys if key.startswith(path)]
            if numbered:
                stacked[path] = not any(numbered)
        routers = (key.removesuffix(_ROUTER) for key in keys if key.endswith(_ROUTER))
        fused = any(
            f"{layer}{SPARSE_NORM_AS_FUSED}weight" in keys
            and f"{layer}{SPARSE_NORM}weight" not in keys
            for layer in routers
        )
        return cls(stacked, fused)


BY_CONFIG = KeyForms()
"""The forms that megatron-core gives the keys of the model that is made of the config."""


def layers_share_keys(settings: Mapping[str, Any]) -> bool:
    """Whether the decoder of a model shares keys, by TransformerBlock's rule.

    `settings` are fields of its TransformerConfig, as far as they are set. A list is a pattern of
    its own for every layer, even one that says the same of all of them.
    """
    if settings.get("hetereogenous_dist_checkpoint") or settings.get("heterogeneous_block_specs"):
        return False
    patterns = (settings.get(name) for name in ("moe_layer_freq", "linear_attention_freq"))
    return not any(isinstance(one, list) or (one or 1) > 1 for one in patterns)


def stored_place(
    key: str, box: Box, stored: Collection[str], paths: Iterable[str]
) -> tuple[str, Box]:
    """Where a box of a key lies in a checkpoint whose keys may have the other form.

    Args:
        key: of the model.
        box: of the tensor with this key.
        stored: the keys of the checkpoint.
        paths: of the model's layers.

    Returns:
        Key and box in the checkpoint; as they are where neither form is there.
    """
    for name in (key, key.replace(SPARSE_NORM, SPARSE_NORM_AS_FUSED)):
        if name in stored:
            return name, box
        for path in paths:
            if not name.startswith(path):
                continue
            layer, _, rest = name.removeprefix(path).partition(".")
            if layer.isdecimal():
                number = int(layer)
                other, other_box = path + rest, ((number, number + 1), *box)
            else:
                number = box[0][0]
                other, other_box = f"{path}{number}.{name.removeprefix(path)}", box[1:]
            if other in stored:
                return other, other_box
    return key, box
