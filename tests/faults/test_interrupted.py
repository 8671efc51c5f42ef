"""Conversions that end early: a full disk, a source that changes, Ctrl-C. There is no target."""

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron.bridge.cli import main
from megatron.bridge.errors import CheckpointError, InputError, SourceChanged
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.operations.convert import import_checkpoint
from megatron.bridge.synthetic import make_model
from megatron.bridge.target import folder as target_folder
from megatron.bridge.target.run import Run
from slow_conversion import MEMORY, convert

AFTER = 20
"""Pieces that are written before something happens: a file is finished, another one begun."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make_model("qwen3-vl", folder / "hf", {"num_shards": 2, "text.vocab_size": 9001}, seed=22)
    convert("import", folder, folder / "megatron")
    return folder


@pytest.fixture(autouse=True)
def everything_is_worth_keeping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_folder, "WORTH_KEEPING", 1)


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy to change, `hf` and `megatron`; there is nothing else beside."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def after(pieces: int, happen: Callable[[], object]) -> Callable[[], None]:
    """Lets something happen once, when so many pieces are written."""
    left = iter(range(pieces, -1, -1))

    def count() -> None:
        if next(left, -1) == 0:
            happen()

    return count


@contextmanager
def full_disk() -> Iterator[Callable[[], None]]:
    """Lets no file be written from then on: like a full disk, and without being root."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("direction", ["import", "export"])
def test_a_disk_that_takes_no_more(direction: str, folder: Path) -> None:
    out = folder / "out"
    with full_disk() as fill_up, pytest.raises(CheckpointError, match="cannot be written"):
        convert(direction, folder, out, after_piece=after(AFTER, fill_up))
    assert names(folder) == ["hf", "megatron", "out.partial"]


@pytest.mark.parametrize("direction", ["import", "export"])
def test_room_is_made_and_it_goes_on(direction: str, folder: Path) -> None:
    out = folder / "out"

    def fail() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        convert(direction, folder, out, after_piece=after(AFTER, fail))
    assert convert(direction, folder, out, resume=True).written.resumed_bytes
    assert names(folder) == ["hf", "megatron", "out"]


def one_weight_file(direction: str, folder: Path) -> Path:
    pattern = "hf/*.safetensors" if direction == "import" else "megatron/*/*.distcp"
    return max(folder.glob(pattern))


@pytest.mark.parametrize("direction", ["import", "export"])
def test_a_source_that_is_cut(direction: str, folder: Path) -> None:
    source = one_weight_file(direction, folder)

    def cut() -> None:
        os.truncate(source, 4000)

    with pytest.raises(CheckpointError, match=r"it ends at byte|changed while") as error:
        convert(direction, folder, folder / "out", after_piece=after(AFTER, cut))
    assert source.name in str(error.value)
    assert not (folder / "out").exists()


@pytest.mark.parametrize("direction", ["import", "export"])
def test_a_source_that_changes(direction: str, folder: Path) -> None:
    """Of the same length, in bytes that were read already or not: nobody knows."""
    source = one_weight_file(direction, folder)

    def change() -> None:
        with source.open("r+b") as file:
            file.seek(-100, os.SEEK_END)
            file.write(b"x")

    with pytest.raises(SourceChanged, match="changed while it was converted") as error:
        convert(direction, folder, folder / "out", after_piece=after(AFTER, change))
    assert source.name in str(error.value)
    assert names(folder) == ["hf", "megatron"]


def test_what_is_resumed_is_the_same_conversion(folder: Path) -> None:
    out = folder / "out"

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as interrupted:
        convert("import", folder, out, after_piece=after(AFTER, stop))
    assert "--resume" in "".join(interrupted.value.__notes__)
    hf = PreTrainedVLM.from_pretrained(folder / "hf")
    with pytest.raises(InputError, match=r"go on with --resume"):
        import_checkpoint(hf, out)
    with pytest.raises(InputError, match="layout of the output files"):
        import_checkpoint(hf, out, run=Run(MEMORY, 300_000, resume=True))
    (folder / "hf" / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(InputError, match=r"model-00001-of-00002\.safetensors"):
        convert("import", folder, out, resume=True)
    assert names(folder) == ["hf", "megatron", "out.partial"]
    import_checkpoint(hf, out, run=Run(force=True))
    assert names(folder) == ["hf", "megatron", "out"]


def test_ctrl_c(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command says what is left and how to go on; then it does."""
    from megatron.bridge.progress_lines import ProgressLines

    press = after(AFTER, lambda: os.kill(os.getpid(), signal.SIGINT))
    monkeypatch.setattr(ProgressLines, "advance", lambda self, nbytes: press())
    args = ["import", str(folder / "hf"), str(folder / "out"), "--memory", str(MEMORY)]
    args += ["--max-shard-size", "1MiB"]
    assert main(args) == 130
    said = capsys.readouterr().err
    assert "interrupted" in said
    assert "out.partial; go on with --resume" in said
    assert "Traceback" not in said
    assert names(folder) == ["hf", "megatron", "out.partial"]
    assert main([*args, "--resume", "--verify", "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    resumed = done["written"]["resumed_bytes"]
    assert 0 < resumed < done["bytes"]
    moved = done["gigabytes_per_second"] * 1e9 * done["seconds"]
    assert moved == pytest.approx(done["bytes"] - resumed)
    assert names(folder) == ["hf", "megatron", "out"]
