"""The streaming engine: pieces, the memory budget, reading into memory of any strides."""

import random
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from megatron.bridge.engine.pieces import (
    PIECE_BYTES,
    FileCopy,
    Literal,
    OutputFile,
    TensorData,
    pieces_of,
)
from megatron.bridge.engine.stream import Budget, write_files, write_pieces
from megatron.bridge.errors import CheckpointError, InputError
from megatron.bridge.models.hf_pretrained import slice_reader
from megatron.bridge.models.hf_pretrained.tensors import TensorIndex
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.operations.convert import export_checkpoint, import_checkpoint
from megatron.bridge.progress import Silent
from megatron.bridge.synthetic import make_model
from megatron.bridge.target.run import Run
from megatron.bridge.tensors.arrays import Array
from megatron.bridge.tensors.boxes import Box, box_shape, full_box, slices
from megatron.bridge.tensors.torch_views import as_array
from slow_conversion import Hook
from tensors_in_memory import put

MIB = 1 << 20


def values(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


# --- pieces ---


def test_parts_are_grouped_to_pieces() -> None:
    parts = tuple(Literal(bytes(length)) for length in (3, 4, 9, 1, 1, 6))
    pieces = list(pieces_of(OutputFile("f", parts), 8))
    assert [(p.offset, p.nbytes) for p in pieces] == [(0, 7), (7, 9), (16, 8)]
    assert [part for piece in pieces for part in piece.parts] == list(parts)


def test_files_of_every_kind_of_part(tmp_path: Path) -> None:
    tensor = values(5, 7, dtype=torch.bfloat16)
    (tmp_path / "side").write_bytes(bytes(range(200)))
    (tmp_path / "out").mkdir()
    data = OutputFile(
        "folder/data",
        (
            Literal(b"head"),
            TensorData("t", ((0, 2), (0, 7)), "BF16"),
            TensorData("t", ((2, 5), (0, 7)), "BF16"),
            FileCopy(tmp_path / "side", 3, 10),
        ),
    )
    copied = OutputFile.copy_of("copied", tmp_path / "side", 64)
    empty = OutputFile.of_bytes("nothing", b"")

    def fill(name: str, box: Box, out: Array) -> None:
        assert name == "t"
        put(tensor[slices(box)], out)

    write_files(tmp_path / "out", [data, copied, empty], fill)
    expected = b"head" + tensor.view(torch.uint8).numpy().tobytes() + bytes(range(3, 13))
    assert (tmp_path / "out" / "folder" / "data").read_bytes() == expected
    assert (tmp_path / "out" / "copied").read_bytes() == bytes(range(200))
    assert (tmp_path / "out" / "nothing").read_bytes() == b""


def test_a_file_that_became_shorter(tmp_path: Path) -> None:
    (tmp_path / "side").write_bytes(b"12345")
    copied = OutputFile.copy_of("copied", tmp_path / "side")
    (tmp_path / "side").write_bytes(b"1")
    with pytest.raises(CheckpointError, match="it was cut while it was copied"):
        write_files(tmp_path, [copied], lambda *_: None)


def test_an_error_of_one_thread_ends_all(tmp_path: Path) -> None:
    filled = []

    def fill(name: str, box: Box, out: Array) -> None:
        filled.append(name)
        if len(filled) == 3:
            raise ValueError("the third")

    parts = tuple(TensorData(str(number), ((0, 999),), "U8") for number in range(1000))
    file = OutputFile("f", parts)
    before = threading.active_count()
    with pytest.raises(ValueError, match="the third"):
        write_pieces(
            tmp_path,
            [file],
            pieces_of(file, 1000),
            fill,
            Budget(3, 1000),
            on_file=lambda *_: None,
            progress=Silent(),
        )
    assert len(filled) < 20
    assert threading.active_count() == before


# --- memory ---


@pytest.mark.parametrize("memory", [4500 << 10, 16 * MIB, 100 * MIB, 1 << 30, 1 << 40])
def test_a_budget_is_kept(memory: int) -> None:
    budget = Budget.of(memory)
    scratch = slice_reader.SCRATCH_BYTES
    assert budget.threads * (3 * budget.piece_bytes + scratch) <= memory
    assert budget.piece_bytes <= PIECE_BYTES
    assert budget.threads >= (2 if memory >= 200 * MIB else 1)


def test_a_budget_that_is_too_small() -> None:
    with pytest.raises(InputError, match=r"memory .*: 1048576 bytes are too small"):
        Budget.of(MIB)


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    pytest.skip("the kernel does not report RssAnon")


@pytest.mark.parametrize("direction", ["import", "export"])
def test_memory_does_not_grow_with_a_tensor(direction: str, tmp_path: Path) -> None:
    """An embedding of 67 MB and a fused expert tensor of 21 MB, within 10 MiB."""
    settings = {
        "text.vocab_size": 200_003,
        "text.num_experts": 101,
        "text.moe_intermediate_size": 200,
        "text.num_hidden_layers": 3,
    }
    hf = PreTrainedVLM.from_pretrained(make_model("qwen3-vl-moe", tmp_path / "hf", settings))
    assert sorted(info.nbytes for info in hf.tensors.values())[-2] > 10_000_000
    import_checkpoint(hf, tmp_path / "megatron")  # also warms what stays in memory
    peak = 0

    def look() -> None:
        nonlocal peak
        peak = max(peak, anonymous_bytes())

    run = Run(memory=10 * MIB, progress=Hook(look))
    before = anonymous_bytes()
    if direction == "import":
        import_checkpoint(hf, tmp_path / "out", run=run)
    else:
        export_checkpoint(tmp_path / "megatron", tmp_path / "out", hf, run=run)
    assert 0 < peak - before < 14 * MIB


# --- reading into memory of the caller ---


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TensorIndex:
    """With so little scratch memory that a row of "wide" does not fit."""
    monkeypatch.setattr(slice_reader, "SCRATCH_BYTES", 3000)
    monkeypatch.setattr(slice_reader, "_LONG_RUN", 400)
    monkeypatch.setattr(slice_reader, "_local", threading.local())
    tensors = {"scalar": values(), "flat": values(1000), "cube": values(11, 13, 17)}
    tensors |= {"wide": values(3, 5, 907), "half": values(23, 130, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "model.safetensors")
    return TensorIndex.from_folder(tmp_path)


@pytest.mark.parametrize("name", ["scalar", "flat", "cube", "wide", "half"])
def test_any_box_into_any_strides(name: str, index: TensorIndex) -> None:
    chance = random.Random(name)
    whole, info = index.read(name), index[name]
    for _ in range(60):
        box = tuple(
            tuple(sorted(chance.sample(range(size + 1), 2))) if chance.random() < 0.7 else (0, size)
            for size in info.shape
        )
        axes = chance.sample(range(len(box)), len(box))
        memory = torch.full([box_shape(box)[axis] * 2 for axis in axes], 7, dtype=whole.dtype)
        # Every second element along each axis, and the axes in another order.
        out = memory[tuple(slice(None, None, 2) for _ in axes)]
        out = out.permute([axes.index(axis) for axis in range(len(axes))])
        index.read_into(name, box, as_array(out))
        assert torch.equal(out, whole[slices(box)])
        if axes:
            assert (memory[1::2] == 7).all()
        assert torch.equal(index.read(name, box), whole[slices(box)])


def test_memory_that_does_not_fit(index: TensorIndex) -> None:
    box = full_box((11, 13, 17))
    with pytest.raises(CheckpointError, match="does not fill"):
        index.read_into("cube", box, np.empty((11, 17, 13), "float32"))
    with pytest.raises(CheckpointError, match="it is F32"):
        index.read_into("cube", box, np.empty((11, 13, 17), "float64"))
    with pytest.raises(CheckpointError, match="no tensor 'ball'"):
        index.read_into("ball", box, np.empty((11, 13, 17), "float32"))
