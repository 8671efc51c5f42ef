"""The benchmarks measure what they say: processes, models, and a run from end to end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import (
    disk_speed,
    live_filling,
    loop_disk,
    processes,
    rounds,
    shared_blocks,
    slow_disk,
)
from benchmarks.cases import CASES, MEMORY, SPEED, START, Case, reduced
from benchmarks.cli import main
from benchmarks.exchange import WAYS
from benchmarks.live_forward import FAMILIES
from benchmarks.model_files import ModelFiles, RandomWeights
from benchmarks.processes import BenchmarkError, Measurement, run
from benchmarks.rounds import (
    COPY_HF,
    COPY_MEGATRON,
    EXPORT,
    IMPORT,
    TORCH,
    VERIFY,
    check_same,
    in_order,
)

import forked
from megatron.bridge.cli import main as bridge

MIB = 2**20


# --- Processes -----------------------------------------------------------------------------------

PROGRAM = """if True:
    import json, time
    {before}
    begin = time.perf_counter()
    {work}
    print(json.dumps({{"seconds": time.perf_counter() - begin}}), flush=True)
    {behind}
"""


def program(before: str = "", work: str = "", behind: str = "") -> list[str]:
    lines = [text.replace("\n", "\n    ") for text in (before, work, behind)]
    return [sys.executable, "-c", PROGRAM.format(before=lines[0], work=lines[1], behind=lines[2])]


def test_a_process_is_measured_in_its_parts() -> None:
    done, document = run(
        program(
            "a = bytearray(b'x') * (40 << 20); time.sleep(0.4)",
            "b = bytearray(b'x') * (90 << 20); time.sleep(0.3); del b",
            "time.sleep(0.1)",
        )
    )
    assert done.seconds == document["seconds"]
    assert done.start_seconds >= 0.4
    assert done.seconds >= 0.3
    assert done.wall_seconds - done.start_seconds - done.seconds >= 0.1
    assert 40 * MIB < done.start_bytes < 80 * MIB
    assert 130 * MIB < done.peak_bytes < 180 * MIB


def test_cpu_time_of_threads_and_of_the_start_is_counted() -> None:
    spin = "end = time.process_time() + {}\nwhile time.process_time() < end: pass"
    done, _ = run(program(f"{spin.format(0.2)}\ntime.sleep(0.4)", spin.format(0.3)))
    assert done.start_cpu_seconds >= 0.2
    assert done.cpu_seconds - done.start_cpu_seconds >= 0.3


def test_files_that_are_mapped_are_no_memory_but_children_are(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(60 * MIB))
    read = (
        "import mmap\n"
        f"file = open({str(file)!r}, 'rb')\n"
        "mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)\n"
        "total = sum(mapped[::4096]); time.sleep(0.1)"
    )
    assert run(program(work=read))[0].peak_bytes < 50 * MIB
    child = "import time; a = bytearray(b'x') * (60 << 20); time.sleep(0.8)"
    start = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}])"
    assert run(program(work=start))[0].peak_bytes > 60 * MIB


def test_a_process_that_fails_is_an_error_with_its_message() -> None:
    with pytest.raises(BenchmarkError, match=r"exit status 3: (.|\n)*a bad end"):
        run(program(work="import sys; print('a bad end', file=sys.stderr); sys.exit(3)"))


def test_nothing_that_was_started_goes_on_behind_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(process: subprocess.Popen[bytes]) -> tuple[bytes, float]:
        assert process.stdout is not None
        process.stdout.readline()
        raise KeyboardInterrupt

    monkeypatch.setattr(processes, "_read", interrupted)
    script = 'sleep 60 & echo $! > "$1"; echo begun; wait'
    with pytest.raises(KeyboardInterrupt):
        run(["sh", "-c", script, "sh", str(tmp_path / "pid")])
    status = Path(f"/proc/{int((tmp_path / 'pid').read_text())}/stat")
    deadline = time.monotonic() + 30  # it is killed, which a busy machine takes a moment for
    while goes_on(status):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def goes_on(status: Path) -> bool:
    """Of a process, by /proc/<pid>/stat; one that is dead may still be listed."""
    try:
        return not status.read_text().rpartition(") ")[2].startswith("Z")
    except FileNotFoundError:
        return False


def test_rounds_begin_with_different_steps_and_go_both_ways() -> None:
    steps = "abcde"
    orders = ["".join(in_order(steps, number)) for number in range(5)]
    assert orders == ["abcde", "baedc", "cdeab", "dcbae", "eabcd"]
    assert all(sorted(order) == list(steps) for order in orders)


def test_the_copy_copies_and_all_of_it_is_work(tmp_path: Path) -> None:
    files = ModelFiles(tiny("dense"), tmp_path)
    (files.folder / "inner").mkdir(parents=True)
    (files.folder / "one").write_bytes(b"12345")
    (files.folder / "inner" / "two").write_bytes(b"678")
    (step,) = (s for s in rounds.Bench(files, print)._steps() if s.name == COPY_HF)
    done, _ = run(step.command)
    assert step.made is not None
    assert (step.made / "one").read_bytes() == b"12345"
    assert (step.made / "inner" / "two").read_bytes() == b"678"
    assert done.wall_seconds == done.seconds > 0
    assert (done.start_seconds, done.start_cpu_seconds, done.start_bytes) == (0, 0, 0)


def test_what_stands_beside_what() -> None:
    assert rounds.beside(SPEED, EXPORT) == COPY_MEGATRON
    assert rounds.beside(START, EXPORT) == TORCH
    assert rounds.beside(MEMORY, EXPORT) is None
    assert rounds.beside(SPEED, COPY_HF) is None


# --- Disks ---------------------------------------------------------------------------------------


def test_the_speed_of_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way writes all its bytes, and leaves none."""
    written: list[tuple[str, int]] = []
    pwrite = os.pwrite

    def noted(descriptor: int, data: memoryview, offset: int) -> int:
        written.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, len(data)))
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", noted)
    found = disk_speed.measure(tmp_path, 64 * MIB)
    assert list(found) == list(disk_speed.WAYS)
    assert all(speed > 0 for (speed,) in found.values())
    assert sum(length for _, length in written) == 3 * 64 * MIB
    assert {name for name, _ in written} == {f"speed-{number}" for number in range(4)}
    assert list(tmp_path.iterdir()) == []
    joined = disk_speed.joined([found, found])
    assert all(joined[way] == 2 * speeds for way, speeds in found.items())


