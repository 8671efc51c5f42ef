"""`compare`: both models on a real photograph, and that it notices a difference."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cli_documentation import documented_keys
from megatron.bridge.cli import main
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM


@pytest.fixture(scope="module")
def photograph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image
    from sklearn.datasets import load_sample_images

    path = tmp_path_factory.mktemp("images") / "china.png"
    Image.fromarray(load_sample_images().images[0]).resize((150, 100)).save(path)
    return path


def test_agreement_on_a_photograph(
    small_model: Path, photograph: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["compare", str(small_model), "--image", str(photograph), "--prompt", "Where is this?"]
    status = main([*args, "--json"])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    document = json.loads(printed.out)
    assert document["agrees"] is True
    assert document["prompt"] == "Where is this?"
    assert document["image"] == "china.png"
    assert 0 < document["image_tokens"] < document["tokens"]
    assert [layer["layer"] for layer in document["layers"]] == [0, 1, 2, 3, 4]
    for distance in (*document["layers"], document["logits"]):
        assert distance["max_abs_diff"] < 1e-4
        assert distance["cosine"] > 1 - 1e-9
        assert distance["largest"] > 0.1  # flat activations would agree with anything
    assert document["logits"]["top1_agreement"] == 1.0
    assert document["next_token"]["hf"] == document["next_token"]["megatron"]
    assert not torch.distributed.is_initialized()
    assert set(document) == documented_keys("JSON of `compare`:")


@pytest.mark.parametrize(
    ("family", "fp8"), [("qwen3-vl-moe", True), ("qwen3.5", False), ("qwen3.5-moe", True)]
)
def test_every_family_agrees(
    family: str,
    fp8: bool,
    photograph: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of an FP8 release both run the BF16 weights that it stands for, smaller blocks included."""
    from megatron.bridge.synthetic import make_model

    settings = {"fp8": fp8, "text.num_hidden_layers": 4}
    model = make_model(family, tmp_path / "model", settings)
    status = main(["compare", str(model), "--image", str(photograph), "--json"])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    document = json.loads(printed.out)
    assert document["agrees"] is True
    assert document["logits"]["max_abs_diff"] < 1e-4 * document["logits"]["largest"]
    assert document["logits"]["top1_agreement"] == 1.0
    assert document["image_tokens"] > 0
    assert len(document["layers"]) == 4


