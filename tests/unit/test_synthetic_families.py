"""Synthetic models of every family and layout: names, shapes, dtypes and values on disk."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import released_configs as released
from megatron.bridge.errors import InputError
from megatron.bridge.models.hf_pretrained.config import HFConfig
from megatron.bridge.models.hf_pretrained.tensors import TensorIndex
from megatron.bridge.models.qwen_vl.rope_config import read_rope
from megatron.bridge.synthetic import make_model
from megatron.bridge.synthetic.config_settings import resolve_settings
from megatron.bridge.synthetic.disk_tensors import RandomTensor, disk_tensors
from megatron.bridge.synthetic.random_weights import random_values
from vision_families import FAMILIES

if TYPE_CHECKING:
    import torch

MOE = [name for name in FAMILIES if name.endswith("-moe")]
HYBRID = [name for name in FAMILIES if name.startswith("qwen3.5")]
LAYER = "model.language_model.layers.0"
MTP_OF_A_DENSE_MODEL = {
    "mtp.fc.weight",
    "mtp.pre_fc_norm_embedding.weight",
    "mtp.pre_fc_norm_hidden.weight",
    "mtp.norm.weight",
    "mtp.layers.0.input_layernorm.weight",
    "mtp.layers.0.post_attention_layernorm.weight",
    "mtp.layers.0.self_attn.q_proj.weight",
    "mtp.layers.0.self_attn.k_proj.weight",
    "mtp.layers.0.self_attn.v_proj.weight",
    "mtp.layers.0.self_attn.o_proj.weight",
    "mtp.layers.0.self_attn.q_norm.weight",
    "mtp.layers.0.self_attn.k_norm.weight",
    "mtp.layers.0.mlp.gate_proj.weight",
    "mtp.layers.0.mlp.up_proj.weight",
    "mtp.layers.0.mlp.down_proj.weight",
}


def made(tmp_path: Path, family: str, **settings: object) -> TensorIndex:
    return TensorIndex.from_folder(make_model(family, tmp_path / "tiny", settings))


def expert(module: str, number: int, projection: str, shape: tuple[int, int]) -> torch.Tensor:
    """One projection of one expert: what every layout has to hold somewhere."""
    name = f"{module}.{number}.{projection}.weight"
    return random_values(RandomTensor(name, shape, "BF16"), 0)


def in_memory(module: str, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The experts as transformers holds them: gate above up, each [out, in]."""
    import torch

    count, rows, columns = shape
    projections = ("gate_proj", "up_proj") if name == "gate_up_proj" else ("down_proj",)
    matrix = (rows // len(projections), columns)
    return torch.stack(
        [
            torch.cat([expert(module, number, projection, matrix) for projection in projections])
            for number in range(count)
        ]
    )


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("qwen3-vl-moe", {}),
        ("qwen3-vl-moe", {"experts": "fused", "text.num_key_value_heads": 1}),
        ("qwen3-vl-moe", {"text.mlp_only_layers": "[1]", "text.decoder_sparse_step": 2}),
        ("qwen3-vl-moe", {"tie_word_embeddings": True, "text.num_local_experts": 5}),
        ("qwen3.5", {}),
        ("qwen3.5", {"tie_word_embeddings": True, "ssm_dtype": "bfloat16", "num_shards": 3}),
        ("qwen3.5", {"text.num_key_value_heads": 1, "rope_form": "old", "fp8": "false"}),
        ("qwen3.5", {"text.full_attention_interval": 9, "text.linear_num_value_heads": 12}),
        ("qwen3.5-moe", {}),
        ("qwen3.5-moe", {"mtp_experts": "fused", "ssm_dtype": "bfloat16"}),
        ("qwen3.5-moe", {"experts": "per-expert", "text.mtp_num_hidden_layers": 0}),
    ],
)
def test_transformers_loads_the_values(
    tmp_path: Path, family: str, settings: dict[str, object]
) -> None:
    import torch
    from transformers import AutoModelForImageTextToText

    folder = make_model(family, tmp_path / "tiny", settings)
    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    assert not any(info.values()), info
    index = TensorIndex.from_folder(folder)
    layers = 0
    for name, value in model.state_dict().items():
        module, _, projection = name.rpartition(".")
        if module.endswith(".mlp.experts"):
            layers += projection == "down_proj"
            shape = tuple(value.shape)
            assert torch.equal(value, in_memory(module, projection, shape).float()), name
        elif name != "lm_head.weight" or not settings.get("tie_word_embeddings"):
            assert torch.equal(value, index.read(name).float()), name
    assert ("lm_head.weight" in index) == ("tie_word_embeddings" not in settings)
    if family in MOE:
        text = model.config.text_config
        dense = "text.mlp_only_layers" in settings
        # Sparse would be the layers 1, 3 and 5.
        assert layers == (2 if dense else text.num_hidden_layers)


