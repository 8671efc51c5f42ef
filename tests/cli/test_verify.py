"""`verify` as a user types it: sizes, the fast mode, and how both end."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from cli_documentation import documented_keys
from megatron.bridge.cli import main
from megatron.bridge.cli.output import WIDTH
from megatron.bridge.errors import InputError
from megatron.bridge.target.record import MANIFEST_FILE
from megatron.bridge.text.sizes import parse_size, size_of

# --- sizes ---


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("1000000", 1_000_000),
        ("17B", 17),
        ("200KB", 200_000),
        ("200kB", 200_000),
        ("2GB", 2_000_000_000),
        ("5gb", 5_000_000_000),
        ("1TB", 10**12),
        ("3KiB", 3 << 10),
        ("512MiB", 512 << 20),
        ("1GiB", 1 << 30),
        ("2 TiB", 2 << 40),
        (" 1.5 GiB ", 3 << 29),
        ("0.1kB", 100),
        ("123456789012345678", 123_456_789_012_345_678),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        *"0 0GB 0.4 -1 +1 1G 1Gi 1GiBs GB 1,5GB 1_000 1e9 .5GB 1.GB 1iB 1PB nan \u0661GB".split(),
        *("", "9" * 19, "9" * 5000),
    ],
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not a valid size"):
        parse_size(text)
    with pytest.raises(InputError, match="--memory: "):
        size_of(text, "--memory")


# --- the command ---


def run(capsys: pytest.CaptureFixture[str], *args: str | Path) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `verify`."""
    status = main(["verify", *map(str, args)])
    printed = capsys.readouterr()
    assert max(map(len, printed.out.splitlines()), default=0) <= WIDTH
    return status, printed.out, printed.err


def document(capsys: pytest.CaptureFixture[str], *args: str | Path) -> tuple[int, Any, str]:
    """Exit status, document and stderr of `verify --json`."""
    status, out, err = run(capsys, *args, "--json")
    return status, json.loads(out) if out else None, err


@pytest.fixture
def checkpoint(small_checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(small_checkpoint, tmp_path / "checkpoint")


def damage(checkpoint: Path) -> None:
    (data, *_) = sorted((checkpoint / "iter_0000000").glob("*.distcp"))
    with data.open("r+b") as file:
        file.seek(50_001)
        byte = file.read(1)[0]
        file.seek(50_001)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("memory", ["5MiB", "64MiB", "2GB"])
def test_memory_does_not_change_the_result(
    memory: str, small_model: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, found, _ = document(capsys, small_model, checkpoint, "--memory", memory)
    assert (status, found["equal"], found["compared"]) == (0, 115, 115)
    damage(checkpoint)
    status, found, _ = document(capsys, small_model, checkpoint, "--memory", memory)
    assert (status, found["equal"], found["compared"]) == (1, 114, 115)
    (tensor,) = found["different"]
    assert (tensor["what"], tensor["elements"]) == ("bits", 1)


@pytest.mark.parametrize("args", [[], ["--fast"]])
def test_memory_has_to_be_enough_for_a_thread(
    args: list[str], checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for memory, reason in (("1MiB", "too small"), ("lots", "is not a valid size")):
        status, out, err = run(capsys, checkpoint, checkpoint, "--memory", memory, *args)
        assert (status, out) == (2, "")
        assert reason in err


def test_one_side_needs_fast(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, checkpoint)
    assert (status, out) == (2, "")
    assert err.startswith("error: B is missing")
    assert "--fast" in err


def test_fast(small_model: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, checkpoint, "--fast")
    assert status == 0
    assert "as it was written" in out
    for sides in ([checkpoint], [small_model, checkpoint], [checkpoint, small_model]):
        status, found, err = document(capsys, *sides, "--fast")
        assert (status, found["identical"], err) == (0, True, "")
        assert set(found) == documented_keys("JSON of `verify --fast`:")
        assert found["target"] == {"source": str(checkpoint), "format": "megatron"}
        assert (found["converted_from"] is None) == (len(sides) == 1)


def test_fast_names_what_changed(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(checkpoint)
    status, out, err = run(capsys, checkpoint, "--fast")
    assert status == 1
    assert "not as it was written" in out
    assert "__0_0.distcp" in out
    assert "\nlanguage_model.embedding.word_embeddings.weight\n" in out
    assert err.splitlines()[-1] == (
        f"error: {checkpoint} is not what was written: 1 range of 1 file changed"
    )
    status, found, err = document(capsys, checkpoint, "--fast")
    (changed,) = found["different"]
    assert (status, found["identical"]) == (1, False)
    assert changed["offset"] <= 50_001 < changed["offset"] + changed["bytes"]
    assert "language_model.embedding.word_embeddings.weight" in changed["tensors"]
    assert err.startswith("error: ")


def test_fast_says_that_the_source_is_another(
    small_model: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = shutil.copytree(small_model, tmp_path / "source")
    os.utime(source / "config.json", ns=(5, 5))
    status, out, err = run(capsys, source, checkpoint, "--fast")
    assert status == 1
    assert "config.json: modified" in out
    assert "without --fast" in err
    status, found, _ = document(capsys, source, checkpoint, "--fast")
    assert (status, found["identical"], found["different"]) == (1, False, [])
    assert found["converted_from"] == {
        "source": str(source),
        "format": "huggingface",
        "changes": ["config.json: modified"],
    }


def test_fast_needs_checksums(
    small_model: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint / MANIFEST_FILE).unlink()
    for sides in ([checkpoint], [small_model, checkpoint]):
        status, out, err = run(capsys, *sides, "--fast")
        assert (status, out) == (2, "")
        assert MANIFEST_FILE in err
        assert "without --fast" in err


def test_names_in_a_manifest_do_not_reach_the_terminal_as_they_are(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint / MANIFEST_FILE
    head = path.read_text().splitlines()[0]
    file = json.dumps({"name": "a\x1b[2Jb", "nbytes": 1, "pieces": [[1, 2]]})
    path.write_text(f"{head}\n{file}\n")
    status, out, err = run(capsys, checkpoint, "--fast")
    assert status == 1
    assert "\x1b" not in out + err
