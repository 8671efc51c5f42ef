"""What `import` writes against stock megatron-core: its save, its load, its own model class."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.bridge import AutoBridge
from megatron.bridge.formats.torch_dist.reader import TorchDistCheckpoint
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.operations.convert import import_checkpoint
from megatron.bridge.synthetic import make_model
from megatron.bridge.tensors.boxes import full_box
from oracle.gpt_models import stock_gpt_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with every optional part, as a Hugging Face folder and as `import` writes it."""
    folder = tmp_path_factory.mktemp("stock")
    settings = {"tie_word_embeddings": False, "text.attention_bias": True, "num_shards": 2}
    make_model("qwen3-vl", folder / "hf", settings, seed=5)
    import_checkpoint(PreTrainedVLM.from_pretrained(folder / "hf"), folder / "megatron")
    return folder


@pytest.fixture(scope="module")
def bridge(folder: Path) -> AutoBridge:
    return AutoBridge.from_hf_pretrained(folder / "hf")


@pytest.fixture(scope="module")
def model(bridge: AutoBridge, process_groups: None) -> Any:
    return bridge.to_megatron_model()[0]


def stock_save(model: Any, folder: Path) -> TorchDistCheckpoint:
    """What stock megatron-core saves of `model`, on norms that save what TransformerEngine's do."""
    from megatron.core import dist_checkpointing

    from megatron.bridge.runtime.cpu import megatron_on_cpu
    from oracle.norm_states import state_with_norms

    folder.mkdir()
    state = state_with_norms(model)
    with megatron_on_cpu():
        dist_checkpointing.save(state, str(folder), async_strategy="mcore")
    return TorchDistCheckpoint(folder)


def assert_same_tensors(ours: TorchDistCheckpoint, stock: TorchDistCheckpoint) -> None:
    assert ours.tensors == stock.tensors
    assert sorted(ours.objects) == sorted(stock.objects)
    for key, spec in stock.tensors.items():
        box = full_box(spec.shape)
        assert torch.equal(ours.read(key, box), stock.read(key, box)), key


def test_key_for_key_what_stock_save_writes(folder: Path, model: Any, tmp_path: Path) -> None:
    ours = TorchDistCheckpoint(folder / "megatron")
    stock = stock_save(model, tmp_path / "stock")
    assert_same_tensors(ours, stock)
    assert any("_extra_state" in name for name in ours.objects)
    written, saved = (
        pickle.loads((one.folder / ".metadata").read_bytes()) for one in (ours, stock)
    )
    for key, entry in saved.state_dict_metadata.items():
        assert type(written.state_dict_metadata[key]) is type(entry)
        if key in stock.tensors:
            assert written.state_dict_metadata[key].properties == entry.properties
    kinds = ("metadata.json", ".metadata", "__0_0.distcp")
    folders = (ours.folder, stock.folder)
    assert all((one / kind).is_file() for one in folders for kind in kinds)
    same = [(one / "metadata.json").read_text() for one in folders]
    assert same[0] == same[1]


@pytest.mark.parametrize("family", ["qwen3-vl-moe", "qwen3.5", "qwen3.5-moe"])
def test_key_for_key_in_the_other_families(
    family: str, tmp_path: Path, process_groups: None
) -> None:
    """With the MTP layer where there is one: the checkpoint holds all of the files."""
    hf = PreTrainedVLM.from_pretrained(make_model(family, tmp_path / "hf", {}, seed=11))
    import_checkpoint(hf, tmp_path / "megatron")
    provider = AutoBridge(hf).to_megatron_provider()
    if "3.5" in family:
        provider.mtp_num_layers = 1
    [model] = provider.provide_distributed_model(wrap_with_ddp=False)
    ours = TorchDistCheckpoint(tmp_path / "megatron")
    assert_same_tensors(ours, stock_save(model, tmp_path / "stock"))
    assert ("language_model.mtp.layers.0.eh_proj.weight" in ours.tensors) == ("3.5" in family)


@pytest.mark.parametrize("by", ["stock megatron-core", "AutoBridge"])
def test_load_of_our_model(folder: Path, bridge: AutoBridge, model: Any, by: str) -> None:
    from megatron.core import dist_checkpointing

    from megatron.bridge.runtime.cpu import megatron_on_cpu

    if by == "AutoBridge":
        found = bridge.load_megatron_model(folder / "megatron")[0].state_dict()
    else:
        empty = bridge.to_megatron_model(load_weights=False)[0]
        with megatron_on_cpu():
            found = dist_checkpointing.load(
                empty.sharded_state_dict(), str(folder / "megatron" / "iter_0000000")
            )
    expected = model.state_dict()
    tensors = [
        name
        for name, value in expected.items()
        if isinstance(value, torch.Tensor) and not name.endswith("_extra_state")
    ]
    assert len(tensors) > 100
    for name in tensors:
        assert torch.equal(found[name], expected[name]), name


