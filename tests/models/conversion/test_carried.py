"""What lies beside a whole model is carried with the reason; what is not whole is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from folders_in_memory import Folder, read_tensors
from megatron.bridge.auto_bridge import AutoBridge
from megatron.bridge.cli import main
from megatron.bridge.errors import PlanError, UnsupportedModel
from megatron.bridge.models.catalog import bridge_for
from megatron.bridge.models.conversion.equal_copies import check_equal
from megatron.bridge.models.hf_pretrained.config import HFConfig
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.operations.verification.bitwise import verify
from megatron.bridge.synthetic import make_model
from megatron.bridge.tensors.spec import TensorSpec
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
    VL_MOE,
    plan,
    tensors_of,
)
from tensors_in_memory import InMemory

OUTPUT = "language_model.output_layer.weight"


def spec(name: str, *shape: int, dtype: str = "BF16") -> dict[str, TensorSpec]:
    return {name: TensorSpec(name, shape, dtype)}


# --- reasons ---

BESIDE = {
    "v_head.summary.weight": "head of a reward, value or classification model",
    "score.weight": "head of a reward, value or classification model",
    f"{LANGUAGE}rotary_emb.inv_freq": "a buffer that the model computes by itself",
    f"{LANGUAGE}layers.4.mlp.up_proj.weight": "of a layer beyond text_config.num_hidden_layers",
    f"{VISION}blocks.3.attn.qkv.weight": "of a layer beyond vision_config.depth",
    f"{LANGUAGE}layers.1.self_attn.q_proj.bias": "a bias that the config switches off",
    f"{LANGUAGE}layers.1.self_attn.q_proj.lora_A.weight": "of an adapter",
    "anything.at.all": "transformers does not read it either",
}


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_lies_beside_the_model_is_carried_with_the_reason(family: str, name: str) -> None:
    config = FAMILIES[family]
    tensors = tensors_of(config)
    found = plan(config, tensors | spec(name, 3, 5))
    (carried,) = found.carried.items()
    assert carried[0] == name
    assert BESIDE[name] in carried[1]
    assert found.megatron == plan(config, tensors).megatron
    assert name in found.hf


def test_nothing_is_carried_beside_a_model_that_is_not_whole() -> None:
    tensors = tensors_of(VL) | spec("anything.at.all", 3)
    del tensors[f"{VISION}pos_embed.weight"]
    with pytest.raises(PlanError) as error:
        plan(VL, tensors)
    missing, beside = error.value.problems
    assert missing.startswith(f"{VISION}pos_embed.weight: missing")
    assert beside.startswith("anything.at.all: no row maps it (shape (3,)")


# --- an output layer that is the embedding ---


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_a_copy_of_the_tied_embedding_has_to_be_equal(dtype: str) -> None:
    tensors = tensors_of(TIED)
    assert HEAD not in tensors
    found = plan(TIED, tensors | spec(HEAD, 300, 40, dtype=dtype))
    assert {name: other.name for name, other in found.equal.items()} == {HEAD: EMBEDDING}
    assert "a copy of" in found.carried[HEAD]
    embedding = torch.randn(300, 40).bfloat16()
    copy = embedding.float() if dtype == "F32" else embedding.clone()
    values = InMemory({EMBEDDING: embedding, HEAD: copy})
    check_equal(found, values)
    copy[299, 39] += 1
    with pytest.raises(PlanError, match=rf"{HEAD} and {EMBEDDING} differ") as error:
        check_equal(found, values)
    assert len(str(error.value).splitlines()) <= 6


def test_a_copy_of_another_shape_differs_without_a_look_at_data() -> None:
    found = plan(TIED, tensors_of(TIED) | spec(HEAD, 301, 40))
    with pytest.raises(PlanError, match="differ"):
        check_equal(found, InMemory({}))


def test_a_copy_is_compared_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.bridge.models.conversion.equal_copies._BLOCK_ELEMENTS", 90)
    found = plan(TIED, tensors_of(TIED) | spec(HEAD, 300, 40))
    embedding = torch.randn(300, 40).bfloat16()
    embedding[3, 3] = float("nan")
    check_equal(found, InMemory({EMBEDDING: embedding, HEAD: embedding.clone()}))
    other = embedding.clone()
    other[299, 0] += 1
    with pytest.raises(PlanError, match="differ"):
        check_equal(found, InMemory({EMBEDDING: embedding, HEAD: other}))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {"tie_word_embeddings": True, "text.num_hidden_layers": 2}
    return make_model("qwen3-vl", tmp_path_factory.mktemp("tied") / "model", settings)


def test_everybody_gives_the_same_verdict_on_a_copy_that_differs(
    tied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Folder.of(tied)
    folder.tensors[HEAD] = folder.tensors[EMBEDDING] * 2
    model = folder.write(tmp_path / "model")
    said = []
    for words in (["inspect", model], ["plan", model], ["import", model, tmp_path / "out"]):
        assert main([str(word) for word in words]) == 2
        said.append(capsys.readouterr().err.splitlines()[1:])
    assert said[0] == said[1] == said[2] != []
    with pytest.raises(PlanError, match="differ"):
        AutoBridge.from_hf_pretrained(model).plan()
    assert not (tmp_path / "out").exists()


def test_a_copy_follows_the_embedding_that_was_trained(
    tied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Taken from the reference, it would be that of the model before training."""
    folder = Folder.of(tied)
    folder.tensors[HEAD] = folder.tensors[EMBEDDING].clone()
    reference = folder.write(tmp_path / "reference")
    for name in (HEAD, EMBEDDING):
        folder.tensors[name] = folder.tensors[name] + 1
    trained = folder.write(tmp_path / "trained")
    megatron, again = tmp_path / "megatron", tmp_path / "again"
    assert main(["import", str(trained), str(megatron)]) == 0
    assert main(["export", str(megatron), str(again), "--hf", str(reference)]) == 0
    capsys.readouterr()
    assert torch.equal(read_tensors(again)[HEAD], folder.tensors[EMBEDDING])


