"""An unfinished target: a run leaves nothing, what can be resumed, or the target."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from megatron.bridge.errors import (
    CheckpointError,
    InputError,
    MismatchError,
    SourceChanged,
    TargetExists,
)
from megatron.bridge.target import folder
from megatron.bridge.target.checksums import check_files
from megatron.bridge.target.fingerprint import Fingerprint, SourceFile
from megatron.bridge.target.folder import ResumableFolder
from megatron.bridge.target.job import Job
from megatron.bridge.target.record import MANIFEST_FILE, read_manifest
from megatron.bridge.target.targets import check_target, partial_of
from unfinished_target import (
    FILES,
    JOB,
    SIZES,
    convert,
    fail,
    killed,
    names,
    record,
    run,
    tree,
    write,
)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The target of a run that nothing happened to."""
    target = tmp_path_factory.mktemp("expected") / "out"
    convert(target)
    return tree(target)


@pytest.fixture(autouse=True)
def everything_is_worth_keeping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "WORTH_KEEPING", 1)


@pytest.fixture(autouse=True)
def on_disk(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was brought to the disk, not really: a kill loses nothing that the kernel has."""
    synced: list[str] = []

    def fsync(descriptor: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))

    monkeypatch.setattr(os, "fsync", fsync)
    return synced


# --- a run that nothing happens to ---


def test_it_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "new" / "out"
    with ResumableFolder(target, JOB, SIZES) as partial:
        assert partial.path == tmp_path / "new" / "out.partial"
        assert (set(partial.finished), partial.resumed_bytes) == (set(), 0)
        assert write(partial) == FILES
        assert names(target.parent) == ["out.partial"]
        partial.commit()
    assert names(target.parent) == ["out"]
    assert set(tree(target)) == {*SIZES, MANIFEST_FILE}
    manifest = read_manifest(target)
    assert manifest is not None
    assert manifest.job == JOB
    assert list(manifest.files) == [record(name) for name in sorted(SIZES)]
    assert check_files(target, manifest) == []


def test_everything_is_on_the_disk_when_it_appears(tmp_path: Path, on_disk: list[str]) -> None:
    convert(tmp_path / "out")
    partial = tmp_path / "out.partial"
    # Files that are recorded are there already: `test_a_file_is_flushed_before_it_is_told`.
    expected = {str(partial / "empty"), str(partial), str(partial / "iter_1")}
    assert expected <= set(on_disk)
    *_, manifest, renamed, parent = on_disk
    assert manifest == str(partial / ".megatron-bridge.new")
    assert (renamed, parent) == (str(partial), str(tmp_path))


def test_force_replaces_a_model_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "config.json").write_text("old")
    with pytest.raises(TargetExists, match="exists already"):
        convert(target)
    fail(target, OSError("disk"), 1, force=True)
    assert (target / "config.json").read_text() == "old"
    convert(target, force=True)
    assert names(tmp_path) == ["out"]
    assert set(tree(target)) == {*SIZES, MANIFEST_FILE}


def test_the_old_target_comes_back_if_the_renaming_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    convert(target)
    before = tree(target)
    rename = Path.rename

    def failing(path: Path, to: Path) -> Path:
        if path.name == "out.partial":
            raise OSError(5, "Input/output error")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output"):
        convert(target, force=True)
    assert names(tmp_path) == ["out", "out.partial"]
    assert tree(target) == before
    monkeypatch.undo()
    assert convert(target, resume=True, force=True) == sum(SIZES.values())


def test_a_target_that_appears_meanwhile(tmp_path: Path, expected: dict[str, bytes]) -> None:
    target = tmp_path / "out"

    def work(partial: ResumableFolder) -> None:
        write(partial)
        target.mkdir()
        (target / "config.json").touch()
        partial.commit()

    with pytest.raises(TargetExists, match="exists already") as raised:
        run(target, work)
    assert "--resume" in raised.value.__notes__[0]
    assert names(tmp_path) == ["out", "out.partial"]
    assert convert(target, resume=True, force=True) == sum(SIZES.values())
    assert tree(target) == expected


# --- what a failed run leaves ---


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(28, "No space left"), SystemExit(3)]
)
def test_what_is_finished_is_kept_and_said(tmp_path: Path, error: BaseException) -> None:
    fail(tmp_path / "out", error)
    [note] = error.__notes__
    assert f"{tmp_path / 'out.partial'}; go on with --resume" in note
    assert names(tmp_path) == ["out.partial"]
    assert convert(tmp_path / "out", resume=True) == 11 + 70


def test_no_finished_file_leaves_nothing(tmp_path: Path) -> None:
    fail(tmp_path / "out", KeyboardInterrupt(), 0)
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [SourceChanged("changed"), MismatchError("differs")])
def test_what_is_no_part_of_a_right_target_is_removed(tmp_path: Path, error: Exception) -> None:
    fail(tmp_path / "out", error)
    assert names(tmp_path) == []
    fail(tmp_path / "out", KeyboardInterrupt())
    fail(tmp_path / "out", error, resume=True)
    assert names(tmp_path) == []


def test_a_check_before_the_end(tmp_path: Path) -> None:
    def check() -> None:
        assert set(tree(tmp_path / "out.partial")) > set(SIZES) - {"empty"}
        raise SourceChanged("changed")

    def work(partial: ResumableFolder) -> None:
        write(partial)
        partial.commit(check)

    with pytest.raises(SourceChanged):
        run(tmp_path / "out", work)
    assert names(tmp_path) == []


@pytest.mark.parametrize("fault", ["a file missing", "a file cut", "a file too many"])
def test_what_is_not_complete_is_not_committed(tmp_path: Path, fault: str) -> None:
    messages = {
        "a file missing": r"iter_1/b\.bin: it was not written to its end",
        "a file cut": "should have 11 bytes and has 3",
        "a file too many": "note.txt: this is no file of the target",
    }

    def work(partial: ResumableFolder) -> None:
        write(partial, 2 if fault == "a file missing" else None)
        if fault == "a file cut":
            os.truncate(partial.path / "config.json", 3)
        if fault == "a file too many":
            (partial.path / "note.txt").touch()
        partial.commit()

    with pytest.raises(CheckpointError, match=messages[fault]):
        run(tmp_path / "out", work)
    assert names(tmp_path) == ["out.partial"]


# --- resuming ---


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_killed_run_is_resumed(tmp_path: Path, expected: dict[str, bytes], count: int) -> None:
    target = tmp_path / "out"
    killed(target, count)
    assert names(tmp_path) == ["out.partial"]
    with ResumableFolder(target, JOB, SIZES, resume=True) as partial:
        assert set(partial.finished) == set(FILES[:count])
        assert write(partial, 1) == FILES[count : count + 1]
    assert convert(target, resume=True) == sum(SIZES[name] for name in FILES[: count + 1])
    assert tree(target) == expected


def test_nothing_was_finished_when_it_was_killed(
    tmp_path: Path, expected: dict[str, bytes]
) -> None:
    killed(tmp_path / "out", 0)
    assert names(tmp_path) == ["out.partial"]
    assert convert(tmp_path / "out", resume=True) == 0
    assert tree(tmp_path / "out") == expected


def test_resume_without_anything_to_resume(tmp_path: Path, expected: dict[str, bytes]) -> None:
    assert convert(tmp_path / "out", resume=True) == 0
    assert tree(tmp_path / "out") == expected


def test_without_resume_it_is_refused_and_with_force_done_again(tmp_path: Path) -> None:
    target = tmp_path / "out"
    killed(target)
    before = tree(tmp_path)
    with pytest.raises(InputError, match=r"go on with --resume .* or start again with --force"):
        convert(target)
    assert tree(tmp_path) == before
    assert convert(target, force=True) == 0
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("job", "difference"),
    [
        (replace(JOB, options={"experts": "fused"}), "option experts: was not given, now 'fused'"),
        (replace(JOB, package="9.9"), "now 9.9"),
        (replace(JOB, layout="01"), "the layout of the output files"),
        (
            replace(
                JOB, sources={"source": Fingerprint((SourceFile("a.safetensors", 9, 34, "ab"),))}
            ),
            "source: a.safetensors: size 120 -> 9",
        ),
    ],
)
def test_another_job_is_refused(tmp_path: Path, job: Job, difference: str) -> None:
    target = tmp_path / "out"
    killed(target)
    before = tree(tmp_path)
    with pytest.raises(InputError, match="was begun as another conversion") as raised:
        convert(target, job, resume=True)
    assert f"  - {difference}" in str(raised.value).replace("megatron-bridge: was 0.1.0.dev0, ", "")
    assert "--force" in str(raised.value)
    assert tree(tmp_path) == before
    assert convert(target, resume=True) > 0


def test_a_torn_line_is_a_file_to_be_done(tmp_path: Path, expected: dict[str, bytes]) -> None:
    target = tmp_path / "out"
    killed(target)
    path = tmp_path / "out.partial" / MANIFEST_FILE
    os.truncate(path, path.stat().st_size - 4)
    assert convert(target, resume=True) == 11
    assert tree(target) == expected


def test_a_file_that_was_cut_is_done_again(tmp_path: Path, expected: dict[str, bytes]) -> None:
    target = tmp_path / "out"
    killed(target, 3)
    os.truncate(tmp_path / "out.partial/iter_1/a.bin", 63)
    assert convert(target, resume=True) == 11 + 64
    assert tree(target) == expected


def test_a_link_is_a_file_to_be_done(tmp_path: Path, expected: dict[str, bytes]) -> None:
    """It is replaced, and what it leads to stays as it is."""
    target, path = tmp_path / "out", tmp_path / "out.partial/iter_1/a.bin"
    killed(target, 3)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    before = (tmp_path / "elsewhere").read_bytes()
    assert convert(target, resume=True) == 11 + 64
    assert tree(target) == expected
    assert not (target / "iter_1/a.bin").is_symlink()
    assert (tmp_path / "elsewhere").read_bytes() == before


def test_a_record_without_a_first_line_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "out"
    killed(target)
    (tmp_path / "out.partial" / MANIFEST_FILE).write_bytes(b"\0" * 50)
    with pytest.raises(CheckpointError, match="cannot be read; start again with --force"):
        convert(target, resume=True)
    convert(target, force=True)


def test_what_is_not_complete_has_no_manifest(tmp_path: Path) -> None:
    killed(tmp_path / "out", 3)
    with pytest.raises(CheckpointError, match="the target is not complete"):
        read_manifest(tmp_path / "out.partial")


# --- one run at a time; nothing of others is touched ---


@contextmanager
def another_run(target: Path, *, resume: bool = False) -> Iterator[None]:
    """A run of another process that stays in the middle of its work."""
    ready, child_ready = os.pipe()
    child = os.fork()
    if not child:
        try:
            with ResumableFolder(target, JOB, SIZES, resume=resume) as partial:
                write(partial, 1)
                os.write(child_ready, b"!")
                signal.pause()
        finally:
            os._exit(1)
    os.read(ready, 1)
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(child_ready)


@pytest.mark.parametrize("resumed", [False, True])
def test_two_runs_never_write_into_one(tmp_path: Path, resumed: bool) -> None:
    target = tmp_path / "out"
    if resumed:
        killed(target)
    with another_run(target, resume=resumed):
        before = tree(tmp_path)
        for options in ({}, {"resume": True}, {"force": True}):
            with pytest.raises(InputError, match="in use by another run"):
                convert(target, **options)
        assert tree(tmp_path) == before
    assert convert(target, resume=True) > 0  # the lock went with the process


@pytest.mark.parametrize("inside", [None, "notes.txt", ".megatron-bridge.txt"])
def test_a_folder_of_somebody_else_is_never_touched(tmp_path: Path, inside: str | None) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    if inside:
        (partial / inside).write_text("mine")
    before = tree(tmp_path)
    for options in ({}, {"resume": True}, {"force": True}):
        with pytest.raises(InputError, match="is in the way"):
            convert(tmp_path / "out", **options)
    assert tree(tmp_path) == before
    assert partial.is_dir()


def test_a_complete_target_of_that_name_is_not_removed(tmp_path: Path) -> None:
    convert(tmp_path / "model")
    (tmp_path / "model").rename(tmp_path / "out.partial")
    with pytest.raises(InputError, match="is complete"):
        convert(tmp_path / "out", force=True)
    with pytest.raises(InputError, match="another conversion"):
        convert(tmp_path / "out", replace(JOB, layout="01"), resume=True)
    assert set(tree(tmp_path / "out.partial")) == {*SIZES, MANIFEST_FILE}


def test_names_of_unfinished_targets_are_refused(tmp_path: Path) -> None:
    for target in (tmp_path / "x.partial", Path("/"), tmp_path / ".."):
        with pytest.raises(InputError, match=r"unfinished targets|cannot be a target"):
            partial_of(target)
    (tmp_path / "out.partial").mkdir()
    with pytest.raises(InputError, match="overlap"):
        check_target(tmp_path / "out", [tmp_path / "out.partial"], force=True)


def test_room_is_looked_for_before_anything_is_written(tmp_path: Path) -> None:
    sizes = {"a": 10**18, "b": 5}
    with (
        pytest.raises(
            InputError, match=r"1,000,000,000,000,000,005 bytes are to be written, [\d,]+"
        ),
        ResumableFolder(tmp_path / "out", JOB, sizes),
    ):
        pass
    assert names(tmp_path) == []