def test_stock_load_finds_no_key_missing_or_unexpected(folder: Path, model: Any) -> None:
    """With the norms of TransformerEngine; without it their states are left where they are."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    from megatron.bridge.runtime.cpu import megatron_on_cpu
    from oracle.norm_states import state_with_norms

    state = state_with_norms(model)
    with megatron_on_cpu():
        _, missing, unexpected = dist_checkpointing.load(
            state,
            str(folder / "megatron" / "iter_0000000"),
            strict=StrictHandling.RETURN_ALL,
        )
    assert not missing
    assert not unexpected


def test_stock_load_into_a_stock_gpt_model(tmp_path: Path, process_groups: None) -> None:
    """The language model fills megatron-core's own GPTModel, built from its own local layer spec.

    The output projection has no bias here: the stock class has none without one in the MLP.
    """
    from megatron.core import dist_checkpointing

    from megatron.bridge.runtime.cpu import megatron_on_cpu

    make_model("qwen3-vl", tmp_path / "hf", {}, seed=6)
    hf = PreTrainedVLM.from_pretrained(tmp_path / "hf")
    import_checkpoint(hf, tmp_path / "megatron")
    stock = stock_gpt_model(tmp_path / "hf")
    with megatron_on_cpu():
        state = stock.sharded_state_dict(prefix="language_model.")
        loaded = dist_checkpointing.load(state, str(tmp_path / "megatron" / "iter_0000000"))
    weights = {name.removeprefix("language_model."): value for name, value in loaded.items()}
    stock.load_state_dict({name: weights[name] for name in stock.state_dict() if name in weights})
    last = stock.config.num_layers - 1
    layer, hf_layer = stock.decoder.layers[last], f"model.language_model.layers.{last}."
    for weight, name in (
        (layer.self_attention.linear_proj.weight, "self_attn.o_proj.weight"),
        (layer.mlp.linear_fc2.weight, "mlp.down_proj.weight"),
        (layer.input_layernorm.weight, "input_layernorm.weight"),
        (layer.mlp.linear_fc1.weight.chunk(2)[1], "mlp.up_proj.weight"),
    ):
        assert torch.equal(weight.cpu(), hf.tensors.read(hf_layer + name)), name
    embedding = hf.tensors.read("model.language_model.embed_tokens.weight")
    rows = stock.embedding.word_embeddings.weight[: len(embedding)]
    assert torch.equal(rows.cpu(), embedding)


def test_a_saved_model_is_what_import_writes(
    folder: Path, bridge: AutoBridge, model: Any, tmp_path: Path
) -> None:
    bridge.save_megatron_model([model], tmp_path / "saved")
    ours, saved = TorchDistCheckpoint(folder / "megatron"), TorchDistCheckpoint(tmp_path / "saved")
    assert ours.tensors == saved.tensors
    assert ours.objects == saved.objects
    for key, spec in ours.tensors.items():
        box = full_box(spec.shape)
        assert torch.equal(ours.read(key, box), saved.read(key, box)), key


def test_a_vocabulary_padded_otherwise_is_loaded(
    bridge: AutoBridge, folder: Path, model: Any
) -> None:
    from megatron.bridge.live.megatron_checkpoint import load_checkpoint

    provider = bridge.to_megatron_provider(load_weights=False)
    provider.make_vocab_size_divisible_by = 512
    [wider] = provider.provide_distributed_model(wrap_with_ddp=False)
    load_checkpoint([wider], TorchDistCheckpoint(folder / "megatron"))
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        found = wider.language_model.get_parameter(name)
        expected = model.language_model.get_parameter(name)
        assert len(found) == 512 > len(expected)
        assert torch.equal(found[: len(expected)], expected)
        assert not found[len(expected) :].any()


def test_load_refuses_another_model(bridge: AutoBridge, folder: Path, tmp_path: Path) -> None:
    from megatron.bridge.errors import PlanError

    make_model("qwen3-vl", tmp_path / "hf", {"text.num_hidden_layers": 4}, seed=5)
    other = AutoBridge.from_hf_pretrained(tmp_path / "hf")
    with pytest.raises(PlanError, match="does not hold this model"):
        other.load_megatron_model(folder / "megatron")
