"""Plans of the MoE and Qwen3.5 families: released models to the byte, every disk layout, MTP."""

import copy
from dataclasses import replace
from typing import Any

import pytest

import released_configs as released
from megatron.bridge.errors import ConfigError, InputError, PlanError
from megatron.bridge.models.catalog import bridge_for
from megatron.bridge.models.conversion.model_bridge import PlanOptions
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.models.hf_pretrained.config import HFConfig
from megatron.bridge.models.qwen_vl.disk_layout import ExpertLayout
from megatron.bridge.tensors.spec import TensorSpec

LAYER = "language_model.decoder.layers."


def small(config: dict[str, Any], **text: Any) -> dict[str, Any]:
    """A released config with its counts cut down; dimensions stay distinct and never square."""
    config = copy.deepcopy(config) | {"dtype": "bfloat16"}
    given = config["text_config"]
    sizes = {
        "hidden_size": 40,
        "num_hidden_layers": 5,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "vocab_size": 300,
    }
    for key, value in (
        ("intermediate_size", 56),
        ("moe_intermediate_size", 28),
        ("num_experts", 3),
        ("num_local_experts", 3),
        ("num_experts_per_tok", 2),
        ("shared_expert_intermediate_size", 36),
        ("linear_num_key_heads", 2),
        ("linear_num_value_heads", 4),
        ("linear_key_head_dim", 6),
        ("linear_value_head_dim", 10),
    ):
        if key in given:
            sizes[key] = value
    if "layer_types" in given:
        linear, full = "linear_attention", "full_attention"
        sizes["layer_types"] = [linear, linear, linear, full, linear]  # type: ignore[assignment]
    given |= sizes | text
    config["vision_config"] |= {
        "depth": 2,
        "hidden_size": 24,
        "num_heads": 2,
        "intermediate_size": 32,
        "out_hidden_size": 40,
        "deepstack_visual_indexes": [1] if "qwen3_vl" in config["model_type"] else [],
    }
    return config


VL_MOE = small(released.QWEN3_VL_30B_A3B)
DENSE_35 = small(released.QWEN3_5_9B)
MOE_35 = small(released.QWEN3_5_35B_A3B)


def plan_of(
    config: dict[str, Any],
    tensors: dict[str, TensorSpec] | None = None,
    options: PlanOptions | None = None,
) -> ConversionPlan:
    view = HFConfig.from_dict(config)
    bridge = bridge_for(view.architecture)
    options = options or PlanOptions()
    if tensors is None:
        return bridge.plan_from_config(view, "BF16", options)
    return bridge.plan(view, tensors, options)


def tensors_of(config: dict[str, Any], experts: str | None = None) -> dict[str, TensorSpec]:
    view = HFConfig.from_dict(config)
    options = PlanOptions(experts=experts)
    return bridge_for(view.architecture).expected_tensors(view, "BF16", options)


@pytest.mark.parametrize(("name", "keys", "nbytes"), released.RELEASED)
def test_released_models(name: str, keys: int, nbytes: int | None) -> None:
    plan = plan_of(getattr(released, name))
    assert len(plan.hf) == keys
    assert nbytes is None or plan.hf_bytes == nbytes


def test_a_size_that_the_config_lacks_is_the_one_of_transformers() -> None:
    config = small(released.QWEN3_5_35B_A3B)
    del config["text_config"]["shared_expert_intermediate_size"]
    shared = f"{LAYER}0.mlp.shared_experts.linear_fc2.weight"
    assert plan_of(config).megatron[shared].shape == (40, 512)
    with pytest.raises(ConfigError, match=r"text_config\.num_experts_per_tok is missing"):
        HFConfig.from_dict({"model_type": "x", "text_config": {}}).text.count("num_experts_per_tok")


def test_layers_without_experts_are_those_of_the_families_that_have_them() -> None:
    """transformers reads `mlp_only_layers` in Qwen3-VL MoE only."""
    dense = small(released.QWEN3_VL_30B_A3B, mlp_only_layers=[1])
    assert f"{LAYER}1.mlp.linear_fc1.weight" in plan_of(dense).megatron
    ignored = small(released.QWEN3_5_35B_A3B, mlp_only_layers=[1])
    assert plan_of(ignored).megatron == plan_of(small(released.QWEN3_5_35B_A3B)).megatron


