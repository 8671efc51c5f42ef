"""The parallel layouts at which models are run, differentiated and trained, as one table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# Large, so that the loss that balances the experts counts beside that of the tokens.
BALANCE = {"moe_aux_loss_coeff": 0.1}
COUNTED_TOGETHER = {"output_router_logits": True, "router_aux_loss_coef": 0.1}
PREDICTOR = {"mtp_num_layers": 1, "mtp_loss_scaling_factor": 0.3}
PREDICTORS = {"mtp_num_hidden_layers": 1}
TIED = {"tie_word_embeddings": True}
# What tensor parallelism splits in four, and one head for two of its ranks.
VISION = {"vision_config": {"num_heads": 4}}
ATTENTION = {"num_attention_heads": 12, "num_key_value_heads": 2}
LINEAR = {
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 12,
    "linear_key_head_dim": 28,
    "linear_value_head_dim": 20,
}
EXPERTS = {"num_experts": 8}


@dataclass(frozen=True)
class Model:
    """A small model.

    Attributes:
        source: a case of tiny.CASES, or a class of text_models.MODELS.
        text: entries of the config of its language model.
        entries: others of its config.
        fields: of its provider, at every layout.
        optimizer: fields of its OptimizerConfig.
    """

    source: str
    text: dict[str, Any] = field(default_factory=dict)
    entries: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)

    @property
    def has_experts(self) -> bool:
        return "num_experts" in self.text

    @property
    def shares_embedding(self) -> bool:
        """Whether several places use the weight of the embedding."""
        return bool(
            self.entries.get("tie_word_embeddings") or self.text.get("mtp_num_hidden_layers")
        )


# Weights that differ by 2e-7 of their size have losses that differ by 1e-4 after three of Adam's
# steps of 1e-3: it takes a whole step wherever a gradient is nothing but rounding. Not so by these.
STEADY = {"lr": 2e-4, "adam_eps": 1e-5}
HYBRID = "qwen3_5-3x_value_heads-one_kv_head"
HYBRID_MOE = "qwen3_5_moe-2x_value_heads"
DEEP = {"vision_config": {"deepstack_visual_indexes": [0, 1, 3], "num_heads": 4}}
MODELS = {
    "vl": Model("qwen3_vl", ATTENTION, DEEP),
    "vl_tied": Model("qwen3_vl", ATTENTION | {"attention_bias": True}, VISION | TIED),
    "vl_moe": Model("qwen3_vl_moe", ATTENTION | EXPERTS, VISION, BALANCE, {"lr": 5e-4}),
    "vl_moe_counted": Model(
        "qwen3_vl_moe", ATTENTION | EXPERTS | COUNTED_TOGETHER, VISION, optimizer={"lr": 5e-4}
    ),
    "hybrid": Model(HYBRID, LINEAR, VISION, optimizer=STEADY),
    "hybrid_mtp_tied": Model(HYBRID, LINEAR | PREDICTORS, VISION | TIED, PREDICTOR, STEADY),
    "hybrid_moe": Model(HYBRID_MOE, LINEAR | EXPERTS, VISION, BALANCE, STEADY),
    "hybrid_moe_mtp": Model(
        HYBRID_MOE, LINEAR | EXPERTS | PREDICTORS, VISION, BALANCE | PREDICTOR, STEADY
    ),
    "text": Model("Qwen3ForCausalLM", ATTENTION),
    "text_moe": Model("Qwen3MoeForCausalLM", ATTENTION | EXPERTS, fields=BALANCE),
    "text_hybrid_mtp": Model("Qwen3_5ForCausalLM", LINEAR | PREDICTORS, fields=PREDICTOR),
    "text_hybrid_moe": Model("Qwen3_5MoeForCausalLM", LINEAR | EXPERTS, fields=BALANCE),
}


@dataclass(frozen=True)
class Layout:
    """A model split over ranks.

    Attributes:
        model: a name of MODELS.
        ranks: how many; what the fields leave of them are data-parallel replicas.
        fields: of the provider.
        batches: "padded", or "packed" for rows of a batch one behind the other.
        fast: run with every change, and not only in `make test-all`.
    """

    model: str
    ranks: int
    fields: dict[str, Any]
    batches: str = "padded"
    fast: bool = False

    @property
    def stages(self) -> int:
        return int(self.fields.get("pipeline_model_parallel_size", 1))

    @property
    def is_pipeline_alone(self) -> bool:
        return self.stages == self.ranks

    @property
    def only_moves_work(self) -> bool:
        """Whether each product of matrices is one that a single process computes, too.

        Not so with experts over ranks: an expert has the tokens of several batches at once, and the
        CPU's product has other last bits where there are no more than three of them.
        """
        moving = {"pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"}
        sizes = {name for name, size in self.fields.items() if name.endswith("_size") and size > 1}
        return sizes <= moving


def tp(ranks: int) -> dict[str, Any]:
    """Tensor parallelism with sequence parallelism."""
    return {"tensor_model_parallel_size": ranks, "sequence_parallel": True}


def ep(ranks: int, etp: int = 1, **fields: Any) -> dict[str, Any]:
    sizes = {"expert_model_parallel_size": ranks, "expert_tensor_parallel_size": etp}
    return sizes | fields


def cp(ranks: int) -> dict[str, Any]:
    return {"context_parallel_size": ranks}


def pp(layout: str | int, stages: int = 2, **fields: Any) -> dict[str, Any]:
    """A pipeline, by its layout or its stages; what chunks send must overlap."""
    if isinstance(layout, int):
        return {"pipeline_model_parallel_size": layout} | fields
    fields |= {"pipeline_model_parallel_size": stages, "pipeline_model_parallel_layout": layout}
    if layout.count("|") < stages:
        return fields
    return fields | {"overlap_p2p_comm": True, "batch_p2p_comm": False}


def ends(first: int, last: int) -> dict[str, int]:
    """Layers of the first and of the last stage."""
    names = "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"
    return dict(zip(names, (first, last), strict=True))


NO_SEQUENCE = {"sequence_parallel": False}
RECOMPUTED = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
EMBEDDING_IS_A_LAYER = {"account_for_embedding_in_pipeline_split": True}
LOSS_IS_A_LAYER = {"account_for_loss_in_pipeline_split": True}

TWO: dict[str, Layout] = {
    # Pipelines.
    "pp2-deepstack_on_both": Layout("vl", 2, pp("Et|ttttL")),
    "pp2-no_layer_on_the_first": Layout("vl_moe", 2, pp("E|tttttL")),
    "pp2-uneven_tied": Layout("vl_tied", 2, pp(2, **ends(3, 2))),
    "pp2-even": Layout("hybrid", 2, pp(2)),
    "pp2-tied_predictors": Layout("hybrid_mtp_tied", 2, pp(2), fast=True),
    "pp2-predictors_before_the_last": Layout("hybrid_mtp_tied", 2, pp("Ettttttm|L")),
    "pp2-embedding_is_a_layer": Layout("vl", 2, pp(2, **EMBEDDING_IS_A_LAYER)),
    "pp2-recomputed": Layout("vl_moe", 2, pp("Et|ttttL") | RECOMPUTED),
    "pp2-text": Layout("text", 2, pp("Etttt|tL")),
    "pp2-text_predictors": Layout("text_hybrid_mtp", 2, pp("Ettt|ttmL")),
    "vpp2-deepstack_on_chunks": Layout("vl", 2, pp("Et|t|tt|tL"), fast=True),
    "vpp2-tied": Layout("vl_tied", 2, pp("Et|t|tt|tL")),
    "vpp2-predictors_on_a_chunk": Layout("hybrid_moe_mtp", 2, pp("Et|t|tt|tmL")),
    # Tensor parallelism; in training, megatron-core has experts beside it with sequence
    # parallelism only.
    "tp2-tied": Layout("vl_tied", 2, tp(2) | NO_SEQUENCE),
    "tp2-more_than_kv_heads": Layout("hybrid", 2, tp(2) | NO_SEQUENCE),
    "tp2-sequence": Layout("vl", 2, tp(2)),
    "tp2-experts": Layout("vl_moe", 2, tp(2)),
    "tp2-counted_together": Layout("vl_moe_counted", 2, tp(2)),
    "tp2-counted_together_recomputed": Layout("vl_moe_counted", 2, tp(2) | RECOMPUTED),
    "tp2-predictors": Layout("hybrid_moe_mtp", 2, tp(2), fast=True),
    "tp2-predictors_recomputed": Layout("hybrid_moe_mtp", 2, tp(2) | RECOMPUTED),
    "tp2-text": Layout("text_hybrid_mtp", 2, tp(2)),
    # Experts.
    "ep2": Layout("vl_moe", 2, ep(2), fast=True),
    "ep2-allgather": Layout("vl_moe", 2, ep(2, moe_token_dispatcher_type="allgather")),
    "ep2-shared_expert": Layout("hybrid_moe", 2, ep(2)),
    "ep2-text": Layout("text_hybrid_moe", 2, ep(2)),
    "etp2": Layout("vl_moe", 2, ep(1, etp=2)),
    "tp2-etp1": Layout("hybrid_moe", 2, tp(2) | ep(1)),
    "tp2-ep2": Layout("hybrid_moe", 2, tp(2) | ep(2)),
    # Replicas.
    "dp2": Layout("vl", 2, {}),
    "dp2-experts": Layout("hybrid_moe_mtp", 2, {}),
    # Context parallelism.
    "cp2": Layout("vl", 2, cp(2)),
    "cp2-experts": Layout("vl_moe", 2, cp(2) | ep(2)),
    "cp2-counted_together": Layout("vl_moe_counted", 2, cp(2)),
    "cp2-recomputed": Layout("hybrid", 2, cp(2) | RECOMPUTED),
    "cp2-packed": Layout("hybrid_moe", 2, cp(2), "packed", fast=True),
    "cp2-text": Layout("text_hybrid_moe", 2, cp(2)),
}
FOUR: dict[str, Layout] = {
    "pp4-deepstack_on_three": Layout("vl", 4, pp("Et|t|t|ttL", 4)),
    "pp4-recomputed": Layout("vl", 4, pp("Et|t|t|ttL", 4) | RECOMPUTED),
    "pp4-no_layer_on_two": Layout("vl_moe", 4, pp("E||ttt|ttL", 4)),
    "pp4-uneven": Layout("hybrid", 4, pp(4, num_layers_in_first_pipeline_stage=3)),
    "pp4-ends_are_layers": Layout("hybrid", 4, pp(4, **EMBEDDING_IS_A_LAYER, **LOSS_IS_A_LAYER)),
    "pp4-predictors_on_a_stage": Layout("hybrid_mtp_tied", 4, pp("Ettt|tt|tm|L", 4)),
    "pp4-predictors_alone": Layout("hybrid_moe_mtp", 4, pp("Ettt|tt|m|L", 4)),
    "pp4-text_predictors": Layout("text_hybrid_mtp", 4, pp("Ettt|tt|m|L", 4)),
    "pp4-vpp2": Layout("vl", 4, pp("E|t|t|t|t||t|L", 4)),
    "pp4-vpp2-tied": Layout("vl_tied", 4, pp("E|t|t|t|t||t|L", 4)),
    "pp4-vpp2-text": Layout("text", 4, pp("Et|t|t||t||t|L", 4)),
    "pp2-dp2": Layout("vl", 4, pp("Et|ttttL")),
    "vpp2-dp2": Layout("hybrid_mtp_tied", 4, pp("Et|tt|tt|tmL")),
    "tp2-pp2": Layout("vl", 4, tp(2) | pp("Et|ttttL")),
    "tp2-pp2-recomputed": Layout("vl_moe", 4, tp(2) | pp("Et|ttttL") | RECOMPUTED),
    "tp2-pp2-predictors": Layout("hybrid_moe_mtp", 4, tp(2) | pp("Etttt|tmL")),
    "tp2-pp2-tied_predictors": Layout("hybrid_mtp_tied", 4, tp(2) | pp("Etttt|ttmL")),
    "tp2-vpp2": Layout("vl", 4, tp(2) | pp("Et|t|tt|tL")),
    "tp2-vpp2-text": Layout("text_moe", 4, tp(2) | pp("Et|t|tt|tL")),
    "ep2-pp2": Layout("vl_moe", 4, ep(2) | pp("Et|ttttL")),
    "ep2-pp2-predictors": Layout("hybrid_moe_mtp", 4, ep(2) | pp("Etttt|tmL")),
    "tp2-dp2": Layout("vl_tied", 4, tp(2)),
    "tp4": Layout("vl", 4, tp(4)),
    "tp4-tied": Layout("vl_tied", 4, tp(4) | NO_SEQUENCE),
    "tp4-hybrid": Layout("hybrid_moe_mtp", 4, tp(4)),
    "tp4-etp1": Layout("vl_moe", 4, tp(4) | ep(1)),
    "tp4-ep2-etp2": Layout("hybrid_moe", 4, tp(4) | ep(2, etp=2)),
    "ep4": Layout("text_moe", 4, ep(4)),
    "tp2-ep2-dp2": Layout("hybrid_moe_mtp", 4, tp(2) | ep(2)),
    "tp2-ep2-etp2": Layout("vl_moe", 4, tp(2) | ep(2, etp=2)),
    "ep2-etp2": Layout("hybrid_moe", 4, ep(2, etp=2)),
    "dp4": Layout("hybrid", 4, {}),
    "cp2-pp2": Layout("vl", 4, cp(2) | pp("Et|ttttL")),
    "cp2-pp2-hybrid": Layout("hybrid", 4, cp(2) | pp(2)),
    "cp2-tp2": Layout("vl", 4, cp(2) | tp(2)),
    "cp2-tp2-packed": Layout("vl", 4, cp(2) | tp(2), "packed"),
    "cp2-tp2-hybrid": Layout("hybrid_moe", 4, cp(2) | tp(2) | RECOMPUTED),
    "cp2-tp2-hybrid_packed": Layout("hybrid_moe", 4, cp(2) | tp(2), "packed"),
    "cp2-tp2-counted_together": Layout("vl_moe_counted", 4, cp(2) | tp(2)),
    "cp2-dp2": Layout("vl_tied", 4, cp(2)),
    "cp2-ep4": Layout("vl_moe", 4, cp(2) | ep(4)),
    "cp4": Layout("vl", 4, cp(4)),
    "cp4-packed": Layout("hybrid_moe", 4, cp(4), "packed"),
}
EIGHT: dict[str, Layout] = {
    "tp2-pp2-cp2": Layout("vl", 8, tp(2) | pp("Et|ttttL") | cp(2)),
    "tp2-pp2-cp2-hybrid": Layout("hybrid_moe", 8, tp(2) | pp("Ett|tttL") | cp(2)),
    "tp2-pp2-cp2-text": Layout("text_moe", 8, tp(2) | pp("Ett|tttL") | cp(2) | ep(4)),
    "tp2-vpp2-cp2": Layout("hybrid", 8, tp(2) | pp("Et|tt|tt|tL") | cp(2)),
    "tp2-pp2-ep2-dp2": Layout("vl_moe", 8, tp(2) | pp("Ett|tttL") | ep(2)),
    "tp2-pp2-ep2-dp2-predictors": Layout("hybrid_moe_mtp", 8, tp(2) | pp("Ettt|ttmL") | ep(2)),
    "tp2-pp2-ep2-etp2-dp2": Layout("vl_moe", 8, tp(2) | pp("Ett|tttL") | ep(2, etp=2)),
    "tp2-vpp2-dp2": Layout("vl_tied", 8, tp(2) | pp("Et|t|tt|tL")),
    "tp2-cp2-dp2": Layout("vl_moe_counted", 8, tp(2) | cp(2)),
    "pp4-dp2": Layout("vl", 8, pp("Et|t|t|ttL", 4)),
    "pp4-ep2-predictors": Layout("hybrid_moe_mtp", 8, pp("Ett|tt|tm|L", 4) | ep(2)),
    "pp4-tp2": Layout("hybrid_mtp_tied", 8, pp("Ettt|tt|tm|L", 4) | tp(2)),
    "pp4-vpp2-tp2": Layout("vl_tied", 8, pp("E|t|t|t|t||t|L", 4) | tp(2)),
    "pp4-cp2": Layout("vl_moe", 8, pp("E||ttt|ttL", 4) | cp(2)),
    "pp8": Layout("vl", 8, pp("Et|t||t|t||t|L", 8)),
    "pp8-text_predictors": Layout("text_hybrid_mtp", 8, pp("E|t|t|tt|t||m|L", 8)),
    "tp4-pp2": Layout("text", 8, tp(4) | pp(2, **ends(2, 3))),
    "tp4-pp2-ep4": Layout("text_hybrid_moe", 8, tp(4) | pp("Ett|tttL") | ep(4)),
    "tp4-ep8": Layout("vl_moe", 8, tp(4) | ep(8)),
    "tp4-ep2-etp2-dp2": Layout("hybrid_moe_mtp", 8, tp(4) | ep(2, etp=2)),
    "tp2-ep8": Layout("text_moe", 8, tp(2) | ep(8)),
    "cp4-tp2": Layout("vl", 8, cp(4) | tp(2), "packed"),
    "cp2-ep8": Layout("hybrid_moe", 8, cp(2) | ep(8)),
    "cp8": Layout("vl_tied", 8, cp(8)),
}
LAYOUTS = {
    f"{layout.ranks}-{name}": layout for part in (TWO, FOUR, EIGHT) for name, layout in part.items()
}
