"""The commands, as a user types them: what they print, and with which status they end."""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from cli_documentation import DOCUMENTATION, documented_keys
from megatron.bridge.cli import main, outcome
from megatron.bridge.cli.output import WIDTH
from megatron.bridge.cli.render import TABLES
from megatron.bridge.errors import MismatchError
from megatron.bridge.progress_lines import ProgressLines
from megatron.bridge.text.sizes import format_bytes

COMMANDS = ("inspect", "plan", "import", "export", "verify", "compare", "make-model")


def run(capsys: pytest.CaptureFixture[str], *args: str | Path) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command."""
    status = main([str(arg) for arg in args])
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    assert max(map(len, printed.out.splitlines()), default=0) <= WIDTH
    return status, printed.out, printed.err


def run_json(capsys: pytest.CaptureFixture[str], *args: str | Path) -> Any:
    """The document of a command that ends well and says nothing else."""
    status = main([*map(str, args), "--json"])
    printed = capsys.readouterr()
    assert (status, printed.err) == (0, "")
    return json.loads(printed.out)


# --- help ---

_HEAVY = (
    "torch", "transformers", "megatron.core", "huggingface_hub", "rich", "pydantic", "typer",
    "asyncio", "numpy", "yaml",
)  # fmt: skip


def test_help_of_every_level_imports_nothing_heavy() -> None:
    program = f"""if True:
        import contextlib, io, sys
        from megatron.bridge.cli import main, outcome
        for args in [[], *([name] for name in {COMMANDS!r})]:
            for flag in ("--help", "-h"):
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    assert main([*args, flag]) == 0
                assert "Exit status: 0 done; 1 " in out.getvalue(), out.getvalue()
        sys.exit(", ".join(set({_HEAVY!r}) & set(sys.modules)) or None)
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("args", "modules"),
    [
        (["--help"], set()),
        (["--version"], set()),
        (["nonsense"], set()),
        (["verify", "--help"], {"verify"}),
        (["export", "only-one"], {"convert"}),
    ],
)
def test_no_command_is_imported_but_the_one_that_is_called(
    args: list[str], modules: set[str]
) -> None:
    program = f"""if True:
        import contextlib, json, sys
        from megatron.bridge.cli import main
        with contextlib.redirect_stdout(sys.stderr):
            main({args!r})
        commands = "megatron.bridge.cli.commands."
        names = [name.removeprefix(commands) for name in sys.modules if name.startswith(commands)]
        print(json.dumps(names))
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert set(json.loads(done.stdout)) == modules


def test_help_answers_at_once() -> None:
    def cpu_seconds() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    seconds = []
    for command in ([], ["import"], ["verify"], [], ["compare"]):
        begin = cpu_seconds()
        done = subprocess.run(
            [sys.executable, "-m", "megatron.bridge", *command, "--help"], capture_output=True
        )
        seconds.append(cpu_seconds() - begin)
        assert done.returncode == 0
    # Of the processor, and the best of five: what else runs on the machine is not what is tested.
    assert 0 < min(seconds) < 0.5


def test_no_command_shows_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    status = main([])
    assert status == 2
    assert all(command in capsys.readouterr().err for command in [COMMANDS[0]])


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--version")
    assert status == 0
    assert out.startswith("megatron-bridge 0.")


# --- imports ---


def test_commands_on_folders_need_neither_torch_nor_megatron_core_nor_transformers(
    small_model: Path, tmp_path: Path
) -> None:
    """And megatron-core, when it is imported, says nothing."""
    program = """if True:
        import json, sys
        from megatron.bridge.cli import main, outcome
        model, out = sys.argv[1:]
        assert main(["inspect", model]) == 0
        assert main(["plan", model]) == 0
        assert main(["plan", model + "/config.json", "--json"]) == 0
        assert main(["import", model, out + "/megatron"]) == 0
        assert main(["inspect", out + "/megatron"]) == 0
        assert main(["plan", out + "/megatron"]) == 0
        assert main(["export", out + "/megatron", out + "/hf", "--hf", model]) == 0
        assert main(["verify", model, out + "/hf"]) == 0
        assert main(["verify", out + "/megatron", out + "/hf"]) == 0
        heavy = {"torch", "transformers", "megatron.core"} & set(sys.modules)
        print(json.dumps(sorted(heavy)), file=sys.stderr)
        import megatron.bridge.runtime, megatron.core.models.gpt.gpt_model
    """
    done = subprocess.run(
        [sys.executable, "-c", program, str(small_model), str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stderr.splitlines()[-1]) == []


@pytest.mark.parametrize("command", ["inspect", "plan"])
def test_a_look_at_a_model_needs_no_numpy(command: str, small_model: Path) -> None:
    program = """if True:
        import sys
        from megatron.bridge.cli import main
        assert main([*sys.argv[1:], "--json"]) == 0
        sys.exit(", ".join({"numpy", "yaml", "rich", "asyncio"} & set(sys.modules)) or None)
    """
    args = [sys.executable, "-c", program, command, str(small_model)]
    done = subprocess.run(args, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# --- make-model ---


def test_make_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--set", "text.num_hidden_layers=3", "--set", "tie_word_embeddings=true"]
    args = ["make-model", "--family", "qwen3-vl", *settings, "--seed", "5", "--out"]
    document = run_json(capsys, *args, tmp_path / "a")
    assert document["family"] == "qwen3-vl"
    assert document["seed"] == 5
    assert document["hf"]["keys"] == 115 - 2 * 11 - 1
    assert "chat_template.jinja" in document["files"]
    status, out, _ = run(capsys, *args, tmp_path / "b")
    assert status == 0
    assert f"{document['hf']['bytes']:,}" in out
    assert run_json(capsys, "verify", tmp_path / "a", tmp_path / "b")["identical"] is True


# --- inspect ---


def test_inspect_hf(small_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = run_json(capsys, "inspect", small_model)
    assert document["format"] == "huggingface"
    assert document["bridge"] == "Qwen3VLBridge"
    assert document["hf"]["keys"] == 115
    assert document["hf"]["dtypes"] == {"BF16": {"keys": 115, "bytes": document["hf"]["bytes"]}}
    assert sum(shard["bytes"] for shard in document["shards"]) == document["hf"]["bytes"]
    assert len(document["shards"]) == 3
    assert document["text"]["num_hidden_layers"] == 5
    assert document["vision"]["depth"] == 3
    assert document["rope"]["mrope_section"] == [6, 5, 5]
    assert (document["tied"], document["proven"], document["problems"]) == (False, True, [])
    padded = {"keys": 44, "bytes": document["hf"]["bytes"] + 2 * 77 * 160 * 2}
    assert document["megatron"] == {**padded, "dtypes": {"BF16": padded}}
    rows = {row["megatron"]: row for row in document["rows"]}
    qkv = rows["language_model.decoder.layers.{0...4}.self_attention.linear_qkv.weight"]
    assert qkv == {
        "megatron": "language_model.decoder.layers.{0...4}.self_attention.linear_qkv.weight",
        "hf": [f"model.language_model.layers.{{0...4}}.self_attn.{w}_proj.weight" for w in "qkv"],
        "layout": "qkv by group",
        "count": 5,
    }
    status, out, err = run(capsys, "inspect", small_model)
    assert (status, err) == (0, "")
    assert "= qkv by group: model.language_model.layers.{0...4}.self_attn.{q,k,v}_proj.w" in out
    assert "[gate; up]" in out
    assert "proven" in out


def test_inspect_config_alone(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run_json(capsys, "inspect", small_model)
    shutil.copy(small_model / "config.json", tmp_path)
    document = run_json(capsys, "inspect", tmp_path)
    assert document["origin"] == "config"
    for same in ("hf", "megatron", "rows", "text", "vision", "rope", "proven"):
        assert document[same] == whole[same]
    assert document["shards"] == []


def test_inspect_of_a_model_without_bridge(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(small_model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["LlavaForConditionalGeneration"]
    (folder / "config.json").write_text(json.dumps(config))
    status, out, err = run(capsys, "inspect", folder)
    assert status == 2
    assert "not proven" in out
    assert "115" in out
    assert "LlavaForConditionalGeneration: no bridge" in err


def test_inspect_megatron(small_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = run_json(capsys, "inspect", small_checkpoint)
    assert document["format"] == "megatron"
    assert document["iteration"] == "0"
    assert document["architecture"] == "Qwen3VLForConditionalGeneration"
    assert document["config_record"] is True
    assert document["megatron"]["keys"] == len(document["tensors"]) == 44
    assert document["objects"] == 53
    assert [file["name"] for file in document["files"]] == ["__0_0.distcp"]
    status, out, _ = run(capsys, "inspect", small_checkpoint / "iter_0000000")
    assert status == 0
    assert "0 (iter_0000000)" in out
    assert "5x384x160" in out
    assert "language_model.decoder.layers.self_attention.linear_qkv.layer_norm_weight" in out
    assert "vision_model.decoder.deepstack_merger_list.{0,1}.linear_fc2.bias" in out


def test_inspect_hub_id_in_the_cache(small_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from huggingface_hub.constants import HF_HUB_CACHE

    repository = Path(HF_HUB_CACHE) / "models--someone--small"
    shutil.copytree(small_model, repository / "snapshots" / "abc123")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc123")
    whole = run_json(capsys, "inspect", small_model)
    document = run_json(capsys, "inspect", "someone/small")
    assert document["source"] == "someone/small"
    assert document["rows"] == whole["rows"]
    assert document == run_json(capsys, "inspect", "someone/small", "--revision", "main")
    for shard in repository.rglob("*.safetensors"):
        shard.unlink()
    status, _, err = run(capsys, "inspect", "someone/small")
    assert status == 2
    assert "HF_HUB_OFFLINE" in err


# --- import, export, verify ---


def test_there_and_back(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    megatron, exported = tmp_path / "megatron", tmp_path / "exported"
    status, out, err = run(capsys, "import", small_model, megatron)
    assert status == 0
    assert "MB/s" in out
    assert err == "import: 100% of 5.56 MB" + err.removeprefix("import: 100% of 5.56 MB")
    document = run_json(capsys, "export", megatron, exported, "--hf", small_model)
    assert document["command"] == "export"
    assert (document["keys"], document["dropped"]) == (115, [])
    assert document["bytes"] == document["hf"]["bytes"]
    assert document["gigabytes_per_second"] == pytest.approx(
        document["bytes"] / document["seconds"] / 1e9
    )
    verified = run_json(capsys, "verify", small_model, exported)
    assert verified["identical"] is True
    assert (verified["equal"], verified["side_files"]) == (115, [])
    assert {p.name: p.read_bytes() for p in small_model.iterdir()} == {
        p.name: p.read_bytes() for p in exported.iterdir()
    }


def test_force_replaces_an_older_result(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_text("an older result")
    document = run_json(capsys, "import", small_model, tmp_path / "out", "--force")
    assert document["megatron"]["keys"] == 44
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        ".megatron-bridge.jsonl",
        "iter_0000000",
        "latest_checkpointed_iteration.txt",
    ]


def test_verify_of_different_models_ends_with_1(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    assert main(["make-model", "--family", "qwen3-vl", "--seed", "1", "--out", str(other)]) == 0
    capsys.readouterr()
    status, out, err = run(capsys, "verify", small_model, other)
    assert status == 1
    assert "they differ" in out
    assert "... and " in out
    assert err.splitlines()[-1] == (
        f"error: {small_model} and {other} differ: 115 tensors not equal, 0 only in A, 0 only in B"
    )
    assert main(["verify", str(small_model), str(other), "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["identical"] is False
    assert len(document["different"]) == 115
    first = document["different"][0]
    assert first["what"] == "bits"
    assert first["elements"] <= first["of"]
    assert first["max_abs_diff"] > 0


# --- the streams ---


def test_only_the_document_goes_to_stdout(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Libraries that print do so on stderr."""
    from megatron.bridge.models.conversion import transfer

    real = transfer.fill_megatron

    def chatty(*args: Any) -> Any:
        print("a library says hello")
        return real(*args)

    monkeypatch.setattr(transfer, "fill_megatron", chatty)
    assert main(["import", str(small_model), str(tmp_path / "out"), "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["command"] == "import"
    assert "a library says hello" in printed.err


def test_a_reader_that_goes_away(small_model: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as closed:  # noqa: PTH123  (a descriptor)
        done = subprocess.run(
            [sys.executable, "-m", "megatron.bridge", "inspect", str(small_model)],
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert (done.returncode, done.stderr) == (141, "")


def test_progress_lines() -> None:
    stream = io.StringIO()
    lines = ProgressLines(stream, seconds=0.0)
    lines.start("import", 1_000_000)
    for _ in range(100):
        lines.advance(10_000)
    written = stream.getvalue().splitlines()
    assert len(written) == 10
    assert written[2].startswith("import: 30% of 1.00 MB, ")
    lines.start("nothing", 0)
    lines.advance(0)
    assert len(stream.getvalue().splitlines()) == 10


def test_progress_lines_are_not_too_many() -> None:
    stream = io.StringIO()
    lines = ProgressLines(stream, seconds=3600.0)
    lines.start("import", 1000)
    for _ in range(100):
        lines.advance(10)
    assert [line[:14] for line in stream.getvalue().splitlines()] == ["import: 100% o"]


def test_units() -> None:
    assert format_bytes(0) == "0 B"
    assert format_bytes(999) == "999 B"
    assert format_bytes(1000) == "1.00 kB"
    assert format_bytes(4_255_064_064) == "4.26 GB"
    assert format_bytes(2.5e13) == "25.00 TB"


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_those_of_the_report(name: str) -> None:
    """They are found by the name of its class, which a checker of types does not see."""
    module, function = TABLES[name]
    renders = getattr(import_module(f"megatron.bridge.cli.render.{module}"), function)
    report, _ = renders.__annotations__.values()
    assert report == name


# --- the documentation ---


def test_documents_are_described(
    small_model: Path,
    small_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sections = {
        "JSON of a Hugging Face model:": ["inspect", small_model],
        "JSON of a Megatron checkpoint:": ["inspect", small_checkpoint],
        "JSON of `import` and `export`:": ["import", small_model, tmp_path / "out"],
        "JSON of `verify`:": ["verify", small_model, small_checkpoint],
        "JSON of `make-model`:": ["make-model", "--family", "qwen3-vl", "--out", tmp_path / "new"],
    }
    for section, args in sections.items():
        assert set(run_json(capsys, *args)) == documented_keys(section)


def test_every_command_and_status_is_described() -> None:
    text = DOCUMENTATION.read_text("utf-8")
    assert [command for command in COMMANDS if f"\n## {command}\n" not in text] == []
    statuses = {
        MismatchError.exit_status,
        outcome.BAD_INPUT,
        outcome.INTERNAL_ERROR,
        outcome.INTERRUPTED,
        outcome.BROKEN_PIPE,
        outcome.TERMINATED,
    }
    assert [status for status in statuses if f"\n| {status} | " not in text] == []
