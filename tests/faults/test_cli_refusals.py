"""Input that cannot be used: exit status 2, one message that names the culprit, nothing written."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron.bridge.cli import main
from refusals import refused

INDEX = "model.safetensors.index.json"
KEY = "model.language_model.layers.2.self_attn.o_proj.weight"
OTHER_KEY = "model.language_model.layers.3.mlp.down_proj.weight"


# --- ways to damage a model folder ---


def shard_of(folder: Path, key: str) -> str:
    return json.loads((folder / INDEX).read_text())["weight_map"][key]


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_shard(folder: Path, file: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a shard and make the index agree with it, as another program would have."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})

    def agree(index: dict[str, Any]) -> None:
        others = {name: f for name, f in index["weight_map"].items() if f != file}
        index["weight_map"] = others | dict.fromkeys(tensors, file)
        del index["metadata"]["total_size"]

    edit_json(folder / INDEX, agree)


def remove_key(folder: Path) -> None:
    edit_shard(folder, shard_of(folder, KEY), lambda tensors: tensors.pop(KEY))


def rename_key(folder: Path) -> None:
    edit_shard(
        folder,
        shard_of(folder, KEY),
        lambda tensors: tensors.update({KEY.replace("o_proj", "out_proj"): tensors.pop(KEY)}),
    )


def transpose_key(folder: Path) -> None:
    def transpose(tensors: dict[str, Any]) -> None:
        tensors[KEY] = tensors[KEY].t().contiguous()

    edit_shard(folder, shard_of(folder, KEY), transpose)


def change_dtype_of_key(folder: Path) -> None:
    def widen(tensors: dict[str, Any]) -> None:
        tensors[KEY] = tensors[KEY].float()

    edit_shard(folder, shard_of(folder, KEY), widen)


def duplicate_key(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = "model-00001-of-00003.safetensors"
    assert file != shard_of(folder, OTHER_KEY)
    tensors = load_file(folder / file)
    tensors[OTHER_KEY] = load_file(folder / shard_of(folder, OTHER_KEY))[OTHER_KEY]
    save_file(tensors, folder / file, metadata={"format": "pt"})


def truncate_shard(folder: Path) -> None:
    path = folder / shard_of(folder, KEY)
    os.truncate(path, path.stat().st_size - 100)


def remove_shard(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").unlink()


def point_outside(folder: Path) -> None:
    outside = folder.parent / "outside.safetensors"
    shutil.copy(folder / shard_of(folder, KEY), outside)
    edit_json(
        folder / INDEX,
        lambda index: index["weight_map"].update({KEY: "../outside.safetensors"}),
    )


def edit_config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", change)


@dataclass(frozen=True)
class Case:
    """damage: done to a copy of the model. named: must stand in the message."""

    name: str
    damage: Callable[[Path], None]
    named: tuple[str, ...]


CASES = [
    Case("key removed", remove_key, (KEY, "missing")),
    Case("key renamed", rename_key, (KEY, KEY.replace("o_proj", "out_proj"))),
    Case("key transposed", transpose_key, (KEY, "(160, 256)", "(256, 160)")),
    Case("dtype of one layer", change_dtype_of_key, (KEY, "F32", "BF16")),
    Case("key in two shards", duplicate_key, (OTHER_KEY, "2 shards")),
    Case("shard truncated", truncate_shard, ("-of-00003.safetensors", "truncated")),
    Case("shard missing", remove_shard, ("model-00002-of-00003.safetensors",)),
    Case("index points outside", point_outside, (KEY, "../outside.safetensors")),
    Case(
        "config lacks heads",
        edit_config(lambda config: config["text_config"].pop("num_key_value_heads")),
        ("config.json", "text_config.num_key_value_heads"),
    ),
    Case(
        "config lacks theta",
        edit_config(lambda config: config["text_config"].pop("rope_theta")),
        ("config.json", "rope_theta"),
    ),
    Case(
        "config of another size",
        edit_config(lambda config: config["text_config"].update(intermediate_size=350)),
        ("gate_proj", "(350, 160)", "(352, 160)"),
    ),
    Case(
        "wrong architecture",
        edit_config(lambda config: config.update(architectures=["LlamaForCausalLM"])),
        ("LlamaForCausalLM", "Qwen3VLForConditionalGeneration"),
    ),
    Case(
        "config not JSON",
        lambda folder: (folder / "config.json").write_text("{"),
        ("config.json",),
    ),
    Case("no config", lambda folder: (folder / "config.json").unlink(), ("config.json",)),
]


# The weights are laid out the same whatever theta is.
CASES_OF_WEIGHTS = [case for case in CASES if case.name != "config lacks theta"]


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture
def broken(case: Case, small_model: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "broken"
    shutil.copytree(small_model, folder)
    case.damage(folder)
    return folder


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_import(case: Case, broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files_below(broken.parent)
    message = refused(capsys, "import", broken, broken.parent / "new" / "out")
    assert [part for part in case.named if part not in message] == []
    assert files_below(broken.parent) == before


@pytest.mark.parametrize("case", CASES_OF_WEIGHTS, ids=lambda case: case.name)
def test_export_with_it_as_reference(
    case: Case, broken: Path, small_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_below(broken.parent)
    out = broken.parent / "new" / "out"
    message = refused(capsys, "export", small_checkpoint, out, "--hf", broken, "--json")
    assert [part for part in case.named if part not in message] == []
    assert files_below(broken.parent) == before


@pytest.mark.parametrize("case", CASES_OF_WEIGHTS, ids=lambda case: case.name)
def test_verify_against_its_checkpoint(
    case: Case, broken: Path, small_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, "verify", small_checkpoint, broken)
    assert [part for part in case.named if part not in message] == []


def test_inspect(case: Case, broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["inspect", str(broken), "--json"])
    printed = capsys.readouterr()
    assert status == 2
    assert "Traceback" not in printed.err
    assert [part for part in case.named if part not in printed.err] == []
    document = json.loads(printed.out)
    if "error" in document:
        assert [part for part in case.named if part not in document["error"]["message"]] == []
    else:  # readable, but not convertible: what is known is reported
        assert document["proven"] is False
        assert document["rows"] == []
        assert any(case.named[0] in problem for problem in document["problems"])


# --- damaged Megatron checkpoints ---


def truncate_data(folder: Path) -> None:
    path = folder / "iter_0000000" / "__0_0.distcp"
    os.truncate(path, path.stat().st_size // 2)


def remove_index(folder: Path) -> None:
    (folder / "iter_0000000" / ".metadata").unlink()


def name_another_iteration(folder: Path) -> None:
    (folder / "latest_checkpointed_iteration.txt").write_text("7")


def hostile_index(folder: Path) -> None:
    import pickle

    class Run:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(folder.parent / "owned"),))

    (folder / "iter_0000000" / ".metadata").write_bytes(pickle.dumps(Run()))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (truncate_data, "__0_0.distcp"),
        (remove_index, ".metadata"),
        (name_another_iteration, "iter_0000007"),
        (hostile_index, "mkdir"),
    ],
)
@pytest.mark.parametrize("command", ["export", "verify", "inspect"])
def test_damaged_checkpoint(
    damage: Callable[[Path], None],
    named: str,
    command: str,
    small_model: Path,
    small_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(small_checkpoint, broken)
    damage(broken)
    before = files_below(tmp_path)
    rest: list[str | Path] = {
        "export": [tmp_path / "out", "--hf", small_model],
        "verify": [small_model],
        "inspect": [],
    }[command]
    assert named in refused(capsys, command, broken, *rest)
    assert files_below(tmp_path) == before


def test_checkpoint_of_another_model(
    small_model: Path,
    small_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A config alone agrees with itself; it must also agree with the checkpoint."""
    reference = tmp_path / "reference"
    reference.mkdir()
    shutil.copy(small_model / "config.json", reference)
    edit_json(
        reference / "config.json", lambda config: config["text_config"].update(num_hidden_layers=4)
    )
    message = refused(capsys, "export", small_checkpoint, tmp_path / "out", "--hf", reference)
    assert "language_model.decoder.layers.mlp.linear_fc1.weight" in message
    assert files_below(tmp_path) == ["reference", "reference/config.json"]


