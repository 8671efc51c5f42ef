"""Every key of transformers' configs of the families is in the table, and is what that says."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from dataclasses import fields
from importlib import import_module, util
from pathlib import Path
from typing import Any

import pytest
import torch

import transformers_keys
from megatron.bridge.errors import ConfigError
from megatron.bridge.models.catalog import bridge_for
from megatron.bridge.models.conversion.model_bridge import DEFAULTS
from megatron.bridge.models.hf_pretrained.config import HFConfig
from megatron.bridge.models.hf_pretrained.transformers_defaults import (
    declared_aliases,
    declared_defaults,
)
from megatron.bridge.models.qwen_vl.config_keys import (
    CONFIG_KEYS,
    MROPE_SECTION,
    Derived,
    Field,
    Ignored,
    Only,
)
from oracle import tiny

FAMILIES = ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
LINEAR, FULL = "linear_attention", "full_attention"

# Another value than that of the small configs below, for every key that the table has.
OTHERS: dict[str, Any] = {
    "architectures": None,  # looked at by a test of its own
    "text_config": None,
    "vision_config": None,
    "quantization_config": None,
    "model_type": None,
    "dtype": "float16",
    "torch_dtype": "float16",
    "per_layer_config": {"1": {"hidden_size": 24}},
    "output_hidden_states": True,
    "output_attentions": True,
    "return_dict": False,
    "tie_last_hidden_states": True,
    "use_cache": False,
    "attn_implementation": "eager",
    "experts_implementation": "eager",
    "id2label": {"0": "no", "1": "yes", "2": "perhaps"},
    "label2id": {"no": 0, "yes": 1, "perhaps": 2},
    "num_labels": 3,
    "problem_type": "regression",
    "pad_token_id": 5,
    "bos_token_id": 6,
    "eos_token_id": 7,
    "transformers_version": "4.57.0",
    "name_or_path": "somewhere",
    "_commit_hash": "abc",
    "chunk_size_feed_forward": 3,
    "is_encoder_decoder": False,
    "image_token_id": 290,
    "video_token_id": 291,
    "vision_start_token_id": 292,
    "vision_end_token_id": 293,
    "tie_word_embeddings": True,
    "rope_theta": 123.0,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0, "mrope_section": [4, 2, 2]},
    "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 123.0},
    "partial_rotary_factor": 0.5,
    "vocab_size": 311,
    "hidden_size": 96,
    "num_attention_heads": 12,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 8192,
    "num_hidden_layers": 4,
    "intermediate_size": 150,
    "hidden_act": "gelu",
    "attention_dropout": 0.25,
    "initializer_range": 0.5,
    "rms_norm_eps": 0.25,
    "attention_bias": True,
    "num_experts": 5,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 26,
    "shared_expert_intermediate_size": 38,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.5,
    "norm_topk_prob": False,
    "decoder_sparse_step": 2,
    "mlp_only_layers": [0],
    "sliding_window": 3,
    "layer_types": [FULL, LINEAR, LINEAR, FULL, FULL],
    "full_attention_interval": 2,
    "attn_output_gate": False,
    "mamba_ssm_dtype": "float32",
    "mtp_num_hidden_layers": 1,
    "mtp_use_dedicated_embeddings": True,
    "linear_conv_kernel_dim": 3,
    "linear_key_head_dim": 56,
    "linear_value_head_dim": 44,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 6,
    "depth": 3,
    "num_heads": 6,
    "patch_size": 14,
    "temporal_patch_size": 3,
    "in_channels": 4,
    "spatial_merge_size": 3,
    "out_hidden_size": 88,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [1],
}


def source() -> transformers_keys.TransformersSource:
    """The installed package, or the one that TRANSFORMERS_SOURCE names (`make test-keys`)."""
    installed = util.find_spec("transformers")
    assert installed is not None
    assert installed.submodule_search_locations
    folder = os.environ.get("TRANSFORMERS_SOURCE", installed.submodule_search_locations[0])
    return transformers_keys.TransformersSource(Path(folder))


def known(model_type: str) -> set[transformers_keys.SectionKey]:
    return {(section, key) for section, uses in CONFIG_KEYS[model_type].items() for key in uses}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_key_that_config_classes_take(model_type: str) -> None:
    declared = source().declared_keys(model_type)
    assert len(declared) > 60
    assert {("vision_config", "rope_scaling"), ("", "per_layer_config")} <= declared
    assert sorted(declared - known(model_type)) == []


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_key_that_modeling_code_reads(model_type: str) -> None:
    read = source().read_keys(model_type)
    assert {("text_config", "rope_parameters"), ("vision_config", "head_dim")} <= read
    anywhere = {key for _, key in known(model_type)}
    absent = {
        (section, key)
        for section, key in read - known(model_type)
        if section != transformers_keys.ANY_SECTION or key not in anywhere
    }
    assert sorted(absent) == []


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_section_of_mrope(model_type: str) -> None:
    """It is the one default that no config class gives."""
    assert list(MROPE_SECTION[model_type]) == source().mrope_section(model_type)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_defaults_read_from_the_source_are_those_of_the_class(model_type: str) -> None:
    from transformers import AutoConfig

    made = AutoConfig.for_model(model_type).to_dict()
    declared = declared_defaults(model_type)
    assert len(declared) > 30
    for path, value in declared.items():
        *sections, key = path.split(".")
        found = made
        for section in sections:
            found = found[section]
        names = [key, *(n.rpartition(".")[2] for n in declared_aliases(model_type).get(path, ()))]
        [stored] = [found[name] for name in names if name in found] or [None]
        if value is not None:  # what is None there is made by code
            assert stored == value, path


def small(model_type: str) -> dict[str, Any]:
    """A config that states every key that a small model needs."""
    _, text, deepstack = tiny.FAMILIES[model_type]
    config = {
        "architectures": [
            f"{tiny.FAMILIES[model_type][0]}ForConditionalGeneration",
        ],
        "model_type": model_type,
        "image_token_id": 300,
        "video_token_id": 301,
        "vision_start_token_id": 302,
        "vision_end_token_id": 303,
        "text_config": copy.deepcopy(tiny.TEXT | text),
        "vision_config": {
            "depth": 4,
            "hidden_size": 48,
            "intermediate_size": 112,
            "num_heads": 3,
            "patch_size": 16,
            "out_hidden_size": 80,
            "num_position_embeddings": 49,
            "deepstack_visual_indexes": deepstack,
        },
    }
    config["text_config"]["dtype"] = "float32"
    return config


def changed(model_type: str, section: str, key: str) -> dict[str, Any]:
    config = small(model_type)
    target = config[section] if section else config
    target[key] = copy.deepcopy(OTHERS[key])
    if key in ("hidden_size", "out_hidden_size") and section == "text_config":
        config["vision_config"]["out_hidden_size"] = OTHERS["hidden_size"]
    if key == "full_attention_interval" or key == "num_hidden_layers":
        target.pop("layer_types", None)
    return config


def outcome(config: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Settings of the provider, and the tensors on both sides of the plan."""
    view = HFConfig.from_dict(config)
    bridge = bridge_for(view.architecture)
    bridge.check(view)
    plan = bridge.plan_from_config(view, view.dtype, DEFAULTS)
    return bridge.provider_settings(view, view.dtype), (plan.hf, plan.megatron)