@pytest.mark.parametrize("form", ["fused", "fused-transposed", "per-expert"])
@pytest.mark.parametrize("family", MOE)
def test_layouts_of_the_experts(tmp_path: Path, family: str, form: str) -> None:
    """The same experts, in the layouts that transformers cannot read too."""
    import torch

    settings = {"experts": form} | ({"mtp_experts": form} if family in HYBRID else {})
    index = made(tmp_path, family, **settings)
    modules = [f"{LAYER}.mlp.experts"]
    modules += ["mtp.layers.0.mlp.experts"] if family in HYBRID else []
    for module in modules:
        gate_up = in_memory(module, "gate_up_proj", (6, 96, 160))
        down = in_memory(module, "down_proj", (6, 160, 48))
        if form == "per-expert":
            assert sum(name.startswith(module) for name in index) == 18
            for number in range(6):
                gate, up = gate_up[number].chunk(2)
                for projection, value in (
                    ("gate_proj", gate),
                    ("up_proj", up),
                    ("down_proj", down[number]),
                ):
                    assert torch.equal(index.read(f"{module}.{number}.{projection}.weight"), value)
            continue
        assert sum(name.startswith(module) for name in index) == 2
        if form == "fused-transposed":
            gate_up, down = gate_up.mT, down.mT
        assert torch.equal(index.read(f"{module}.gate_up_proj"), gate_up)
        assert torch.equal(index.read(f"{module}.down_proj"), down)


def test_released_layout_of_qwen3_vl_moe(tmp_path: Path) -> None:
    index = made(tmp_path, "qwen3-vl-moe")
    assert index[f"{LAYER}.mlp.experts.gate_up_proj"].shape == (6, 160, 96)
    assert index[f"{LAYER}.mlp.experts.down_proj"].shape == (6, 48, 160)
    assert index[f"{LAYER}.mlp.gate.weight"].shape == (6, 160)
    assert {info.dtype for info in index.values()} == {"BF16"}
    text = HFConfig.from_file(tmp_path / "tiny").text
    assert text.require("num_experts", int) == 6
    assert text.require("num_experts_per_tok", int) == 3
    assert text.require("moe_intermediate_size", int) == 48
    assert text.require("intermediate_size", int) == 352
    assert text.require("decoder_sparse_step", int) == 1
    assert text.require("mlp_only_layers", list) == []
    assert text.require("norm_topk_prob", bool) is True
    # transformers' default of this key is wrong, and released configs leave it out.
    assert not text.has("tie_word_embeddings")
    assert text.has("rope_scaling")