# --- models without an output layer ---


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bare_model_has_no_output_layer(family: str) -> None:
    config = FAMILIES[family]
    name = config["architectures"][0].replace("ForConditionalGeneration", "Model")
    bare = config | {"architectures": [name]}
    tensors = tensors_of(bare)
    assert HEAD not in tensors
    assert OUTPUT not in plan(bare, tensors).megatron
    with_head = plan(bare, tensors | spec(HEAD, 300, 40))
    assert with_head.megatron[OUTPUT].shape[1:] == (40,)
    other = plan(bare, tensors | spec(HEAD, 9, 40))
    assert OUTPUT not in other.megatron
    assert "output layer" in other.carried[HEAD]
    with pytest.raises(PlanError, match="the output layer is absent: 1 tensor") as error:
        plan(config, tensors)
    assert "tie_word_embeddings" in str(error.value)
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize("file", ["modules.json", "config_sentence_transformers.json"])
def test_an_embedding_model_has_none_either(file: str) -> None:
    tensors = tensors_of(VL)
    del tensors[HEAD]
    assert OUTPUT not in plan(VL, tensors, files=frozenset({file})).megatron


def test_a_reward_head_in_place_of_the_output_layer() -> None:
    tensors = tensors_of(DENSE_35) | spec("score.weight", 1, 40)
    del tensors[HEAD]
    found = plan(DENSE_35, tensors)
    assert OUTPUT not in found.megatron
    assert set(found.carried) == {"score.weight"}


