"""Synthetic models: transformers and its processors take them for real ones."""

from __future__ import annotations

import json
import warnings
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.bridge.cli import main
from megatron.bridge.errors import InputError, TargetExists, UnsupportedModel
from megatron.bridge.models.hf_pretrained.tensors import TensorIndex
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.models.qwen_vl.rope_config import read_rope
from megatron.bridge.synthetic import make_model
from megatron.bridge.synthetic.config_settings import resolve_settings
from megatron.bridge.synthetic.disk_tensors import RandomTensor
from megatron.bridge.synthetic.random_weights import random_values
from vision_families import FAMILIES

FAMILY = FAMILIES["qwen3-vl"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("qwen3-vl", tmp_path_factory.mktemp("synthetic") / "tiny")


@pytest.fixture(scope="module", params=list(FAMILIES))
def vlm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedVLM:
    made = make_model(request.param, tmp_path_factory.mktemp("synthetic") / "tiny")
    return PreTrainedVLM.from_pretrained(made)


def chat(*content: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}]


def processed(vlm: PreTrainedVLM, messages: list[dict[str, Any]]) -> Any:
    return vlm.processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )


def pixels(*shape: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(5).integers(0, 256, (*shape, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tie_word_embeddings": True, "num_shards": 3},
        {"text.attention_bias": "true", "rope_form": "new", "vision.deepstack_visual_indexes": []},
        {"dtype": "float32", "max_shard_size": 3_000_000, "image_token_id": 290, "vocab_size": 311},
    ],
)
def test_transformers_loads_it(tmp_path: Path, settings: dict[str, object]) -> None:
    import torch
    from transformers import AutoModelForImageTextToText

    made = make_model("qwen3-vl", tmp_path / "tiny", settings)
    model, info = AutoModelForImageTextToText.from_pretrained(made, output_loading_info=True)
    assert not any(info.values()), info
    tokenizer = PreTrainedVLM.from_pretrained(made).tokenizer
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") == model.config.image_token_id
    with TensorIndex.from_folder(made) as index:
        state = model.state_dict()
        absent = set(state) - set(index)
        assert absent == ({"lm_head.weight"} if settings.get("tie_word_embeddings") else set())
        for name in index:
            assert torch.equal(state[name], index.read(name)), name
    assert ("model.language_model.layers.0.self_attn.q_proj.bias" in index) == (
        "text.attention_bias" in settings
    )


def test_released_layout(folder: Path) -> None:
    index = TensorIndex.from_folder(folder)
    assert {info.dtype for info in index.values()} == {"BF16"}
    assert index.shards[0].metadata == {"format": "pt"}
    config = json.loads((folder / "config.json").read_text())
    assert config["text_config"]["rope_scaling"]["mrope_section"] == [6, 5, 5]
    assert config["text_config"]["rope_theta"] == 5e6
    assert "rope_parameters" not in config["text_config"]
    tokens = {"image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"}
    assert config.keys() - tokens == FAMILY.config.keys()


def test_new_form_of_rope(tmp_path: Path) -> None:
    vlm = PreTrainedVLM.from_pretrained(
        make_model("qwen3-vl", tmp_path / "tiny", {"rope_form": "new", "text.rope_theta": 1e4})
    )
    text = vlm.hf_config.text
    assert not text.has("rope_scaling")
    assert not text.has("rope_theta")
    assert (
        read_rope(vlm.hf_config).theta
        == vlm.config.text_config.rope_parameters["rope_theta"]
        == 1e4
    )


def test_an_image(vlm: PreTrainedVLM) -> None:
    from PIL import Image

    image = Image.fromarray(pixels(210, 340))
    batch = processed(vlm, chat({"type": "image", "image": image}, {"type": "text", "text": "Hé?"}))
    t, h, w = batch["image_grid_thw"][0].tolist()
    assert batch["pixel_values"].shape == (t * h * w, 3 * 2 * 16 * 16)
    assert int((batch["input_ids"] == vlm.config.image_token_id).sum()) == t * h * w // 4
    text = vlm.tokenizer.decode(batch["input_ids"][0])
    assert text.replace("<|image_pad|>" * (h * w // 4), "<|image_pad|>") == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Hé?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert vlm.load_model()(**batch).logits.isfinite().all()


def test_a_video(vlm: PreTrainedVLM) -> None:
    video = pixels(10, 70, 100)
    batch = processed(vlm, chat({"type": "video", "video": video}, {"type": "text", "text": "?"}))
    t, h, w = batch["video_grid_thw"][0].tolist()
    assert t > 1
    assert batch["pixel_values_videos"].shape == (t * h * w, 3 * 2 * 16 * 16)
    assert int((batch["input_ids"] == vlm.config.video_token_id).sum()) == t * h * w // 4
    assert int((batch["input_ids"] == vlm.config.vision_start_token_id).sum()) >= t
    assert vlm.load_model()(**batch).logits.isfinite().all()


def test_the_chat_template_refuses_what_it_does_not_know(vlm: PreTrainedVLM) -> None:
    with pytest.raises(Exception, match="cannot render content of type audio"):
        vlm.tokenizer.apply_chat_template(chat({"type": "audio"}), tokenize=False)
    plain = vlm.tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert plain == "<|im_start|>user\nx<|im_end|>\n"


def test_tokens_match_the_config(vlm: PreTrainedVLM) -> None:
    (family,) = (
        family
        for family in FAMILIES.values()
        if family.config["model_type"] == vlm.hf_config.model_type
    )
    for key, token in family.token_ids.items():
        assert vlm.tokenizer.convert_tokens_to_ids(token) == vlm.hf_config.require(key, int)
    text = "naïve <tool_call>\n\t日本"
    assert vlm.tokenizer.decode(vlm.tokenizer(text)["input_ids"]) == text
    assert max(vlm.tokenizer.get_vocab().values()) < vlm.hf_config.text.require("vocab_size", int)
    ids = vlm.tokenizer("<|im_start|>a<think>")["input_ids"]
    assert vlm.tokenizer.decode(ids, skip_special_tokens=True) == "a<think>"


def test_the_seed_decides(tmp_path: Path, folder: Path) -> None:
    def content(path: Path) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in path.iterdir()}

    assert content(make_model("qwen3-vl", tmp_path / "same")) == content(folder)
    other = content(make_model("qwen3-vl", tmp_path / "other", seed=1))
    assert {name for name, data in content(folder).items() if other[name] != data} == {
        "model.safetensors"
    }


def test_random_values() -> None:
    centred = RandomTensor("input_layernorm.weight", (4000,), "F32", zero_centred=True)
    norm = random_values(RandomTensor("input_layernorm.weight", (4000,), "F32"), 0)
    bias = random_values(RandomTensor("proj.bias", (4000,), "F32"), 0)
    matrix = random_values(RandomTensor("proj.weight", (70, 400), "F32"), 0)
    kernel = random_values(RandomTensor("conv.weight", (70, 3, 2, 8, 8), "F32"), 0)
    for value, mean, deviation in (
        (norm, 1, 0.1),
        (random_values(centred, 0), 0, 0.1),
        (bias, 0, 0.1),
        (matrix, 0, 400**-0.5),
        (kernel, 0, prod((3, 2, 8, 8)) ** -0.5),
    ):
        assert float(value.mean()) == pytest.approx(mean, abs=0.01)
        assert float(value.std()) == pytest.approx(deviation, rel=0.05)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_number_of_shards(tmp_path: Path, count: int) -> None:
    made = make_model("qwen3-vl", tmp_path / "tiny", {"num_shards": count})
    index = TensorIndex.from_folder(made)
    assert len(index.shards) == count
    assert (index.index_metadata is None) == (count == 1)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"text.hiden_size": 3}, "did you mean text_config.hidden_size?"),
        ({"nonsense": 3}, "known are: dtype, "),
        ({"text.hidden_size": "many"}, "must be of type int"),
        ({"text.hidden_size": 1.5}, "must be of type int"),
        ({"tie_word_embeddings": 1}, "must be of type bool"),
        ({"vision.deepstack_visual_indexes": ["0"]}, "must be of type list"),
        ({"text.num_hidden_layers": 0}, "text_config.num_hidden_layers must be a number from 1"),
        ({"text.num_key_value_heads": 3}, "8 attention heads do not divide into 3"),
        ({"text.head_dim": 31}, "rotates 32 channels of a head"),
        ({"text.hidden_act": "none"}, "activation_func is 'none'"),
        ({"text.rope_scaling.mrope_section": [8, 8]}, "must be a list of three counts"),
        ({"vision.num_heads": 3}, "not a multiple of 4 * num_heads = 12"),
        ({"vision.num_position_embeddings": 80}, "vision.num_position_embeddings is 80, not a sq"),
        ({"vision.deepstack_visual_indexes": [0, 3]}, "should name some of 3 layers"),
        ({"vision.deepstack_visual_indexes": [2, 0]}, "expected ascending block indexes"),
        ({"vision.out_hidden_size": 96}, "vision.out_hidden_size is 96"),
        ({"vocab_size": 281}, "is smaller than the tokenizer's (282)"),
        ({"rope_form": "newest"}, "rope_form must be one of old, new"),
        ({"dtype": "float64"}, "dtype must be one of bfloat16"),
        ({"num_shards": -1}, "num_shards must be 0 or more, found -1"),
        ({"num_shards": 999}, "there are only 115 tensors"),
        ({"vocab_size": 311, "text.vocab_size": 313}, "vocab_size is set twice: to 311, and by"),
        ({"model_type": "qwen3_vl_moe"}, "not a setting"),
        ({"image_token_id": 300, "video_token_id": 300}, "do not fit together"),
        ({"image_token_id": 4}, "do not fit together"),
    ],
)
def test_settings_that_make_no_model(
    tmp_path: Path, settings: dict[str, object], reason: str
) -> None:
    with pytest.raises(InputError) as caught:
        make_model("qwen3-vl", tmp_path / "tiny", settings)
    assert reason in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("qwen3-vl", {"text.head_dim": 30, "text.num_hidden_layers": 1}),
        ("qwen3-vl", {"text.rope_scaling.mrope_section": [4, 6, 6]}),
        ("qwen3-vl-moe", {"text.mlp_only_layers": [7, 1]}),
        ("qwen3.5", {"text.partial_rotary_factor": 0.3}),
    ],
)
def test_odd_settings_make_a_model_that_computes_the_same(
    family: str, settings: dict[str, object], tmp_path: Path
) -> None:
    """No more is refused than what transformers or the Megatron model refuses."""
    made = make_model(family, tmp_path / "odd", settings)
    assert main(["compare", str(made), "--dtype", "float64"]) == 0