def entries(*kinds: type) -> Iterator[Any]:
    for model_type, sections in CONFIG_KEYS.items():
        for section, uses in sections.items():
            for key, use in uses.items():
                if isinstance(use, kinds):
                    yield pytest.param(
                        model_type, section, key, use, id=f"{model_type}-{section}.{key}"
                    )


@pytest.mark.parametrize(("model_type", "section", "key", "use"), entries(Field))
def test_a_mapped_key_sets_the_fields_that_the_table_names(
    model_type: str, section: str, key: str, use: Field
) -> None:
    before, _ = outcome(small(model_type))
    after, _ = outcome(changed(model_type, section, key))
    if section == "vision_config":
        before, after = before["vision"], after["vision"]
    else:
        bridge = bridge_for(HFConfig.from_dict(small(model_type)).architecture)
        module, _, name = bridge.provider.rpartition(".")
        provider = getattr(import_module(module), name)
        assert set(use.names) <= {field.name for field in fields(provider)} | {"hidden_act"}
        provider.from_settings(after)
    for name in use.names:
        assert after[name] == OTHERS[key]
        assert before[name] != after[name]


@pytest.mark.parametrize(("model_type", "section", "key", "use"), entries(Derived))
def test_a_key_that_is_read_with_others_changes_the_outcome(
    model_type: str, section: str, key: str, use: Derived
) -> None:
    config = changed(model_type, section, key)
    if OTHERS[key] is None or key in ("mamba_ssm_dtype", "mtp_use_dedicated_embeddings"):
        return  # the kind of model, or files: tests of their own
    target = config[section] if section else config
    if key == "torch_dtype" or (key == "dtype" and not section):
        del config["text_config"]["dtype"]
    elif key == "num_local_experts":
        del target["num_experts"]
    elif section == "vision_config" and key == "num_attention_heads":
        target[key] = 6
        del target["num_heads"]
    elif section == "vision_config" and key == "num_hidden_layers":
        target[key] = 3
        del target["depth"]
    elif key == "partial_rotary_factor":
        del target["rope_parameters"]["partial_rotary_factor"]
        target["rope_parameters"]["mrope_section"] = [6, 5, 5]
    elif key in ("rope_scaling", "rope_parameters", "rope_theta"):
        target.pop("rope_parameters", None)
        target[key] = copy.deepcopy(OTHERS[key])
    elif key == "router_aux_loss_coef":
        target["output_router_logits"] = True
    elif key == "intermediate_size" and model_type == "qwen3_vl_moe":
        target["mlp_only_layers"] = [1]
    if key in ("dtype", "torch_dtype") and section == "vision_config":
        return  # the tower has the dtype of the rest
    assert outcome(config) != outcome(small(model_type))