@pytest.mark.parametrize("family", HYBRID)
def test_released_layout_of_qwen3_5(tmp_path: Path, family: str) -> None:
    index = made(tmp_path, family)
    wide = {name for name, info in index.items() if info.dtype != "BF16"}
    linear = [number for number in range(6 + (family in MOE)) if number != 3]
    assert wide == {
        f"model.language_model.layers.{number}.linear_attn.{name}"
        for number in linear
        for name in ("A_log", "norm.weight")
    }
    assert {index[name].dtype for name in wide} == {"F32"}
    mtp = {name for name in index if name.startswith("mtp.")}
    if family in MOE:
        experts = {name for name in mtp if ".mlp.experts." in name}
        assert len(experts) == 3 * 6
        assert len(mtp - experts) == 17
        assert index[f"{LAYER}.mlp.experts.gate_up_proj"].shape == (6, 96, 160)
        assert index[f"{LAYER}.mlp.experts.down_proj"].shape == (6, 160, 48)
        assert index["mtp.layers.0.mlp.experts.5.down_proj.weight"].shape == (160, 48)
        assert index[f"{LAYER}.mlp.shared_expert.up_proj.weight"].shape == (72, 160)
    else:
        assert mtp == MTP_OF_A_DENSE_MODEL
    assert index["mtp.fc.weight"].shape == (160, 320)
    assert index["mtp.layers.0.self_attn.q_proj.weight"].shape == (2 * 6 * 64, 160)
    assert index[f"{LAYER}.linear_attn.in_proj_qkv.weight"].shape == (2 * 472 + 816, 160)
    assert not any("deepstack" in name for name in index)
    config = HFConfig.from_file(tmp_path / "tiny")
    assert config.vision.require("deepstack_visual_indexes", list) == []
    assert read_rope(config).partial_rotary_factor == 0.25
    text = config.text
    types = text.require("layer_types", list)
    assert [number for number, kind in enumerate(types) if kind == "full_attention"] == [3]
    assert set(types) == {"full_attention", "linear_attention"}
    assert text.require("full_attention_interval", int) == 4
    assert text.require("attn_output_gate", bool) is True
    assert text.require("mamba_ssm_dtype", str) == "float32"
    assert text.require("mtp_num_hidden_layers", int) == 1
    assert text.require("mtp_use_dedicated_embeddings", bool) is False
    assert text.has("rope_parameters")


def test_dtype_of_the_state_space_tensors(tmp_path: Path) -> None:
    index = made(tmp_path, "qwen3.5", ssm_dtype="bfloat16")
    assert {info.dtype for info in index.values()} == {"BF16"}
    config = HFConfig.from_file(tmp_path / "tiny")
    # The config of a release says the same whatever is on disk: only file headers tell.
    assert config.text.require("mamba_ssm_dtype", str) == "float32"


def test_float32_values_need_float32(tmp_path: Path) -> None:
    import torch

    index = made(tmp_path, "qwen3.5")
    for name in ("A_log", "norm.weight"):
        value = index.read(f"{LAYER}.linear_attn.{name}")
        assert not torch.equal(value, value.bfloat16().float())


@pytest.mark.parametrize("family", FAMILIES)
def test_centres_of_the_norms(tmp_path: Path, family: str) -> None:
    index = made(tmp_path, family, **{"text.hidden_size": 640, "text.num_hidden_layers": 4})
    checked = set()
    for name, info in index.items():
        match = re.search(r"(\w*norm\w*)\.weight$", name)
        if match is None:
            continue
        ordinary = family not in HYBRID or ".visual." in name or ".linear_attn." in name
        mean = float(index.read(name).float().mean())
        tolerance = 0.5 / info.shape[0] ** 0.5
        assert mean == pytest.approx(1.0 if ordinary else 0.0, abs=tolerance), name
        checked.add(match[1])
    assert checked >= {"input_layernorm", "post_attention_layernorm", "q_norm", "k_norm", "norm"}


