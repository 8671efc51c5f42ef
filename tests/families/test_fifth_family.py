"""A family that the package does not know goes through every command and the live model.

Nothing of it is in the package: what a command needs to know of a family is on its bridge. The
oracle is transformers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron.bridge import AutoBridge
from megatron.bridge.cli import main
from megatron.bridge.runtime.parallel import destroy_process_groups

SIZES = {
    "head_dim": 16,
    "hidden_size": 84,
    "intermediate_size": 136,
    "num_attention_heads": 6,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "vocab_size": 307,
}
KEYS = 3 + 9 * SIZES["num_hidden_layers"]


@pytest.fixture(autouse=True)
def _no_process_groups() -> Iterator[None]:
    yield
    destroy_process_groups()


pytestmark = pytest.mark.usefixtures("registered")


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def model(
    request: pytest.FixtureRequest, registered: None, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A model that transformers itself made and saved, with a tokenizer."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "llama"
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, tie_word_embeddings=request.param, dtype="float32")
    LlamaForCausalLM(config).save_pretrained(folder)
    symbols = {symbol: number for number, symbol in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(symbols, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tied(model: Path) -> bool:
    return bool(json.loads((model / "config.json").read_text())["tie_word_embeddings"])


@pytest.fixture(scope="module")
def checkpoint(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("checkpoints") / "llama"
    assert main(["import", str(model), str(target)]) == 0
    return target


def document(capsys: pytest.CaptureFixture[str], *args: str | Path) -> Any:
    assert main([*map(str, args), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_inspect(model: Path, tied: bool, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "inspect", model)
    assert found["proven"]
    assert (found["bridge"], found["tied"]) == ("LlamaBridge", tied)
    assert found["hf"]["keys"] == KEYS - tied
    assert found["text"] | SIZES == found["text"]
    assert main(["inspect", str(model)]) == 0
    assert "num_hidden_layers 3" in capsys.readouterr().out


def test_plan(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "plan", model)
    assert found["conversion"]["read_bytes"] == found["hf"]["bytes"]
    assert main(["plan", str(model)]) == 0


def test_plan_of_a_config_alone(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = document(capsys, "plan", model / "config.json")
    assert alone["hf"] == document(capsys, "plan", model)["hf"]


def test_plan_for_a_cluster(model: Path, tied: bool, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "plan", model, "--tp", "2", "--pp", "3")
    assert found["parallel"]["legal"]
    ranks = found["ranks"]
    assert [rank["layers"] for rank in ranks[::2]] == [[[0]], [[1]], [[2]]]
    assert [rank["parts"] for rank in ranks[::2]] == [["embedding"], [], ["output"]]
    heads, groups, d, hidden, inner = (
        SIZES[name]
        for name in (
            *("num_attention_heads", "num_key_value_heads", "head_dim"),
            *("hidden_size", "intermediate_size"),
        )
    )
    halved = hidden * d * (2 * heads + 2 * groups) + 3 * hidden * inner
    assert ranks[2]["parameters"] == halved // 2 + 2 * hidden


def test_a_layout_that_the_model_cannot_have(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(model), "--tp", "5"]) == 2
    said = capsys.readouterr().err
    assert "--tp 5: megatron-core refuses: num_attention_heads (6)" in said
    assert "(the nearest legal: 2)" in said


def test_there_and_back(model: Path, checkpoint: Path, tmp_path: Path) -> None:
    back = tmp_path / "back"
    assert main(["export", str(checkpoint), str(back), "--hf", str(model)]) == 0
    assert (back / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert main(["verify", str(model), str(back)]) == 0
    assert main(["verify", str(model), str(checkpoint)]) == 0
    assert main(["verify", "--fast", str(checkpoint), str(model)]) == 0


def test_export_without_a_reference(model: Path, checkpoint: Path, tmp_path: Path) -> None:
    back = tmp_path / "back"
    assert main(["export", str(checkpoint), str(back)]) == 0
    assert main(["verify", str(model), str(back)]) == 0


def test_verify_sees_a_changed_bit(model: Path, checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    other = tmp_path / "other"
    other.mkdir()
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"][3, 5] += 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    (other / "config.json").write_bytes((model / "config.json").read_bytes())
    assert main(["verify", str(other), str(checkpoint)]) == 1


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_compare(model: Path, dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "compare", model, "--dtype", dtype, "--prompt", "To be, or not to be")
    assert found["agrees"]
    assert found["tokens"] == len("To be, or not to be")
    assert (found["image"], found["image_tokens"]) == (None, 0)
    assert len(found["layers"]) == SIZES["num_hidden_layers"]
    assert main(["compare", str(model)]) == 0


def test_compare_with_a_chat_template(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A turn of text alone, as the tokenizer's template takes it."""
    folder = tmp_path / "chat"
    shutil.copytree(model, folder)
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template + "{{ 'A:' if add_generation_prompt }}")
    found = document(capsys, "compare", folder, "--prompt", "Why?")
    assert found["agrees"]
    assert found["tokens"] == len("[user] Why?A:")


