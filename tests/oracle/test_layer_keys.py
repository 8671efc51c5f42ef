"""The keys of layers: those of the live model, in either form, whatever made them."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron.bridge import AutoBridge
from megatron.bridge.cli import main
from megatron.bridge.formats.file_plans import is_state
from megatron.bridge.formats.torch_dist.reader import TorchDistCheckpoint
from megatron.bridge.live.local_tensors import local_tensors
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.runtime.cpu import megatron_on_cpu
from megatron.bridge.synthetic import make_model
from model_folders import same_tensors
from oracle.norm_states import objects_with_norms
from oracle.stock import stock_save

pytestmark = pytest.mark.usefixtures("process_groups")

LAYERS = "language_model.decoder.layers."
VISION_LAYERS = "vision_model.decoder.layers."

FULL_ATTENTION: dict[str, object] = {
    "text.num_hidden_layers": 2,
    "text.layer_types": ["full_attention"] * 2,
}
MODELS: dict[str, tuple[str, dict[str, object], bool]] = {
    "linear attention in all layers": ("qwen3.5", {"text.num_hidden_layers": 3}, False),
    "the same with experts": ("qwen3.5-moe", {"text.num_hidden_layers": 3}, False),
    "full attention in all layers": (
        "qwen3.5",
        FULL_ATTENTION,
        False,
    ),
    "both kinds of attention": ("qwen3.5", {}, False),
    "experts in no layer": (
        "qwen3-vl-moe",
        {"text.num_hidden_layers": 3, "text.mlp_only_layers": [0, 1, 2]},
        False,
    ),
    "experts in some layers": ("qwen3-vl-moe", {"text.mlp_only_layers": [1, 4]}, False),
    "experts in all layers": ("qwen3-vl-moe", {}, True),
    "one kind of layer": ("qwen3-vl", {}, True),
}


@pytest.mark.parametrize(("family", "settings", "stacked"), MODELS.values(), ids=MODELS)
def test_keys_are_those_of_the_live_model(
    family: str, settings: dict[str, object], stacked: bool, tmp_path: Path
) -> None:
    bridge = AutoBridge.from_hf_pretrained(make_model(family, tmp_path / "hf", settings, seed=3))
    [model] = bridge.to_megatron_model()
    objects = objects_with_norms(model)
    plan = bridge.plan()
    held = {local.key: local.key_shape for local in local_tensors([model])}
    expected = {k: spec.shape for k, spec in plan.megatron.items() if ".mtp." not in k}
    assert expected == held
    assert {name for name in plan.extra_states if ".mtp." not in name} == objects
    assert (f"{LAYERS}mlp.linear_fc1.weight" in held or f"{LAYERS}mlp.router.weight" in held) == (
        stacked
    )


@pytest.mark.parametrize("family", ["qwen3.5", "qwen3-vl-moe"])
def test_an_imported_model_of_alike_layers_is_loaded(family: str, tmp_path: Path) -> None:
    settings: dict[str, object] = {"text.num_hidden_layers": 3}
    if family == "qwen3-vl-moe":
        settings["text.mlp_only_layers"] = [0, 1, 2]
    folder = make_model(family, tmp_path / "hf", settings, seed=4)
    bridge = AutoBridge.from_hf_pretrained(folder)
    AutoBridge.import_ckpt(folder, tmp_path / "megatron")
    [from_files] = bridge.to_megatron_model()
    [from_checkpoint] = bridge.load_megatron_model(tmp_path / "megatron")
    assert_same_weights(from_files, from_checkpoint)


# A provider whose fields ask for the other form of keys.
OVERRIDES: dict[str, tuple[str, dict[str, object], dict[str, Any]]] = {
    "keys for each layer": ("qwen3-vl", {}, {"hetereogenous_dist_checkpoint": True}),
    "a list of ones": ("qwen3-vl-moe", {}, {"moe_layer_freq": [1] * 7}),
    "an interval": (
        "qwen3.5",
        FULL_ATTENTION | {"text.mtp_num_hidden_layers": 0},
        {"linear_attention_freq": 1},
    ),
}


@pytest.mark.parametrize(("family", "settings", "fields"), OVERRIDES.values(), ids=OVERRIDES)
def test_a_live_model_has_the_form_of_its_own_keys(
    family: str, settings: dict[str, object], fields: dict[str, Any], tmp_path: Path
) -> None:
    folder = make_model(family, tmp_path / "hf", settings, seed=5)
    bridge = AutoBridge.from_hf_pretrained(folder)
    [usual] = bridge.to_megatron_model()
    provider = bridge.to_megatron_provider()
    for name, value in fields.items():
        setattr(provider, name, value)
    [model] = provider.provide_distributed_model(wrap_with_ddp=False)
    keys = {local.key for local in local_tensors([model])}
    assert keys != {local.key for local in local_tensors([usual])}
    assert_same_weights(usual, model)
    weights = PreTrainedVLM.from_pretrained(folder).tensors
    for name, tensor in bridge.export_hf_weights([model]):
        assert torch.equal(tensor, weights.read(name)), name
    bridge.save_megatron_model([model], tmp_path / "saved")
    assert main(["verify", str(folder), str(tmp_path / "saved")]) == 0
    [again] = bridge.load_megatron_model(tmp_path / "saved")
    assert_same_weights(usual, again)
    # And the checkpoint of the usual form fills the model of the other one.
    bridge.save_megatron_model([usual], tmp_path / "usual")
    [other] = bridge.load_megatron_model(tmp_path / "usual", mp_overrides=fields)
    assert {local.key for local in local_tensors([other])} == keys
    assert_same_weights(usual, other)


def test_a_checkpoint_with_keys_for_each_layer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As training loops of today save it: `non_homogeneous_layers` in the metadata."""
    folder = make_model("qwen3-vl-moe", tmp_path / "hf", {}, seed=6)
    bridge = AutoBridge.from_hf_pretrained(folder)
    [model] = bridge.to_megatron_model()
    with megatron_on_cpu():
        state = model.sharded_state_dict(metadata={"non_homogeneous_layers": True})
    trained = stock_save({"model": state}, tmp_path / "trained")
    assert {"language_model.decoder.layers.2.mlp.router.weight"} < {
        key for key in keys_of(trained) if "router" in key
    }
    assert any(key.startswith(f"{VISION_LAYERS}1.") for key in keys_of(trained))
    assert main(["verify", str(folder), str(trained)]) == 0
    assert main(["export", str(trained), str(tmp_path / "out"), "--hf", str(folder)]) == 0
    assert same_tensors(folder, tmp_path / "out")
    [loaded] = bridge.load_megatron_model(trained)
    assert_same_weights(model, loaded)