@pytest.mark.parametrize("family", FAMILIES)
def test_no_two_sizes_alike(tmp_path: Path, family: str) -> None:
    """So that a transposed or swapped tensor cannot go unnoticed."""
    config = FAMILIES[family].config
    text, vision = config["text_config"], config["vision_config"]
    sizes = [
        text["hidden_size"],
        text["num_attention_heads"] * text["head_dim"],
        text["num_key_value_heads"] * text["head_dim"],
        text["vocab_size"],
        vision["hidden_size"],
        3 * vision["hidden_size"],
        vision["intermediate_size"],
        vision["num_position_embeddings"],
        vision["hidden_size"] * vision["spatial_merge_size"] ** 2,
    ]
    if family != "qwen3.5-moe":
        sizes.append(text["intermediate_size"])
    if family in MOE:
        sizes += [text["moe_intermediate_size"], 2 * text["moe_intermediate_size"]]
        assert text["num_experts_per_tok"] == 3
    if family in HYBRID:
        keys = text["linear_num_key_heads"] * text["linear_key_head_dim"]
        values = text["linear_num_value_heads"] * text["linear_value_head_dim"]
        sizes += [keys, values, 2 * keys + values, 2 * sizes[1]]
        assert text["linear_num_value_heads"] == 2 * text["linear_num_key_heads"]
        assert text["linear_value_head_dim"] != text["linear_key_head_dim"]
    if "shared_expert_intermediate_size" in text:
        sizes.append(text["shared_expert_intermediate_size"])
    assert len(set(sizes)) == len(sizes)
    assert all(a != 2 * b and b != 2 * a for a, b in combinations((sizes[0], *sizes[9:]), 2)
               if sizes[0] in (a, b))  # fmt: skip
    assert text["num_hidden_layers"] % 4
    assert text["vocab_size"] % 4
    index = made(tmp_path, family)
    square = {
        info.name
        for info in index.values()
        if len(info.shape) > 1
        and info.shape[-2] == info.shape[-1]
        and ".patch_embed." not in info.name
    }
    # Square in every model: the vision attention's projection and the mergers' first layer.
    assert all(name.endswith(("attn.proj.weight", "linear_fc1.weight")) for name in square)


