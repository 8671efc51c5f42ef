"""FP8 releases: what they are read as, and that they can be written again."""

from __future__ import annotations

import filecmp
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.bridge.dtypes import numpy_dtype, torch_dtype
from megatron.bridge.errors import CheckpointError
from megatron.bridge.formats.config_record import read_hf_config
from megatron.bridge.formats.fp8_writer import (
    Requantizer,
    block_scales,
    float_to_e4m3,
    quantize,
)
from megatron.bridge.models.hf_pretrained.fp8 import (
    DequantizedTensors,
    dequantize,
    e4m3_to_float,
)
from megatron.bridge.models.hf_pretrained.quantization import BlockFP8
from megatron.bridge.models.hf_pretrained.scales import SCALE_SUFFIX
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.operations.convert import export_checkpoint, import_checkpoint
from megatron.bridge.operations.verification.bitwise import verify
from megatron.bridge.synthetic import make_model
from megatron.bridge.tensors.arrays import Array
from megatron.bridge.tensors.boxes import Box, slices
from megatron.bridge.tensors.spec import TensorSpec
from megatron.bridge.tensors.torch_views import as_array, as_torch
from tensors_in_memory import numpy_dtype_named, put

BLOCK = BlockFP8(128, 128)
O_PROJ = "model.language_model.layers.3.self_attn.o_proj.weight"
SCALE_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def make_fp8(family: str, folder: Path, scale_dtype: str = "bfloat16", **settings: object) -> Path:
    """More than one block along most axes, and a smaller one at their ends."""
    moe = {"text.moe_intermediate_size": 136} if family.endswith("-moe") else {}
    fp8 = {"fp8": True, "fp8_scale_dtype": scale_dtype}
    return make_model(family, folder, fp8 | moe | settings)


def plain_dequantized(stored: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """In one line of torch: every scale repeated over its block, the ends cut off."""
    rows, columns = stored.shape[-2:]
    spread = scales.float().repeat_interleave(128, -2).repeat_interleave(128, -1)
    return (stored.float() * spread[..., :rows, :columns]).bfloat16()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )  # fmt: skip


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers; the largest of a block is often not a number of e4m3 times a power of 2."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def scales_of(
    weight: torch.Tensor, dtype: torch.dtype, *, preferred: torch.Tensor | None = None
) -> torch.Tensor:
    wanted = None if preferred is None else as_array(preferred)
    return as_torch(block_scales(as_array(weight), BLOCK, numpy_dtype_named(dtype), wanted))


