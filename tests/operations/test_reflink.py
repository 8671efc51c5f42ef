"""Conversions on file systems that share blocks: the bytes of copies, and hardly a new block."""

from __future__ import annotations

import os
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as dcp

from megatron.bridge.dtypes import torch_dtype
from megatron.bridge.errors import InputError
from megatron.bridge.formats.torch_dist.reader import TorchDistCheckpoint
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.operations.convert import Converted, export_checkpoint, import_checkpoint
from megatron.bridge.operations.verification.bitwise import verify
from megatron.bridge.operations.verification.fast import verify_fast
from megatron.bridge.synthetic import make_model
from megatron.bridge.target.record import MANIFEST_FILE
from megatron.bridge.target.run import Run
from megatron.bridge.tensors.boxes import full_box
from shared_block_systems import SYSTEMS, mounted, used_bytes
from unfinished_target import names, tree
from written_pieces import flip_a_bit

SIZES = {
    "text.hidden_size": 256,
    "text.num_attention_heads": 8,
    "text.num_key_value_heads": 2,
    "text.head_dim": 64,
    "text.vocab_size": 8009,
    "text.num_hidden_layers": 3,
    "num_shards": 3,
}
FAMILIES = {
    "qwen3-vl": {"text.intermediate_size": 640},
    "qwen3-vl-moe": {"text.moe_intermediate_size": 144, "text.num_experts": 5},
    "qwen3.5-moe": {"text.moe_intermediate_size": 144, "text.num_experts": 5},
}
"""With tensors so large that they are worth it; in the second, experts lie transposed."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of each family, and what becomes of it where no blocks are shared."""
    folder = tmp_path_factory.mktemp("models")
    for number, (family, settings) in enumerate(FAMILIES.items()):
        hf = make_model(family, folder / family, SIZES | settings, seed=number)
        done = imported(hf, folder / f"{family}-megatron")
        assert done.written.shared_bytes == 0
    return folder


@pytest.fixture(scope="module", params=SYSTEMS)
def system(request: pytest.FixtureRequest, models: Path) -> Iterator[Path]:
    """A file system that shares blocks, with a model of each family."""
    with mounted(request.param) as folder:
        for family in FAMILIES:
            shutil.copytree(models / family, folder / family)
        yield folder


@pytest.fixture
def place(system: Path) -> Iterator[Path]:
    """A folder on it, for one test."""
    folder = system / "place"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def imported(source: Path, target: Path, transposed: Any = "strides", **options: Any) -> Converted:
    hf = PreTrainedVLM.from_pretrained(source)
    return import_checkpoint(hf, target, transposed=transposed, run=Run(**options))


def without_manifest(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in tree(folder).items() if name != MANIFEST_FILE}


def assert_stock_torch_reads(folder: Path) -> None:
    """PyTorch's own reader and ours find the same tensors."""
    checkpoint = TorchDistCheckpoint(folder)
    state = {
        key: torch.empty(spec.shape, dtype=torch_dtype(spec.dtype))
        for key, spec in checkpoint.tensors.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, storage_reader=dcp.FileSystemReader(checkpoint.folder), no_dist=True)
    for key, spec in checkpoint.tensors.items():
        assert torch.equal(state[key], checkpoint.read(key, full_box(spec.shape))), key


@pytest.mark.parametrize("family", FAMILIES)
def test_import_shares_what_does_not_change(
    family: str, system: Path, place: Path, models: Path
) -> None:
    before = used_bytes(system)
    done = imported(system / family, place / "out")
    written = done.written
    assert written.shared_bytes > 0.85 * written.bytes
    taken = used_bytes(system) - before
    assert taken < written.bytes - written.shared_bytes + (2 << 20)
    assert without_manifest(place / "out") == without_manifest(models / f"{family}-megatron")
    assert verify(system / family, place / "out").identical
    assert_stock_torch_reads(place / "out")


@pytest.mark.parametrize("family", FAMILIES)
def test_export_shares_it_back(family: str, system: Path, place: Path) -> None:
    imported(system / family, place / "megatron")
    hf = PreTrainedVLM.from_pretrained(system / family)
    done = export_checkpoint(
        place / "megatron", place / "out", hf, run=Run(keep_manifest=True, verify=True)
    )
    assert done.written.shared_bytes > 0.8 * done.written.bytes
    assert without_manifest(place / "out") == tree(system / family)
    # An export is asked for its checksums, so all are there.
    assert verify_fast(place / "out").identical


def test_transposed_experts_can_be_turned(system: Path, place: Path) -> None:
    family = "qwen3-vl-moe"
    strided = imported(system / family, place / "strides")
    turned = imported(system / family, place / "copy", transposed="copy")
    assert turned.written.shared_bytes < strided.written.shared_bytes
    for name in ("strides", "copy"):
        assert verify(system / family, place / name).identical
        assert_stock_torch_reads(place / name)


def test_never_is_the_same_bytes(system: Path, place: Path) -> None:
    family = "qwen3-vl"
    always = imported(system / family, place / "always", reflink="always")
    never = imported(system / family, place / "never", reflink="never")
    assert always.written.shared_bytes > never.written.shared_bytes == 0
    assert without_manifest(place / "always") == without_manifest(place / "never")