def test_a_picture_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    Image.new("RGB", (40, 30)).save(tmp_path / "picture.png")
    assert main(["compare", str(model), "--image", str(tmp_path / "picture.png")]) == 2
    assert "takes no pictures" in capsys.readouterr().err


def test_a_config_that_the_provider_cannot_honour(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((model / "config.json").read_text())
    del config["rope_parameters"]
    config |= {"rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["inspect", str(tmp_path)]) == 2
    assert "rope_type is 'linear'; only 'default' can be converted" in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings", [[], ["rope_form=new", "num_hidden_layers=5", "dtype=float32"]]
)
def test_make_model(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A small model that the family declares, which transformers loads and the plan proves."""
    folder = tmp_path / "small"
    given = [part for setting in settings for part in ("--set", setting)]
    made = document(capsys, "make-model", "--family", "llama", "--out", folder, *given)
    assert made["hf"]["keys"] == 3 + 9 * (5 if settings else 3)
    found = document(capsys, "compare", folder, "--dtype", "float64")
    assert found["agrees"]
    assert len(found["layers"]) == (5 if settings else 3)


def test_settings_that_make_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["make-model", "--family", "llama", "--out", str(tmp_path / "small")]
    assert main([*args, "--set", "fp8=true"]) == 2
    assert "no FP8 release" in capsys.readouterr().err
    assert main([*args, "--set", "vocab_size=257"]) == 2
    assert "vocab_size (257) is smaller than the tokenizer's (258)" in capsys.readouterr().err


def test_the_live_model(model: Path, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    bridge = AutoBridge.from_hf_pretrained(model)
    provider = bridge.to_megatron_provider(load_weights=False)
    (live,) = chunks = provider.provide_distributed_model(wrap_with_ddp=False)
    bridge.load_hf_weights(chunks)
    tokens = torch.randint(SIZES["vocab_size"], (2, 21), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = LlamaForCausalLM.from_pretrained(model)(tokens).logits
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        found = live(tokens, positions, None)[..., : SIZES["vocab_size"]]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)

    stored = load_file(model / "model.safetensors")
    exported = dict(bridge.export_hf_weights(chunks))
    assert exported.keys() == stored.keys()
    assert all(torch.equal(exported[name], stored[name]) for name in stored)
    bridge.save_hf_pretrained(chunks, tmp_path / "saved")
    assert main(["verify", str(model), str(tmp_path / "saved")]) == 0


def test_a_live_model_as_a_checkpoint(model: Path, tmp_path: Path) -> None:
    bridge = AutoBridge.from_hf_pretrained(model)
    bridge.save_megatron_model(bridge.to_megatron_model(), tmp_path / "saved")
    assert main(["verify", str(model), str(tmp_path / "saved")]) == 0
    chunks = bridge.load_megatron_model(tmp_path / "saved")
    stored = load_file(model / "model.safetensors")
    assert all(torch.equal(stored[name], one) for name, one in bridge.export_hf_weights(chunks))