@pytest.mark.parametrize(
    ("kind", "labels", "heads"),
    [
        ("Sequence", {}, {"score.weight": (2, 40)}),
        ("Sequence", {"num_labels": 1}, {"score.weight": (1, 40)}),
        ("Sequence", {"num_labels": 5, "id2label": {"0": "a", "1": "b"}},
         {"score.weight": (5, 40)}),
        ("Token", {"id2label": {"0": "a", "1": "b", "2": "c"}},
         {"score.weight": (3, 40), "score.bias": (3,)}),
        ("Token", {"num_labels": 5, "token_classification_bias": False},
         {"score.weight": (5, 40)}),
    ],
)  # fmt: skip
def test_a_classifier_has_its_own_head(
    kind: str, labels: dict[str, Any], heads: dict[str, tuple[int, ...]]
) -> None:
    config = DENSE_35 | {"architectures": [f"Qwen3_5For{kind}Classification"]} | labels
    whole = tensors_of(config)
    assert HEAD not in whole
    assert {name: spec.shape for name, spec in whole.items() if "score" in name} == heads
    mapped = plan(config, whole | spec(HEAD, 307, 40))
    assert set(mapped.carried) == {HEAD}
    key = "language_model.output_layer"
    for name, shape in heads.items():
        assert mapped.megatron[name.replace("score", key)].shape == shape
        without = {key: value for key, value in whole.items() if key != name}
        with pytest.raises(PlanError, match=rf"{name}: missing|classifier is absent"):
            plan(config, without)
        other = replace(whole[name], shape=(shape[0] + 1, *shape[1:]))
        with pytest.raises(PlanError, match=rf"{name}: the config asks for shape|num_labels is"):
            plan(config, whole | {name: other})


def test_a_live_model_without_an_output_layer_is_refused(small_model: Path, tmp_path: Path) -> None:
    from whole_folders import bare_model

    folder = Folder.of(small_model)
    bare_model(folder, Random(1))
    hf = PreTrainedVLM.from_pretrained(folder.write(tmp_path / "model"))
    with pytest.raises(UnsupportedModel, match="without an output layer can be converted from"):
        bridge_for(hf.hf_config.architecture).provider_bridge(hf)


# --- text halves ---


@pytest.mark.parametrize("config", [DENSE_35, MOE_35, VL, VL_MOE])
@pytest.mark.parametrize("form", ["causal", "flat", "nested"])
def test_the_text_half_is_named_as_what_it_is(config: dict[str, Any], form: str) -> None:
    name = config["architectures"][0]
    if form == "nested":
        tensors = {k: v for k, v in tensors_of(config).items() if not k.startswith(VISION)}
        with pytest.raises(PlanError, match=r"the vision tower is absent: \d+ tensors") as error:
            plan(config, tensors)
        assert len(str(error.value).splitlines()) == 2
        return
    text = name.replace("ForConditionalGeneration", "ForCausalLM")
    if form == "causal":
        if "3_5" not in name:
            return
        name = text
    flat = config["text_config"] | {"architectures": [name]}
    view = HFConfig.from_dict(flat)
    if form == "causal":
        bridge_for(view.architecture).check(view)
        return
    with pytest.raises(UnsupportedModel, match="text half of a vision-language model") as refusal:
        bridge_for(view.architecture).check(view)
    assert "base model" in str(refusal.value)
    assert (f"set architectures to {text}" in str(refusal.value)) == ("3_5" in name)


# --- MTP layers that are not those of the rows ---

MTP_OBSTACLES = {
    "two layers": ({"mtp_num_hidden_layers": 2}, {}, "2 MTP layers"),
    "own embedding": (
        {"mtp_use_dedicated_embeddings": True},
        {"mtp.embed_tokens.weight": (300, 40)},
        "an embedding of its own",
    ),
    "narrow": ({}, {"mtp.fc.weight": (40, 60)}, "another size than the model: mtp.fc.weight"),
    "more": ({}, {"mtp.extra.weight": (3,)}, "another kind: the Megatron model has no mtp.extra"),
}


