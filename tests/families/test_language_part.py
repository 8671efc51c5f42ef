"""`--part language`: the language model out of a vision-language one, and home into it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from cli_documentation import DOCUMENTATION
from megatron.bridge import AutoBridge
from megatron.bridge.cli import main
from megatron.bridge.errors import InputError
from megatron.bridge.formats.torch_dist.reader import TorchDistCheckpoint
from megatron.bridge.synthetic import make_model
from refusals import refused

ALONE = {
    "qwen3-vl": "Qwen3ForCausalLM",
    "qwen3-vl-moe": "Qwen3MoeForCausalLM",
    "qwen3.5": "Qwen3_5ForCausalLM",
    "qwen3.5-moe": "Qwen3_5MoeForCausalLM",
}
PART = ("--part", "language")
TOWER = "model.visual."
SMALL_HEADS = {"text.head_dim": 20, "text.rope_parameters.mrope_section": [4, 3, 3]}

type Model = SimpleNamespace
type Capsys = pytest.CaptureFixture[str]


def run(*words: object) -> None:
    assert main(list(map(str, words))) == 0


def document(capsys: Capsys, *words: object) -> dict[str, Any]:
    capsys.readouterr()
    run(*words, "--json")
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def edited(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A folder whose config.json was changed."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def same_files(one: Path, other: Path) -> bool:
    names = {path.name for path in one.iterdir()}
    return names == {path.name for path in other.iterdir()} and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names
    )


def make(folder: Path, family: str, **settings: Any) -> Model:
    """A vision-language model, both checkpoints of it, and its language model alone."""
    model = SimpleNamespace(
        family=family,
        hf=make_model(family, folder / "hf", settings, seed=5),
        whole=folder / "whole",
        language=folder / "language",
        text=folder / "text",
    )
    run("import", model.hf, model.whole)
    run("import", model.hf, model.language, *PART)
    run("export", model.whole, model.text, *PART, "--hf", model.hf)
    return model


@pytest.fixture(
    scope="module",
    params=[
        one if one in ("qwen3-vl", "qwen3.5-moe") else pytest.param(one, marks=pytest.mark.slow)
        for one in ALONE
    ],
)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make(tmp_path_factory.mktemp("part"), request.param)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make(tmp_path_factory.mktemp("part"), "qwen3-vl", tie_word_embeddings=True)


def logits(auto_class: Any, folder: Path) -> torch.Tensor:
    """transformers' own, of words."""
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    hf, found = auto_class.from_pretrained(folder, output_loading_info=True, **options)
    assert not found["missing_keys"]
    ids = torch.randint(6, 250, (2, 13), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return hf.eval()(input_ids=ids).logits


def assert_same_logits(hf: Path, text: Path) -> None:
    """To the last bit: the two classes of transformers compute the same on words."""
    whole, alone = logits(AutoModelForImageTextToText, hf), logits(AutoModelForCausalLM, text)
    assert whole.std() > 0.1
    assert torch.equal(whole, alone), (whole - alone).abs().max()


def test_transformers_gives_the_same_logits(model: Model) -> None:
    config = json.loads((model.text / "config.json").read_text())
    assert config["architectures"] == [ALONE[model.family]]
    assert_same_logits(model.hf, model.text)


def test_what_lies_in_the_folder(model: Model) -> None:
    """Tokenizer and settings of generation, no processors; names of the class of text."""
    names = {path.name for path in model.text.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= names
    assert not any("processor" in name for name in names)
    tensors = load_file(model.text / "model.safetensors")
    assert {name.partition(".")[0] for name in tensors} <= {"model", "lm_head", "mtp"}
    assert not any(name.startswith((TOWER, "model.language_model.")) for name in tensors)
    assert any(name.startswith("mtp.") for name in tensors) == ("3.5" in model.family)


def test_the_checkpoint_is_that_of_the_text_model(
    model: Model, tmp_path: Path, capsys: Capsys
) -> None:
    """Keys, bits and record; the latter are what `inspect` and `plan` go by."""
    run("import", model.text, tmp_path / "again")
    assert document(capsys, "verify", tmp_path / "again", model.language)["identical"]
    found = document(capsys, "inspect", model.language)
    assert found["architecture"] == ALONE[model.family]
    assert not any("vision" in tensor["name"] for tensor in found["tensors"])
    planned = document(capsys, "plan", model.language)
    assert (planned["proven"], planned["architecture"]) == (True, ALONE[model.family])
    assert planned["hf"]["bytes"] == document(capsys, "inspect", model.text)["hf"]["bytes"]


def test_the_live_model_agrees(model: Model, capsys: Capsys) -> None:
    assert document(capsys, "compare", model.text)["agrees"]


def test_home_again(model: Model, tmp_path: Path, capsys: Capsys) -> None:
    """The tower and all that lies beside the weights come from the reference."""
    run("export", model.language, tmp_path / "home", *PART, "--hf", model.hf)
    assert same_files(model.hf, tmp_path / "home")
    found = document(capsys, "verify", model.hf, model.language, *PART)
    assert found["identical"]
    assert all(name.startswith(TOWER) for name in found["carried"])
    assert found["compared"] + len(found["carried"]) == len(tensors_of(model.hf))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def test_a_trained_tensor_comes_home(model: Model, tmp_path: Path, capsys: Capsys) -> None:
    """Of the whole model only that differs, and everywhere else no bit."""
    trained = shutil.copytree(model.text, tmp_path / "trained")
    name = "model.layers.1.post_attention_layernorm.weight"
    tensors = load_file(trained / "model.safetensors")
    tensors[name] = tensors[name] + 1
    save_file(tensors, trained / "model.safetensors", metadata={"format": "pt"})
    run("import", trained, tmp_path / "megatron")
    run("export", tmp_path / "megatron", tmp_path / "home", *PART, "--hf", model.hf)
    before, after = tensors_of(model.hf), tensors_of(tmp_path / "home")
    assert before.keys() == after.keys()
    changed = [one for one in before if not torch.equal(before[one], after[one])]
    assert changed == [name.replace("model.", "model.language_model.", 1)]
    status = main(["verify", str(model.hf), str(tmp_path / "megatron"), *PART, "--json"])
    assert status == 1
    found = json.loads(capsys.readouterr().out.rpartition("\n{\n")[2].join(["{", ""]))
    assert [one["name"] for one in found["different"]] == changed


def test_from_a_whole_checkpoint(model: Model, tmp_path: Path, capsys: Capsys) -> None:
    """Like the text model, like a config alone, and by the record that the checkpoint keeps."""
    run("export", model.whole, tmp_path / "like", *PART, "--hf", model.text)
    assert same_files(model.text, tmp_path / "like")
    (tmp_path / "config").mkdir()
    shutil.copy(model.hf / "config.json", tmp_path / "config")
    run("export", model.whole, tmp_path / "by_config", *PART, "--hf", tmp_path / "config")
    found = document(capsys, "export", model.whole, tmp_path / "by_record", *PART)
    assert found["architecture"] == ALONE[model.family]
    assert any(key.startswith("vision_model.") for key in found["dropped"])
    assert same_files(tmp_path / "by_config", tmp_path / "by_record")
    for folder in (tmp_path / "by_config", model.text):
        assert document(capsys, "verify", folder, model.whole, *PART)["identical"]
    assert document(capsys, "verify", model.whole, model.hf, *PART)["identical"]


def test_forecasts(model: Model, capsys: Capsys) -> None:
    out = document(capsys, "plan", model.hf, *PART, "--tp", 2)
    assert (out["proven"], out["parallel"]["legal"]) == (True, True)
    home = document(capsys, "plan", model.language, *PART, "--hf", model.hf)
    alone = document(capsys, "plan", model.whole, *PART, "--hf", model.hf)
    assert out["megatron"] == home["megatron"]
    assert home["conversion"]["written_bytes"] == out["conversion"]["read_bytes"]
    assert alone["hf"] == document(capsys, "inspect", model.text)["hf"]
    assert any(name.startswith("vision_model.") for name in alone["dropped"])
    capsys.readouterr()
    run("plan", model.whole, *PART, "--hf", model.hf)
    shown = capsys.readouterr().out
    assert f"left behind  {len(alone['dropped'])} tensors: vision_model." in shown


def test_a_model_that_was_trained_without_its_mtp_layer(tmp_path: Path, capsys: Capsys) -> None:
    """Home and alone it comes from the reference, as from any other."""
    model = make(tmp_path, "qwen3.5-moe")
    bridge = AutoBridge.from_hf_pretrained(model.hf)
    without = tmp_path / "without"
    for source, target in ((model.hf, tmp_path / "hf2"), (model.text, tmp_path / "text2")):
        shutil.copytree(source, target)
        for file in target.glob("*.safetensors"):
            tensors = load_file(file)
            kept = {name: tensor for name, tensor in tensors.items() if "mtp." not in name}
            save_file(kept, file, metadata={"format": "pt"})
        (target / "model.safetensors.index.json").unlink(missing_ok=True)
    run("import", tmp_path / "hf2", without)
    run("export", without, tmp_path / "alone", *PART, "--hf", model.hf)
    assert same_files(tmp_path / "alone", model.text)
    run("import", tmp_path / "text2", tmp_path / "language2")
    bridge.export_ckpt(tmp_path / "language2", tmp_path / "home", part="language")
    assert same_files(tmp_path / "home", model.hf)


def test_an_fp8_release(tmp_path: Path, capsys: Capsys) -> None:
    """Both ways through BF16, and home as FP8; the language model alone is BF16."""
    model = make(tmp_path, "qwen3.5-moe", fp8=True)
    assert "quantization_config" not in json.loads((model.text / "config.json").read_text())
    run("export", model.language, tmp_path / "home", *PART, "--hf", model.hf, "--fp8")
    assert same_files(model.hf, tmp_path / "home")
    words = ("export", model.whole, tmp_path / "no", *PART, "--hf", model.hf, "--fp8")
    capsys.readouterr()
    assert "fp8 and part exclude each other" in refused(capsys, *words)


def old_and_odd(config: dict[str, Any]) -> None:
    """What the class beside a tower passes over and the class of text alone reads."""
    text = config["text_config"]
    text |= {
        "tie_word_embeddings": not config["tie_word_embeddings"],
        "layer_types": ["sliding_attention"] * text["num_hidden_layers"],
        "sliding_window": 2,
        "use_sliding_window": True,
        "norm_topk_prob": False,
        "partial_rotary_factor": 0.5,
    }


def unsaid(config: dict[str, Any]) -> None:
    """Values of which the two classes have different defaults, and a dtype at the top alone."""
    text = config["text_config"]
    del text["rope_theta"], text["rope_scaling"], text["rms_norm_eps"]
    text.pop("num_experts_per_tok", None)  # of 4 there and 8 here
    config["dtype"] = text.pop("dtype")


def head_of_default_size(config: dict[str, Any]) -> None:
    """Only one of the classes has a field for it."""
    text = config["text_config"]
    assert text["head_dim"] * text["num_attention_heads"] == text["hidden_size"]
    del text["head_dim"]


def scaled(config: dict[str, Any]) -> None:
    text = config["text_config"]
    text.pop("rope_scaling")
    text["rope_parameters"] = {
        "rope_type": "yarn",
        "rope_theta": text.pop("rope_theta"),
        "factor": 4.0,
        "original_max_position_embeddings": 8,
        "mrope_section": [6, 5, 5],
        "mrope_interleaved": True,
    }


@pytest.mark.parametrize(
    ("family", "change", "settings"),
    [
        ("qwen3-vl", old_and_odd, {}),
        ("qwen3-vl-moe", old_and_odd, {"tie_word_embeddings": True, "text.mlp_only_layers": [1]}),
        ("qwen3-vl", unsaid, {}),
        ("qwen3-vl-moe", unsaid, {}),
        ("qwen3-vl-moe", head_of_default_size, SMALL_HEADS),
        ("qwen3-vl", scaled, {}),
    ],
)
def test_configs_that_the_two_classes_read_differently(
    family: str,
    change: Callable[[dict[str, Any]], None],
    settings: dict[str, Any],
    tmp_path: Path,
) -> None:
    hf = edited(make_model(family, tmp_path / "hf", settings, seed=6), change)
    run("import", hf, tmp_path / "whole")
    run("export", tmp_path / "whole", tmp_path / "text", *PART, "--hf", hf)
    assert_same_logits(hf, tmp_path / "text")
    assert AutoConfig.from_pretrained(tmp_path / "text").get_text_config().dtype == torch.bfloat16


def test_experts_that_the_whole_passes_over(tmp_path: Path, capsys: Capsys) -> None:
    """One by one beside fused ones: the class beside a tower reads the fused, the other those."""
    hf = make_model("qwen3-vl-moe", tmp_path / "hf", {}, seed=7)
    tensors = load_file(hf / "model.safetensors")
    beside = {
        f"model.language_model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight": torch.ones(
            (160, 48) if part == "down" else (48, 160), dtype=torch.bfloat16
        )
        for layer in range(7)
        for expert in range(6)
        for part in ("gate", "up", "down")
    }
    save_file(tensors | beside, hf / "model.safetensors", metadata={"format": "pt"})
    run("import", hf, tmp_path / "language", *PART)
    run("import", hf, tmp_path / "whole")
    run("export", tmp_path / "whole", tmp_path / "text", *PART, "--hf", hf)
    assert_same_logits(hf, tmp_path / "text")
    run("import", tmp_path / "text", tmp_path / "again")
    assert document(capsys, "verify", tmp_path / "again", tmp_path / "language")["identical"]
    run("export", tmp_path / "language", tmp_path / "home", *PART, "--hf", hf)
    assert same_files(hf, tmp_path / "home")


def test_refusals(dense: Model, tmp_path: Path, capsys: Capsys) -> None:
    """Where it is not plain what is meant, and what to do instead."""
    out = tmp_path / "out"
    assert "has no part 'tower' that is a model of its own; it has language" in refused(
        capsys, "import", dense.hf, out, "--part", "tower"
    )
    assert "a Qwen3ForCausalLM has no part 'language'" in refused(
        capsys, "import", dense.text, out, *PART
    )
    give = 'is the language part of the other: give --part language (part="language")'
    assert give in refused(capsys, "export", dense.language, out, "--hf", dense.hf)
    assert give in refused(capsys, "export", dense.whole, out, "--hf", dense.text)
    assert give in refused(capsys, "verify", dense.language, dense.hf)
    assert give in refused(capsys, "plan", dense.language, "--hf", dense.hf)
    own = ("export", dense.language, out, *PART)
    message = "keeps no config of a model with a part 'language'"
    assert "has no part 'language'" in refused(capsys, *own)
    assert "has no part 'language'" in refused(capsys, *own, "--hf", dense.text)
    (tmp_path / "config").mkdir()
    shutil.copy(dense.hf / "config.json", tmp_path / "config")
    assert "no weights to take the rest from" in refused(capsys, *own, "--hf", tmp_path / "config")
    unknown = shutil.copytree(dense.whole, tmp_path / "unknown")
    (unknown / "iter_0000000" / "run_config.yaml").unlink()
    assert message in refused(capsys, "export", unknown, out, *PART, "--hf", dense.text)
    other = make_model("qwen3-moe", tmp_path / "other", {})
    assert "its language part is a 'qwen3' model" in refused(
        capsys, "export", dense.whole, out, *PART, "--hf", other
    )
    bare = edited(
        shutil.copytree(dense.hf, tmp_path / "bare"),
        lambda config: config.update(architectures=["Qwen3VLModel"]),
    )
    assert "only that of a Qwen3VLForConditionalGeneration" in refused(
        capsys, "import", bare, out, *PART
    )
    assert "are of one format" in refused(capsys, "verify", dense.hf, dense.text, *PART)
    assert "leave out --part" in refused(capsys, "verify", dense.language, "--fast", *PART)
    for words in (("--world-size", "2"), ("--without", "mtp")):
        message = refused(capsys, "plan", dense.whole, *PART, *words)
        assert f"--part excludes {words[0]}: leave out" in message
    assert not out.exists()


def test_what_is_missing_is_all_that_is_said(dense: Model, tmp_path: Path, capsys: Capsys) -> None:
    """The tower is no part of the language model, and so no problem of it."""
    hf = shutil.copytree(dense.hf, tmp_path / "hf")
    tensors = load_file(hf / "model.safetensors")
    name = "model.language_model.norm.weight"
    del tensors[name]
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    assert main(["import", str(hf), str(tmp_path / "out"), *PART, "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["problems"] == [f"{name}: missing, needed for decoder.final_layernorm.weight"]


def test_a_checkpoint_without_a_record_goes_by_its_keys(dense: Model, tmp_path: Path) -> None:
    """As another trainer saves it."""
    for source, target in ((dense.language, "home"), (dense.whole, "alone")):
        saved = shutil.copytree(source, tmp_path / f"saved_{target}")
        (saved / "iter_0000000" / "run_config.yaml").unlink()
        run("export", saved, tmp_path / target, *PART, "--hf", dense.hf)
    assert same_files(dense.hf, tmp_path / "home")
    assert same_files(dense.text, tmp_path / "alone")


def test_in_python(dense: Model, tmp_path: Path) -> None:
    AutoBridge.import_ckpt(dense.hf, tmp_path / "language", part="language", verify=True)
    keys = TorchDistCheckpoint(tmp_path / "language").tensors.keys()
    assert keys == TorchDistCheckpoint(dense.language).tensors.keys()
    assert "embedding.word_embeddings.weight" in keys
    bridge = AutoBridge.from_hf_pretrained(dense.hf)
    bridge.export_ckpt(dense.whole, tmp_path / "text", part="language", verify=True)
    assert same_files(dense.text, tmp_path / "text")
    with pytest.raises(InputError, match="has no part 'vision'"):
        bridge.export_ckpt(dense.whole, tmp_path / "no", part="vision")


def test_the_documented_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    """Each of the section, in order, with the lines that it shows."""
    _, _, rest = DOCUMENTATION.read_text("utf-8").partition("\n## The language model alone\n")
    section = rest.partition("\n## ")[0]
    blocks = re.findall(r"```console\n\$ megatron-bridge (.*?)\n(.*?)```", section, re.DOTALL)
    assert len(blocks) >= 3
    monkeypatch.chdir(tmp_path)
    make_model("qwen3-vl", tmp_path / "small", {"num_shards": 3})
    run("import", "small", "small-megatron")
    for command, shown in blocks:
        capsys.readouterr()
        run(*command.split())
        printed = capsys.readouterr().out
        for line in shown.splitlines():
            if not re.match(r" (seconds|speed)|  \.\.\.", line):
                assert line.rstrip() in printed, line
