"""Models of text alone from files to files: both ways, under every root, key for key."""

from __future__ import annotations

import json
import time
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

import released_configs as released
from megatron.bridge import AutoBridge
from megatron.bridge.cli import main
from megatron.bridge.formats.torch_dist.reader import TorchDistCheckpoint
from megatron.bridge.models.catalog import bridge_for
from megatron.bridge.models.hf_pretrained.config import HFConfig
from oracle import text_models
from oracle.loading import missing_for_transformers
from oracle.test_stock_checkpoint import assert_same_tensors, stock_save

AS_ALONE, AS_BESIDE_VISION, BARE = "model.", "model.language_model.", ""
ROOTS = (
    *("model.", "", "model.model.", "language_model.", "language_model.model.", "module.model."),
    *("model.language_model.", "model.language_model.model.", "model.model.language_model."),
)
HYBRID = ("Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM", "Qwen3_5TextForSequenceClassification")


def comes_back(folder: Path, tmp_path: Path) -> TorchDistCheckpoint:
    """Both ways, bit for bit; returns what lies between."""
    assert missing_for_transformers(folder) == []
    megatron, again = tmp_path / "megatron", tmp_path / "again"
    assert main(["import", str(folder), str(megatron)]) == 0
    assert main(["export", str(megatron), str(again), "--hf", str(folder)]) == 0
    assert main(["verify", str(folder), str(megatron)]) == 0
    for file in folder.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes(), file.name
    return TorchDistCheckpoint(megatron)


@pytest.mark.parametrize("name", text_models.MODELS)
def test_the_roots_are_those_of_transformers(name: str) -> None:
    """Of all names that there might be, those that it takes for the same, and no others."""
    config_class, config = text_models.MODELS[name]
    with torch.device("meta"):
        model = getattr(transformers, name)(getattr(transformers, config_class)(**config))
    state = model.state_dict()
    renamings = [
        entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)
    ]
    bare = name in text_models.BARE_MODELS
    own = "" if bare else "model."
    others = bridge_for(name).roots["model."]
    for root in ROOTS:
        understood = all(
            rename_source_key(root + end.removeprefix(own), renamings, [], "model", state)[0] == end
            for end in state
            if end.startswith(own) and not end.startswith(("lm_head.", "score."))
        )
        known = root in ("model.", *others) and not (bare and root.startswith("model.model."))
        if bare and root.endswith("language_model.model."):
            continue  # transformers does not read it; there is nothing else that it could be
        assert understood == known, root


@pytest.mark.parametrize("name", text_models.MODELS)
def test_both_ways_and_key_for_key_what_stock_save_writes(
    name: str, tmp_path: Path, process_groups: None
) -> None:
    """As transformers writes them; the live model has an MTP layer where its config has one."""
    hybrid = name in HYBRID and "Causal" in name
    more = {"mtp_num_hidden_layers": 1} if hybrid else {}
    folder = text_models.save(text_models.build(name, **more), tmp_path / "hf")
    if hybrid:
        text_models.add_predictor(folder)
    ours = comes_back(folder, tmp_path)
    keys = ours.tensors
    assert "embedding.word_embeddings.weight" in keys
    bare = name in text_models.BARE_MODELS
    head = ("output_layer.weight" in keys, "output_layer.bias" in keys)
    assert head == (not bare, "Token" in name)
    if bare:
        return
    provider = AutoBridge.from_hf_pretrained(folder).to_megatron_provider()
    if hybrid:
        provider.mtp_num_layers = 1
    [model] = provider.provide_distributed_model(wrap_with_ddp=False)
    assert_same_tensors(ours, stock_save(model, tmp_path / "stock"))


@pytest.mark.parametrize("root", [BARE, "model.model."])
def test_both_ways_under_another_root(root: str, tmp_path: Path) -> None:
    comes_back(
        text_models.save(text_models.build("Qwen3ForCausalLM"), tmp_path / "hf", root), tmp_path
    )