def test_experts_share_a_key_with_two_leading_axes() -> None:
    plan = plan_of(VL_MOE)
    fc1, fc2 = (f"{LAYER}mlp.experts.experts.linear_fc{n}.weight" for n in (1, 2))
    assert plan.megatron[fc1].shape == (5, 3, 56, 40)
    assert plan.megatron[fc2].shape == (5, 3, 40, 28)
    assert plan.megatron[f"{LAYER}pre_mlp_layernorm.weight"].shape == (5, 40)
    assert f"{LAYER}mlp.experts.experts.linear_fc1._extra_state/shard_4.2_5.3" in plan.extra_states
    [copy] = [copy for _, copy in plan.copies_to(fc2, ((4, 5), (2, 3), (0, 40), (0, 28)))]
    assert copy.hf_name == "model.language_model.layers.4.mlp.experts.down_proj"
    assert (copy.hf_box, copy.transpose) == (((2, 3), (0, 28), (0, 40)), True)


def test_layers_of_different_kinds_have_keys_of_their_own() -> None:
    plan = plan_of(DENSE_35)
    assert plan.megatron[f"{LAYER}3.self_attention.linear_qkv.weight"].shape == (192, 40)
    assert f"{LAYER}2.self_attention.linear_qkv.weight" not in plan.megatron
    net = f"{LAYER}2.self_attention."
    found = {
        key.removeprefix(net): spec.shape
        for key, spec in plan.megatron.items()
        if key.startswith(net)
    }
    assert found == {
        "in_proj.layer_norm_weight": (40,),
        "in_proj.weight.query": (12, 40),
        "in_proj.weight.key": (12, 40),
        "in_proj.weight.value": (40, 40),
        "in_proj.weight.z": (40, 40),
        "in_proj.weight.beta": (4, 40),
        "in_proj.weight.alpha": (4, 40),
        "conv1d.weight.query": (12, 1, 4),
        "conv1d.weight.key": (12, 1, 4),
        "conv1d.weight.value": (40, 1, 4),
        "A_log": (4,),
        "dt_bias": (4,),
        "out_norm.weight": (10,),
        "out_proj.weight": (40, 40),
    }
    key = f"{net}in_proj.weight.value"
    [copy] = [copy for _, copy in plan.copies_to(key, ((0, 40), (0, 40)))]
    assert copy.hf_name == "model.language_model.layers.2.linear_attn.in_proj_qkv.weight"
    assert copy.hf_box == ((24, 64), (0, 40))


def test_dtypes_of_the_release() -> None:
    plan = plan_of(MOE_35)
    layer = "model.language_model.layers.0.linear_attn."
    assert plan.hf[f"{layer}A_log"].dtype == plan.hf[f"{layer}norm.weight"].dtype == "F32"
    assert plan.hf[f"{layer}dt_bias"].dtype == "BF16"
    half = copy.deepcopy(MOE_35)
    del half["text_config"]["mamba_ssm_dtype"]
    assert {spec.dtype for spec in plan_of(half).hf.values()} == {"BF16"}
    norm = f"{LAYER}0.self_attention.out_norm.weight"
    assert plan.megatron[norm].dtype == plan_of(half).megatron[norm].dtype == "F32"


@pytest.mark.parametrize("config", [VL_MOE, MOE_35], ids=["qwen3-vl-moe", "qwen3.5-moe"])
@pytest.mark.parametrize("layout", list(ExpertLayout))
def test_every_layout_makes_the_same_checkpoint(
    config: dict[str, Any], layout: ExpertLayout
) -> None:
    tensors = tensors_of(config, layout)
    plan, released_plan = plan_of(config, tensors), plan_of(config)
    assert plan.megatron == released_plan.megatron
    assert plan.extra_states == released_plan.extra_states
    assert set(plan.hf) == set(tensors)


def test_main_and_mtp_experts_may_differ() -> None:
    released_form = tensors_of(MOE_35)
    assert "model.language_model.layers.0.mlp.experts.gate_up_proj" in released_form
    assert "mtp.layers.0.mlp.experts.2.gate_proj.weight" in released_form
    fused = tensors_of(MOE_35, "fused")
    later = {k: v for k, v in released_form.items() if not k.startswith("mtp.")}
    later |= {k: v for k, v in fused.items() if k.startswith("mtp.")}
    assert plan_of(MOE_35, later).megatron == plan_of(MOE_35).megatron


