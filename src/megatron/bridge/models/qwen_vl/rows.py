"""The rows that the language models of the Qwen families share, each written once.

Shapes on the Hugging Face side use these symbols, which `structure.py` derives from a config:

    H     hidden size                                 E     routed experts of a layer
    I     intermediate size of the dense MLP          Ie    intermediate size of a routed expert
    Q     query heads x head dimension                Is    intermediate size of the shared expert
    K     key-value heads x head dimension            C     GDN: channels of the convolution
    d     head dimension                              Z     GDN: value heads x value dimension
    V     vocabulary, before padding                  nv    GDN: value heads
    L     labels of a classifier                      dv    GDN: value dimension
                                                      w     GDN: width of the convolution
"""

from megatron.bridge.models.conversion.param_mapping import (
    ColumnParallelMapping,
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
from megatron.bridge.models.qwen_vl.parts import (
    HF_HEAD,
    HF_MTP,
    HF_SCORE,
    SCORE_BIAS,
    UNTIED_OUTPUT,
    WITH_MTP,
    Layer,
    Prefixes,
)


def embedding_rows(prefixes: Prefixes) -> list[ParamMapping]:
    """Word embedding, final norm and the output layer, which is absent where it is tied."""
    megatron, hf = prefixes.megatron, prefixes.hf
    return [
        ColumnParallelMapping(
            f"{megatron}embedding.word_embeddings.weight",
            f"{prefixes.hf_embedding}weight",
            "V H",
            vocabulary=True,
        ),
        ColumnParallelMapping(
            f"{megatron}output_layer.weight",
            f"{HF_HEAD}weight",
            "V H",
            vocabulary=True,
            only=UNTIED_OUTPUT,
        ),
        NormMapping(f"{megatron}decoder.final_layernorm.weight", f"{hf}norm.weight", "H"),
    ]


def score_rows(prefixes: Prefixes) -> list[ParamMapping]:
    """The head of a classifier, in the place of the output layer: a score for each label."""
    head = f"{prefixes.megatron}output_layer."
    return [
        ReplicatedMapping(f"{head}weight", f"{HF_SCORE}weight", "L H"),
        ReplicatedMapping(f"{head}bias", f"{HF_SCORE}bias", "L", only=SCORE_BIAS),
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


def mtp_rows(prefixes: Prefixes) -> list[ParamMapping]:
    """What joins the multi-token-prediction layer to the decoder; the layer has rows of its own."""
    mtp = prefixes.mtp
    rows: list[ParamMapping] = [
        ColumnParallelMapping(f"{mtp}eh_proj.weight", f"{HF_MTP}fc.weight", "H 2H", only=WITH_MTP)
    ]
    for norm, hf_norm in (
        ("enorm", "pre_fc_norm_embedding"),
        ("hnorm", "pre_fc_norm_hidden"),
        ("final_layernorm", "norm"),
    ):
        name, hf_name = f"{mtp}{norm}.weight", f"{HF_MTP}{hf_norm}.weight"
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
