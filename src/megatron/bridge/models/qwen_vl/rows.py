"""The rows that the language models of the Qwen families share, each written once.

Shapes on the Hugging Face side use these symbols, which `text_structure.py` derives from a config:

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
    HF_SCORE,
    SCORE_BIAS,
    UNTIED_OUTPUT,
    Layer,
    Prefixes,
)


def embedding_rows(prefixes: Prefixes) -> list[ParamMapping]:
    """Word embedding, final norm and the output layer, which is absent where it is tied."""
    megatron, hf = prefixes.megatron, prefixes.hf
    embedding, hf_embedding = prefixes.embedding, f"{prefixes.hf_embedding}weight"
    output, hf_output = f"{megatron}output_layer.weight", f"{HF_HEAD}weight"
    return [
        ColumnParallelMapping(embedding, hf_embedding, "V H", vocabulary=True),
        ColumnParallelMapping(output, hf_output, "V H", vocabulary=True, only=UNTIED_OUTPUT),
        NormMapping(f"{megatron}decoder.final_layernorm.weight", f"{hf}norm.weight", "H"),
    ]


def score_rows(prefixes: Prefixes) -> list[ParamMapping]:
    """The head of a classifier, in the place of the output layer: a score for each label."""
    return Layer(f"{prefixes.megatron}output_layer.", HF_SCORE).rows(
        ReplicatedMapping("weight", "weight", "L H"),
        ReplicatedMapping("bias", "bias", "L", only=SCORE_BIAS),
    )


def attention_rows(layer: Layer, *, gated: bool = False) -> list[ParamMapping]:
    """Self-attention with its input norm, per-head query and key norms, and biases.

    Args:
        layer: the layers that have it.
        gated: whether q_proj also makes a gate for every head.
    """
    megatron, hf, queries = "self_attention.", "self_attn.", "2Q" if gated else "Q"

    def qkv(part: str, shapes: tuple[str, str], only: str | None = None) -> ParamMapping:
        name, (q, k, v) = (
            f"{megatron}linear_qkv.{part}",
            (f"{hf}{one}_proj.{part}" for one in "qkv"),
        )
        return QKVMapping(name, q, k, v, shapes, gated=gated, only=only)

    return layer.rows(
        NormMapping(f"{megatron}linear_qkv.layer_norm_weight", "input_layernorm.weight", "H"),
        qkv("weight", (f"{queries} H", "K H")),
        NormMapping(f"{megatron}q_layernorm.weight", f"{hf}q_norm.weight", "d"),
        NormMapping(f"{megatron}k_layernorm.weight", f"{hf}k_norm.weight", "d"),
        RowParallelMapping(f"{megatron}linear_proj.weight", f"{hf}o_proj.weight", "H Q"),
        qkv("bias", (queries, "K"), only=layer.bias),
        ReplicatedMapping(f"{megatron}linear_proj.bias", f"{hf}o_proj.bias", "H", only=layer.bias),
    )


def gated_delta_rows(layer: Layer) -> list[ParamMapping]:
    """Gated DeltaNet with its input norm, which Megatron fuses into the input projection."""
    megatron, hf = "self_attention.", "linear_attn."
    in_proj = f"{megatron}in_proj.weight"
    qkv, z, b, a = (f"{hf}in_proj_{part}.weight" for part in ("qkv", "z", "b", "a"))
    return layer.rows(
        NormMapping(f"{megatron}in_proj.layer_norm_weight", "input_layernorm.weight", "H"),
        GatedDeltaInProjMapping(in_proj, qkv, z, b, a, ("C H", "Z H", "nv H")),
        GatedDeltaConvMapping(f"{megatron}conv1d.weight", f"{hf}conv1d.weight", "C 1 w"),
        ColumnParallelMapping(f"{megatron}A_log", f"{hf}A_log", "nv"),
        ColumnParallelMapping(f"{megatron}dt_bias", f"{hf}dt_bias", "nv"),
        ZeroCenteredNormMapping(f"{megatron}out_norm.weight", f"{hf}norm.weight", "dv"),
        RowParallelMapping(f"{megatron}out_proj.weight", f"{hf}out_proj.weight", "H Z"),
    )


def dense_mlp_rows(layer: Layer) -> list[ParamMapping]:
    """Gated MLP with its norm, which Megatron fuses into the first linear layer."""
    return layer.rows(
        NormMapping("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight", "H"),
        *_gated_mlp("mlp.", "mlp.", "I"),
    )


def moe_rows(
    layer: Layer, experts: ExpertLayout, *, shared_expert: bool = False
) -> list[ParamMapping]:
    """Router and routed experts, in the disk layout `experts`, and the shared expert."""
    shared = [
        *_gated_mlp("mlp.shared_experts.", "mlp.shared_expert.", "Is"),
        ReplicatedMapping("mlp.shared_experts.gate_weight", "mlp.shared_expert_gate.weight", "1 H"),
    ]
    return layer.rows(
        NormMapping("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", "H"),
        ReplicatedMapping("mlp.router.weight", "mlp.gate.weight", "E H"),
        *_experts(experts),
        *(shared if shared_expert else ()),
    )


def mtp_rows(prefixes: Prefixes) -> list[ParamMapping]:
    """What joins the multi-token-prediction layer to the decoder; the layer has rows of its own."""
    return prefixes.predictor.rows(
        ColumnParallelMapping("eh_proj.weight", "fc.weight", "H 2H"),
        NormMapping("enorm.weight", "pre_fc_norm_embedding.weight", "H"),
        NormMapping("hnorm.weight", "pre_fc_norm_hidden.weight", "H"),
        NormMapping("final_layernorm.weight", "norm.weight", "H"),
    )


def _gated_mlp(megatron: str, hf: str, size: str) -> list[ParamMapping]:
    """Gate, up and down of a dense MLP or of a shared expert with `size` features inside."""
    gate, up = f"{hf}gate_proj.weight", f"{hf}up_proj.weight"
    return [
        GatedMLPMapping(f"{megatron}linear_fc1.weight", gate, up, f"{size} H"),
        RowParallelMapping(f"{megatron}linear_fc2.weight", f"{hf}down_proj.weight", f"H {size}"),
    ]


def _experts(layout: ExpertLayout) -> list[ParamMapping]:
    hf, fc1, fc2 = "mlp.experts.", *(f"mlp.experts.linear_fc{n}.weight*" for n in (1, 2))
    if layout is ExpertLayout.PER_EXPERT:
        gate, up, down = (f"{hf}*.{part}_proj.weight" for part in ("gate", "up", "down"))
        return [GatedMLPMapping(fc1, gate, up, "Ie H"), RowParallelMapping(fc2, down, "H Ie")]
    gate_up, down = f"{hf}gate_up_proj", f"{hf}down_proj"
    if layout is ExpertLayout.FUSED_TRANSPOSED:
        return [
            ExpertMLPGateUpProjMapping(fc1, gate_up, "E H 2Ie", transposed=True),
            ExpertMLPDownProjMapping(fc2, down, "E Ie H", transposed=True),
        ]
    return [
        ExpertMLPGateUpProjMapping(fc1, gate_up, "E 2Ie H"),
        ExpertMLPDownProjMapping(fc2, down, "E H Ie"),
    ]
