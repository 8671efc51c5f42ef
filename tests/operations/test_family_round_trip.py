"""Files to Megatron files and back for the MoE and Qwen3.5 families, in every disk layout."""

import filecmp
from pathlib import Path

import pytest
import torch

from megatron.bridge.formats.torch_dist.reader import TorchDistCheckpoint
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.operations.convert import export_checkpoint, import_checkpoint
from megatron.bridge.synthetic import make_model
from megatron.bridge.tensors.boxes import full_box
from torch_dist_folders import write_torch_dist

VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "vl-moe": ("qwen3-vl-moe", {}),
    "vl-moe, fused": ("qwen3-vl-moe", {"experts": "fused", "num_shards": 3}),
    "vl-moe, per expert": ("qwen3-vl-moe", {"experts": "per-expert"}),
    "vl-moe, dense layers": ("qwen3-vl-moe", {"text.mlp_only_layers": [0, 4]}),
    "3.5": ("qwen3.5", {}),
    "3.5, tied": ("qwen3.5", {"tie_word_embeddings": True, "num_shards": 2}),
    "3.6: all BF16": ("qwen3.5", {"ssm_dtype": "bfloat16"}),
    "3.5, no MTP": ("qwen3.5", {"text.mtp_num_hidden_layers": 0}),
    "3.5: biases": ("qwen3.5", {"text.attention_bias": True}),
    "3.5-moe: biases": ("qwen3.5-moe", {"text.attention_bias": True}),
    "3.5, one key-value head": ("qwen3.5", {"text.num_key_value_heads": 1}),
    "3.5-moe": ("qwen3.5-moe", {}),
    "3.6-moe: fused MTP": ("qwen3.5-moe", {"mtp_experts": "fused", "ssm_dtype": "bfloat16"}),
    "3.5-moe, per expert": ("qwen3.5-moe", {"experts": "per-expert", "num_shards": 2}),
}


def assert_same_bytes(left: Path, right: Path) -> None:
    names = sorted(path.name for path in left.iterdir())
    assert names == sorted(path.name for path in right.iterdir())
    for name in names:
        assert filecmp.cmp(left / name, right / name, shallow=False), name


@pytest.mark.parametrize(("family", "settings"), VARIANTS.values(), ids=VARIANTS)
def test_every_byte_comes_back(family: str, settings: dict[str, object], tmp_path: Path) -> None:
    source = make_model(family, tmp_path / "hf", settings, seed=12)
    hf = PreTrainedVLM.from_pretrained(source)
    done = import_checkpoint(hf, tmp_path / "megatron")
    assert done.inexact == ()
    export_checkpoint(tmp_path / "megatron", tmp_path / "back", hf)
    assert_same_bytes(source, tmp_path / "back")


@pytest.mark.parametrize("family", ["qwen3-vl-moe", "qwen3.5-moe"])
def test_the_disk_layout_does_not_matter(family: str, tmp_path: Path) -> None:
    """One model in three layouts makes one checkpoint; each export is the file made directly."""
    layouts = ("fused", "fused-transposed", "per-expert")
    for layout in layouts:
        settings = {"experts": layout, "mtp_experts": layout} if "3.5" in family else {}
        settings |= {"experts": layout}
        made = make_model(family, tmp_path / layout, settings, seed=13)
        import_checkpoint(PreTrainedVLM.from_pretrained(made), tmp_path / f"{layout}-megatron")
    checkpoints = [TorchDistCheckpoint(tmp_path / f"{layout}-megatron") for layout in layouts]
    for key, spec in checkpoints[0].tensors.items():
        box = full_box(spec.shape)
        first, *others = (checkpoint.read(key, box) for checkpoint in checkpoints)
        assert all(torch.equal(first, other) for other in others), key
    for layout in layouts:
        out = tmp_path / f"{layout}-again"
        reference = PreTrainedVLM.from_pretrained(tmp_path / "fused")
        export_checkpoint(tmp_path / "fused-megatron", out, reference, experts=layout)
        written = PreTrainedVLM.from_pretrained(out).tensors
        expected = PreTrainedVLM.from_pretrained(tmp_path / layout).tensors
        assert set(written) == set(expected)
        for name in expected:
            assert torch.equal(written.read(name), expected.read(name)), name


def test_the_mtp_layer_comes_from_the_reference_if_it_was_not_trained(tmp_path: Path) -> None:
    hf = PreTrainedVLM.from_pretrained(make_model("qwen3.5", tmp_path / "hf", {}, seed=14))
    import_checkpoint(hf, tmp_path / "whole")
    whole = TorchDistCheckpoint(tmp_path / "whole")
    kept = {key: spec for key, spec in whole.tensors.items() if ".mtp." not in key}
    assert len(kept) < len(whole.tensors)
    write_torch_dist(tmp_path / "trained", kept, whole.read_into)
    done = export_checkpoint(tmp_path / "trained", tmp_path / "back", hf)
    assert set(done.plan.carried) == {name for name in hf.tensors if name.startswith("mtp.")}
    assert_same_bytes(tmp_path / "hf", tmp_path / "back")


@pytest.mark.parametrize("ssm_dtype", ["float32", "bfloat16"])
def test_norms_in_the_usual_range_survive_minus_one(ssm_dtype: str, tmp_path: Path) -> None:
    """Every BF16 value in [0.5, 2], and F32 values with all bits set at random."""
    values = torch.arange(0x3F00, 0x4001, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    assert (values[0], values[-1]) == (0.5, 2.0)
    hf = norm_of(tmp_path, ssm_dtype, values)
    assert import_checkpoint(hf, tmp_path / "megatron").inexact == ()
    export_checkpoint(tmp_path / "megatron", tmp_path / "back", hf)
    assert_same_bytes(tmp_path / "hf", tmp_path / "back")


def test_norms_outside_of_the_range_are_reported(tmp_path: Path) -> None:
    hf = norm_of(tmp_path, "float32", torch.tensor([1.0, 1e-9]))
    done = import_checkpoint(hf, tmp_path / "megatron")
    [found] = done.inexact
    assert found.name == "model.language_model.layers.0.linear_attn.norm.weight"
    assert 0 < found.max_abs_diff <= 2**-24


def norm_of(folder: Path, ssm_dtype: str, values: torch.Tensor) -> PreTrainedVLM:
    """A Qwen3.5 whose first GDN norm holds `values` over and over."""
    from megatron.bridge.formats.safetensors_writer import write_shard

    settings = {
        "ssm_dtype": ssm_dtype,
        "text.linear_value_head_dim": 2 * len(values) + 2,
        "text.mtp_num_hidden_layers": 0,
    }
    made = PreTrainedVLM.from_pretrained(make_model("qwen3.5", folder / "hf", settings, seed=15))
    name = "model.language_model.layers.0.linear_attn.norm.weight"
    [shard] = made.tensors.shards
    tensors = {key: made.tensors.read(key) for key in made.tensors}
    repeated = values.repeat(3)[: len(tensors[name])].to(tensors[name].dtype)
    if ssm_dtype == "float32" and len(values) > 2:  # F32 values between the BF16 ones
        generator = torch.Generator().manual_seed(0)
        repeated = (repeated + torch.rand(repeated.shape, generator=generator) / 512).clamp(0.5, 2)
    tensors[name] = repeated
    specs = [made.tensors[key] for key in shard.names]
    (folder / "hf" / shard.file_name).unlink()
    write_shard(folder / "hf" / shard.file_name, specs, tensors.__getitem__, shard.metadata)
    return PreTrainedVLM.from_pretrained(folder / "hf")