@pytest.mark.parametrize(("model_type", "section", "key", "use"), entries(Only))
def test_a_key_with_one_value_is_refused_by_name_with_another(
    model_type: str, section: str, key: str, use: Only
) -> None:
    with pytest.raises(ConfigError, match=rf"{section}\.?{key} is .*only .* can be converted"):
        outcome(changed(model_type, section, key))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_ignored_keys_change_nothing_in_transformers_and_nothing_here(model_type: str) -> None:
    reference = logits_of(small(model_type))
    expected = outcome(small(model_type))
    for section, uses in CONFIG_KEYS[model_type].items():
        for key, use in uses.items():
            if not isinstance(use, Ignored) or key == "return_dict":
                continue  # without a dict transformers' own forward ends with an error
            config = changed(model_type, section, key)
            assert torch.equal(logits_of(config), reference), (section, key)
            assert outcome(config) == expected, (section, key)


def logits_of(config: dict[str, Any]) -> torch.Tensor:
    """Of transformers' model, with the same weights each time, for words and a picture."""
    from transformers import AutoConfig

    data = {key: value for key, value in copy.deepcopy(config).items() if key != "model_type"}
    model = tiny.build_hf_model(AutoConfig.for_model(config["model_type"], **data))
    pixels = torch.linspace(-1, 1, 8 * 6 * 3 * 2 * 16 * 16).view(48, -1)
    ids = torch.tensor([[9, 302, *[300] * 12, 303, 17, 23, 42]])
    with torch.no_grad():
        found = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == 300).int(),
            pixel_values=pixels,
            image_grid_thw=torch.tensor([[1, 8, 6]]),
            use_cache=False,
        )
    return found[0] if isinstance(found, tuple) else found.logits