def _fill_wrongly(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Let the live model get one matrix of layer 2 multiplied by `factor`."""
    from megatron.bridge.live import weights

    fill = weights.fill_from_files

    def fill_wrongly(model: Sequence[Any], *args: Any) -> None:
        fill(model, *args)
        with torch.no_grad():
            model[0].language_model.decoder.layers[2].mlp.linear_fc2.weight.mul_(factor)

    monkeypatch.setattr(weights, "fill_from_files", fill_wrongly)


def test_a_changed_weight_is_noticed(
    small_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _fill_wrongly(monkeypatch, 1.01)
    assert main(["compare", str(small_model), "--prompt", "No picture."]) == 1
    printed = capsys.readouterr()
    assert "the logits differ" in printed.out
    assert "error: the logits of" in printed.err
    assert "Traceback" not in printed.err
    assert main(["compare", str(small_model), "--tolerance", "1", "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert layers[1]["max_abs_diff"] < 1e-4 < 1e-3 < layers[2]["max_abs_diff"]


@pytest.mark.parametrize("family", ["qwen3-vl-moe", "qwen3.5-moe"])  # every kind of layer
def test_float64_leaves_no_rounding(
    family: str,
    photograph: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The F32 scales of this FP8 release are multiplied in float32 all the same."""
    from megatron.bridge.synthetic import make_model

    settings = {"fp8": True, "fp8_scale_dtype": "float32", "text.num_hidden_layers": 4}
    model = make_model(family, tmp_path / "model", settings)
    args = ["compare", str(model), "--image", str(photograph), "--dtype", "float64", "--json"]
    assert main(args) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["dtype"] == "float64"
    assert document["tolerance"] == 1e-10
    for distance in (*document["layers"], document["logits"]):
        assert distance["max_abs_diff"] < 1e-12
        assert distance["relative_rms_diff"] < 1e-13
    assert torch.get_default_dtype() is torch.float32


def test_float64_shows_what_rounding_hides(
    small_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A millionth of one layer: the noise of float32 hides it, that of float64 does not."""
    _fill_wrongly(monkeypatch, 1 + 1e-6)
    assert main(["compare", str(small_model)]) == 0
    assert main(["compare", str(small_model), "--dtype", "float64", "--json"]) == 1
    capsys.readouterr()
    assert main(["compare", str(small_model), "--dtype", "float64", "--tolerance", "1"]) == 0
    printed = capsys.readouterr().out
    assert "relative RMS" in printed


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--image", "nothing.png"], "nothing.png"),
        (["--image", "MODEL/config.json"], "config.json"),
        (["--dtype", "int4"], "float64, float32, bfloat16, float16"),
    ],
)
def test_unusable_input(
    args: list[str], named: str, small_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [arg.replace("MODEL", str(small_model)) for arg in args]
    assert main(["compare", str(small_model), *args]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert named in printed.err
    assert "Traceback" not in printed.err


def test_float64_is_refused_on_a_gpu(
    small_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert main(["compare", str(small_model), "--dtype", "float64"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "CUDA_VISIBLE_DEVICES" in printed.err


@pytest.mark.parametrize("prefix", ["module.", "base_model.model."])
def test_names_with_a_prefix_are_those_of_the_release_for_transformers(
    prefix: str, small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would make up random weights for names that it does not know."""
    from folders_in_memory import Folder

    folder = Folder.of(small_model)
    folder.rename(lambda name: prefix + name)
    assert main(["compare", str(folder.write(tmp_path / "model"))]) == 0
    capsys.readouterr()


def test_a_tied_head_and_files_of_other_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from random import Random

    from folders_in_memory import Folder
    from megatron.bridge.synthetic import make_model
    from whole_folders import tied_under_the_other_name

    settings = {"tie_word_embeddings": True, "text.num_hidden_layers": 2}
    folder = Folder.of(make_model("qwen3-vl", tmp_path / "made", settings))
    tied_under_the_other_name(folder, Random(0))
    folder.split(Random(0), "model.safetensors-00001-of-00002", "model.safetensors-00002-of-00002")
    assert main(["compare", str(folder.write(tmp_path / "model"))]) == 0
    capsys.readouterr()


def test_a_model_without_an_output_layer_is_refused_at_once(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from random import Random

    from folders_in_memory import Folder
    from whole_folders import bare_model

    folder = Folder.of(small_model)
    bare_model(folder, Random(0))
    assert main(["compare", str(folder.write(tmp_path / "model"))]) == 2
    said = capsys.readouterr().err
    assert "Qwen3VLModel without an output layer can be converted from files to files" in said
    assert "Loading weights" not in said


# --- memory ---


def test_a_picture_for_which_there_is_no_memory(
    small_model: Path,
    photograph: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Refused before anything is loaded; with the number that the refusal names it runs."""
    from PIL import Image

    from megatron.bridge.operations.verification import logits, memory

    with Image.open(photograph) as small:
        small.resize((600, 400)).save(tmp_path / "large.png")
    monkeypatch.setattr(memory, "available_bytes", lambda: 20_000_000)
    run = logits.run_transformers
    monkeypatch.setattr(logits, "run_transformers", lambda *_: pytest.fail("it was loaded"))
    args = ["compare", str(small_model), "--image", str(tmp_path / "large.png")]
    assert main(args) == 2
    said = capsys.readouterr().err
    assert "of memory, and 20.00 MB are available" in said
    pixels = re.search(r"give a smaller one: --max-pixels (\d+) \(max_pixels=\1\)", said)
    assert pixels is not None, said
    monkeypatch.setattr(logits, "run_transformers", run)
    assert main([*args, "--max-pixels", pixels[1], "--json"]) == 0
    fewer = json.loads(capsys.readouterr().out)["image_tokens"]
    monkeypatch.undo()
    assert main([*args, "--json"]) == 0
    assert 0 < fewer < json.loads(capsys.readouterr().out)["image_tokens"]


def test_weights_for_which_there_is_no_memory(
    small_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron.bridge.operations.verification import memory

    monkeypatch.setattr(memory, "available_bytes", lambda: 1_000_000)
    assert main(["compare", str(small_model)]) == 2
    assert "take a shorter dtype (--dtype bfloat16)" in capsys.readouterr().err


def test_a_phone_and_a_released_model(small_model: Path) -> None:
    """4000 x 3000 pixels, 16 heads, float32: scores and softmax of 46,500 patches."""
    from megatron.bridge.operations.verification.memory import available_bytes, needed

    hf = PreTrainedVLM.from_pretrained(small_model)
    grid = torch.tensor([[1, 186, 250]])
    inputs = {"input_ids": torch.zeros(1, 11_700), "image_grid_thw": grid}
    need = needed(hf, inputs, torch.float32)
    heads = hf.hf_config.require("vision_config.num_heads", int)
    assert need.vision == 46_500**2 * heads * 4 * 2
    assert need.weights == 4 * sum(info.nbytes // 2 for info in hf.tensors.values())
    patches = need.most_pixels(need.bytes) // need.pixels_per_patch
    assert 0.98 * 46_500 < patches < 46_500  # sides are rounded by the processor
    assert (available_bytes() or 1) > 0


def test_without_a_chat_template(
    small_model: Path, photograph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As base models are: the prompt is run as it is, and nothing says where a picture stands."""
    base = tmp_path / "base"
    shutil.copytree(small_model, base)
    (base / "chat_template.jinja").unlink()
    assert main(["compare", str(base), "--prompt", "To be", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == len("To be")
    assert main(["compare", str(base), "--image", str(photograph)]) == 2
    assert "there is no chat template, which says where a picture stands" in capsys.readouterr().err