def test_always_refuses_another_file_system(system: Path, tmp_path: Path) -> None:
    for source, target in (
        (system / "qwen3-vl", tmp_path / "out"),
        (tmp_path / "hf", place_in(system)),
    ):
        if not source.exists():
            shutil.copytree(system / "qwen3-vl", source)
        with pytest.raises(InputError, match="--reflink always") as error:
            imported(source, target, reflink="always")
        assert "cross-device" in str(error.value)
        assert len(str(error.value).splitlines()) == 1
        assert not target.exists()
        assert not target.with_name("out.partial").exists()
        done = imported(source, target)
        assert done.written.shared_bytes == 0
        shutil.rmtree(target)


def place_in(system: Path) -> Path:
    return system / "other" / "out"


def test_a_change_on_one_side_does_not_show_on_the_other(system: Path, place: Path) -> None:
    shutil.copytree(system / "qwen3-vl", place / "hf")
    imported(place / "hf", place / "out")
    before = tree(place / "out")
    for path in (place / "hf").glob("*.safetensors"):
        with path.open("r+b") as file:
            file.seek(-(100 << 10), os.SEEK_END)
            file.write(bytes(100 << 10))
    assert tree(place / "out") == before


# --- checksums ---


def test_verify_fast_compares_with_the_source(system: Path, place: Path) -> None:
    source, out = system / "qwen3-vl", place / "out"
    imported(source, out)
    with pytest.raises(InputError, match="name the source, too"):
        verify_fast(out)
    for pair in ((source, out), (out, source)):
        assert verify_fast(*pair).identical
    [path, *_] = out.rglob("*.distcp")
    middle = path.stat().st_size // 2
    flip_a_bit(path, middle)
    report = verify_fast(source, out)
    [found] = report.different
    assert found.offset <= middle < found.offset + found.bytes
    assert "not the bytes of" in found.problem
    assert found.tensors
    flip_a_bit(path, middle)
    shutil.copytree(source, place / "hf")
    assert verify_fast(place / "hf", out).identical
    for path in (place / "hf").glob("*.safetensors"):
        flip_a_bit(path, path.stat().st_size - 1)
    changed = verify_fast(place / "hf", out)
    assert changed.source_changes
    assert not changed.different


def test_verify_takes_the_checksums(system: Path, place: Path) -> None:
    """Everything is read back for it anyway."""
    out = place / "out"
    done = imported(system / "qwen3-vl", out, verify=True)
    assert done.written.shared_bytes
    assert verify_fast(out).identical
    [path, *_] = out.rglob("*.distcp")
    flip_a_bit(path, path.stat().st_size // 2)
    [found] = verify_fast(out).different
    assert "CRC-32" in found.problem


# --- runs that end early ---


class Killer:
    """A Progress that kills the process when something holds."""

    def __init__(self, when: Callable[[], bool]) -> None:
        self._when = when

    def start(self, task: str, total_bytes: int) -> None:
        """Nothing holds yet."""

    def advance(self, done_bytes: int) -> None:
        if self._when():
            os.kill(os.getpid(), signal.SIGKILL)


def after(reports: int) -> Callable[[], bool]:
    left = iter(range(reports - 1, -1, -1))
    return lambda: next(left) == 0


def recorded(out: Path) -> Callable[[], bool]:
    """Whether a file is."""
    record = out.with_name("out.partial") / MANIFEST_FILE
    return lambda: record.read_bytes().count(b"\n") > 1


def killed(convert: Callable[[Run], object], when: Callable[[], bool], **options: Any) -> None:
    child = os.fork()
    if not child:
        try:
            convert(Run(progress=Killer(when), **options))
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)


@pytest.mark.parametrize("reports", [1, 4, 12])
def test_killed_and_resumed(reports: int, system: Path, place: Path, models: Path) -> None:
    source, out = system / "qwen3-vl", place / "out"
    hf = PreTrainedVLM.from_pretrained(source)
    options: dict[str, Any] = {"max_shard_bytes": 4 << 20}
    import_checkpoint(hf, place / "whole", run=Run(**options))
    killed(lambda run: import_checkpoint(hf, out, run=run), after(reports), **options)
    assert names(place) == ["out.partial", "whole"]
    done = import_checkpoint(hf, out, run=Run(resume=True, **options))
    assert done.written.shared_bytes
    assert tree(out) == tree(place / "whole")


def test_a_run_without_sharing_goes_on_with_one_that_shared(system: Path, place: Path) -> None:
    """Bytes do not depend on it, so it is one conversion; the checksums of all are taken."""
    hf, out = PreTrainedVLM.from_pretrained(system / "qwen3-vl"), place / "out"
    options: dict[str, Any] = {"max_shard_bytes": 4 << 20}
    killed(lambda run: import_checkpoint(hf, out, run=run), recorded(out), **options)
    done = import_checkpoint(hf, out, run=Run(resume=True, reflink="never", verify=True, **options))
    assert done.written.resumed_bytes
    assert done.written.shared_bytes == 0
    assert verify_fast(out).identical
    assert verify(system / "qwen3-vl", out).identical


# --- room ---


def test_shared_blocks_need_no_room(models: Path) -> None:
    """On XFS: btrfs does not say before how much room it has."""
    with mounted("xfs") as system:
        source = shutil.copytree(models / "qwen3-vl", system / "hf")
        used_bytes(system)  # is on the disk
        free = os.statvfs(system)
        with (system / "filler").open("wb") as file:
            room = free.f_bavail * free.f_frsize
            os.posix_fallocate(file.fileno(), 0, room - (10 << 20))
        with pytest.raises(InputError, match="make room"):
            imported(source, system / "out", reflink="never")
        assert imported(source, system / "out").written.shared_bytes > (10 << 20)
        assert verify(source, system / "out").identical