@pytest.mark.parametrize("case", [*MTP_OBSTACLES, "incomplete"])
@pytest.mark.parametrize("config", [DENSE_35, MOE_35])
def test_another_mtp_layer_is_carried_as_a_whole(config: dict[str, Any], case: str) -> None:
    tensors = tensors_of(config)
    text, more, why = MTP_OBSTACLES.get(case, ({}, {}, "incomplete MTP layer: mtp.norm.weight"))
    if case == "incomplete":
        del tensors["mtp.norm.weight"]
    tensors |= {name: TensorSpec(name, shape, "BF16") for name, shape in more.items()}
    changed = config | {"text_config": config["text_config"] | text}
    found = plan(changed, tensors)
    assert set(found.carried) == {name for name in tensors if name.startswith("mtp.")}
    assert all(why in reason for reason in found.carried.values())
    assert not any(".mtp." in key for key in found.megatron)
    assert found.absent == frozenset()


# --- parts that a Megatron checkpoint lacks ---


@pytest.fixture(scope="module")
def language_only(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of stock layout that holds the language model alone."""
    from megatron.bridge.formats.file_plans import plan_of
    from megatron.bridge.models.conversion.model_bridge import PlanOptions
    from megatron.bridge.operations.convert import import_checkpoint

    target = tmp_path_factory.mktemp("language") / "megatron"
    with pytest.MonkeyPatch.context() as patch:
        without = PlanOptions(without=frozenset({"vision"}))
        patch.setattr(
            "megatron.bridge.operations.convert.plan_of", lambda hf, _options: plan_of(hf, without)
        )
        import_checkpoint(PreTrainedVLM.from_pretrained(small_model), target)
    return target


def test_the_vision_tower_comes_from_the_reference(
    language_only: Path, small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = tmp_path / "again"
    words = ["export", str(language_only), str(again), "--hf", str(small_model), "--json"]
    assert main(words) == 0
    document = json.loads(capsys.readouterr().out)
    tower = {name for name in read_tensors(small_model) if name.startswith(VISION)}
    assert set(document["carried"]) == tower
    assert set(document["carried"].values()) == {
        "the Megatron model is built without its vision tower"
    }
    assert verify(small_model, again).identical
    report = verify(small_model, language_only)  # a part that it could have is a difference
    assert set(report.only_in_a) == tower
    assert report.carried == {}


def test_a_vision_tower_that_nobody_has_is_named_once(
    language_only: Path, small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Folder.of(small_model)
    folder.tensors = {n: t for n, t in folder.tensors.items() if not n.startswith(VISION)}
    model = folder.write(tmp_path / "model")
    assert main(["export", str(language_only), str(tmp_path / "out"), "--hf", str(model)]) == 2
    said = capsys.readouterr().err
    assert "the vision tower is absent" in said
    assert len(said.splitlines()) <= 6
    config = small_model / "config.json"
    target = tmp_path / "config"
    target.mkdir()
    (target / "config.json").write_bytes(config.read_bytes())
    assert main(["export", str(language_only), str(tmp_path / "out"), "--hf", str(target)]) == 2
    assert "no vision part of the model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- verify ---


def test_what_a_megatron_model_has_no_place_for_is_not_a_difference(
    small_model: Path, small_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Folder.of(small_model)
    folder.tensors["v_head.weight"] = torch.ones(1, 160)
    model = folder.write(tmp_path / "model")
    report = verify(model, small_checkpoint)
    assert report.identical
    assert report.carried == {
        "v_head.weight": "the head of a reward, value or classification model"
    }
    assert main(["verify", str(small_checkpoint), str(model), "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["carried"]) == ["v_head.weight"]


def test_headers_alone_do_not_prove_a_copy(
    tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.bridge.models.hf_pretrained.tensors import TensorIndex
    from megatron.bridge.operations.inspection import hf_report

    folder = Folder.of(tied)
    folder.tensors[HEAD] = folder.tensors[EMBEDDING] * 2
    hf = PreTrainedVLM.from_pretrained(folder.write(tmp_path / "model"))
    headers = TensorIndex.from_folder(hf.folder)
    monkeypatch.setattr(hf_report, "_tensors", lambda _hf: ("hub headers", headers))
    report = hf_report.inspect_model(hf, "someone/model")
    assert report.plan is not None
    assert report.plan.carried[HEAD].endswith("not compared: only headers were read")
