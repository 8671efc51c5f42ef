"""Comparing bits: what counts as equal, and that no difference goes unnoticed."""

from __future__ import annotations

import json
import shutil
from math import inf, nan
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron.bridge.dtypes import DTYPE_NAMES, torch_dtype
from megatron.bridge.engine.difference import Difference
from megatron.bridge.engine.difference import difference as difference_of_arrays
from megatron.bridge.operations.verification.bitwise import verify
from megatron.bridge.operations.verification.distance import distance, logits_distance
from megatron.bridge.tensors.torch_views import as_array

# --- two tensors ---


def difference(a: torch.Tensor, b: torch.Tensor) -> Difference:
    return difference_of_arrays(as_array(a), as_array(b))


def test_bits_and_not_values_are_compared() -> None:
    zeros = torch.tensor([0.0, 1.0, nan])
    assert difference(zeros, zeros.clone()) == Difference(0, 0.0)
    assert difference(zeros, torch.tensor([-0.0, 1.0, nan])) == Difference(1, 0.0)
    other_nan = torch.tensor([0.0, 1.0, -nan])
    assert difference(zeros, other_nan).elements == 1
    assert difference(zeros, torch.tensor([0.0, 1.0, 3.0])) == Difference(1, inf)
    assert difference(torch.tensor([inf]), torch.tensor([-inf])) == Difference(1, inf)


def test_elements_are_counted_not_bytes() -> None:
    a = torch.arange(12, dtype=torch.int32).reshape(3, 4)
    b = a.clone()
    b[1, 2] += 70_000  # differs in three of its bytes
    b[2, 0] -= 1
    assert difference(a, b) == Difference(2, 70_000.0)
    assert difference(a.t(), b.t()) == Difference(2, 70_000.0)


@pytest.mark.parametrize("name", DTYPE_NAMES)
def test_every_dtype(name: str) -> None:
    dtype = torch_dtype(name)
    a = torch.zeros(24 * dtype.itemsize, dtype=torch.uint8).view(dtype).reshape(4, 6)
    b = a.clone()
    assert difference(a, b).elements == 0
    b.view(torch.uint8).reshape(-1)[5 * dtype.itemsize] = 1
    assert difference(a, b).elements == 1


def test_differences_of_long_tensors_add_up() -> None:
    a = torch.zeros(150_000, dtype=torch.int16)
    b = a.clone()
    b[[0, 65_535, 65_536, 149_999]] = torch.tensor([1, 2, 9, 3], dtype=torch.int16)
    assert difference(a, b) == Difference(4, 9.0)


def test_scalars_and_empty_tensors() -> None:
    assert difference(torch.tensor(1.0), torch.tensor(1.5)) == Difference(1, 0.5)
    assert difference(torch.empty(0, 3), torch.empty(0, 3)) == Difference()


# --- two activations ---


def test_distance_is_that_of_the_formulas() -> None:
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(1, 150, 11, generator=generator)
    b = a + 0.01 * torch.randn(1, 150, 11, generator=generator)
    found = distance(a, b)
    assert found.max_abs_diff == pytest.approx((a - b).abs().max().item())
    assert found.mean_abs_diff == pytest.approx((a - b).abs().mean().item(), rel=1e-5)
    assert found.largest == pytest.approx(a.abs().max().item())
    expected = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()
    assert found.cosine == pytest.approx(expected, abs=1e-6)
    logits = logits_distance(a[0], b[0])
    kl = torch.nn.functional.kl_div(
        b[0].double().log_softmax(-1),
        a[0].double().log_softmax(-1),
        log_target=True,
        reduction="batchmean",
    )
    assert logits.kl == pytest.approx(kl.item(), rel=1e-4)
    same = (a[0].argmax(-1) == b[0].argmax(-1)).float().mean().item()
    assert logits.top1_agreement == pytest.approx(same)
    assert same < 1


@pytest.mark.parametrize("value", [nan, inf, -inf])
def test_what_is_not_finite_is_infinitely_far(value: float) -> None:
    a = torch.ones(70, 3)
    b = a.clone()
    b[66, 1] = value
    assert distance(a, b).max_abs_diff == inf
    assert distance(b, b).max_abs_diff == inf


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="shapes differ"):
        distance(torch.ones(2, 3), torch.ones(3, 2))


# --- two checkpoints ---

KEY = "model.language_model.layers.1.self_attn.k_proj.weight"
MEGATRON_KEY = "language_model.decoder.layers.self_attention.linear_qkv.weight"