@pytest.mark.parametrize(
    "text",
    [{"hidden_size": 56}, {"hidden_size": 28}],
    ids=["hidden = 2 intermediate", "hidden = intermediate"],
)
def test_of_square_experts_the_other_matrix_decides(text: dict[str, int]) -> None:
    config = small(released.QWEN3_VL_30B_A3B, **text)
    config["vision_config"]["out_hidden_size"] = text["hidden_size"]
    for layout in (ExpertLayout.FUSED, ExpertLayout.FUSED_TRANSPOSED):
        tensors = tensors_of(config, layout)
        for options in (PlanOptions(), PlanOptions(experts=layout)):
            plan = plan_of(config, tensors, options)
            # As transformers reads it, what is square is never turned.
            square = "gate_up_proj" if text["hidden_size"] == 56 else "down_proj"
            turned = {c.hf_name.endswith(square): c.transpose for c in plan.copies
                      if ".experts." in c.hf_name}  # fmt: skip
            assert turned == {True: False, False: layout is ExpertLayout.FUSED_TRANSPOSED}
        # Without the other matrix neither would do: that it is absent is what is wrong.
        alone = {name: spec for name, spec in tensors.items() if name.endswith(square)}
        alone |= {name: spec for name, spec in tensors.items() if ".experts." not in name}
        with pytest.raises(PlanError, match=r"_proj: missing, needed for .*linear_fc"):
            plan_of(config, alone)
    per_expert = tensors_of(config, ExpertLayout.PER_EXPERT)
    assert plan_of(config, per_expert).megatron  # names tell


FUSED_OF_ONE_LAYER = "model.language_model.layers.1.mlp.experts."
ONE_BY_ONE = f"{FUSED_OF_ONE_LAYER}0.gate_proj.weight"


def test_experts_of_another_layout_that_transformers_passes_over() -> None:
    """Of Qwen3-VL it merges none, of Qwen3.5 it takes them before gate_up_proj."""
    whole, single = (tensors_of(VL_MOE, layout) for layout in ("fused-transposed", "per-expert"))
    plan = plan_of(VL_MOE, whole | {ONE_BY_ONE: single[ONE_BY_ONE]})
    assert set(plan.carried) == {ONE_BY_ONE}
    assert set(plan_of(VL_MOE, whole | single).carried) == set(single) - set(whole)
    whole, single = (tensors_of(MOE_35, layout) for layout in ("fused", "per-expert"))
    beside = f"{FUSED_OF_ONE_LAYER}gate_up_proj"
    assert set(plan_of(MOE_35, single | {beside: whole[beside]}).carried) == {beside}
    beyond = ONE_BY_ONE.replace("layers.1.", "layers.77.")
    more = {beyond: replace(single[ONE_BY_ONE], name=beyond)}
    assert set(plan_of(MOE_35, whole | more).carried) == {beyond}


@pytest.mark.parametrize(
    ("config", "base", "more", "remove"),
    [
        (MOE_35, "fused", ONE_BY_ONE, ONE_BY_ONE),
        (MOE_35, "per-expert", f"{FUSED_OF_ONE_LAYER}down_proj", f"{FUSED_OF_ONE_LAYER}down_proj"),
        (VL_MOE, "per-expert", f"{FUSED_OF_ONE_LAYER}down_proj", f"{FUSED_OF_ONE_LAYER}down_proj"),
    ],
)
def test_experts_in_two_layouts_are_refused(
    config: dict[str, Any], base: str, more: str, remove: str
) -> None:
    every = tensors_of(config, "per-expert") | tensors_of(config, "fused")
    with pytest.raises(ConfigError, match=rf"remove what is too much, such as {remove}$"):
        plan_of(config, tensors_of(config, base) | {more: every[more]})


def test_experts_of_which_some_layers_lie_otherwise_are_refused() -> None:
    whole, single = (tensors_of(MOE_35, layout) for layout in ("fused", "per-expert"))
    mixed = {n: s for n, s in whole.items() if not n.startswith(FUSED_OF_ONE_LAYER)}
    mixed |= {n: s for n, s in single.items() if n.startswith(FUSED_OF_ONE_LAYER)}
    with pytest.raises(ConfigError, match="should lie in one way: convert them to one"):
        plan_of(MOE_35, mixed)


@pytest.mark.parametrize("config", [VL_MOE, DENSE_35, MOE_35])
def test_every_key_is_missed(config: dict[str, Any]) -> None:
    complete = tensors_of(config)
    for name in complete:
        tensors = {key: spec for key, spec in complete.items() if key != name}
        if name.startswith("mtp."):  # nobody needs it: what is left of it is carried
            assert f"{name} is missing" in next(iter(plan_of(config, tensors).carried.values()))
            continue
        with pytest.raises((PlanError, ConfigError)) as error:
            plan_of(config, tensors)
        assert name in str(error.value)


def test_an_expert_tensor_of_another_shape_is_named() -> None:
    tensors = tensors_of(VL_MOE)
    name = "model.language_model.layers.2.mlp.experts.gate_up_proj"
    tensors[name] = replace(tensors[name], shape=(4, 40, 56))
    with pytest.raises(PlanError, match=rf"{name}: the config asks for shape") as error:
        plan_of(VL_MOE, tensors)
    assert len(error.value.problems) == 1  # said once, not once for every expert


