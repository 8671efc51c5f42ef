"""Models and parallel layouts between whose ranks tensors are moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.bridge import AutoBridge
from megatron.bridge.synthetic import make_model

EIGHT_EXPERTS = {"num_experts": 8}
# name: (family, settings of the folder, fields of the provider in every layout)
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "vl": ("qwen3-vl", {"num_shards": 2}, {}),
    "vl_tied": ("qwen3-vl", {"tie_word_embeddings": True}, {}),
    "vl_moe": ("qwen3-vl-moe", EIGHT_EXPERTS, {}),
    "hybrid": ("qwen3.5", {}, {}),
    "hybrid_mtp": ("qwen3.5", {}, {"mtp_num_layers": 1}),
    "hybrid_moe": ("qwen3.5-moe", EIGHT_EXPERTS, {}),
    "hybrid_moe_mtp": ("qwen3.5-moe", EIGHT_EXPERTS, {"mtp_num_layers": 1}),
    "text": ("qwen3", {}, {}),
    "text_moe": ("qwen3-moe", {}, {}),
    "text_hybrid": ("qwen3.5-text", {}, {}),
}


def layout(
    tp: int = 1, pp: int = 1, ep: int = 1, etp: int | None = None, stages: str | None = None
) -> dict[str, Any]:
    """Fields of a provider."""
    fields: dict[str, Any] = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "expert_model_parallel_size": ep,
        "sequence_parallel": tp > 1,
    }
    if etp is not None:
        fields["expert_tensor_parallel_size"] = etp
    if stages is not None:
        fields["pipeline_model_parallel_layout"] = stages
        if stages.count("|") >= pp:  # what chunks of two stages send must overlap
            fields |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    return fields


def make_models(folder: Path, names: set[str]) -> None:
    for name in names:
        family, settings, _ = MODELS[name]
        make_model(family, folder / name, settings)


def built(bridge: AutoBridge, fields: dict[str, Any], *, load_weights: bool = True) -> list[Any]:
    """This rank's part of a model, in process groups of its own."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    provider = bridge.to_megatron_provider(load_weights=load_weights)
    provider.set_fields(fields)
    return list(provider.provide_distributed_model(wrap_with_ddp=False))


# layout: (model, ranks, fields of the provider)
QUICK: dict[str, tuple[str, int, dict[str, Any]]] = {
    "tensor": ("hybrid", 4, layout(tp=2)),
    "tensor_stages_experts": (
        "hybrid_moe_mtp",
        4,
        layout(tp=2, pp=2, ep=2, etp=1, stages="Etttt|tttmL"),
    ),
    "expert_tensors": ("vl_moe", 4, layout(tp=4, ep=2, etp=2)),
}
OF_FOUR: dict[str, tuple[str, int, dict[str, Any]]] = {
    "stages": ("vl_tied", 4, layout(pp=4, stages="Et|t|t|ttL")),
    "chunks": ("vl", 4, layout(pp=2, stages="Et|t|tt|tL")),
    "experts": ("vl_moe", 4, layout(ep=4)),
    "text": ("text_hybrid", 4, layout(tp=2, pp=2, stages="Ettt|tttL")),
}

OF_TWO: dict[str, tuple[str, int, dict[str, Any]]] = {
    "replicas": ("vl", 2, layout()),
    "tensor_tied": ("vl_tied", 2, layout(tp=2)),
    "stages": ("hybrid", 2, layout(pp=2)),
    "stages_tied": ("vl_tied", 2, layout(pp=2, stages="Et|ttttL")),
    "chunks": ("vl", 2, layout(pp=2, stages="Et|t|tt|tL")),
    "predictors": ("hybrid_mtp", 2, layout(pp=2, stages="Etttt|ttmL")),
    "experts": ("hybrid_moe", 2, layout(ep=2)),
    "expert_tensors": ("vl_moe", 2, layout(tp=2, ep=2, etp=1)),
    "text": ("text", 2, layout(tp=2)),
    "text_moe": ("text_moe", 2, layout(tp=2, ep=2, etp=1)),
}
OF_EIGHT: dict[str, tuple[str, int, dict[str, Any]]] = {
    "tensor_stages_replicas": ("hybrid", 8, layout(tp=2, pp=2)),
    "tensor_stages_experts": (
        "hybrid_moe",
        8,
        layout(tp=2, pp=2, ep=2, etp=1, stages="Etttt|tttL"),
    ),
    "experts_of_two_tensors": ("vl_moe", 8, layout(tp=2, ep=4, etp=2)),
    "stages_tied": ("vl_tied", 8, layout(pp=4, stages="Et|t|t|ttL")),
    "chunks": ("vl", 8, layout(tp=2, pp=2, stages="Et|t|tt|tL")),
    "experts": ("hybrid_moe_mtp", 8, layout(ep=8)),
    "text": ("text_hybrid", 8, layout(tp=2, pp=2, stages="Ettt|tttL")),
}
