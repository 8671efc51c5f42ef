"""The rows of the vision tower, which is the same in every family.

Shapes on the Hugging Face side use these symbols, which `vision_structure.py` derives from a
config:

    h     hidden size                      D     h x merged patches (spatial_merge_size^2)
    i     intermediate size of the MLP     O     output size of the mergers
    P     entries of the position table    c t p   channels, frames, side of a patch
"""

from megatron.bridge.models.conversion.param_mapping import (
    ColumnParallelMapping,
    ConcatenatedQKVMapping,
    NormMapping,
    ParamMapping,
    ReplicatedMapping,
    RowParallelMapping,
)
from megatron.bridge.models.qwen_vl.parts import (
    DEEPSTACK_MERGERS,
    HF_VISION,
    VISION,
    VISION_LAYERS,
)


def vision_rows() -> list[ParamMapping]:
    """The tower: patches, positions, blocks, merger."""
    block, hf = f"{VISION_LAYERS}*.", f"{HF_VISION}blocks.*."
    rows: list[ParamMapping] = [
        ReplicatedMapping(
            f"{VISION}patch_embed.proj.weight", f"{HF_VISION}patch_embed.proj.weight", "h c t p p"
        ),
        ReplicatedMapping(
            f"{VISION}patch_embed.proj.bias", f"{HF_VISION}patch_embed.proj.bias", "h"
        ),
        ReplicatedMapping(f"{VISION}pos_embed.weight", f"{HF_VISION}pos_embed.weight", "P h"),
        ConcatenatedQKVMapping(
            f"{block}self_attention.linear_qkv.weight", f"{hf}attn.qkv.weight", "3h h"
        ),
        ConcatenatedQKVMapping(
            f"{block}self_attention.linear_qkv.bias", f"{hf}attn.qkv.bias", "3h"
        ),
        *_linear_rows(
            f"{block}self_attention.linear_proj", f"{hf}attn.proj", "h h", RowParallelMapping
        ),
        *_linear_rows(
            f"{block}mlp.linear_fc1", f"{hf}mlp.linear_fc1", "i h", ColumnParallelMapping
        ),
        *_linear_rows(f"{block}mlp.linear_fc2", f"{hf}mlp.linear_fc2", "h i", RowParallelMapping),
    ]
    for norm, hf_norm in (("self_attention.linear_qkv", "norm1"), ("mlp.linear_fc1", "norm2")):
        rows += [
            NormMapping(f"{block}{norm}.layer_norm_{part}", f"{hf}{hf_norm}.{part}", "h")
            for part in ("weight", "bias")
        ]
    return rows + _merger_rows(f"{VISION}merger.", f"{HF_VISION}merger.", "h")


def deepstack_rows() -> list[ParamMapping]:
    """One more merger for each tapped block; its norm sees merged patches, not single ones."""
    return _merger_rows(f"{DEEPSTACK_MERGERS}*.", f"{HF_VISION}deepstack_merger_list.*.", "D")


def _merger_rows(merger: str, hf_merger: str, norm_size: str) -> list[ParamMapping]:
    rows: list[ParamMapping] = [
        NormMapping(f"{merger}patch_norm.{part}", f"{hf_merger}norm.{part}", norm_size)
        for part in ("weight", "bias")
    ]
    return [
        *rows,
        *_linear_rows(
            f"{merger}linear_fc1", f"{hf_merger}linear_fc1", "D D", ColumnParallelMapping
        ),
        *_linear_rows(f"{merger}linear_fc2", f"{hf_merger}linear_fc2", "O D", RowParallelMapping),
    ]


def _linear_rows(
    linear: str,
    hf_linear: str,
    shape: str,
    split: type[ColumnParallelMapping] | type[RowParallelMapping],
) -> list[ParamMapping]:
    """Weight and bias of a linear layer; a row-parallel layer's bias is not split."""
    split_bias = ReplicatedMapping if split is RowParallelMapping else ColumnParallelMapping
    return [
        split(f"{linear}.weight", f"{hf_linear}.weight", shape),
        split_bias(f"{linear}.bias", f"{hf_linear}.bias", shape.split()[0]),
    ]