def quantized(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    out = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    quantize(as_array(weight), as_array(scales), BLOCK, as_array(out))
    return out


def dequantized(
    stored: torch.Tensor,
    scales: torch.Tensor,
    block: BlockFP8 = BLOCK,
    first: tuple[int, int] = (0, 0),
) -> torch.Tensor:
    out = torch.empty(stored.shape, dtype=torch.bfloat16)
    dequantize(as_array(stored), as_array(scales), block, as_array(out), first)
    return out


RELEASES = [("qwen3.5", "bfloat16"), ("qwen3-vl-moe", "float32"), ("qwen3.5-moe", "bfloat16")]


@pytest.fixture(scope="module", params=RELEASES, ids=" with scales in ".join)
def release(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, scale_dtype = request.param
    folder = tmp_path_factory.mktemp("fp8") / "release"
    return make_fp8(family, folder, scale_dtype, num_shards=2)


# --- reading ---


def test_the_model_that_a_release_stands_for(release: Path) -> None:
    hf = PreTrainedVLM.from_pretrained(release)
    weights, files = hf.weights, hf.tensors
    assert isinstance(weights, DequantizedTensors)
    scales = {name for name in files if name.endswith(SCALE_SUFFIX)}
    assert len(scales) > 30
    assert set(weights) == set(files) - scales
    assert {name + SCALE_SUFFIX for name in weights.quantized} == scales
    assert hf.main_dtype == "BF16"
    generator = random.Random(1)
    cut = False
    for name, info in weights.items():
        whole = weights.read(name)
        assert tuple(whole.shape) == info.shape == files[name].shape
        assert whole.nbytes == info.nbytes
        if name not in weights.quantized:
            assert info.dtype == files[name].dtype != "F8_E4M3"
            assert same_bits(whole, files.read(name))
            continue
        assert info.dtype == "BF16"
        expected = plain_dequantized(files.read(name), files.read(name + SCALE_SUFFIX))
        assert same_bits(whole, expected), name
        box = []
        for size in info.shape:
            start = generator.randrange(size)
            box.append((start, generator.randrange(start, size) + 1))
        cut |= any(start % 128 and stop - start > 128 for start, stop in box)
        part = expected[tuple(slice(*ends) for ends in box)]
        assert same_bits(weights.read(name, tuple(box)), part), (name, box)
    assert cut  # boxes that begin inside of a block and end in another


def test_a_release_is_imported_as_its_bf16_model(release: Path, tmp_path: Path) -> None:
    hf = PreTrainedVLM.from_pretrained(release)
    done = import_checkpoint(hf, tmp_path / "megatron")
    assert done.quantization == BLOCK
    assert done.hf.keys > len(done.plan.hf)
    config = read_hf_config(tmp_path / "megatron" / "iter_0000000")
    assert "quantization_config" not in config.data
    assert verify(release, tmp_path / "megatron").identical

    plain = export_checkpoint(tmp_path / "megatron", tmp_path / "bf16", hf)
    assert plain.quantization is None
    out = PreTrainedVLM.from_pretrained(tmp_path / "bf16")
    said = json.loads((release / "config.json").read_text())
    assert said.pop("quantization_config")["quant_method"] == "fp8"
    assert json.loads((tmp_path / "bf16" / "config.json").read_text()) == said
    assert set(out.tensors) == set(hf.weights)
    assert all(same_bits(out.tensors.read(name), hf.weights.read(name)) for name in hf.weights)

    again = export_checkpoint(tmp_path / "megatron", tmp_path / "fp8", hf, fp8=True)
    assert again.quantization == BLOCK
    assert {f.name for f in release.iterdir()} == {f.name for f in (tmp_path / "fp8").iterdir()}
    for file in release.iterdir():
        assert filecmp.cmp(file, tmp_path / "fp8" / file.name, shallow=False), file.name


def test_only_the_scales_of_the_box_are_read(tmp_path: Path) -> None:
    folder = make_fp8("qwen3-vl", tmp_path / "model")
    spoil_scale(folder, O_PROJ + SCALE_SUFFIX, torch.nan)
    weights = PreTrainedVLM.from_pretrained(folder).weights
    assert weights[O_PROJ].shape == (160, 256)
    assert torch.isfinite(weights.read(O_PROJ, ((128, 160), (0, 256)))).all()
    assert torch.isfinite(weights.read(O_PROJ, ((0, 160), (0, 128)))).all()
    assert weights.read(O_PROJ, ((0, 0), (0, 256))).shape == (0, 256)
    with pytest.raises(CheckpointError, match=r"o_proj.weight_scale_inv holds 1 scales"):
        weights.read(O_PROJ, ((127, 128), (128, 129)))


def spoil_scale(folder: Path, name: str, value: float) -> None:
    """Change the scale of the block of the first rows and the second columns."""
    from safetensors.torch import load_file, save_file

    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors[name][0, 1] = value
    save_file(tensors, file, metadata={"format": "pt"})


def test_weights_without_quantization_are_the_files(small_model: Path) -> None:
    hf = PreTrainedVLM.from_pretrained(small_model)
    assert hf.weights is hf.tensors
    assert hf.quantization is None


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES.values(), ids=str)
def test_transformers_dequantizes_alike(scale_dtype: torch.dtype) -> None:
    """Its own arithmetic, where it takes blocks for what they are: without smaller ones."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight = values(3, 256, 384)
    scales = scales_of(weight, scale_dtype)
    stored = quantized(weight, scales)
    theirs = Fp8Dequantize(None)._dequantize_one(stored, scales, torch.bfloat16)
    assert same_bits(dequantized(stored, scales), theirs)


def test_other_blocks() -> None:
    block = BlockFP8(3, 5)
    stored = values(7, 11).to(torch.float8_e4m3fn)
    scales = torch.rand(block.scale_shape((7, 11))) + 0.5
    spread = scales.repeat_interleave(3, 0).repeat_interleave(5, 1)[:7, :11]
    assert same_bits(dequantized(stored, scales, block), (stored.float() * spread).bfloat16())
    part = dequantized(stored[4:, 6:], scales[1:, 1:], block, (1, 1))
    assert same_bits(part, (stored.float() * spread).bfloat16()[4:, 6:])


@pytest.mark.parametrize("first", [(0, 0), (3, 2), (127, 127)])
def test_dequantizing_into_any_memory(first: tuple[int, int]) -> None:
    """Scales as small and as large as float32 has them, all codes, transposed memory."""
    codes = torch.arange(256).to(torch.uint8).repeat(2 * 200 * 2)[: 2 * 200 * 300]
    stored = codes.view(torch.float8_e4m3fn).view(2, 200, 300)
    scales = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(2)) + 0.5
    scales[:, 1, 1] *= 2.0**-126
    scales[:, 1, 2] *= 2.0**126
    spread = scales.repeat_interleave(128, -2).repeat_interleave(128, -1)
    spread = spread[:, first[0] : first[0] + 200, first[1] : first[1] + 300]
    expected = (stored.float() * spread).bfloat16()
    assert expected.isinf().any()
    assert ((expected != 0) & (expected.abs() < 2**-126)).any()
    memory = torch.empty(300, 2, 200, dtype=torch.bfloat16)
    out = memory.permute(1, 2, 0)
    dequantize(as_array(stored), as_array(scales), BLOCK, as_array(out), first)
    numbers = ~expected.isnan()
    assert torch.equal(out.isnan(), ~numbers)
    assert same_bits(out[numbers], expected[numbers])


# --- numbers of e4m3 ---


def test_every_code_is_the_number_that_torch_says() -> None:
    codes = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn)
    found = as_torch(e4m3_to_float(as_array(codes)))
    assert same_bits(found[~codes.isnan()], codes.float()[~codes.isnan()])
    assert torch.equal(found.isnan(), codes.isnan())
    assert e4m3_to_float(as_array(codes.view(4, 64).t())).shape == (64, 4)


def every_rounding() -> torch.Tensor:
    """Float32 numbers of up to 448, those around a change of the nearest e4m3 number among them."""
    codes = torch.arange(127).to(torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (codes[:-1] + codes[1:]) / 2
    above, below = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    edges = [codes, middle, middle.nextafter(above), middle.nextafter(below)]
    edges += [codes[1:].nextafter(below), codes[:-1].nextafter(above)]
    halves = torch.arange(1 << 15).to(torch.int16).view(torch.bfloat16).float()
    drawn = torch.randint(0, 1 << 31, (300_000,), generator=torch.Generator().manual_seed(11))
    tiny = torch.arange(0, 1 << 31, 9_999_991)
    found = torch.cat([*edges, halves, drawn.to(torch.int32).view(torch.float32),
                       tiny.to(torch.int32).view(torch.float32)])  # fmt: skip
    found = found[found.abs() <= 448]
    return torch.cat([found, -found])


def test_floats_are_rounded_to_e4m3_as_torch_and_ml_dtypes_round_them() -> None:
    values = every_rounding()
    assert len(values) > 300_000
    found = float_to_e4m3(as_array(values))
    assert found.dtype == numpy_dtype("F8_E4M3")
    expected = values.to(torch.float8_e4m3fn)
    assert same_bits(as_torch(found), expected)
    assert found.tobytes() == as_array(values).astype(found.dtype).tobytes()
    assert len(as_torch(found).view(torch.uint8).unique()) == 254  # every number of both signs
    cube = values[: 6 * 10 * 1000].view(6, 10, 1000).permute(2, 0, 1)[::3]
    assert same_bits(as_torch(float_to_e4m3(as_array(cube))), cube.to(torch.float8_e4m3fn))
    assert float_to_e4m3(as_array(values[:0].view(0, 3))).shape == (0, 3)


# --- writing ---


@pytest.mark.parametrize("shape", [(200, 300), (2, 128, 129), (127, 1)], ids=str)
@pytest.mark.parametrize("dtype", SCALE_DTYPES.values(), ids=str)
def test_quantizing(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = values(*shape)
    weight[..., :127, :1] *= 1000
    scales = scales_of(weight, dtype)
    stored = quantized(weight, scales)
    assert scales.shape == BLOCK.scale_shape(shape)
    assert same_bits(scales, scales.to(dtype).float())
    matrices = weight.reshape(-1, *shape[-2:])
    flat_scales = scales.reshape(-1, *scales.shape[-2:])
    flat_stored = stored.reshape(-1, *shape[-2:])
    for matrix, matrix_scales, matrix_stored in zip(
        matrices, flat_scales, flat_stored, strict=True
    ):
        for i in range(matrix_scales.shape[0]):
            for j in range(matrix_scales.shape[1]):
                here = slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1))
                scale = (matrix[here].float().abs().max() / 448).to(dtype).float()
                assert matrix_scales[i, j] == scale
                quotients = (matrix[here].float() / scale).clamp(-448, 448)
                assert same_bits(matrix_stored[here], quotients.to(torch.float8_e4m3fn))


def test_a_block_of_zeros_has_a_scale() -> None:
    weight = values(256, 128)
    weight[128:] = 0
    weight[128, 3] = -0.0
    scales = scales_of(weight, torch.float32)
    assert scales[1, 0] == 1
    assert same_bits(dequantized(quantized(weight, scales), scales)[128:], weight[128:])


def test_a_scale_that_was_rounded_down_makes_no_nan() -> None:
    """Among the smallest numbers of bfloat16, rounding to the next costs a fifth."""
    weight = torch.full((4, 5), 1.02e-37).bfloat16()
    scales = scales_of(weight, torch.bfloat16)
    assert float(weight[0, 0]) / float(scales) > 480
    assert quantized(weight, scales).float().unique().tolist() == [448]


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_not_quantized(number: float) -> None:
    weight = values(130, 140)
    weight[129, 139] = number
    with pytest.raises(ValueError, match="not finite"):
        scales_of(weight, torch.float32)


class _Release(dict[str, Any]):
    """As much of DequantizedTensors as a Requantizer needs, from tensors in memory."""

    quantization = BLOCK

    def __init__(self, stored: torch.Tensor, scales: torch.Tensor, dtype: str) -> None:
        self.stored, self.scales = stored, scales
        self["w"] = TensorSpec("w", tuple(stored.shape), "BF16")
        self.quantized = {"w": TensorSpec("w" + SCALE_SUFFIX, tuple(scales.shape), dtype)}

    def scale_box(self, box: Box) -> Box:
        return DequantizedTensors.scale_box(self, box)  # type: ignore[arg-type]

    def read_scales(self, name: str, box: Box) -> Array:
        return as_array(self.scales[slices(box)])


def requantized(
    release: _Release, change: Callable[[torch.Tensor], object]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight and its scales, each made of two boxes."""
    weight = dequantized(release.stored, release.scales)
    change(weight)

    def fill(name: str, box: Box, out: Array) -> None:
        put(weight[slices(box)], out)

    again = Requantizer(release, fill)  # type: ignore[arg-type]
    assert again.rows_multiple == {"w": BLOCK.rows}
    scale_dtype = torch_dtype(release.quantized["w"].dtype)
    results = (
        ("w", torch.empty_like(release.stored), BLOCK.rows),
        ("w" + SCALE_SUFFIX, torch.empty_like(release.scales, dtype=scale_dtype), 1),
    )
    for name, result, cut in results:
        rows, columns = result.shape
        for box in (((0, cut), (0, columns)), ((cut, rows), (0, columns))):
            again.fill(name, box, as_array(result[slices(box)]))
    return results[0][1], results[1][1]


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_quantizing_again_changes_only_what_was_changed(dtype: str) -> None:
    """Also where the release chose other scales than we do, and does not use all of e4m3."""
    scales = (torch.rand(3, 2, generator=torch.Generator().manual_seed(7)) + 1e-4).to(
        torch_dtype(dtype)
    )
    stored = (values(300, 200) * 40).to(torch.float8_e4m3fn)
    release = _Release(stored, scales.float(), dtype)
    found, found_scales = requantized(release, lambda weight: None)
    assert same_bits(found, stored)
    assert same_bits(found_scales, scales)

    def change(weight: torch.Tensor) -> None:
        weight[140, 150] += 0.7

    found, found_scales = requantized(release, change)
    untouched = torch.ones(3, 2, dtype=torch.bool)
    untouched[1, 1] = False
    assert torch.equal(found_scales == scales, untouched)
    outside = untouched.repeat_interleave(128, 0).repeat_interleave(128, 1)[:300, :200]
    assert torch.equal(found.float()[outside], stored.float()[outside])


@pytest.mark.parametrize("dtype", SCALE_DTYPES.values(), ids=str)
def test_quantizing_again_without_knowing_the_scales(dtype: torch.dtype) -> None:
    """Exact for scales that are as ours: the largest value of a BF16 model / 448."""
    weight = values(512, 384)
    scales = scales_of(weight, dtype)
    stored = quantized(weight, scales)
    read = dequantized(stored, scales)
    assert same_bits(scales_of(read, dtype), scales)
    assert same_bits(quantized(read, scales), stored)


def test_why_the_scales_of_the_reference_are_looked_at() -> None:
    """Others do not come back from the values alone: here those of a model in float32."""
    scales = torch.rand(4, 3, generator=torch.Generator().manual_seed(3)) + 1e-3
    stored = quantized(values(512, 384) * 300, torch.ones(4, 3))
    read = dequantized(stored, scales)
    again = scales_of(read, torch.float32)
    assert not torch.equal(again, scales)
    assert same_bits(scales_of(read, torch.float32, preferred=scales), scales)


# --- comparing ---


def test_verify_compares_files_as_they_are_if_both_are_quantized(tmp_path: Path) -> None:
    one = make_fp8("qwen3-vl", tmp_path / "one")
    other = make_fp8("qwen3-vl", tmp_path / "other")
    assert verify(one, other).identical
    spoil_scale(other, O_PROJ + SCALE_SUFFIX, 3.0)
    report = verify(one, other)
    assert [tensor.name for tensor in report.different] == [O_PROJ + SCALE_SUFFIX]
    plain = tmp_path / "plain"
    import_checkpoint(PreTrainedVLM.from_pretrained(one), tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", plain, PreTrainedVLM.from_pretrained(one))
    assert verify(one, plain).identical
    assert [tensor.name for tensor in verify(other, plain).different] == [O_PROJ]


def test_config_alone_exports_bf16(tmp_path: Path) -> None:
    hf = PreTrainedVLM.from_pretrained(make_fp8("qwen3.5", tmp_path / "model"))
    import_checkpoint(hf, tmp_path / "megatron")
    config = PreTrainedVLM.from_config(hf.hf_config)
    export_checkpoint(tmp_path / "megatron", tmp_path / "out", config)
    out = PreTrainedVLM.from_pretrained(tmp_path / "out")
    assert out.hf_config.data == hf.unquantized_config.data
    assert not out.hf_config.has("quantization_config")
    assert verify(tmp_path / "out", tmp_path / "model").identical
