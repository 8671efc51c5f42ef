"""What the command says of wrong input: to a person, and by --json to a program."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.bridge.cli import main
from megatron.bridge.cli.commands import verify
from refusals import refused


@pytest.mark.parametrize(
    ("args", "kind", "said"),
    [
        (["inspect", "nothing-here"], "ReferenceNotFound", "nothing-here"),
        (["import", "nothing-here", "out"], "ReferenceNotFound", "nothing-here"),
        (["export", "nothing-here"], "MissingParameter", "DST"),
        (["verify", "nothing-here"], "InputError", "nothing-here"),
        (["plan", "x", "--tp", "abc"], "BadParameter", "'abc' is not a whole number from 1 to"),
        (["plan", "x", "--pp", "0"], "BadParameter", "'0' is not a whole number from 1 to"),
        (
            ["plan", "x", "--world-size", "99999999999"],
            "BadParameter",
            "'99999999999' is not a",
        ),
        (["plan", "x", "--ep", "131073"], "BadParameter", "from 1 to 131072"),
        (["compare", "x", "--tolerance", "nan"], "BadParameter", "'nan' is not a finite number"),
        (["compare", "x", "--tolerance", "-1"], "BadParameter", "'-1' is not a finite number"),
        (["compare", "x", "--tolerance", "much"], "BadParameter", "'much' is not a finite number"),
        (["compare", "x", "--max-pixels", "0"], "BadParameter", "'0' is not a whole number of at"),
        (["compare", "x", "--max-pixels", "q"], "BadParameter", "'q' is not a whole number of at"),
        (["make-model", "--seed", "1.5"], "BadParameter", "'1.5' is not a valid integer"),
        (["compare", "x", "--image", "nope.jpg"], "BadParameter", "'nope.jpg' does not exist"),
        (["compare", "x", "--dtype", "int4"], "BadParameter", "'int4' is none of float64, float32"),
        (["import", "x", "y", "--experts", "e"], "BadParameter", "'e' is none of fused, fused-tr"),
        (["export", "x", "y", "--hf", "z", "--experts", "e"], "BadParameter", "'e' is none of"),
        (["nonsense"], "NoSuchCommand", "nonsense"),
    ],
)
def test_an_error_is_a_document(
    args: list[str],
    kind: str,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*args, "--json"]) == 2
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert document == {"error": {**document["error"], "kind": kind, "exit_status": 2}}
    assert said in document["error"]["message"]
    assert said in printed.err
    assert "loading" not in printed.err
    assert main(args) == 2
    assert capsys.readouterr().out == ""


def test_the_names_that_options_take_are_those_that_the_library_knows(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Options list them on their own, since their help must not wait for torch."""
    from megatron.bridge.models.qwen_vl.disk_layout import ExpertLayout
    from megatron.bridge.operations.verification.logits import TOLERANCES

    for args, names in ((["import", "x", "y", "--experts"], ExpertLayout),
                        (["compare", "x", "--dtype"], TOLERANCES)):  # fmt: skip
        assert main([*args, "?"]) == 2
        assert capsys.readouterr().err.endswith(f"'?' is none of {', '.join(names)}\n")


def test_a_fault_of_the_program_is_a_document(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: object) -> None:
        raise ZeroDivisionError("in the middle")

    monkeypatch.setattr(verify, "open_output", fail)
    assert main(["verify", "a", "b", "--json"]) == 70
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["kind"], error["exit_status"]) == ("ZeroDivisionError", 70)
    assert "This is a fault of megatron-bridge" in error["message"]


def test_a_result_that_is_shown_is_the_only_document(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a difference, or a layout that is illegal, the document tells already."""
    assert main(["plan", str(small_model), "--tp", "3", "--json"]) == 2
    assert "error" not in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_one_of_several_processes_writes_the_document(
    rank: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    assert main(["inspect", "nothing-here", "--json"]) == 2
    printed = capsys.readouterr()
    assert bool(printed.out) == (rank == "0")
    assert "nothing-here" in printed.err


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("inspect nothing-here --json | true", 2),
        ("nonsense --json | true", 2),
        ("inspect nothing-here --json >&-", 2),
        ("inspect nothing-here 2>&-", 2),
        ("--version >&-", 0),
    ],
)
def test_streams_that_are_closed(command: str, status: int) -> None:
    program = f"{sys.executable} -m megatron.bridge {command}; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(["bash", "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_a_folder_of_the_other_kind(
    small_model: Path,
    small_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    for args in (
        ["import", small_checkpoint, out],
        ["compare", small_checkpoint],
        ["export", small_checkpoint, out, "--hf", small_checkpoint],
    ):
        said = refused(capsys, *args)
        assert f"{small_checkpoint} is a Megatron checkpoint" in said
        assert "`megatron-bridge export` makes one of it" in said
    said = refused(capsys, "export", small_model, out, "--hf", small_model)
    assert "it is a Hugging Face model, which import makes one of" in said


def test_nothing_to_resume_is_said(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["import", str(small_model), str(tmp_path / "out"), "--resume"]
    assert main(args) == 0
    said = "nothing to resume: there is no out.partial; beginning anew\n"
    assert capsys.readouterr().err.startswith(said)
    assert main([*args, "--json", "--force"]) == 0
    assert capsys.readouterr().err == ""


def test_force_is_only_offered_where_it_helps(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    said = refused(capsys, "import", small_model, tmp_path / "file")
    assert "not even force replaces it" in said
    assert "--force" not in said
    assert "overlap" in refused(capsys, "import", small_model, small_model)


def test_a_pipeline_that_vpp_needs_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layers = ["--set", "text.num_hidden_layers=8"]
    model = tmp_path / "model"
    assert main(["make-model", "--family", "qwen3-vl", "--out", str(model), *layers]) == 0
    capsys.readouterr()
    assert main(["plan", str(model), "--vpp", "2"]) == 2
    assert "legal without it, or with --pp 2" in capsys.readouterr().err


def test_the_origin_of_a_planned_checkpoint(
    small_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(small_checkpoint), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["origin"] == "checkpoint"
    assert main(["plan", str(small_checkpoint)]) == 0
    printed = capsys.readouterr().out
    assert "the checkpoint, and the config that it keeps" in printed
    assert "dtypes assumed" not in printed


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["num_shards"], "'num_shards' should be KEY=VALUE"),
        (["=1"], "'=1' should be KEY=VALUE"),
        ([""], "'' should be KEY=VALUE"),
        (["num_shards=2", "num_shards=3"], "num_shards is set twice"),
    ],
    ids=str,
)
def test_a_setting_that_is_not_a_key_and_a_value(
    settings: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [one for setting in settings for one in ("--set", setting)]
    assert main(["make-model", "--family", "qwen3", "--out", str(tmp_path / "out"), *given]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "--set" in err
    assert said in err
    assert not (tmp_path / "out").exists()


def test_a_value_may_hold_what_stands_between_key_and_value(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--family", "qwen3", "--out", str(tmp_path / "out"), "--set", "dtype=a=b"]
    assert main(["make-model", *args]) == 2
    assert "a=b" in capsys.readouterr().err