@pytest.mark.parametrize("config", [DENSE_35, MOE_35])
def test_files_without_mtp(config: dict[str, Any]) -> None:
    """transformers saves none, and keeps the config's word for it."""
    tensors = {k: v for k, v in tensors_of(config).items() if not k.startswith("mtp.")}
    plan = plan_of(config, tensors)
    assert not any(".mtp." in key for key in plan.megatron)
    assert not plan.carried


@pytest.mark.parametrize("config", [DENSE_35, MOE_35])
def test_a_model_without_mtp_carries_it(config: dict[str, Any]) -> None:
    tensors = tensors_of(config)
    plan = plan_of(config, tensors, PlanOptions(without=frozenset({"mtp"})))
    assert set(plan.carried) == {name for name in tensors if name.startswith("mtp.")}
    assert not any(".mtp." in key for key in plan.megatron)
    assert set(plan.hf) == set(tensors)
    view = HFConfig.from_dict(config)
    bridge = bridge_for(view.architecture)
    assert bridge.options_of_checkpoint(plan.megatron).without == {"mtp"}
    assert bridge.options_of_checkpoint(plan_of(config).megatron).without == frozenset()


def test_mtp_rows_are_those_of_a_layer() -> None:
    plan = plan_of(MOE_35)
    mtp = "language_model.mtp.layers.0."
    assert plan.megatron[f"{mtp}eh_proj.weight"].shape == (40, 80)
    experts = f"{mtp}transformer_layer.mlp.experts.experts.linear_fc1.weight"
    assert plan.megatron[experts].shape == (3, 56, 40)
    names = {parameter.name for parameter in plan.parameters}
    assert f"{mtp}mtp_model_layer.mlp.experts.linear_fc1.weight2" in names


@pytest.mark.parametrize(
    ("text", "sparse"),
    [
        ({"mlp_only_layers": [0, 3]}, [1, 2, 4]),
        ({"mlp_only_layers": [3, 7, -1]}, [0, 1, 2, 4]),  # as after layers were cut off
        ({"decoder_sparse_step": 2}, [1, 3]),
    ],
)
def test_dense_layers_inside_a_moe_model(text: dict[str, Any], sparse: list[int]) -> None:
    config = small(released.QWEN3_VL_30B_A3B, **text)
    plan = plan_of(config)
    for layer in range(5):
        has_router = f"{LAYER}{layer}.mlp.router.weight" in plan.megatron
        has_mlp = f"{LAYER}{layer}.mlp.linear_fc1.weight" in plan.megatron
        assert (has_router, has_mlp) == (layer in sparse, layer not in sparse)
    view = HFConfig.from_dict(config)
    settings = bridge_for(view.architecture).provider_settings(view, "BF16")
    assert settings["moe_layer_freq"] == [int(layer in sparse) for layer in range(5)]


@pytest.mark.parametrize(
    ("config", "text", "message"),
    [
        (DENSE_35, {"layer_types": ["full_attention"]}, "layer_types should name 5 layers"),
        (DENSE_35, {"mtp_num_hidden_layers": -1}, "mtp_num_hidden_layers is -1; expected 0 or"),
        (VL_MOE, {"decoder_sparse_step": 0}, "decoder_sparse_step must be 1 or more, found 0"),
        (
            VL_MOE,
            {"num_experts": 3, "num_local_experts": 4},
            "num_experts = 3, .*num_local_experts = 4",
        ),
    ],
)
def test_configs_that_contradict_themselves(
    config: dict[str, Any], text: dict[str, Any], message: str
) -> None:
    changed = copy.deepcopy(config)
    changed["text_config"] |= text
    with pytest.raises(ConfigError, match=message):
        plan_of(changed)


def test_attention_is_gated_whatever_the_config_says_as_in_transformers() -> None:
    config = copy.deepcopy(DENSE_35)
    config["text_config"]["attn_output_gate"] = False
    assert plan_of(config).megatron == plan_of(DENSE_35).megatron


def test_a_norm_is_found_by_the_kind_of_its_layer() -> None:
    view = HFConfig.from_dict(DENSE_35)
    bridge = bridge_for(view.architecture)
    registry, structure = bridge.mapping_registry(), bridge.structure(view)
    norm = "model.language_model.layers.{}.input_layernorm.weight"
    with pytest.raises(InputError, match="by the kind of the layer; pass the structure"):
        registry.hf_to_megatron_lookup(norm.format(3))
    for layer, module in ((3, "linear_qkv"), (4, "in_proj")):
        row = registry.hf_to_megatron_lookup(norm.format(layer), structure)
        assert row is not None
        name = f"{LAYER}{layer}.self_attention.{module}.layer_norm_weight"
        assert row.megatron_param == name
