"""Strict access to config.json."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from megatron.bridge.errors import ConfigError
from megatron.bridge.models.catalog import bridge_for
from megatron.bridge.models.hf_pretrained.config import HFConfig
from megatron.bridge.models.qwen_vl.rope_config import Rope, read_rope
from released_configs import QWEN3_VL_2B, QWEN3_VL_30B_A3B

ROPE_2B = Rope(5e6, (24, 20, 20), partial_rotary_factor=1.0, rope_type="default", scaling={})


def settings_of(data: dict[str, Any]) -> dict[str, Any]:
    config = HFConfig.from_dict(data)
    return bridge_for(config.architecture).provider_settings(config, "BF16")


@pytest.fixture
def data() -> dict[str, Any]:
    return copy.deepcopy(QWEN3_VL_2B)


def new_form(data: dict[str, Any], **changes: object) -> dict[str, Any]:
    """The config with rope as transformers 5 writes it."""
    text = data["text_config"]
    text["rope_parameters"] = (
        text.pop("rope_scaling") | {"rope_theta": text.pop("rope_theta")} | changes
    )
    return data


def test_values(data: dict[str, Any]) -> None:
    config = HFConfig.from_dict(data)
    assert config.architecture == "Qwen3VLForConditionalGeneration"
    assert config.model_type == "qwen3_vl"
    assert config.require("text_config.num_hidden_layers", int) == 28
    assert config.text.require("rope_scaling.mrope_section", list) == [24, 20, 20]
    assert config.vision.require("depth", int) == 24
    assert config.require("text_config.rope_theta", float) == 5e6
    assert isinstance(config.require("text_config.rope_theta", float), float)


def test_missing_value_names_file_and_key(tmp_path: Path, data: dict[str, Any]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(data))
    for config in (HFConfig.from_file(path), HFConfig.from_file(tmp_path)):
        with pytest.raises(ConfigError) as caught:
            config.text.require("number_of_heads", int)
        assert str(caught.value) == (
            f"{path}: text_config.number_of_heads is missing; expected a value of type int"
        )


def test_what_transformers_refuses_has_no_defaults(data: dict[str, Any]) -> None:
    data["model_type"] = "qwen3_5"
    data["text_config"]["num_hidden_layers"] = "many"
    reason = r"layer_types is missing; .*\(transformers gives no default: .*num_hidden_layers"
    with pytest.raises(ConfigError, match=reason):
        HFConfig.from_dict(data).text.require("layer_types", list)


@pytest.mark.parametrize("count", [10**12, 10**400])
def test_no_list_is_made_of_a_hostile_count(data: dict[str, Any], count: int) -> None:
    data |= {"model_type": "qwen3_5"}
    data["text_config"]["num_hidden_layers"] = count
    with pytest.raises(ConfigError, match=r"num_hidden_layers = .* is more than any model has"):
        HFConfig.from_dict(data).text.require("layer_types", list)


@pytest.mark.parametrize(
    ("value", "kind"),
    [("28", int), (28.0, int), (True, int), (1, bool), (28, str), ({}, list), (False, float)],
)
def test_wrong_type(data: dict[str, Any], value: object, kind: type) -> None:
    data["text_config"]["x"] = value
    with pytest.raises(ConfigError, match=rf"text_config\.x must be of type {kind.__name__}"):
        HFConfig.from_dict(data).text.require("x", kind)


def test_null_is_absent(data: dict[str, Any]) -> None:
    data["text_config"] |= {"head_dim": None, "x": None}
    config = HFConfig.from_dict(data)
    assert not config.has("text_config.head_dim")
    assert not config.has("text_config.x")
    with pytest.raises(ConfigError, match="is missing"):
        config.require("text_config.x", int)


def test_optional_values(data: dict[str, Any]) -> None:
    config = HFConfig.from_dict(data)
    assert config.get("text_config.mlp_only_layers", []) == []
    assert config.get("tie_word_embeddings", False) is True
    with pytest.raises(ConfigError, match="tie_word_embeddings must be of type str"):
        config.get("tie_word_embeddings", "no")
    assert not config.has("architectures.0.x")


@pytest.mark.parametrize("value", [[3], "Qwen3VLForConditionalGeneration", {}])
def test_no_architecture(data: dict[str, Any], value: object) -> None:
    data["architectures"] = value
    with pytest.raises(ConfigError, match="architectures"):
        _ = HFConfig.from_dict(data).architecture


@pytest.mark.parametrize("value", [[], None])
def test_the_architecture_follows_from_the_model_type(data: dict[str, Any], value: object) -> None:
    data["architectures"] = value
    assert HFConfig.from_dict(data).architecture == "Qwen3VLForConditionalGeneration"
    data["model_type"] = "qwen3_5_moe"
    assert HFConfig.from_dict(data).architecture == "Qwen3_5MoeForConditionalGeneration"
    data["model_type"] = "unheard_of"
    with pytest.raises(ConfigError, match=r"architectures (is missing|must be a list)"):
        _ = HFConfig.from_dict(data).architecture


def test_nothing_is_shared_with_the_caller(data: dict[str, Any]) -> None:
    config = HFConfig.from_dict(data)
    data["text_config"]["hidden_size"] = 1
    config.data["text_config"]["hidden_size"] = 2
    config.require("text_config", dict)["hidden_size"] = 3
    config.require("text_config.rope_scaling.mrope_section", list).clear()
    assert config.data == QWEN3_VL_2B


@pytest.mark.parametrize("form", ["old", "new", "both"])
def test_rope_in_either_form(data: dict[str, Any], form: str) -> None:
    if form == "both":
        text = data["text_config"]
        text["rope_parameters"] = text["rope_scaling"] | {"rope_theta": text["rope_theta"]}
    elif form == "new":
        data = new_form(data)
    assert read_rope(HFConfig.from_dict(data)) == ROPE_2B


@pytest.mark.parametrize("key", ["rope_theta", "mrope_section", "mrope_interleaved", "rope_type"])
@pytest.mark.parametrize("form", ["old", "new"])
def test_rope_value_missing(data: dict[str, Any], form: str, key: str) -> None:
    """Then it is the one that transformers fills in."""
    from transformers import AutoConfig

    if form == "new":
        data = new_form(data)
    text = data["text_config"]
    parent = text["rope_parameters"] if form == "new" else text["rope_scaling"]
    (text if key in text else parent).pop(key)
    found = read_rope(HFConfig.from_dict(data))
    values = {name: value for name, value in data.items() if name != "model_type"}
    expected = AutoConfig.for_model("qwen3_vl", **copy.deepcopy(values)).text_config.rope_parameters
    assert found.theta == expected["rope_theta"]
    assert found.rope_type == expected["rope_type"]
    assert found.mrope_section == (24, 20, 20)


@pytest.mark.parametrize(
    ("key", "value"),
    [("rope_theta", 1e4), ("mrope_section", [22, 21, 21]), ("rope_type", "yarn")],
)
def test_rope_forms_that_disagree(data: dict[str, Any], key: str, value: object) -> None:
    text = data["text_config"]
    text["rope_parameters"] = (
        text["rope_scaling"] | {"rope_theta": text["rope_theta"]} | {key: value}
    )
    with pytest.raises(ConfigError, match=rf"contradictory values: .*{key} = .*{key} = "):
        read_rope(HFConfig.from_dict(data))


@pytest.mark.parametrize("form", ["old", "new"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("rope_theta", value) for value in (-1, 0, -0.5, float("nan"), float("inf"))),
        *(("partial_rotary_factor", value) for value in (0.0, -0.25, 1.5, float("nan"))),
    ],
)
def test_rope_value_that_makes_no_sense(
    data: dict[str, Any], form: str, key: str, value: float
) -> None:
    data["model_type"] = "qwen3_5"  # the other families do not read the second key
    if form == "new":
        data = new_form(data, **{key: value})
    else:
        data["text_config"][key] = value
    with pytest.raises(ConfigError, match=rf"text_config\.(\w+\.)?{key} must be a number above 0"):
        read_rope(HFConfig.from_dict(data))


@pytest.mark.parametrize("value", [0, -1e-6, float("nan"), float("inf")])
def test_epsilon_that_makes_no_sense(data: dict[str, Any], value: float) -> None:
    data["text_config"]["rms_norm_eps"] = value
    with pytest.raises(ConfigError, match=r"text_config\.rms_norm_eps must be a number above 0"):
        settings_of(data)


@pytest.mark.parametrize("value", [0, -2, 2**40])
@pytest.mark.parametrize(
    "path",
    [
        "text_config.max_position_embeddings",
        "text_config.num_hidden_layers",
        "text_config.head_dim",
        "vision_config.patch_size",
        "vision_config.spatial_merge_size",
    ],
)
def test_size_that_makes_no_sense(data: dict[str, Any], path: str, value: int) -> None:
    section, key = path.split(".")
    data[section][key] = value
    with pytest.raises(ConfigError, match=rf"{path} must be a number from 1 to"):
        settings_of(data)


def test_more_experts_for_a_token_than_there_are() -> None:
    data = copy.deepcopy(QWEN3_VL_30B_A3B)
    data["text_config"]["num_experts_per_tok"] = 129
    with pytest.raises(ConfigError, match="num_experts_per_tok must be a number from 1 to 128"):
        settings_of(data)


def test_no_rope(data: dict[str, Any]) -> None:
    del data["text_config"]["rope_scaling"]
    assert read_rope(HFConfig.from_dict(data)) == ROPE_2B


@pytest.mark.parametrize("section", [[1, 2], [1, -1, 2], [1.0, 2, 3], ["a", 1, 2], [True, 1, 2]])
def test_rope_section_that_is_none(data: dict[str, Any], section: list[object]) -> None:
    data["text_config"]["rope_scaling"]["mrope_section"] = section
    with pytest.raises(ConfigError, match="mrope_section must be a list of three counts"):
        read_rope(HFConfig.from_dict(data))


def test_partial_rotary(data: dict[str, Any]) -> None:
    """Read only where transformers reads it, and filled in as it does."""
    data["text_config"]["partial_rotary_factor"] = 0.5
    assert read_rope(HFConfig.from_dict(data)).partial_rotary_factor == 1.0
    data["model_type"] = "qwen3_5"
    assert read_rope(HFConfig.from_dict(data)).partial_rotary_factor == 0.5
    del data["text_config"]["partial_rotary_factor"]
    assert read_rope(HFConfig.from_dict(data)).partial_rotary_factor == 0.25
    partial = HFConfig.from_dict(new_form(data, partial_rotary_factor=0.75))
    assert read_rope(partial).partial_rotary_factor == 0.75


@pytest.mark.parametrize("form", ["old", "new"])
def test_scaled_rope(data: dict[str, Any], form: str) -> None:
    """The parameters of the type, as transformers completes them."""
    changes = {"rope_type": "yarn", "factor": 4.0}
    data = new_form(data, **changes)
    if form == "old":
        text = data["text_config"]
        text["rope_scaling"] = text.pop("rope_parameters")
        text["rope_scaling"]["type"] = text["rope_scaling"].pop("rope_type")
    rope = read_rope(HFConfig.from_dict(data))
    assert rope.rope_type == "yarn"
    assert rope.scaling == {"factor": 4.0, "original_max_position_embeddings": 262144}


def test_type_of_a_rotation_under_its_old_name(data: dict[str, Any]) -> None:
    """transformers reads `type` only where `rope_type` is not stated."""
    data["text_config"]["rope_scaling"] |= {"type": "mrope", "rope_type": "default"}
    assert read_rope(HFConfig.from_dict(data)).rope_type == "default"
    del data["text_config"]["rope_scaling"]["rope_type"]
    data["text_config"]["rope_scaling"]["type"] = "yarn"
    assert read_rope(HFConfig.from_dict(data)).rope_type == "yarn"


@pytest.mark.parametrize("value", [[1, 2], "yarn", 5])
def test_rotation_that_is_not_an_object(data: dict[str, Any], value: object) -> None:
    data["text_config"]["rope_parameters"] = value
    with pytest.raises(ConfigError, match=r"text_config\.rope_parameters must be of type dict"):
        read_rope(HFConfig.from_dict(data))


def test_transformers_object(data: dict[str, Any]) -> None:
    from transformers import Qwen3VLConfig

    values = {key: value for key, value in data.items() if key != "architectures"}
    given = Qwen3VLConfig(**copy.deepcopy(values))
    before = given.to_dict()
    config = HFConfig.from_transformers(given)
    assert config.architecture == "Qwen3VLForConditionalGeneration"
    assert read_rope(config) == ROPE_2B
    assert given.to_dict() == before


@pytest.mark.parametrize("path", [("dtype",), ("text_config", "torch_dtype")])
def test_dtype(path: tuple[str, ...]) -> None:
    data: dict[str, Any] = {"text_config": {}}
    (data["text_config"] if len(path) == 2 else data)[path[-1]] = "bfloat16"
    assert HFConfig.from_dict(data).dtype == "BF16"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({}, "dtype is missing"),
        ({"dtype": "auto"}, "dtype is 'auto', which is not a valid dtype"),
        ({"dtype": "float32", "text_config": {"dtype": "bfloat16"}}, "contradictory dtypes"),
    ],
)
def test_dtype_that_is_not_clear(data: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        _ = HFConfig.from_dict(data).dtype


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is not JSON from line 1, column 1 on"),
        (b'{"a": 1,\n "b": }', "it is not JSON from line 2, column 7 on"),
        (b'{"a": "\xff"}', "it is not UTF-8 text: byte 0xff at offset 7"),
        (b"[]", "expected a JSON object, found list"),
        (b'{"a": 1, "a": 2}', "duplicate key 'a'"),
    ],
)
def test_unreadable_file(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        HFConfig.from_file(tmp_path)
    assert str(caught.value) == (
        f"{path}: cannot be read as a config: {reason}; mend it, or download it again"
    )


def test_weights_are_no_config(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=f"give the folder that holds it, {tmp_path}$"):
        HFConfig.from_file(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: there is no such file"):
        HFConfig.from_file(tmp_path)
