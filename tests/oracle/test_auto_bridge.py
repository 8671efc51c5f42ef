"""AutoBridge: what clients call, on one process."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import released_configs as released
from megatron.bridge import AutoBridge
from megatron.bridge.errors import (
    ConfigError,
    InputError,
    PlanError,
    TargetExists,
    UnsupportedModel,
)
from megatron.bridge.models.hf_pretrained.tensors import TensorIndex
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.synthetic import make_model

ARCHITECTURE = "Qwen3VLForConditionalGeneration"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("qwen3-vl", tmp_path_factory.mktemp("auto") / "hf", {"num_shards": 2}, seed=9)


@pytest.fixture(scope="module")
def bridge(folder: Path) -> AutoBridge:
    return AutoBridge.from_hf_pretrained(folder)


@pytest.fixture(scope="module")
def model(bridge: AutoBridge, process_groups: None) -> list[Any]:
    return bridge.to_megatron_model()


def same_files(left: Path, right: Path, names: set[str]) -> bool:
    return all((left / name).read_bytes() == (right / name).read_bytes() for name in names)


def test_what_is_supported(folder: Path, tmp_path: Path) -> None:
    assert ARCHITECTURE in AutoBridge.list_supported_models()
    assert AutoBridge.supports(released.QWEN3_VL_8B)
    assert AutoBridge.can_handle(folder)
    assert not AutoBridge.can_handle(tmp_path)
    other = released.QWEN3_VL_8B | {"architectures": ["LlamaForCausalLM"]}
    assert not AutoBridge.supports(other)
    with pytest.raises(
        UnsupportedModel, match=f"LlamaForCausalLM: .* bridges for .*{ARCHITECTURE}"
    ):
        AutoBridge.from_hf_config(other)


def test_the_provider_has_the_released_values() -> None:
    config = copy.deepcopy(released.QWEN3_VL_8B) | {"dtype": "bfloat16"}
    before = copy.deepcopy(config)
    provider = AutoBridge.from_hf_config(config).transformer_config
    expected = {
        "num_layers": 36,
        "hidden_size": 4096,
        "ffn_hidden_size": 12288,
        "num_attention_heads": 32,
        "num_query_groups": 8,
        "kv_channels": 128,
        "mrope_section": [24, 20, 20],
        "rotary_base": 5e6,
        "rotary_percent": 1.0,
        "qk_layernorm": True,
        "position_embedding_type": "mrope",
        "scatter_embedding_sequence_parallel": False,
        "share_embeddings_and_output_weights": False,
        "add_qkv_bias": False,
        "normalization": "RMSNorm",
        "layernorm_epsilon": 1e-6,
        "vocab_size": 151936,
        "padded_vocab_size": 151936,
        "params_dtype": torch.bfloat16,
        "bf16": True,
    }
    assert {name: getattr(provider, name) for name in expected} == expected
    vision: Any = provider.vision  # type: ignore[attr-defined]
    assert (vision.depth, vision.deepstack_visual_indexes) == (27, (8, 16, 24))
    assert config == before  # a caller's config is not changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_theta": 0}, "rope_theta must be a number above 0"),
        ({"num_key_value_heads": 0}, "text_config.num_key_value_heads must be a number from 1"),
        ({"head_dim": "128"}, "text_config.head_dim must be of type int"),
    ],
)
def test_a_config_that_cannot_be_honoured(change: dict[str, Any], message: str) -> None:
    config = copy.deepcopy(released.QWEN3_VL_8B) | {"dtype": "bfloat16"}
    config["text_config"] |= change
    with pytest.raises(InputError, match=message):
        AutoBridge.from_hf_config(config).to_megatron_provider(load_weights=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "must be 'qwen3_vl', found 'llama'"),
        ({"dtype": "foo"}, "dtype is 'foo', which is not a valid dtype of tensors"),
    ],
)
def test_what_is_checked_before_all_else(
    change: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    """With weights and without."""
    shutil.copytree(folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | change
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    alone = AutoBridge.from_hf_config(config)
    files = AutoBridge.from_hf_pretrained(tmp_path / "model")
    for bridge in (alone, files):
        with pytest.raises(ConfigError, match=message):
            bridge.plan()
        with pytest.raises(ConfigError, match=message):
            bridge.to_megatron_provider(load_weights=False)


def test_a_config_alone_has_no_weights_to_load() -> None:
    bridge = AutoBridge.from_hf_config(released.QWEN3_VL_8B)
    with pytest.raises(InputError, match="no weights to load"):
        bridge.to_megatron_provider()


def test_export_gives_every_tensor_in_order(bridge: AutoBridge, model: list[Any]) -> None:
    tensors = bridge.hf_pretrained.tensors
    names = []
    for name, tensor in bridge.export_hf_weights(model, cpu=True):
        names.append(name)
        assert torch.equal(tensor, tensors.read(name)), name
    assert names == list(tensors)


def test_save_writes_the_same_files(
    bridge: AutoBridge, model: list[Any], folder: Path, tmp_path: Path
) -> None:
    names = {path.name for path in folder.iterdir()}
    weights = {name for name in names if "safetensors" in name}
    bridge.save_hf_pretrained(model, tmp_path / "all")
    assert {path.name for path in (tmp_path / "all").iterdir()} == names
    assert same_files(folder, tmp_path / "all", names)
    bridge.save_hf_weights(model, tmp_path / "weights")
    assert {path.name for path in (tmp_path / "weights").iterdir()} == weights
    assert same_files(folder, tmp_path / "weights", weights)
    with pytest.raises(TargetExists):
        bridge.save_hf_pretrained(model, tmp_path / "all")
    bridge.save_hf_pretrained(model, tmp_path / "all", force=True)


def test_checkpoints_without_a_model(bridge: AutoBridge, folder: Path, tmp_path: Path) -> None:
    AutoBridge.import_ckpt(folder, tmp_path / "megatron")
    bridge.export_ckpt(tmp_path / "megatron", tmp_path / "hf")
    assert same_files(folder, tmp_path / "hf", {path.name for path in folder.iterdir()})


def test_loading_other_weights(bridge: AutoBridge, model: list[Any], tmp_path: Path) -> None:
    other = make_model("qwen3-vl", tmp_path / "other", {}, seed=10)
    [fresh] = bridge.to_megatron_model(load_weights=False)
    bridge.load_hf_weights([fresh], other)
    expected = PreTrainedVLM.from_pretrained(other).tensors
    for name, tensor in bridge.export_hf_weights([fresh]):
        assert torch.equal(tensor, expected.read(name)), name


def test_weights_of_another_model_are_refused(
    bridge: AutoBridge, model: list[Any], tmp_path: Path
) -> None:
    settings = {"text.num_hidden_layers": 4, "text.intermediate_size": 272}
    other = make_model("qwen3-vl", tmp_path / "other", settings)
    before = model[0].language_model.decoder.final_layernorm.weight.clone()
    with pytest.raises(PlanError) as error:
        bridge.load_hf_weights(model, other)
    assert any("linear_fc1.weight: the files make shape" in one for one in error.value.problems)
    assert torch.equal(model[0].language_model.decoder.final_layernorm.weight, before)


def test_values_that_do_not_fit_the_files_are_refused(bridge: AutoBridge, tmp_path: Path) -> None:
    provider = bridge.to_megatron_provider()
    provider.params_dtype, provider.bf16 = torch.float32, False
    [model] = provider.provide_distributed_model(wrap_with_ddp=False)
    exact = dict(bridge.export_hf_weights([model]))  # BF16 values in F32: nothing is lost
    norm = model.language_model.decoder.final_layernorm.weight
    assert norm.dtype == torch.float32
    with torch.no_grad():
        norm[3] = 1 + 2**-12
    with pytest.raises(InputError, match=r"final_layernorm.weight: values in float32 do not"):
        dict(bridge.export_hf_weights([model]))
    with pytest.raises(InputError, match="do not fit"):
        bridge.save_hf_pretrained([model], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    wide = dict(bridge.export_hf_weights([model], dtype=torch.float32))
    assert wide["model.language_model.norm.weight"][3] == 1 + 2**-12
    assert wide.keys() == exact.keys()
    bridge.save_hf_weights([model], tmp_path / "wide", dtype=torch.float32)
    written = TensorIndex.from_folder(tmp_path / "wide")  # checks total_size, too
    assert all(torch.equal(written.read(name), tensor) for name, tensor in wide.items())


def test_tasks_cover_every_parameter(bridge: AutoBridge, model: list[Any]) -> None:
    tasks = bridge.get_conversion_tasks(model)
    assert len(tasks) == len(list(model[0].parameters()))
    names = {name for task in tasks for name in task.mapping.hf_params.values()}
    assert names == set(bridge.hf_pretrained.tensors)
    by_name = {task.global_param_name: task for task in tasks}
    task = by_name["language_model.decoder.layers.1.self_attention.linear_qkv.weight"]
    assert (
        task.megatron_module is model[0].language_model.decoder.layers[1].self_attention.linear_qkv
    )
    assert task.param_weight is task.megatron_module.weight