def dequantized(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Block by block, the plain way."""
    result = values.float()
    rows, columns = result.shape
    assert scales.shape == (-(-rows // 128), -(-columns // 128))
    for i, j in ((i, j) for i in range(scales.shape[0]) for j in range(scales.shape[1])):
        block = result[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
        assert float(block.abs().max()) == 448  # the whole range of e4m3 is used
        block *= float(scales[i, j])
    return result


@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fp8(tmp_path: Path, family: str, scale_dtype: str) -> None:
    settings: dict[str, object] = {"fp8": "true", "fp8_scale_dtype": scale_dtype}
    # More than one block, and smaller ones at the edges.
    settings |= {"text.moe_intermediate_size": 136} if family in MOE else {}
    index = made(tmp_path, family, **settings)
    layout = {"experts": "per-expert"} if family == "qwen3.5-moe" else {}
    plain = TensorIndex.from_folder(
        make_model(family, tmp_path / "plain", settings | {"fp8": False} | layout)
    )
    scales = {name for name in index if name.endswith("_scale_inv")}
    assert {index[name].dtype for name in scales} == {
        {"bfloat16": "BF16", "float32": "F32"}[scale_dtype]
    }
    quantized = {name.removesuffix("_scale_inv") for name in scales}
    assert {name for name, info in index.items() if info.dtype == "F8_E4M3"} == quantized
    assert index.keys() - scales == plain.keys()
    for name in plain:
        if name not in quantized:
            assert index[name].dtype == plain[name].dtype
            continue
        stored, scale, exact = index.read(name), index.read(f"{name}_scale_inv"), plain.read(name)
        assert stored.shape == exact.shape
        for part in (
            zip(stored, scale, exact, strict=True) if exact.ndim == 3 else [(stored, scale, exact)]
        ):
            error = (dequantized(*part[:2]) - part[2].float()).abs()
            # Three bits of mantissa; below 2**-6 of the scale, steps of 2**-9.
            assert bool(
                (error <= part[2].float().abs() / 15.9 + float(part[1].max()) * 2**-9).all()
            )
    plain_parts = ("lm_head", "embed_tokens", "norm", "A_log", "dt_bias", "conv1d", "in_proj_a",
                   "in_proj_b", "mlp.gate.", "shared_expert_gate", "visual", "mtp.fc")  # fmt: skip
    assert quantized == {name for name in plain if not any(part in name for part in plain_parts)}
    config = HFConfig.from_file(tmp_path / "tiny").section("quantization_config")
    assert config.require("quant_method", str) == "fp8"
    assert config.require("weight_block_size", list) == [128, 128]
    modules = config.require("modules_to_not_convert", list)
    assert {f"{name}.weight" for name in modules} == {
        name for name in plain if name.endswith(".weight") and name not in quantized
    }
    if family == "qwen3-vl-moe":
        assert index[f"{LAYER}.mlp.experts.gate_up_proj_scale_inv"].shape == (6, 2, 3)
        assert index[f"{LAYER}.mlp.experts.down_proj_scale_inv"].shape == (6, 2, 2)
    if family == "qwen3.5-moe":
        for module in (f"{LAYER}.mlp.experts.5", "mtp.layers.0.mlp.experts.5"):
            assert index[f"{module}.up_proj.weight_scale_inv"].shape == (2, 2)


@pytest.mark.parametrize(("name", "keys", "size"), released.RELEASED)
def test_real_sizes(name: str, keys: int, size: int | None) -> None:
    """A real config.json, given as settings, makes the tensors of the released files."""
    config: dict[str, Any] = getattr(released, name)
    (family,) = (
        family
        for family in FAMILIES.values()
        if family.config["model_type"] == config["model_type"]
    )
    resolved = resolve_settings(family, config)
    for key in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        assert resolved.config[key] == config[key]
    for section in ("text_config", "vision_config"):
        assert resolved.config[section].items() >= config[section].items()
    tensors = disk_tensors(family, resolved)
    assert len(tensors) == len({tensor.name for tensor in tensors}) == keys
    if size is not None:
        assert sum(spec.nbytes for spec in tensors) == size


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("qwen3-vl-moe", {"text.num_experts_per_tok": 7}, "must be a number from 1 to 6, found 7"),
        ("qwen3-vl-moe", {"text.num_experts": 0}, "num_experts must be a number from 1"),
        ("qwen3-vl-moe", {"experts": "transposed"}, "experts must be one of fused, "),
        ("qwen3-vl-moe", {"mtp_experts": "fused"}, "unknown setting 'mtp_experts'"),
        ("qwen3-vl-moe", {"text.norm_topk_prob": False}, "not a setting"),
        ("qwen3-vl", {"experts": "fused"}, "unknown setting 'experts'"),
        ("qwen3.5", {"ssm_dtype": "float64"}, "ssm_dtype must be one of"),
        ("qwen3.5", {"vision.deepstack_visual_indexes": [1]}, "is [], not a setting"),
        ("qwen3.5", {"text.attn_output_gate": False}, "not a setting"),
        ("qwen3.5", {"text.mtp_use_dedicated_embeddings": True}, "not a setting"),
        ("qwen3.5", {"text.mtp_num_hidden_layers": -1}, "expected 0 or more"),
        ("qwen3.5", {"text.linear_num_value_heads": 6}, "(6) must be a multiple of"),
        ("qwen3.5", {"text.layer_types": ["full_attention"]}, "should name 6 layers"),
        ("qwen3.5", {"text.layer_types": ["linear"] * 6}, "each full_attention or "),
        ("qwen3.5", {"text.full_attention_interval": 0}, "full_attention_interval (0)"),
        ("qwen3.5", {"text.partial_rotary_factor": 1.5}, "partial_rotary_factor must be"),
        ("qwen3.5", {"fp8_scale_dtype": "float16"}, "fp8_scale_dtype must be one of"),
        ("qwen3.5-moe", {"text.mlp_only_layers": [1]}, "not a setting"),
    ],
)
def test_settings_that_make_no_model(
    tmp_path: Path, family: str, settings: dict[str, object], reason: str
) -> None:
    with pytest.raises(InputError) as caught:
        made(tmp_path, family, **settings)
    assert reason in str(caught.value)
    assert list(tmp_path.iterdir()) == []