def test_the_norm_before_experts_as_the_local_spec_of_megatron_core_names_it(
    tmp_path: Path,
) -> None:
    folder = make_model("qwen3-vl-moe", tmp_path / "hf", {}, seed=7)
    bridge = AutoBridge.from_hf_pretrained(folder)
    [model] = bridge.to_megatron_model()
    with megatron_on_cpu():
        state = model.sharded_state_dict()
    for entry in state.values():
        entry.key = entry.key.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
    trained = stock_save({"model": state}, tmp_path / "trained")
    assert f"{LAYERS}mlp.linear_fc1.layer_norm_weight" in keys_of(trained)
    assert main(["verify", str(folder), str(trained)]) == 0
    assert main(["export", str(trained), str(tmp_path / "out"), "--hf", str(folder)]) == 0
    assert same_tensors(folder, tmp_path / "out")
    [loaded] = bridge.load_megatron_model(trained)
    assert_same_weights(model, loaded)


def test_state_of_several_optimizers_is_not_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mixture of experts has two optimizers; the keys are those of megatron-core's own."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, optimizer
    from megatron.core.optimizer.optimizer import ChainedOptimizer

    settings = {"text.num_hidden_layers": 3, "dtype": "float32"}
    folder = make_model("qwen3-vl-moe", tmp_path / "hf", settings, seed=8)
    bridge = AutoBridge.from_hf_pretrained(folder)
    provider = bridge.to_megatron_provider()
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=False)
    chunks = provider.provide_distributed_model(ddp)
    for name, parameter in chunks[0].named_parameters():
        parameter.allreduce = ".experts." not in name  # as in expert parallelism
    # It asks for one number on the GPU.
    on_cpu = SimpleNamespace(**vars(torch) | {"tensor": lambda *values, **_: torch.tensor(*values)})
    monkeypatch.setattr(optimizer, "torch", on_cpu)
    with megatron_on_cpu():
        chained = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-4), chunks)
        assert isinstance(chained, ChainedOptimizer)
        assert len(chained.chained_optimizers) == 2
        for one in chained.chained_optimizers:
            one.init_state_fn(one.optimizer)
        weights = chunks[0].module.sharded_state_dict()
        state = chained.sharded_state_dict(weights)
    trained = stock_save({"model": weights, "optimizer": state}, tmp_path / "trained")
    keys = keys_of(trained)
    assert {key.partition(".")[0] for key in keys} > {"chained_0", "chained_1"}
    of_weights = [key for key in keys if not key.startswith("chained_")]
    of_state = len(keys) - len(of_weights)
    capsys.readouterr()
    assert main(["inspect", str(trained), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["megatron"]["keys"] == len(of_weights) == len(shown["tensors"])
    assert shown["state"]["keys"] == of_state
    assert main(["verify", str(folder), str(trained), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["ignored"]) == of_state
    out = tmp_path / "out"
    assert main(["export", str(trained), str(out), "--hf", str(folder), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["dropped"]) == of_state
    assert same_tensors(folder, out)
    [loaded] = bridge.load_megatron_model(trained)
    assert_same_weights(chunks[0].module, loaded)


@pytest.mark.parametrize(
    ("key", "state"),
    [
        ("optimizer.state.exp_avg.language_model.output_layer.weight", True),
        ("chained_0.optimizer.state.fp32_param.vision_model.pos_embed.weight", True),
        ("chained_11.optimizer.distributed.dp_group_idx_0.gbuf_idx_0.bucket_idx_0.param", True),
        ("chained_1.chained_0.optimizer.state.exp_avg_sq.weight", True),
        ("rng_state", True),
        ("rerun_state_machine_state/shard_0_1", True),
        ("chained_0.weight", False),
        ("language_model.optimizer.weight", False),
        ("optimizers.weight", False),
        ("rng_states", False),
    ],
)
def test_keys_of_state(key: str, state: bool) -> None:
    assert is_state(key) is state


def keys_of(folder: Path) -> list[str]:
    return list(TorchDistCheckpoint(folder).tensors)


def assert_same_weights(one: Any, other: Any) -> None:
    here, there = dict(one.named_parameters()), dict(other.named_parameters())
    assert here.keys() == there.keys()
    for name, weight in here.items():
        assert weight.dtype == there[name].dtype, name
        assert torch.equal(weight, there[name]), name
