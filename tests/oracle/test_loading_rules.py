"""What transformers takes for a model's tensors decides: names, experts, files, one verdict."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

import whole_folders as whole
from folders_in_memory import HEAD, INDEX, LANGUAGE, VISION, Folder
from megatron.bridge.cli import main
from megatron.bridge.models.qwen_vl import names
from megatron.bridge.synthetic import make_model
from oracle.loading import FAMILIES, missing_for_transformers
from refusals import paths_below

SETTINGS = {"text.num_hidden_layers": 4, "vision.depth": 3}
LAYER = f"{LANGUAGE}layers.1."
NORM = f"{LAYER}post_attention_layernorm.weight"
EXPERTS = f"{LAYER}mlp.experts."

type Edit = Callable[[Folder], object]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("models")

    def model(family: str, **settings: object) -> Path:
        path = folder / "-".join([family, *map(str, settings.values())])
        if not path.exists():
            make_model(family, path, SETTINGS | settings)
        return path

    return model


def changed(model: Path, target: Path, edit: Edit) -> Path:
    folder = Folder.of(model)
    edit(folder)
    return folder.write(target)


def verdicts(model: Path, capsys: pytest.CaptureFixture[str]) -> tuple[set[int], set[str]]:
    """Exit statuses and messages of the commands that look at a model."""
    target = model.with_name("imported")
    commands = [["inspect"], ["plan"], ["import", str(target)], ["compare"]]
    statuses, said = set(), set()
    for command, *more in commands:
        capsys.readouterr()
        statuses.add(main([command, str(model), *more]))
        message = capsys.readouterr().err.partition("error: ")[2]
        assert len(message.splitlines()) <= 6
        said.add(message)
    return statuses, said


def comes_back(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All commands agree that it converts, compute the same, and give the same bytes back."""
    assert missing_for_transformers(model) == []
    assert verdicts(model, capsys)[0] == {0}
    again = model.with_name("again")
    imported = str(model.with_name("imported"))
    assert main(["export", imported, str(again), "--hf", str(model)]) == 0
    assert paths_below(again) == paths_below(model)
    for path in paths_below(model):
        if (model / path).is_file():
            assert (model / path).read_bytes() == (again / path).read_bytes(), path
    capsys.readouterr()


# --- names ---


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_roots_are_those_of_transformers(
    family: str, bare: bool, models: Callable[..., Path]
) -> None:
    """Each is one for all names of its part, and for those of no other part."""
    config = transformers.AutoConfig.from_pretrained(models(family))
    name = config.architectures[0]
    if bare:
        name = name.replace("ForConditionalGeneration", "Model")
    with torch.device("meta"):
        model = getattr(transformers, name)(config)
    state = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    for root, others in names.VISION_LANGUAGE_ROOTS.items():
        for own in state:
            declared = own if own.startswith("model.") or own == HEAD else f"model.{own}"
            if not declared.startswith(root):
                continue
            for other in (root, *others):
                stored = declared.replace(root, other, 1)
                found, _ = rename_source_key(stored, renamings, [], "model", state)
                too_much = bare and other.startswith("model.model.")
                assert (found == own) is not too_much, stored