def test_values_that_transformers_makes_of_others(tmp_path: Path) -> None:
    made = make_model("qwen3.5", tmp_path / "a", {"text.full_attention_interval": 2})
    full, linear = "full_attention", "linear_attention"
    text = json.loads((made / "config.json").read_text())["text_config"]
    assert text["layer_types"] == [linear, full] * 3
    own = [full, *[linear] * 5]
    resolved = resolve_settings(FAMILIES["qwen3.5"], {"text.layer_types": own})
    assert resolved.config["text_config"]["layer_types"] == own
    assert resolved.config["text_config"]["full_attention_interval"] == 4
    with pytest.raises(InputError, match=r"num_hidden_layers = 999999 is more than any model has"):
        resolve_settings(FAMILIES["qwen3.5"], {"text.num_hidden_layers": 999999})


def test_the_family_is_not_changed_by_its_models() -> None:
    before = json.dumps(FAMILY.config)
    resolved = resolve_settings(FAMILY, {"rope_form": "new"})
    resolved.config["text_config"]["rope_parameters"]["mrope_section"].clear()
    resolved.config["architectures"].clear()
    assert json.dumps(FAMILY.config) == before


def test_unknown_family(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"'qwen3-vl-next'; there is .*qwen3-vl"):
        make_model("qwen3-vl-next", tmp_path / "tiny")


def test_an_existing_target(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    made = make_model("qwen3-vl", tmp_path / "tiny", {"text.num_hidden_layers": 2})
    with pytest.raises(TargetExists):
        make_model("qwen3-vl", tmp_path / "tiny")
    (made / "model.safetensors").unlink()
    make_model("qwen3-vl", tmp_path / "tiny", {"text.num_hidden_layers": 2}, force=True)
    assert (made / "model.safetensors").exists()


def test_advice_for_training_is_not_given_for_files(tmp_path: Path) -> None:
    """megatron-core warns of many experts whose router is not in float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_model("qwen3-vl-moe", tmp_path / "m", {"num_experts": 64})


def test_many_settings_that_make_no_model_are_one_cause(tmp_path: Path) -> None:
    wrong = {f"vision.{key}": -1 for key in ("depth", "hidden_size", "num_heads", "patch_size")}
    with pytest.raises(
        InputError, match=r"these settings: vision_config\.\w+ must be a number"
    ) as e:
        make_model("qwen3-vl", tmp_path / "model", wrong)
    assert len(str(e.value).splitlines()) == 1
