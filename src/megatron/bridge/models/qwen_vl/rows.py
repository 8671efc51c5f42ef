"""The rows that the Qwen vision-language families share, each written once.

Shapes on the Hugging Face side use these symbols, which `structure.py` derives from a config:

    H     hidden size of the language model           h   hidden size of the vision tower
    I     intermediate size of its dense MLP          i   intermediate size of its MLP
    Q     query heads x head dimension                D   h x merged patches (spatial_merge_size^2)
    K     key-value heads x head dimension            P   entries of the position table
    d     head dimension                              O   output size of the mergers
    V     vocabulary, before padding                  c t p   channels, frames, side of a patch
    E     routed experts of a layer                   C   GDN: channels of the convolution
    Ie    intermediate size of a routed expert        Z   GDN: value heads x value dimension
    Is    intermediate size of the shared expert      nv  GDN: value heads
                                                      dv  GDN: value dimension
                                                      w   GDN: width of the convolution
"""

from dataclasses import dataclass, replace

from megatron.bridge.models.conversion.param_mapping import (
    ColumnParallelMapping,
    ConcatenatedQKVMapping,
    GatedMLPMapping,
    NormMapping,
    ParamMapping,
    QKVMapping,
    ReplicatedMapping,
    RowParallelMapping,
)
from megatron.bridge.models.qwen_vl.disk_layout import ExpertLayout
from megatron.bridge.models.qwen_vl.expert_mapping import (
    ExpertMLPDownProjMapping,
    ExpertMLPGateUpProjMapping,
)
from megatron.bridge.models.qwen_vl.gated_delta_mapping import (
    GatedDeltaConvMapping,
    GatedDeltaInProjMapping,
    ZeroCenteredNormMapping,
)

LANGUAGE = "language_model."
VISION = "vision_model."
HF_LANGUAGE = "model.language_model."
HF_VISION = "model.visual."
HF_EMBEDDING = f"{HF_LANGUAGE}embed_tokens."
HF_HEAD = "lm_head."

DECODER_LAYERS = f"{LANGUAGE}decoder.layers."
VISION_LAYERS = f"{VISION}decoder.layers."
DEEPSTACK_MERGERS = f"{VISION}decoder.deepstack_merger_list."

MTP = f"{LANGUAGE}mtp.layers.0."
MTP_LAYER = f"{MTP}mtp_model_layer."
HF_MTP = "mtp."
HF_MTP_LAYER = f"{HF_MTP}layers.0."

# Optional parts.
ATTENTION_BIAS = "attention_bias"
UNTIED_OUTPUT = "untied_output"
WITH_MTP = "mtp"
MTP_ATTENTION_BIAS = "mtp_attention_bias"

# Parts that a Megatron model may be built without; the MTP layer is one, too.
VISION_PART = "vision"

# Kinds of layers.
FULL_ATTENTION = "full_attention"
LINEAR_ATTENTION = "linear_attention"
DENSE_MLP = "dense_mlp"
SPARSE_MLP = "sparse_mlp"


@dataclass(frozen=True)
class Layer:
    """Where the rows of one layer apply: its names on both sides, a kind of layer, its features.

    only: without which there is no such layer. bias: without which its attention has no biases.
    """

    megatron: str
    hf: str
    kind: str | None = None
    only: str | None = None
    bias: str = ATTENTION_BIAS

    def of_kind(self, kind: str) -> "Layer":
        """The same layers, but only those of one kind."""
        return replace(self, kind=kind)


DECODER_LAYER = Layer(f"{DECODER_LAYERS}*.", f"{HF_LANGUAGE}layers.*.")
MTP_MODEL_LAYER = Layer(MTP_LAYER, HF_MTP_LAYER, only=WITH_MTP, bias=MTP_ATTENTION_BIAS)