# --- targets ---


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("command", ["import", "export", "make-model"])
def test_existing_target_is_kept(
    command: str,
    small_model: Path,
    small_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "config.json").write_text("mine")
    args: list[str | Path] = {
        "import": ["import", small_model, target],
        "export": ["export", small_checkpoint, target, "--hf", small_model],
        "make-model": ["make-model", "--family", "qwen3-vl", "--out", target],
    }[command]
    message = refused(capsys, *args)
    assert str(target) in message
    assert "--force" in message
    assert contents(tmp_path) == {"target/config.json": b"mine"}


def test_force_never_replaces_what_is_read(
    small_model: Path,
    small_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, checkpoint = tmp_path / "all" / "model", tmp_path / "all" / "checkpoint"
    shutil.copytree(small_model, model)
    shutil.copytree(small_checkpoint, checkpoint)
    (tmp_path / "link").symlink_to(model)
    before = contents(tmp_path)
    for args in (
        ["import", model, model],
        ["import", model, tmp_path / "all"],
        ["import", model, model / "inside"],
        ["import", tmp_path / "link", model],
        ["export", checkpoint, checkpoint, "--hf", model],
        ["export", checkpoint, model, "--hf", model],
        ["export", checkpoint, checkpoint / "iter_0000000", "--hf", model],
    ):
        assert "overlap" in refused(capsys, *args, "--force")
    assert contents(tmp_path) == before


def test_force_never_replaces_a_folder_of_other_things(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years")
    (tmp_path / "file").write_text("text")
    for target in ("home", "file"):
        assert target in refused(capsys, "import", small_model, tmp_path / target, "--force")
    assert contents(tmp_path) == {"home/thesis.tex": b"years", "file": b"text"}


# --- what is not there, and options that make no sense ---


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["import", "no/such/folder", "out"], "no/such/folder"),
        (["import", "org/name", "out"], "HF_HUB_OFFLINE"),
        (["inspect", "org/name@main"], "HF_HUB_OFFLINE"),
        (["export", "nothing", "out", "--hf", "MODEL"], "nothing"),
        (["verify", "nothing", "MODEL"], "nothing"),
        (["import", "MODEL", "out", "--revision", "v1"], "v1"),
        (["inspect", "MODEL", "--revision", "v1"], "v1"),
        (["make-model", "--family", "gpt-2", "--out", "out"], "qwen3-vl"),
        (
            ["make-model", "--family", "qwen3-vl", "--out", "out", "--set", "text.hiden_size=8"],
            "text_config.hidden_size",
        ),
    ],
)
def test_unusable_arguments(
    args: list[str],
    named: str,
    small_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    message = refused(capsys, *(small_model if arg == "MODEL" else arg for arg in args))
    assert named in message
    assert files_below(tmp_path) == []


@pytest.mark.parametrize(
    "args",
    [
        ["import"],
        ["import", "a", "b", "--unknown"],
        ["no-such-command"],
        ["export", "a", "b"],
        ["make-model", "--family", "qwen3-vl", "--out", "out", "--set", "no-equals-sign"],
        ["make-model", "--family", "qwen3-vl", "--out", "out", "--set", "a=1", "--set", "a=2"],
    ],
)
def test_wrong_usage(
    args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(args) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "error: " in printed.err
    assert "Traceback" not in printed.err
    assert files_below(tmp_path) == []


# --- ends in the middle of the work ---


class Fault:
    """Something that happens while the twentieth tensor is made."""

    def __init__(self, happen: Callable[[], None], real: Callable[..., Any]) -> None:
        self.happen = happen
        self.real = real
        self.left = 20

    def __call__(self, *args: Any) -> Any:
        self.left -= 1
        if not self.left:
            self.happen()
        return self.real(*args)


def raise_(error: BaseException) -> Callable[[], None]:
    def happen() -> None:
        raise error

    return happen


@pytest.mark.parametrize(
    ("happen", "status", "said"),
    [
        (raise_(KeyboardInterrupt()), 130, "interrupted"),
        (lambda: os.kill(os.getpid(), signal.SIGINT), 130, "interrupted"),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), 143, ""),
        (raise_(OSError(28, "No space left on device")), 2, "error: "),
        (raise_(RuntimeError("a fault\nof ours")), 70, "internal error: RuntimeError: a fault\n"),
    ],
    ids=["KeyboardInterrupt", "SIGINT", "SIGTERM", "disk full", "internal error"],
)
@pytest.mark.parametrize("direction", ["import", "export"])
def test_nothing_is_left_half_written(
    happen: Callable[[], None],
    status: int,
    said: str,
    direction: str,
    small_model: Path,
    small_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from megatron.bridge.models.conversion import transfer

    name = "fill_megatron" if direction == "import" else "fill_hf"
    monkeypatch.setattr(transfer, name, Fault(happen, getattr(transfer, name)))
    out = tmp_path / "out"
    args = {
        "import": ["import", str(small_model), str(out)],
        "export": ["export", str(small_checkpoint), str(out), "--hf", str(small_model)],
    }[direction]
    assert main(args) == status
    printed = capsys.readouterr()
    assert said in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""
    assert files_below(tmp_path) == []


def test_debug_shows_the_traceback(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--debug", "import", str(tmp_path / "nothing"), str(tmp_path / "out")]) == 2
    assert "Traceback" in capsys.readouterr().err
    assert main(["import", str(tmp_path / "nothing"), str(tmp_path / "out")]) == 2
    assert "Traceback" not in capsys.readouterr().err