@pytest.mark.parametrize("root", [AS_ALONE, AS_BESIDE_VISION])
@pytest.mark.parametrize("name", ["Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM"])
def test_with_an_mtp_layer_and_a_tower_left_behind(
    name: str, root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files of a vision-language model with the config of its text: the tower is carried."""
    folder = text_models.save(
        text_models.build(name, mtp_num_hidden_layers=1), tmp_path / "hf", root
    )
    text_models.add_predictor(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.visual.patch_embed.proj.bias"] = torch.ones(7)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    keys = comes_back(folder, tmp_path).tensors
    assert "mtp.layers.0.eh_proj.weight" in keys
    assert not any("vision" in key for key in keys)


def test_names_under_two_roots(tmp_path: Path) -> None:
    folder = text_models.save(text_models.build("Qwen3_5ForCausalLM"), tmp_path / "hf", AS_ALONE)
    tensors = load_file(folder / "model.safetensors")
    for other, part in (("model.language_model.", "layers.1."), ("", "norm."), ("", "embed_")):
        for name in [name for name in tensors if name.startswith(f"model.{part}")]:
            tensors[name.replace("model.", other, 1)] = tensors.pop(name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    comes_back(folder, tmp_path)


def test_tied_and_biased_and_in_one_position(tmp_path: Path) -> None:
    model = text_models.build("Qwen3ForCausalLM", tie_word_embeddings=True, attention_bias=True)
    keys = comes_back(text_models.save(model, tmp_path / "hf"), tmp_path).tensors
    assert "output_layer.weight" not in keys
    assert "decoder.layers.self_attention.linear_qkv.bias" in keys


def test_keys_and_shapes_of_a_stock_gpt_model(tmp_path: Path, process_groups: None) -> None:
    """megatron-core's own model class with its own layers has the same keys."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron.bridge.live.local_tensors import local_tensors
    from megatron.bridge.runtime.cpu import megatron_on_cpu

    folder = text_models.save(text_models.build("Qwen3ForCausalLM"), tmp_path / "hf")
    assert main(["import", str(folder), str(tmp_path / "megatron")]) == 0
    with megatron_on_cpu():
        config = TransformerConfig(
            num_layers=5,
            hidden_size=80,
            ffn_hidden_size=144,
            num_attention_heads=6,
            num_query_groups=2,
            kv_channels=16,
            add_bias_linear=False,
            gated_linear_unit=True,
            qk_layernorm=True,
            normalization="RMSNorm",
        )
        spec = get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm")
        stock = GPTModel(
            config, spec, vocab_size=384, max_sequence_length=4096, position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
        )  # fmt: skip
        shapes = {one.key: one.key_shape for one in local_tensors([stock])}
    ours = TorchDistCheckpoint(tmp_path / "megatron").tensors
    assert {key: spec.shape for key, spec in ours.items()} == shapes


def test_the_largest_model_from_its_config() -> None:
    config = HFConfig.from_dict(released.QWEN3_8_2400B_A95B)
    start = time.process_time()
    plan = bridge_for(config.architecture).plan_from_config(config, config.dtype)
    assert time.process_time() - start < 5.0
    assert sum(prod(spec.shape) for spec in plan.hf.values()) == 2_446_182_725_504
    assert len(plan.hf) == 1609


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [
        ("qwen3", "Qwen3ForCausalLM"),
        ("qwen3_moe", "Qwen3MoeForCausalLM"),
        ("qwen3_5_text", "Qwen3_5ForCausalLM"),
        ("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM"),
        ("qwen3_5", "Qwen3_5ForConditionalGeneration"),
    ],
)
def test_a_config_that_names_no_class(model_type: str, architecture: str) -> None:
    assert HFConfig.from_dict({"model_type": model_type}).architecture == architecture


def refusal(folder: Path, change: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert main(["import", str(folder), str(folder.with_name("megatron"))]) == 2
    return capsys.readouterr().err.partition("error: ")[2]


def test_text_under_the_class_of_a_model_with_vision(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is refused, and what is said to do does it."""
    folder = text_models.save(text_models.build("Qwen3_5ForCausalLM"), tmp_path / "hf")
    said = refusal(folder, {"architectures": ["Qwen3_5ForConditionalGeneration"]}, capsys)
    assert "architectures names Qwen3_5ForConditionalGeneration" in said
    assert "Qwen3_5ForCausalLM" in said
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["Qwen3_5ForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["import", str(folder), str(tmp_path / "megatron")]) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": 4}, ["num_hidden_layers is 4", "beyond"]),
        ({"num_hidden_layers": 6}, ["num_hidden_layers is 6, the files hold 5 layers"]),
        ({"vocab_size": 309}, ["vocab_size is 309, the files have 307"]),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, ["classifier is absent"]),
    ],
)
def test_files_that_contradict_the_config(
    change: dict[str, Any], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = text_models.save(text_models.build("Qwen3ForCausalLM"), tmp_path / "hf")
    if change.get("num_hidden_layers") == 4:  # transformers reads these, and leaves a layer out
        config = json.loads((folder / "config.json").read_text()) | change
        config.pop("layer_types", None)
        (folder / "config.json").write_text(json.dumps(config))
        assert main(["import", str(folder), str(tmp_path / "megatron")]) == 0
        return
    said = refusal(folder, change, capsys)
    assert all(word in said for word in words), said
    assert "text_config" not in said


def test_labels_that_the_head_has_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = text_models.save(text_models.build("Qwen3ForTokenClassification"), tmp_path / "hf")
    names = {str(number): f"label {number}" for number in range(4)}
    said = refusal(folder, {"id2label": names, "label2id": None}, capsys)
    assert "num_labels is 4, the files have 3: set it" in said
    config = json.loads((folder / "config.json").read_text()) | {"num_labels": 3}
    (folder / "config.json").write_text(json.dumps(config))
    assert transformers.AutoConfig.from_pretrained(folder).num_labels == 3
    assert main(["import", str(folder), str(tmp_path / "megatron")]) == 0