def embedding_rows() -> list[ParamMapping]:
    """Word embedding, final norm and the output layer, which is absent where it is tied."""
    return [
        ColumnParallelMapping(
            f"{LANGUAGE}embedding.word_embeddings.weight",
            f"{HF_EMBEDDING}weight",
            "V H",
            vocabulary=True,
        ),
        ColumnParallelMapping(
            f"{LANGUAGE}output_layer.weight",
            f"{HF_HEAD}weight",
            "V H",
            vocabulary=True,
            only=UNTIED_OUTPUT,
        ),
        NormMapping(f"{LANGUAGE}decoder.final_layernorm.weight", f"{HF_LANGUAGE}norm.weight", "H"),
    ]


def attention_rows(layer: Layer, *, gated: bool = False) -> list[ParamMapping]:
    """Self-attention with its input norm, per-head query and key norms, and biases.

    gated: q_proj also makes a gate for every head.
    """
    linear, hf = f"{layer.megatron}self_attention.", f"{layer.hf}self_attn."
    return [
        _norm(layer, "self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
        QKVMapping(
            f"{linear}linear_qkv.weight",
            f"{hf}q_proj.weight",
            f"{hf}k_proj.weight",
            f"{hf}v_proj.weight",
            ("2Q H" if gated else "Q H", "K H"),
            gated=gated,
            only=layer.only,
            layers=layer.kind,
        ),
        _norm(layer, "self_attention.q_layernorm.weight", "self_attn.q_norm.weight", "d"),
        _norm(layer, "self_attention.k_layernorm.weight", "self_attn.k_norm.weight", "d"),
        RowParallelMapping(
            f"{linear}linear_proj.weight",
            f"{hf}o_proj.weight",
            "H Q",
            only=layer.only,
            layers=layer.kind,
        ),
        QKVMapping(
            f"{linear}linear_qkv.bias",
            f"{hf}q_proj.bias",
            f"{hf}k_proj.bias",
            f"{hf}v_proj.bias",
            ("2Q" if gated else "Q", "K"),
            gated=gated,
            only=layer.bias,
            layers=layer.kind,
        ),
        ReplicatedMapping(
            f"{linear}linear_proj.bias",
            f"{hf}o_proj.bias",
            "H",
            only=layer.bias,
            layers=layer.kind,
        ),
    ]


def gated_delta_rows(layer: Layer) -> list[ParamMapping]:
    """Gated DeltaNet with its input norm, which Megatron fuses into the input projection."""
    net, hf, kind = f"{layer.megatron}self_attention.", f"{layer.hf}linear_attn.", layer.kind
    return [
        _norm(layer, "self_attention.in_proj.layer_norm_weight", "input_layernorm.weight"),
        GatedDeltaInProjMapping(
            f"{net}in_proj.weight",
            f"{hf}in_proj_qkv.weight",
            f"{hf}in_proj_z.weight",
            f"{hf}in_proj_b.weight",
            f"{hf}in_proj_a.weight",
            ("C H", "Z H", "nv H"),
            layers=kind,
        ),
        GatedDeltaConvMapping(f"{net}conv1d.weight", f"{hf}conv1d.weight", "C 1 w", layers=kind),
        ColumnParallelMapping(f"{net}A_log", f"{hf}A_log", "nv", layers=kind),
        ColumnParallelMapping(f"{net}dt_bias", f"{hf}dt_bias", "nv", layers=kind),
        ZeroCenteredNormMapping(f"{net}out_norm.weight", f"{hf}norm.weight", "dv", layers=kind),
        RowParallelMapping(f"{net}out_proj.weight", f"{hf}out_proj.weight", "H Z", layers=kind),
    ]


def dense_mlp_rows(layer: Layer) -> list[ParamMapping]:
    """Gated MLP with its norm, which Megatron fuses into the first linear layer."""
    norm = _norm(layer, "mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight")
    return [norm, *_gated_mlp_rows(layer, "mlp.", "mlp.", "I")]


def moe_rows(
    layer: Layer, experts: ExpertLayout, *, shared_expert: bool = False
) -> list[ParamMapping]:
    """Router and routed experts, in the disk layout `experts`, and the shared expert."""
    rows: list[ParamMapping] = [
        _norm(layer, "pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
        _whole(layer, "mlp.router.weight", "mlp.gate.weight", "E H"),
        *_expert_rows(layer, experts),
    ]
    if shared_expert:
        rows += _gated_mlp_rows(layer, "mlp.shared_experts.", "mlp.shared_expert.", "Is")
        rows.append(
            _whole(layer, "mlp.shared_experts.gate_weight", "mlp.shared_expert_gate.weight", "1 H")
        )
    return rows


def mtp_rows() -> list[ParamMapping]:
    """What joins the multi-token-prediction layer to the decoder; the layer has rows of its own."""
    rows: list[ParamMapping] = [
        ColumnParallelMapping(f"{MTP}eh_proj.weight", f"{HF_MTP}fc.weight", "H 2H", only=WITH_MTP)
    ]
    for norm, hf_norm in (
        ("enorm", "pre_fc_norm_embedding"),
        ("hnorm", "pre_fc_norm_hidden"),
        ("final_layernorm", "norm"),
    ):
        name, hf_name = f"{MTP}{norm}.weight", f"{HF_MTP}{hf_norm}.weight"
        rows.append(NormMapping(name, hf_name, "H", only=WITH_MTP))
    return rows


def _norm(layer: Layer, megatron: str, hf: str, shape: str = "H") -> ParamMapping:
    """A norm of a layer."""
    return NormMapping(
        f"{layer.megatron}{megatron}", f"{layer.hf}{hf}", shape, only=layer.only, layers=layer.kind
    )


def _whole(layer: Layer, megatron: str, hf: str, shape: str) -> ParamMapping:
    """A parameter of a layer that every rank holds whole."""
    return ReplicatedMapping(
        f"{layer.megatron}{megatron}", f"{layer.hf}{hf}", shape, only=layer.only, layers=layer.kind
    )


def _gated_mlp_rows(layer: Layer, mlp: str, hf_mlp: str, size: str) -> list[ParamMapping]:
    """Gate, up and down of a dense MLP or of a shared expert with `size` features inside."""
    linear, hf = f"{layer.megatron}{mlp}", f"{layer.hf}{hf_mlp}"
    return [
        GatedMLPMapping(
            f"{linear}linear_fc1.weight",
            f"{hf}gate_proj.weight",
            f"{hf}up_proj.weight",
            f"{size} H",
            only=layer.only,
            layers=layer.kind,
        ),
        RowParallelMapping(
            f"{linear}linear_fc2.weight",
            f"{hf}down_proj.weight",
            f"H {size}",
            only=layer.only,
            layers=layer.kind,
        ),
    ]


def _expert_rows(layer: Layer, experts: ExpertLayout) -> list[ParamMapping]:
    fc1, fc2 = (f"{layer.megatron}mlp.experts.linear_fc{n}.weight*" for n in (1, 2))
    hf, only, kind = f"{layer.hf}mlp.experts.", layer.only, layer.kind
    if experts is ExpertLayout.PER_EXPERT:
        return [
            GatedMLPMapping(
                fc1,
                f"{hf}*.gate_proj.weight",
                f"{hf}*.up_proj.weight",
                "Ie H",
                only=only,
                layers=kind,
            ),
            RowParallelMapping(fc2, f"{hf}*.down_proj.weight", "H Ie", only=only, layers=kind),
        ]
    turned = experts is ExpertLayout.FUSED_TRANSPOSED
    return [
        ExpertMLPGateUpProjMapping(
            fc1,
            f"{hf}gate_up_proj",
            "E H 2Ie" if turned else "E 2Ie H",
            transposed=turned,
            only=only,
            layers=kind,
        ),
        ExpertMLPDownProjMapping(
            fc2,
            f"{hf}down_proj",
            "E Ie H" if turned else "E H Ie",
            transposed=turned,
            only=only,
            layers=kind,
        ),
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
