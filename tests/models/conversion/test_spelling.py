"""Names that other programs give the same tensors: the plan is spelled like the files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron.bridge.cli import main
from megatron.bridge.errors import InputError, PlanError
from megatron.bridge.models.catalog import bridge_for
from megatron.bridge.models.hf_pretrained.config import HFConfig
from megatron.bridge.models.hf_pretrained.tensors import TensorIndex
from megatron.bridge.synthetic import make_model
from plans_of import (
    DENSE_35,
    EMBEDDING,
    FAMILIES,
    HEAD,
    LANGUAGE,
    MOE_35,
    TIED,
    VISION,
    VL,
    plan,
    tensors_of,
    with_names,
)

SPELLINGS: dict[str, Callable[[str], str]] = {
    "module": lambda name: f"module.{name}",
    "adapter": lambda name: f"base_model.model.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "two prefixes": lambda name: f"policy.module.{name}",
    "doubled": lambda name: name.replace(LANGUAGE, f"{LANGUAGE}language_model."),
    "model.layers": lambda name: name.replace(LANGUAGE, "model."),
    "bare model": lambda name: name.removeprefix("model."),
    "as in llava": lambda name: (
        name.replace(LANGUAGE, "language_model.model.")
        .replace(VISION, "visual.")
        .replace("lm_head", "language_model.lm_head")
    ),
    "no root": lambda name: name.replace(LANGUAGE, "").replace(VISION, "visual."),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_has_the_names_of_the_files(family: str, spelling: str) -> None:
    config = FAMILIES[family]
    tensors, change = tensors_of(config), SPELLINGS[spelling]
    released = plan(config, tensors)
    spelled = plan(config, with_names(tensors, change))
    assert list(spelled.hf) == [change(name) for name in tensors]
    assert spelled.megatron == released.megatron
    assert spelled.carried == {}
    expected = [copy._replace(hf_name=change(copy.hf_name)) for copy in released.copies]
    assert list(spelled.copies) == expected


@pytest.mark.parametrize("config", [DENSE_35, MOE_35])
def test_an_mtp_layer_is_found_under_a_prefix(config: dict[str, Any]) -> None:
    tensors = with_names(tensors_of(config), SPELLINGS["module"])
    found = plan(config, tensors)
    assert any(copy.hf_name == "module.mtp.fc.weight" for copy in found.copies)
    bridge = bridge_for(config["architectures"][0])
    without = bridge.options_of_checkpoint(
        {key: spec for key, spec in found.megatron.items() if ".mtp." not in key}
    )
    carried = plan(config, tensors, without=without.without).carried
    assert set(carried) == {name for name in tensors if name.startswith("module.mtp.")}


def test_a_second_copy_of_the_names_is_not_the_model() -> None:
    """Averaged weights, say: those under the declared names are the model."""
    tensors = tensors_of(VL)
    ema = with_names(tensors, lambda name: f"ema.{name}")
    found = plan(VL, tensors | ema)
    assert set(found.carried) == set(ema)
    assert {copy.hf_name for copy in found.copies} == set(tensors)


def test_two_copies_under_other_names_are_a_question() -> None:
    tensors = tensors_of(VL)
    both = with_names(tensors, lambda name: f"ema.{name}")
    both |= with_names(tensors, lambda name: f"actor.{name}")
    with pytest.raises(InputError, match=r"2 prefixes, actor\.\S+ and ema\.") as error:
        plan(VL, both)
    assert len(str(error.value).splitlines()) == 1


def test_a_missing_tensor_is_named_as_the_files_would_have_it() -> None:
    tensors = with_names(tensors_of(VL), SPELLINGS["bare model"])
    del tensors["visual.pos_embed.weight"]
    with pytest.raises(PlanError, match=r"- visual\.pos_embed\.weight: missing"):
        plan(VL, tensors)


def test_a_tied_embedding_under_the_name_of_the_head() -> None:
    tensors = tensors_of(TIED)
    tensors[HEAD] = replace(tensors.pop(EMBEDDING), name=HEAD)
    found = plan(TIED, tensors)
    (copy,) = (copy for copy in found.copies if copy.hf_name == HEAD)
    assert copy.megatron_key == "language_model.embedding.word_embeddings.weight"
    assert found.carried == {}
    with pytest.raises(PlanError, match=rf"{EMBEDDING}: missing"):
        plan(VL, tensors)  # not tied: the embedding is not there


def test_experts_in_another_layout_keep_the_names_of_the_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from random import Random

    from folders_in_memory import Folder, read_tensors
    from whole_folders import names_of_the_bare_model

    model = make_model("qwen3-vl-moe", tmp_path / "made", {"text.num_hidden_layers": 2})
    folder = Folder.of(model)
    names_of_the_bare_model(folder, Random(0))
    bare = folder.write(tmp_path / "bare")
    megatron, again = tmp_path / "megatron", tmp_path / "again"
    assert main(["import", str(bare), str(megatron)]) == 0
    assert main(["export", str(megatron), str(again), "--hf", str(bare),
                 "--experts", "per-expert"]) == 0  # fmt: skip
    capsys.readouterr()
    names = set(read_tensors(again))
    assert "language_model.layers.1.mlp.experts.0.gate_proj.weight" in names
    assert not any(name.startswith("model.") for name in names)


def test_the_names_of_a_config_alone_are_those_of_a_release() -> None:
    view = HFConfig.from_dict(VL)
    names = set(bridge_for(view.architecture).plan_from_config(view, "BF16").hf)
    assert {EMBEDDING, HEAD, f"{VISION}pos_embed.weight"} <= names


def test_a_prefix_comes_back(tmp_path: Path, small_model: Path, capsys: Any) -> None:
    from folders_in_memory import Folder

    folder = Folder.of(small_model)
    folder.rename(SPELLINGS["module"])
    model = folder.write(tmp_path / "model")
    megatron, again = tmp_path / "megatron", tmp_path / "again"
    for words in (
        ["import", model, megatron],
        ["export", megatron, again, "--hf", model],
        ["verify", model, again],
        ["verify", megatron, model],
    ):
        assert main([str(word) for word in words]) == 0
    capsys.readouterr()
    assert set(TensorIndex.from_folder(again)) == set(folder.tensors)
    assert main(["inspect", str(model), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["proven"] is True
    assert any("module.lm_head.weight" in row["hf"] for row in document["rows"])
