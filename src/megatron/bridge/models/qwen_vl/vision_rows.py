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
    Layer,
)


def vision_rows() -> list[ParamMapping]:
    """The tower: patches, positions, blocks, merger."""
    tower = Layer(VISION, HF_VISION)
    block = Layer(f"{VISION_LAYERS}*.", f"{HF_VISION}blocks.*.")
    return [
        *tower.rows(
            ReplicatedMapping("patch_embed.proj.weight", "patch_embed.proj.weight", "h c t p p"),
            ReplicatedMapping("patch_embed.proj.bias", "patch_embed.proj.bias", "h"),
            ReplicatedMapping("pos_embed.weight", "pos_embed.weight", "P h"),
        ),
        *block.rows(
            ConcatenatedQKVMapping("self_attention.linear_qkv.weight", "attn.qkv.weight", "3h h"),
            ConcatenatedQKVMapping("self_attention.linear_qkv.bias", "attn.qkv.bias", "3h"),
            *_row_parallel("self_attention.linear_proj.", "attn.proj.", "h h"),
            *_column_parallel("mlp.linear_fc1.", "mlp.linear_fc1.", "i h"),
            *_row_parallel("mlp.linear_fc2.", "mlp.linear_fc2.", "h i"),
            *_norm("self_attention.linear_qkv.layer_norm_", "norm1.", "h"),
            *_norm("mlp.linear_fc1.layer_norm_", "norm2.", "h"),
        ),
        *_merger_rows(Layer(f"{VISION}merger.", f"{HF_VISION}merger."), "h"),
    ]


def deepstack_rows() -> list[ParamMapping]:
    """One more merger for each tapped block; its norm sees merged patches, not single ones."""
    merger = Layer(f"{DEEPSTACK_MERGERS}*.", f"{HF_VISION}deepstack_merger_list.*.")
    return _merger_rows(merger, "D")


def _merger_rows(merger: Layer, norm_size: str) -> list[ParamMapping]:
    return merger.rows(
        *_norm("patch_norm.", "norm.", norm_size),
        *_column_parallel("linear_fc1.", "linear_fc1.", "D D"),
        *_row_parallel("linear_fc2.", "linear_fc2.", "O D"),
    )


def _norm(megatron: str, hf: str, size: str) -> list[ParamMapping]:
    return [NormMapping(f"{megatron}{part}", f"{hf}{part}", size) for part in ("weight", "bias")]


def _column_parallel(megatron: str, hf: str, shape: str) -> list[ParamMapping]:
    return [
        ColumnParallelMapping(f"{megatron}weight", f"{hf}weight", shape),
        ColumnParallelMapping(f"{megatron}bias", f"{hf}bias", shape.split()[0]),
    ]


def _row_parallel(megatron: str, hf: str, shape: str) -> list[ParamMapping]:
    """Weight and bias of a row-parallel layer, whose bias is not split."""
    return [
        RowParallelMapping(f"{megatron}weight", f"{hf}weight", shape),
        ReplicatedMapping(f"{megatron}bias", f"{hf}bias", shape.split()[0]),
    ]
