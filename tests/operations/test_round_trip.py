"""Files to Megatron files and back: every byte of every file, for all the ways models differ."""

import filecmp
import resource
import signal
from pathlib import Path

import pytest
import torch

import forked
from megatron.bridge.errors import CheckpointError, InputError, PlanError, TargetExists
from megatron.bridge.formats.file_plans import plan_of
from megatron.bridge.formats.torch_dist.reader import TorchDistCheckpoint, iteration_folder
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.operations.convert import export_checkpoint, import_checkpoint
from megatron.bridge.synthetic import make_model
from megatron.bridge.target.run import Run
from megatron.bridge.tensors.boxes import full_box

VARIANTS: dict[str, dict[str, object]] = {
    "untied": {"tie_word_embeddings": False},
    "tied": {"tie_word_embeddings": True},
    "biases": {"text.attention_bias": True, "tie_word_embeddings": True},
    "three shards": {"num_shards": 3},
    "no padding": {"vocab_size": 384},
    "new rope": {"rope_form": "new"},
    "float32": {"dtype": "float32", "num_shards": 2},
    "one key-value head": {"text.num_key_value_heads": 1, "text.num_hidden_layers": 2},
}


def files_of(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def assert_same_bytes(left: Path, right: Path) -> None:
    assert files_of(left) == files_of(right)
    for file in files_of(left):
        assert filecmp.cmp(left / file, right / file, shallow=False), file


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_every_byte_comes_back(settings: dict[str, object], tmp_path: Path) -> None:
    source = make_model("qwen3-vl", tmp_path / "hf", settings, seed=3)
    hf = PreTrainedVLM.from_pretrained(source)
    imported = import_checkpoint(hf, tmp_path / "megatron")
    exported = export_checkpoint(tmp_path / "megatron", tmp_path / "back", hf)
    assert_same_bytes(source, tmp_path / "back")
    assert imported.plan.hf_bytes == exported.plan.hf_bytes == hf.tensors.total_bytes
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "megatron", "back"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model("qwen3-vl", folder / "hf", {"num_shards": 2}, seed=4)
    import_checkpoint(PreTrainedVLM.from_pretrained(folder / "hf"), folder / "megatron")
    return folder


def test_the_megatron_tensors_are_the_rearranged_ones(model: Path) -> None:
    """One parameter of each kind against torch's own operations, not against our way back."""
    hf = PreTrainedVLM.from_pretrained(model / "hf")
    read, text, vision = hf.tensors.read, hf.hf_config.text, hf.hf_config.vision
    checkpoint = TorchDistCheckpoint(model / "megatron")

    def megatron(key: str) -> torch.Tensor:
        return checkpoint.read(key, full_box(checkpoint.tensors[key].shape))

    layers = range(text.require("num_hidden_layers", int))
    groups, dim = text.require("num_key_value_heads", int), text.require("head_dim", int)
    layer = "model.language_model.layers.{}."
    qkv = [
        torch.cat(
            [
                read(f"{layer.format(n)}self_attn.{part}_proj.weight").unflatten(0, (groups, -1))
                for part in "qkv"
            ],
            dim=1,
        ).flatten(0, 1)
        for n in layers
    ]
    key = "language_model.decoder.layers."
    assert torch.equal(megatron(f"{key}self_attention.linear_qkv.weight"), torch.stack(qkv))
    fc1 = [
        torch.cat([read(f"{layer.format(n)}mlp.{part}_proj.weight") for part in ("gate", "up")])
        for n in layers
    ]
    assert torch.equal(megatron(f"{key}mlp.linear_fc1.weight"), torch.stack(fc1))
    heads = vision.require("num_heads", int)
    packed = [
        read(f"model.visual.blocks.{n}.attn.qkv.weight")
        .unflatten(0, (3, heads, -1))
        .transpose(0, 1)
        .flatten(0, 2)
        for n in range(vision.require("depth", int))
    ]
    vision_key = "vision_model.decoder.layers.self_attention.linear_qkv.weight"
    assert torch.equal(megatron(vision_key), torch.stack(packed))
    embedding = megatron("language_model.embedding.word_embeddings.weight")
    tokens = text.require("vocab_size", int)
    assert torch.equal(embedding[:tokens], read("model.language_model.embed_tokens.weight"))
    assert embedding.shape[0] % 128 == 0
    assert not embedding[tokens:].any()
    assert dim > 0


def test_a_reference_without_weights_gives_the_same_tensors(model: Path, tmp_path: Path) -> None:
    hf = PreTrainedVLM.from_pretrained(model / "hf")
    config = PreTrainedVLM.from_config(hf.hf_config)
    export_checkpoint(model / "megatron", tmp_path / "out", config)
    back = PreTrainedVLM.from_pretrained(tmp_path / "out")
    assert set(back.tensors) == set(hf.tensors)
    assert all(torch.equal(back.tensors.read(n), hf.tensors.read(n)) for n in hf.tensors)
    assert back.hf_config.data == hf.hf_config.data


def test_a_reference_of_another_model_is_refused(model: Path, tmp_path: Path) -> None:
    other = make_model("qwen3-vl", tmp_path / "other", {"text.intermediate_size": 272}, seed=4)
    with pytest.raises(
        PlanError, match=r"mlp.linear_fc1.weight: expected BF16 of shape .*found"
    ) as error:
        export_checkpoint(
            model / "megatron", tmp_path / "out", PreTrainedVLM.from_pretrained(other)
        )
    assert "does not hold the model of" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_existing_target_is_kept_unless_forced(model: Path, tmp_path: Path) -> None:
    hf = PreTrainedVLM.from_pretrained(model / "hf")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(TargetExists):
        export_checkpoint(model / "megatron", tmp_path / "out", hf)
    with pytest.raises(TargetExists):
        import_checkpoint(hf, tmp_path / "out")
    with pytest.raises(TargetExists, match="neither empty nor a model"):
        export_checkpoint(model / "megatron", tmp_path / "out", hf, run=Run(force=True))
    assert files_of(tmp_path / "out") == [Path("mine")]
    make_model("qwen3-vl", tmp_path / "old", {"num_shards": 3})
    export_checkpoint(model / "megatron", tmp_path / "old", hf, run=Run(force=True))
    assert_same_bytes(model / "hf", tmp_path / "old")


@pytest.mark.parametrize("target", ["hf", "hf/inside", "."])
def test_a_target_that_overlaps_with_the_source_is_refused(model: Path, target: str) -> None:
    hf = PreTrainedVLM.from_pretrained(model / "hf")
    before = files_of(model)
    with pytest.raises(InputError, match="overlap"):
        import_checkpoint(hf, model / target, run=Run(force=True))
    with pytest.raises(InputError, match="overlap"):
        export_checkpoint(model / "megatron", model / target, hf, run=Run(force=True))
    assert files_of(model) == before


def _import_with_little_room(source: Path, target: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    try:
        import_checkpoint(PreTrainedVLM.from_pretrained(source), target)
    except CheckpointError as error:
        print(error)


def test_a_disk_that_is_full_leaves_nothing(model: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk."""
    done = forked.run(_import_with_little_room, model / "hf", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "cannot be written" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_failure_on_the_way_leaves_nothing(model: Path, tmp_path: Path) -> None:
    hf = PreTrainedVLM.from_pretrained(model / "hf")
    plan_of(hf)  # the headers are read and found good
    shard = model / "hf" / hf.tensors.shards[-1].file_name
    whole = shard.read_bytes()
    try:
        shard.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(CheckpointError, match=shard.name):
            import_checkpoint(hf, tmp_path / "out")
    finally:
        shard.write_bytes(whole)
    assert list(tmp_path.iterdir()) == []


def test_iterations_are_found_by_the_tracker(model: Path) -> None:
    folder = model / "megatron"
    assert iteration_folder(folder) == folder / "iter_0000000"
    assert iteration_folder(folder / "iter_0000000") == folder / "iter_0000000"
    with pytest.raises(CheckpointError, match="not a Megatron checkpoint"):
        iteration_folder(model / "hf")