PARTS: dict[str, tuple[str, str]] = {
    "a layer with model. twice": (LAYER, f"model.{LAYER}"),
    "a layer as older versions had it": (LAYER, f"{LANGUAGE}model.layers.1."),
    "a tensor": (NORM, NORM.removeprefix("model.")),
    "the vision tower": (VISION, "visual."),
    "the head": (HEAD, f"model.{HEAD}"),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_under_another_root(
    part: str, models: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family = list(FAMILIES)[list(PARTS).index(part) % len(FAMILIES)]
    root, other = PARTS[part]

    def rename(folder: Folder) -> None:
        assert any(name.startswith(root) for name in folder.tensors)
        folder.rename(lambda name: re.sub(f"^{re.escape(root)}", other, name))

    comes_back(changed(models(family), tmp_path / "model", rename), capsys)


def test_a_tied_embedding_under_another_root(
    models: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def tie(folder: Folder) -> None:
        whole.tied_under_the_other_name(folder, Random(0))
        folder.tensors[f"model.{HEAD}"] = folder.tensors.pop(HEAD)

    comes_back(changed(models("qwen3-vl"), tmp_path / "model", tie), capsys)


@pytest.mark.parametrize("other", [NORM.removeprefix("model."), f"model.{NORM}"])
def test_two_names_of_one_parameter(
    other: str, models: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Equal copies come back; of others transformers takes one, by the order of the names."""
    model = models("qwen3-vl")

    def copy(folder: Folder) -> None:
        folder.tensors[other] = folder.tensors[NORM].clone()

    comes_back(changed(model, tmp_path / "model", copy), capsys)
    assert main(["inspect", str(tmp_path / "model"), "--json"]) == 0
    carried = json.loads(capsys.readouterr().out)["carried"]
    assert other in json.dumps(carried)

    def differ(folder: Folder) -> None:
        folder.tensors[other] = folder.tensors[NORM] * 2

    (tmp_path / "other").mkdir()
    statuses, said = verdicts(changed(model, tmp_path / "other" / "model", differ), capsys)
    assert statuses == {2}
    assert len(said) == 1
    assert f"{other} and {NORM} differ, but transformers takes both names" in said.pop()


def test_copies_that_nobody_reads_may_differ(
    models: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def add(folder: Folder) -> None:
        for number, name in enumerate([f"{LANGUAGE}layers.9.x", "language_model.layers.9.x"]):
            folder.tensors[name] = torch.tensor([1.0 + number])

    comes_back(changed(models("qwen3-vl"), tmp_path / "model", add), capsys)


@pytest.mark.parametrize("experts", ["fused", "fused-transposed", "per-expert"])
def test_another_layout_of_experts_under_another_root(
    experts: str,
    models: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def rename(folder: Folder) -> None:
        folder.rename(lambda name: re.sub(r"^model\.(.*\.layers\.1\.mlp)", r"\1", name))

    model = changed(models("qwen3-vl-moe"), tmp_path / "model", rename)
    imported, again = str(tmp_path / "imported"), str(tmp_path / "again")
    assert main(["import", str(model), imported]) == 0
    words = ["export", imported, again, "--hf", str(model), "--experts", experts]
    assert main(words) == 0
    assert main(["verify", imported, again]) == 0
    if experts != "per-expert":  # which transformers does not read in this family
        assert missing_for_transformers(Path(again)) == []
    capsys.readouterr()


# --- experts ---


def test_experts_that_transformers_would_mix_up(
    models: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It stacks experts in the order of their names: those without model. come first."""
    order = {}
    for number in (0, 2):

        def rename(folder: Folder, number: int = number) -> None:
            whole.split_experts(folder)
            name = f"{EXPERTS}{number}.gate_proj.weight"
            folder.tensors[name.removeprefix("model.")] = folder.tensors.pop(name)

        path = tmp_path / str(number)
        path.mkdir()
        model = changed(models("qwen3.5-moe"), path / "model", rename)
        assert missing_for_transformers(model) == []
        loaded = transformers.AutoModelForImageTextToText.from_pretrained(model)
        order[number] = loaded.state_dict()[f"{EXPERTS}gate_up_proj"].float()
        statuses, said = verdicts(model, capsys)
        assert statuses == ({0} if number == 0 else {2}), said
        if number:
            assert "would mix them up" in said.pop()
    assert not torch.equal(order[0], order[2])


@pytest.mark.parametrize(
    ("intermediate", "turned"),
    [(80, False), (160, True)],
    ids=["gate_up is square", "down is square, and turned"],
)
def test_square_experts_are_what_transformers_makes_of_them(
    intermediate: int,
    turned: bool,
    models: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It looks at shapes: what is square is never turned, in whichever layout the others lie."""
    model = models("qwen3-vl-moe", **{"text.moe_intermediate_size": intermediate})

    def turn(folder: Folder) -> None:
        for name, tensor in folder.tensors.items():
            if turned and ".mlp.experts." in name:
                folder.tensors[name] = tensor.transpose(1, 2).contiguous()

    comes_back(changed(model, tmp_path / "model", turn), capsys)


# --- files ---


@pytest.mark.parametrize(
    ("kind", "seed"),
    [
        (whole.experts_passed_over, 1),
        (whole.experts_one_by_one, 2),
        (whole.shards_in_folders, 1),
        (whole.tracker_of_a_trainer, 2),
    ],
)
def test_what_lies_beside_and_below(
    kind: Callable[[Folder, Random], None],
    seed: int,
    models: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = models("qwen3.5-moe")
    comes_back(changed(model, tmp_path / "model", lambda f: kind(f, Random(seed))), capsys)


def test_a_model_with_the_index_of_a_checkpoint_beside_it(
    models: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both are whole: it is the model for who reads models, the checkpoint for who asks for one."""
    model = shutil.copytree(models("qwen3-vl"), tmp_path / "model")
    other = tmp_path / "checkpoint"
    assert main(["import", str(model), str(other)]) == 0
    for path in other.iterdir():
        (shutil.copytree if path.is_dir() else shutil.copy)(path, model / path.name)
    comes_back_as_model = verdicts(model, capsys)
    assert comes_back_as_model[0] == {0}
    assert main(["inspect", str(model), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "huggingface"
    assert main(["inspect", str(model), "--iteration", "release", "--json"]) in (0, 2)
    capsys.readouterr()
    (iteration,) = [path.name for path in other.iterdir() if path.is_dir()]
    assert main(["inspect", str(model / iteration), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] != "huggingface"
    out = str(tmp_path / "out")
    assert main(["export", str(model), out, "--hf", str(models("qwen3-vl"))]) == 0
    assert main(["verify", out, str(models("qwen3-vl"))]) == 0


def test_a_shard_that_the_index_does_not_name(
    models: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    model = changed(
        models("qwen3-vl"), tmp_path / "model", lambda folder: folder.split(Random(1), *files)
    )
    index = json.loads((model / INDEX).read_text())
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if f == files[0]}
    (model / INDEX).write_text(json.dumps(index))
    assert missing_for_transformers(model)
    statuses, said = verdicts(model, capsys)
    assert statuses == {2}
    (message,) = said
    assert len(message.splitlines()) == 2
    assert f"in a file that does not count as the model's: {files[1]}" in message


@pytest.mark.parametrize("kind", ["mrope", "axial"])
def test_a_rotation_that_transformers_does_not_know(
    kind: str, models: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`type` alone counts; with a rope_type that it knows beside it, nobody reads it."""

    def older(folder: Folder, **more: str) -> None:
        folder.text["rope_theta"] = 5e6
        folder.text["rope_scaling"] = {"type": kind, "mrope_section": [6, 5, 5], **more}

    model = models("qwen3-vl")
    known = changed(model, tmp_path / "model", lambda folder: older(folder, rope_type="default"))
    comes_back(known, capsys)
    (tmp_path / "alone").mkdir()
    alone = changed(model, tmp_path / "alone" / "model", older)
    assert f"KeyError: '{kind}'" in missing_for_transformers(alone)
    statuses, said = verdicts(alone, capsys)
    assert statuses == {2}
    assert f"transformers knows no rope_type '{kind}'" in said.pop()


def test_integers_in_a_layer_are_one_short_message(
    models: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def to_integers(folder: Folder) -> None:
        for name, tensor in folder.tensors.items():
            if name.startswith(LAYER):
                folder.tensors[name] = tensor.to(torch.int64)

    statuses, said = verdicts(changed(models("qwen3-vl"), tmp_path / "model", to_integers), capsys)
    assert statuses == {2}
    (message,) = said
    assert "tensors are I64, such as" in message
    assert len(message) < 400


def test_a_tensor_in_fp8_that_no_row_needs(
    models: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def add(folder: Folder) -> None:
        folder.tensors["extra.weight"] = torch.ones(4, 6).to(torch.float8_e4m3fn)

    comes_back(changed(models("qwen3-vl"), tmp_path / "model", add), capsys)
