"""Every command on the families of text alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import released_configs as released
from megatron.bridge.cli import main
from megatron.bridge.models.catalog import small_models
from megatron.bridge.synthetic import make_model
from oracle import text_models
from refusals import paths_below

FAMILIES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen3-moe": "Qwen3MoeForCausalLM",
    "qwen3.5-text": "Qwen3_5ForCausalLM",
    "qwen3.5-moe-text": "Qwen3_5MoeForCausalLM",
}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(request.param, tmp_path_factory.mktemp("text") / request.param, {}, seed=2)


def document(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*map(str, words), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_inspect(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "inspect", model)
    assert found["architecture"] == FAMILIES[model.name]
    assert found["proven"] is True
    assert found["text"]["hidden_size"] == 160
    assert "vision" not in found
    assert (found["experts"]["decoder"] is not None) == ("moe" in model.name)
    assert found["mtp"]["present"] is ("3.5" in model.name)


def test_plan_for_two_ranks(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "plan", model, "--tp", 2)
    assert found["parallel"]["legal"] is True
    assert ("MTP" in json.dumps(found["ranks"])) == ("3.5" in model.name)


def test_sizes_that_it_cannot_have(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(model), "--tp", "3"]) == 2
    assert "the nearest legal: 2" in capsys.readouterr().err


def test_both_ways_and_compared(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    megatron, again = tmp_path / "megatron", tmp_path / "again"
    assert main(["import", str(model), str(megatron)]) == 0
    assert main(["export", str(megatron), str(again), "--hf", str(model)]) == 0
    assert main(["verify", str(model), str(megatron)]) == 0
    assert paths_below(again) == paths_below(model)
    for path in filter(lambda path: (model / path).is_file(), paths_below(model)):
        assert (model / path).read_bytes() == (again / path).read_bytes(), path
    assert document(capsys, "compare", again)["agrees"] is True


def test_an_fp8_release(tmp_path: Path) -> None:
    """Both ways through BF16, and to FP8 again."""
    model = make_model("qwen3.5-moe-text", tmp_path / "fp8", {"fp8": True})
    megatron, again = tmp_path / "megatron", tmp_path / "again"
    assert main(["import", str(model), str(megatron)]) == 0
    assert main(["export", str(megatron), str(again), "--hf", str(model), "--fp8"]) == 0
    assert main(["verify", str(model), str(again)]) == 0


def test_the_largest_model_by_its_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(released.QWEN3_8_2400B_A95B))
    found = document(capsys, "plan", tmp_path)
    assert found["architecture"] == "Qwen3_5MoeForCausalLM"
    small_tensors = 69 * (128 + 128)  # in F32
    assert found["hf"]["bytes"] == 2 * 2_446_182_725_504 + 2 * small_tensors


def test_contradictory_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["make-model", "--family", "qwen3-moe", "--out", str(tmp_path / "model")]
    assert main([*words, "--set", "num_experts_per_tok=9"]) == 2
    assert "num_experts_per_tok must be a number from 1 to 6, found 9" in capsys.readouterr().err
    assert main([*words, "--set", "head_dim=31"]) == 2
    assert "rotates 32 channels of a head" in capsys.readouterr().err


def test_layers_of_other_kinds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Settings that other families do not have together."""
    settings = {"mlp_only_layers": [1, 2], "experts": "fused", "tie_word_embeddings": True}
    model = make_model("qwen3-moe", tmp_path / "model", settings)
    assert document(capsys, "compare", model)["agrees"] is True
    assert {*FAMILIES} <= small_models().keys()


def test_compare_says_what_it_cannot_compare(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scores of labels; and a prompt of which the tokenizer makes nothing."""
    classifier = text_models.save(text_models.build("Qwen3ForTokenClassification"), tmp_path / "a")
    assert main(["compare", str(classifier)]) == 2
    assert "a Qwen3ForTokenClassification scores labels" in capsys.readouterr().err
    without_tokenizer = text_models.save(text_models.build("Qwen3ForCausalLM"), tmp_path / "b")
    assert main(["compare", str(without_tokenizer)]) == 2
    assert "its tokenizer makes no tokens of the prompt" in capsys.readouterr().err
