"""A model folder behind one object."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from megatron.bridge.errors import CheckpointError, InputError, ReferenceNotFound
from megatron.bridge.models.hf_pretrained.side_files import side_files
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.synthetic import make_model
from released_configs import QWEN3_VL_2B


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("qwen3-vl", tmp_path_factory.mktemp("vlm") / "tiny")


def test_everything_of_a_folder(folder: Path) -> None:
    vlm = PreTrainedVLM.from_pretrained(folder)
    assert vlm.name_or_path == str(folder)
    assert vlm.folder == vlm.weights_folder == folder
    assert vlm.hf_config.text.require("hidden_size", int) == 160
    assert vlm.config.text_config.hidden_size == 160
    assert vlm.tensors["model.language_model.embed_tokens.weight"].shape == (307, 160)
    assert vlm.tokenizer.convert_tokens_to_ids("<|image_pad|>") == vlm.config.image_token_id
    assert type(vlm.processor).__name__ == "Qwen3VLProcessor"
    assert vlm.generation_config.eos_token_id[0] == vlm.tokenizer.eos_token_id
    written = json.loads((folder / "generation_config.json").read_text())
    assert vlm.generation_config.to_diff_dict().keys() == written.keys()


def test_transformers_own_model(folder: Path) -> None:
    import torch

    vlm = PreTrainedVLM.from_pretrained(folder)
    model = vlm.load_model(dtype=torch.float32)
    assert model.config._attn_implementation == "eager"
    name = "model.visual.merger.linear_fc2.weight"
    assert torch.equal(model.state_dict()[name], vlm.tensors.read(name).float())


def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path) -> None:
    vlm = PreTrainedVLM.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError):
        _ = vlm.tensors
    with pytest.raises(ReferenceNotFound):
        PreTrainedVLM.from_pretrained(tmp_path / "gone")


def test_weights_and_their_main_dtype(folder: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    assert PreTrainedVLM.from_pretrained(folder).has_weights
    assert PreTrainedVLM.from_pretrained(folder).main_dtype == "BF16"
    (tmp_path / "config.json").write_text('{"dtype": "float16"}')
    assert not PreTrainedVLM.from_pretrained(tmp_path).has_weights
    assert PreTrainedVLM.from_pretrained(tmp_path).main_dtype == "F16"
    # Most bytes, not most tensors.
    tensors = {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(99, dtype=torch.int8)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert PreTrainedVLM.from_pretrained(tmp_path).main_dtype == "I8"
    alone = PreTrainedVLM.from_config({"text_config": {"dtype": "bfloat16"}})
    assert not alone.has_weights
    assert alone.main_dtype == "BF16"


@pytest.mark.parametrize("attribute", ["config", "processor", "tokenizer", "generation_config"])
def test_what_transformers_cannot_load(tmp_path: Path, attribute: str) -> None:
    vlm = PreTrainedVLM.from_pretrained(tmp_path)
    words = attribute.replace("_", " ")
    with pytest.raises(InputError, match=f"{tmp_path}: transformers cannot load the {words}: "):
        getattr(vlm, attribute)


@pytest.mark.parametrize("kind", ["dict", "transformers"])
def test_a_config_alone(kind: str) -> None:
    from transformers import Qwen3VLConfig

    given = copy.deepcopy(QWEN3_VL_2B)
    before = copy.deepcopy(given)
    config = given if kind == "dict" else Qwen3VLConfig(**copy.deepcopy(given))
    vlm = PreTrainedVLM.from_config(config)
    assert vlm.hf_config.architecture == "Qwen3VLForConditionalGeneration"
    assert vlm.config.vision_config.depth == 24
    assert vlm.config.text_config.rope_parameters["mrope_section"] == [24, 20, 20]
    assert vlm.side_files == ()
    for attribute in ("tensors", "folder", "processor", "tokenizer", "generation_config"):
        with pytest.raises(InputError, match="only a config is at hand"):
            getattr(vlm, attribute)
    with pytest.raises(InputError, match="only a config is at hand"):
        vlm.load_model()
    assert given == before


def test_side_files(tmp_path: Path) -> None:
    side = [
        "config.json",
        "chat_template.jinja",
        "merges.txt",
        "extra/notes.md",
        "tokenizer.json",
        "value_head.safetensors",
        "model.safetensors.index.json",
        "sub/model.safetensors",
    ]
    weights = ["model.safetensors", "pytorch_model.bin",
               "pytorch_model.bin.index.json", "consolidated.pth", "q4.GGUF"]  # fmt: skip
    hidden = [".gitattributes", ".cache/huggingface/x.json", "extra/.secret"]
    for name in side + weights + hidden:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "linked.json").symlink_to("config.json")
    assert side_files(tmp_path) == tuple(sorted(map(Path, [*side, "linked.json"])))
