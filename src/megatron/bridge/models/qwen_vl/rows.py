"""The rows that the Qwen vision-language families share, each written once.

Shapes on the Hugging Face side use these symbols, which `structure.py` derives from a config:

    H     hidden size of the language model           h   hidden size of the vision tower
    I     intermediate size of its dense MLP          i   intermediate size of its MLP
    Q     query heads x head dimension                D   h x merged patches (spatial_merge_size^2)
    K     key-value heads x head dimension            P   entries of the position table
    d     head dimension                              O   output size of the mergers
    V     vocabulary, before padding                  c t p   channels, frames, side of a patch
"""

from megatron.bridge.models.conversion.param_mapping import (
    ColumnParallelMapping,
    ConcatenatedQKVMapping,
    GatedMLPMapping,
    ParamMapping,
    QKVMapping,
    ReplicatedMapping,
    RowParallelMapping,
)

LANGUAGE = "language_model."
VISION = "vision_model."
HF_LANGUAGE = "model.language_model."
HF_VISION = "model.visual."

DECODER_LAYERS = f"{LANGUAGE}decoder.layers."
VISION_LAYERS = f"{VISION}decoder.layers."
DEEPSTACK_MERGERS = f"{VISION}decoder.deepstack_merger_list."

ATTENTION_BIAS = "attention_bias"
UNTIED_OUTPUT = "untied_output"


def embedding_rows() -> list[ParamMapping]:
    """Word embedding, final norm and the output layer, which is absent where it is tied."""
    return [
        ColumnParallelMapping(
            f"{LANGUAGE}embedding.word_embeddings.weight",
            f"{HF_LANGUAGE}embed_tokens.weight",
            "V H",
            vocabulary=True,
        ),
        ColumnParallelMapping(
            f"{LANGUAGE}output_layer.weight",
            "lm_head.weight",
            "V H",
            vocabulary=True,
            only=UNTIED_OUTPUT,
        ),
        ReplicatedMapping(
            f"{LANGUAGE}decoder.final_layernorm.weight", f"{HF_LANGUAGE}norm.weight", "H"
        ),
    ]


def attention_rows(layer: str, hf_layer: str) -> list[ParamMapping]:
    """Self-attention with its input norm and per-head query and key norms."""
    linear, hf = f"{layer}self_attention.", f"{hf_layer}self_attn."
    return [
        ReplicatedMapping(
            f"{linear}linear_qkv.layer_norm_weight", f"{hf_layer}input_layernorm.weight", "H"
        ),
        QKVMapping(
            f"{linear}linear_qkv.weight",
            f"{hf}q_proj.weight",
            f"{hf}k_proj.weight",
            f"{hf}v_proj.weight",
            ("Q H", "K H"),
        ),
        QKVMapping(
            f"{linear}linear_qkv.bias",
            f"{hf}q_proj.bias",
            f"{hf}k_proj.bias",
            f"{hf}v_proj.bias",
            ("Q", "K"),
            only=ATTENTION_BIAS,
        ),
        ReplicatedMapping(f"{linear}q_layernorm.weight", f"{hf}q_norm.weight", "d"),
        ReplicatedMapping(f"{linear}k_layernorm.weight", f"{hf}k_norm.weight", "d"),
        RowParallelMapping(f"{linear}linear_proj.weight", f"{hf}o_proj.weight", "H Q"),
        ReplicatedMapping(
            f"{linear}linear_proj.bias", f"{hf}o_proj.bias", "H", only=ATTENTION_BIAS
        ),
    ]


def dense_mlp_rows(layer: str, hf_layer: str) -> list[ParamMapping]:
    """Gated MLP with its norm, which Megatron fuses into the first linear layer."""
    linear, hf = f"{layer}mlp.", f"{hf_layer}mlp."
    return [
        ReplicatedMapping(
            f"{linear}linear_fc1.layer_norm_weight",
            f"{hf_layer}post_attention_layernorm.weight",
            "H",
        ),
        GatedMLPMapping(
            f"{linear}linear_fc1.weight", f"{hf}gate_proj.weight", f"{hf}up_proj.weight", "I H"
        ),
        RowParallelMapping(f"{linear}linear_fc2.weight", f"{hf}down_proj.weight", "H I"),
    ]


def vision_rows() -> list[ParamMapping]:
    """The vision tower, the same in every family: patches, positions, blocks, merger."""
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
            ReplicatedMapping(f"{block}{norm}.layer_norm_{part}", f"{hf}{hf_norm}.{part}", "h")
            for part in ("weight", "bias")
        ]
    return rows + _merger_rows(f"{VISION}merger.", f"{HF_VISION}merger.", "h")


def deepstack_rows() -> list[ParamMapping]:
    """One more merger for each tapped block; its norm sees merged patches, not single ones."""
    return _merger_rows(f"{DEEPSTACK_MERGERS}*.", f"{HF_VISION}deepstack_merger_list.*.", "D")


def _merger_rows(merger: str, hf_merger: str, norm_size: str) -> list[ParamMapping]:
    rows: list[ParamMapping] = [
        ReplicatedMapping(f"{merger}patch_norm.{part}", f"{hf_merger}norm.{part}", norm_size)
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