def flip_one_bit(folder: Path, key: str) -> None:
    """Change the lowest bit of one element of a tensor, in the file."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = folder / index["weight_map"][key]
    tensors = load_file(file)
    tensors[key].view(torch.int16)[3, 5] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture
def changed(small_model: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "changed"
    shutil.copytree(small_model, folder)
    flip_one_bit(folder, KEY)
    return folder


def test_equal_in_every_pair_of_formats(small_model: Path, small_checkpoint: Path) -> None:
    for a, b, kinds in (
        (small_model, small_model, ("huggingface", "huggingface")),
        (small_model, small_checkpoint, ("huggingface", "megatron")),
        (small_checkpoint, small_model, ("megatron", "huggingface")),
        (small_checkpoint, small_checkpoint / "iter_0000000", ("megatron", "megatron")),
    ):
        report = verify(a, b)
        assert report.identical
        assert (report.a.format, report.b.format) == kinds
        assert (
            report.equal == report.compared == (44 if kinds[0] == kinds[1] == "megatron" else 115)
        )
        weights = 5_555_840 if kinds[0] == kinds[1] == "megatron" else 5_506_560
        assert report.bytes == weights
        assert report.padding_elements == (2 * 77 * 160 if kinds[0] != kinds[1] else 0)
        assert (report.side_files is None) == (kinds != ("huggingface", "huggingface"))


def test_one_bit_is_found(changed: Path, small_model: Path, small_checkpoint: Path) -> None:
    for a, b in (
        (changed, small_model),
        (changed, small_checkpoint),
        (small_checkpoint, changed),
    ):
        report = verify(a, b)
        assert not report.identical
        assert (report.compared, report.equal) == (115, 114)
        (found,) = report.different
        assert (found.name, found.what) == (KEY, "bits")
        assert (found.elements, found.of) == (1, 64 * 160)
        assert 0 < found.max_abs_diff < 1e-2


def test_one_bit_is_found_between_megatron_checkpoints(
    changed: Path, small_checkpoint: Path, tmp_path: Path
) -> None:
    from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
    from megatron.bridge.operations.convert import import_checkpoint

    import_checkpoint(PreTrainedVLM.from_pretrained(changed), tmp_path / "other")
    (found,) = verify(small_checkpoint, tmp_path / "other").different
    assert (found.name, found.elements) == (MEGATRON_KEY, 1)


def test_shapes_dtypes_and_names_of_hf_folders(small_model: Path, tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        folder.mkdir()
        shutil.copy(small_model / "config.json", folder)
    tensor = torch.arange(12.0).reshape(3, 4)
    save_file(
        {name: tensor.clone() for name in ("same", "shape", "dtype", "h.0.w")}
        | {"empty": tensor[:0]},
        a / "model.safetensors",
    )
    save_file(
        {
            "same": tensor.clone(),
            "shape": tensor.t().contiguous(),
            "dtype": tensor.to(torch.bfloat16),
            "empty": tensor[:0],
            "new": torch.tensor(1.0),
        },
        b / "model.safetensors",
    )
    (b / "notes.txt").write_text("new")
    (b / "config.json").write_text((b / "config.json").read_text() + "\n")
    report = verify(a, b)
    assert {(d.name, d.what, d.a, d.b) for d in report.different} == {
        ("shape", "shape", "F32 of shape (3, 4)", "F32 of shape (4, 3)"),
        ("dtype", "dtype", "F32 of shape (3, 4)", "BF16 of shape (3, 4)"),
    }
    assert (report.only_in_a, report.only_in_b) == (["h.0.w"], ["new"])
    assert (report.compared, report.equal) == (4, 2)
    assert report.side_files is not None
    assert {(f.file, f.what) for f in report.side_files} == {
        ("config.json", "content"),
        ("notes.txt", "only in b"),
    }


def test_missing_megatron_tensors_are_differences(small_model: Path, tmp_path: Path) -> None:
    """The same config with fewer layers in the checkpoint, and with a layer of other size."""
    from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
    from megatron.bridge.operations.convert import import_checkpoint
    from megatron.bridge.synthetic import make_model

    tied = make_model("qwen3-vl", tmp_path / "tied", {"tie_word_embeddings": "true"})
    import_checkpoint(PreTrainedVLM.from_pretrained(tied), tmp_path / "checkpoint")
    report = verify(small_model, tmp_path / "checkpoint")
    assert report.only_in_a == ["lm_head.weight"]
    assert report.compared == 114
    report = verify(tmp_path / "checkpoint", small_model)
    assert report.only_in_b == ["lm_head.weight"]

    shorter = make_model("qwen3-vl", tmp_path / "shorter", {"text.num_hidden_layers": "3"})
    import_checkpoint(PreTrainedVLM.from_pretrained(shorter), tmp_path / "short")
    report = verify(small_model, tmp_path / "short")
    (found,) = [d for d in report.different if d.name == MEGATRON_KEY]
    assert (found.what, found.a, found.b) == (
        "shape",
        "BF16 of shape (5, 384, 160)",
        "BF16 of shape (3, 384, 160)",
    )
    assert not any(d.name.startswith("model.language_model.layers.") for d in report.different)