def test_a_slow_disk_is_for_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with (
        pytest.raises(BenchmarkError, match="--slow-disk makes a block device: run it as root"),
        slow_disk.slow_disk(tmp_path, 0.4, MIB),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_slow_disk_without_its_tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    with (
        pytest.raises(BenchmarkError, match=r"needs losetup, mkfs\.ext4, mount, umount"),
        slow_disk.slow_disk(tmp_path, 0.4, MIB),
    ):
        pass


class Tools:
    """Stands for the commands: notes them, and makes nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, groups: Path) -> None:
        self.called: list[str] = []
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        monkeypatch.setattr(shutil, "which", lambda tool: f"/sbin/{tool}")
        monkeypatch.setattr(loop_disk, "_run", self._run)
        monkeypatch.setattr(slow_disk, "_GROUPS", groups)
        monkeypatch.setattr(slow_disk, "write", lambda *_: self.speed)
        monkeypatch.setattr(os, "posix_fallocate", lambda *_: None)
        self.speed = 0.41

    def _run(self, _option: str, *command: str) -> str:
        self.called.append(command[0])
        return "/dev/null"  # number 1:3


def test_a_slow_disk_is_held_back_and_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = tmp_path / "groups"
    (groups / "blkio").mkdir(parents=True)
    limits = [groups / "blkio" / f"blkio.throttle.{way}_bps_device" for way in ("read", "write")]
    tools = Tools(monkeypatch, groups)
    with slow_disk.slow_disk(tmp_path, 0.4, MIB) as mounted:
        assert mounted.is_dir()
        assert [file.read_text() for file in limits] == ["1:3 400000000\n"] * 2
    assert [file.read_text() for file in limits] == ["1:3 0\n"] * 2
    assert tools.called == ["losetup", "mkfs.ext4", "mount", "umount", "losetup"]
    assert list(tmp_path.iterdir()) == [groups]


def test_a_disk_that_is_busy_is_left_to_the_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "blkio").mkdir()
    tools = Tools(monkeypatch, tmp_path)
    monkeypatch.setattr(loop_disk, "_PATIENCE", 2)
    called: list[tuple[str, ...]] = []

    def busy(option: str, *command: str) -> str:
        called.append(command[:2])
        if command[0] == "umount" and command[1] != "--lazy":
            raise BenchmarkError("target is busy")
        return tools._run(option, *command)

    monkeypatch.setattr(loop_disk, "_run", busy)
    with slow_disk.slow_disk(tmp_path, 0.4, MIB) as mounted:
        pass
    plain = ("umount", str(mounted))
    assert called[-4:] == [plain, plain, ("umount", "--lazy"), ("losetup", "--detach")]
    assert not mounted.exists()


def test_a_kernel_that_does_not_hold_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "blkio").mkdir()
    tools = Tools(monkeypatch, tmp_path)
    tools.speed = 1.3
    with (
        pytest.raises(BenchmarkError, match=r"writes 1\.30 GB/s, not 0\.4: this kernel does not"),
        slow_disk.slow_disk(tmp_path, 0.4, MIB),
    ):
        pass
    assert tools.called[-2:] == ["umount", "losetup"]


def test_control_groups_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = Tools(monkeypatch, tmp_path / "none")
    with (
        pytest.raises(BenchmarkError, match="needs the block I/O controller of the control groups"),
        slow_disk.slow_disk(tmp_path, 0.4, MIB),
    ):
        pass
    assert tools.called[-2:] == ["umount", "losetup"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("given", [["--slow-disk=0"], ["--slow-disk=0.4", "--keep"]])
def test_a_slow_disk_that_cannot_be(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*given, f"--folder={tmp_path}"]) == 1
    assert given[-1].partition("=")[0] in capsys.readouterr().err


# --- Models --------------------------------------------------------------------------------------


def test_random_weights_are_of_an_ordinary_size_and_all_different() -> None:

    random = RandomWeights()
    names = {f"layers.{number}.weight": count for number, count in enumerate((40_000, 40_000, 333))}

    def data(name: str, count: int) -> bytes:
        return b"".join(random.blocks(name, count))

    drawn = {name: data(name, count) for name, count in names.items()}
    assert [len(values) for values in drawn.values()] == [80_000, 80_000, 666]
    assert len({values[:400] for values in drawn.values()}) == 3
    assert drawn == {name: data(name, count) for name, count in names.items()}
    values = torch.frombuffer(bytearray(drawn["layers.0.weight"]), dtype=torch.bfloat16).float()
    assert bool(values.isfinite().all())
    assert 0.01 < values.std() < 0.04
    # More than one block, which do not repeat one another.
    long = data("long", 9_000_000)
    assert len(long) == 18_000_000
    assert len(zlib.compress(long[: 4 * MIB], 1)) > 0.75 * 4 * MIB
    blocks = [bytes(block) for block in random.blocks("long", 9_000_000)]
    assert blocks[0][: len(blocks[1])] != blocks[1]


def tiny(name: str, layers: int = 1) -> Case:
    return reduced(next(case for case in CASES if case.name == name), layers, tiny=True)


def test_files_are_those_of_the_layout_and_are_used_again(tmp_path: Path) -> None:
    from megatron.bridge.operations.inspection.hf_report import inspect_hf

    files = ModelFiles(tiny("moe"), tmp_path)
    assert not files.ready()
    files.make()
    assert files.ready()
    assert files.weights == ["model.safetensors"]
    report = inspect_hf(str(files.folder))
    assert report.problem is None
    assert report.description["experts"].value["decoder"] == "fused-transposed"
    weights = files.folder / files.weights[0]
    written = weights.stat().st_mtime_ns
    assert files.file_bytes() == weights.stat().st_size > files.nbytes
    files.make()
    assert weights.stat().st_mtime_ns == written
    os.truncate(weights, 100)
    assert not files.ready()
    assert not ModelFiles(tiny("moe", layers=2), tmp_path).ready()
    files.make()
    assert weights.stat().st_size > 100
    files.remove()
    assert list(tmp_path.iterdir()) == []


def test_large_models_are_split_as_released(tmp_path: Path) -> None:
    case = tiny("dense")
    split = replace(case, settings={**case.settings, "max_shard_size": 1_000_000})
    files = ModelFiles(split, tmp_path)
    files.make()
    index = json.loads((files.folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files.weights) - {
        "model.safetensors.index.json"
    }
    assert len(files.weights) > 3
    assert index["metadata"]["total_size"] == files.nbytes


def test_full_sizes_are_the_real_ones() -> None:
    sizes = {case.name: ModelFiles(case, Path()).nbytes for case in CASES if case.name != "small"}
    assert (sizes["dense"], sizes["dense-large"]) == (4_255_064_064, 8_875_631_616)
    assert sizes["moe"] >= 4e9
    for case in CASES:
        if case.base is not None:
            assert sizes[case.name] >= 2 * sizes[case.base]
    # Nothing but a kept source of each speed case, and three times one model, lies on the disk.
    assert sizes["dense"] + sizes["moe"] + 3 * max(sizes.values()) < 40e9


def test_an_export_that_is_not_the_original_is_an_error(tmp_path: Path) -> None:
    for folder, data in (("a", b"12345"), ("b", b"12346")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same").write_bytes(b"0")
        (tmp_path / folder / "weights").write_bytes(data)
        os.utime(tmp_path / folder / "weights", (1, 1))
    check_same(["same"], tmp_path / "a", tmp_path / "b")
    with pytest.raises(BenchmarkError, match="weights: export does not give back"):
        check_same(["same", "weights"], tmp_path / "a", tmp_path / "b")


# --- The whole -----------------------------------------------------------------------------------


def test_too_small_a_disk_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: full)
    assert main(["--case", "moe", "--tiny", "--folder", str(tmp_path)]) == 1
    assert "0.0 GB free" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


TINY = ("--tiny", "--layers=1", "--rounds=1")


def test_commands_are_measured_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the measuring, which is tested above: the commands are real, but forked."""

    def forked_run(command: Sequence[str]) -> tuple[Measurement, dict[str, Any]]:
        assert command[:3] == [sys.executable, "-m", "megatron.bridge"]
        done = forked.run(bridge, command[3:])
        assert done.returncode == 0, done.stderr
        document = json.loads(done.stdout)
        return Measurement(3.0, 1.0, document["seconds"], 2.5, 0.5, 7 * MIB, 4 * MIB), document

    monkeypatch.setattr(rounds, "run", forked_run)
    monkeypatch.setattr(rounds, "SETTLE_SECONDS", 0)
    folder, out = tmp_path / "files", tmp_path / "out"
    given = [*TINY, "--case=moe-large", f"--folder={folder}", f"--out={out}"]
    assert main(given) == 0
    assert list(folder.iterdir()) == []
    document = json.loads((out / "benchmarks.json").read_text("utf-8"))
    assert document["command"] == 'make bench ARGS="--rounds=1 --case=moe-large --layers=1 --tiny"'
    (case,) = document["cases"]
    assert case["role"] == MEMORY
    assert list(case["runs"]) == [IMPORT, EXPORT, VERIFY]
    for figures in case["figures"].values():
        assert figures["above_bytes"] > 0
        assert figures["own_bytes"] > 0
        assert figures["seconds"]["median"] > 0


def test_a_model_is_filled_and_its_files_are_read(tmp_path: Path) -> None:
    files = ModelFiles(tiny("dense"), tmp_path)
    files.make()
    threads = torch.get_num_threads()
    filled, parameters = live_filling.fill(files.folder)
    read, nbytes = live_filling.read(files.folder)
    torch.set_num_threads(threads)
    assert nbytes == sum(path.stat().st_size for path in files.folder.glob("*.safetensors"))
    assert 0.9 * nbytes < parameters < 1.2 * nbytes
    assert filled > read > 0


@pytest.mark.slow
@pytest.mark.skipif(
    not loop_disk.can_make_disks(shared_blocks.SYSTEMS), reason="takes root, xfsprogs, btrfs-progs"
)
def test_imports_share_blocks(tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = [*TINY, "--case=shared-blocks", f"--folder={tmp_path / 'files'}", f"--out={out}"]
    assert main(given) == 0
    document = json.loads((out / "benchmarks-shared-blocks.json").read_text("utf-8"))
    assert list(document["imports"]) == ["XFS", "btrfs"]
    for (one,) in document["imports"].values():
        assert one["wall_seconds"] > 0


def test_disks_that_share_blocks_are_for_root(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert not loop_disk.can_make_disks(shared_blocks.SYSTEMS)
    assert main([*TINY, "--case=shared-blocks", f"--folder={tmp_path / 'files'}"]) == 1
    assert "--case shared-blocks makes a block device: run it as root" in capsys.readouterr().err


@pytest.mark.slow
def test_a_whole_run(tmp_path: Path) -> None:
    folder, out = tmp_path / "files", tmp_path / "out"
    given = [*TINY, "--keep", f"--folder={folder}", f"--out={out}"]
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "benchmarks", *given]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    kept = {file.name for file in folder.iterdir() if file.is_dir()}
    assert kept == {"small-hf", "dense-hf", "moe-hf"}
    document = json.loads((out / "benchmarks.json").read_text("utf-8"))
    assert [case["name"] for case in document["cases"]] == [case.name for case in CASES]
    steps = document["cases"][1]["figures"]
    assert list(steps) == [IMPORT, EXPORT, VERIFY, COPY_HF, COPY_MEGATRON]
    assert all(steps[step]["ratio"]["median"] > 0 for step in (IMPORT, EXPORT, VERIFY))
    page = (out / "benchmarks.md").read_text("utf-8")
    shared = loop_disk.can_make_disks(shared_blocks.SYSTEMS)
    assert page.count("### ") == 3 + len(CASES) + 2 + 3 + 2 * shared
    ET.fromstring((out / "benchmarks.svg").read_text("utf-8"))
    moved = json.loads((out / "benchmarks-exchange.json").read_text("utf-8"))
    assert set(moved["figures"]["to_floor"]) == set(WAYS)
    assert not any(any(rank["wrong"].values()) for rank in moved["ranks"])
    live = json.loads((out / "benchmarks-live.json").read_text("utf-8"))
    assert {one["family"] for one in live["passes"]} == set(FAMILIES)
