"""What clients do with a bridge beside converting: set values, register bridges, copy artifacts."""

import copy
import json
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import released_configs as released
from megatron.bridge import AutoBridge
from megatron.bridge.errors import ConfigError, InputError, PlanError, UnsupportedModel
from megatron.bridge.models.catalog import bridge_for
from megatron.bridge.models.conversion.model_bridge import (
    REGISTERED_BRIDGES,
    MegatronModelBridge,
)
from megatron.bridge.models.conversion.param_mapping import MegatronParamMapping, ReplicatedMapping
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.models.qwen_vl.qwen3_vl_bridge import Qwen3VLBridge
from megatron.bridge.models.qwen_vl.qwen3_vl_provider import Qwen3VLModelProvider
from megatron.bridge.synthetic import make_model
from oracle import tiny

ARCHITECTURE = "Qwen3VLForConditionalGeneration"
TOKENS = torch.arange(3, 14, device="cuda" if torch.cuda.is_available() else "cpu")[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("qwen3-vl", tmp_path_factory.mktemp("clients") / "hf", seed=4)


@pytest.fixture
def bridge(folder: Path) -> AutoBridge:
    return AutoBridge.from_hf_pretrained(folder)


def test_an_architecture_set_on_the_config_is_the_one_that_counts(bridge: AutoBridge) -> None:
    """A client's switch to the text half: there is no bridge for that, and it is not overlooked."""
    bridge.hf_pretrained.config.architectures = ["Qwen3VLTextModel"]
    uses: list[Callable[[], object]] = [
        bridge.to_megatron_provider,
        bridge.plan,
        lambda: bridge.transformer_config,
    ]
    for use in uses:
        with pytest.raises(UnsupportedModel, match=r"^Qwen3VLTextModel: it .* text half"):
            use()
    bridge.hf_pretrained.config.architectures = [ARCHITECTURE]
    bridge.plan()


@pytest.mark.parametrize("alone", [False, True], ids=["files", "config alone"])
def test_values_set_on_the_config_are_those_of_the_provider(alone: bool, folder: Path) -> None:
    if alone:
        config = json.loads((folder / "config.json").read_text())
        bridge = AutoBridge.from_hf_config(config)
    else:
        bridge = AutoBridge.from_hf_pretrained(folder)
    stated = bridge.hf_pretrained.hf_config
    config = bridge.hf_pretrained.config
    assert bridge.hf_pretrained.hf_config is stated, "looking at it changes nothing"
    config.text_config.rope_parameters["rope_theta"] = 123.0
    config.text_config.rms_norm_eps = 3e-5
    config.vision_start_token_id = 299
    provider: Any = bridge.to_megatron_provider(load_weights=False)
    found = (provider.rotary_base, provider.layernorm_epsilon, provider.vision_start_token_id)
    assert found == (123.0, 3e-5, 299)
    assert provider.hidden_size == 160
    config.text_config.rms_norm_eps = -1.0
    with pytest.raises(ConfigError, match=r"rope_parameters, .* as set on .*rms_norm_eps must"):
        bridge.to_megatron_provider(load_weights=False)


def test_a_size_that_the_files_do_not_have_is_named(bridge: AutoBridge) -> None:
    """All layers that the config says must be there; others are carried, as in transformers."""
    text = bridge.hf_pretrained.config.text_config
    text.num_hidden_layers -= 1
    carried = bridge.plan().carried
    assert carried
    assert all(f"layers.{text.num_hidden_layers}." in name for name in carried)
    text.num_hidden_layers += 2
    with pytest.raises(PlanError, match=r"num_hidden_layers is 6, the files hold 5 layers"):
        bridge.plan()
    text.num_hidden_layers -= 1
    text.intermediate_size += 1
    with pytest.raises(PlanError, match="the config asks for shape"):
        bridge.to_megatron_model()


def test_what_was_set_replaces_other_spellings(tmp_path: Path) -> None:
    """The file states rope and the number of experts as older versions of transformers did."""
    made = make_model("qwen3-vl-moe", tmp_path / "model", {"rope_form": "old"})
    bridge = AutoBridge.from_hf_pretrained(made)
    text = bridge.hf_pretrained.config.text_config
    assert "rope_scaling" in bridge.hf_pretrained.hf_config.text.data
    text.rope_parameters["rope_theta"] = 777.0
    assert bridge.to_megatron_provider(load_weights=False).rotary_base == 777.0  # type: ignore[attr-defined]
    text.num_experts = 5  # transformers' other name of num_local_experts
    with pytest.raises(PlanError, match="the config asks for shape"):
        bridge.plan()
    assert bridge.to_megatron_provider(load_weights=False).num_moe_experts == 5


def test_values_that_cannot_be_honoured(bridge: AutoBridge) -> None:
    config = bridge.hf_pretrained.config
    config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(ConfigError, match="quantization_config was changed on `config`"):
        bridge.plan()
    del config.quantization_config
    config.text_config.notes = {1, 2}
    with pytest.raises(ConfigError, match=r"text_config.notes was set on `config` to a value"):
        bridge.plan()
    del config.text_config.notes
    bridge.plan()


def test_what_is_saved_states_what_was_set(
    bridge: AutoBridge, folder: Path, process_groups: None, tmp_path: Path
) -> None:
    bridge.hf_pretrained.config.text_config.rms_norm_eps = 2e-5
    model = bridge.to_megatron_model()
    bridge.save_hf_pretrained(model, tmp_path / "saved")
    bridge.hf_pretrained.save_artifacts(tmp_path / "artifacts")
    stated = json.loads((folder / "config.json").read_text())
    stated["text_config"]["rms_norm_eps"] = 2e-5
    for name in ("saved", "artifacts"):
        assert json.loads((tmp_path / name / "config.json").read_text()) == stated
    theirs = bridge.hf_pretrained.load_model(dtype=torch.float32)
    again = PreTrainedVLM.from_pretrained(tmp_path / "saved").load_model(dtype=torch.float32)
    unchanged = PreTrainedVLM.from_pretrained(folder).load_model(dtype=torch.float32)
    with torch.no_grad():
        logits = theirs(TOKENS).logits
        assert torch.equal(logits, again(TOKENS).logits)
        assert not torch.equal(logits, unchanged(TOKENS).logits)


def test_artifacts(bridge: AutoBridge, folder: Path, tmp_path: Path) -> None:
    """All files but weights, into a folder that may hold others."""
    hf = bridge.hf_pretrained
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    hf.save_artifacts(tmp_path / "out")
    expected = {str(file) for file in hf.side_files}
    assert {path.name for path in (tmp_path / "out").iterdir()} == expected | {"notes.txt"}
    for name in expected:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    with pytest.raises(InputError, match="these files come from there"):
        hf.save_artifacts(folder)
    with pytest.raises(InputError, match=r"Not a directory|File exists"):
        hf.save_artifacts(tmp_path / "out" / "notes.txt")
    fp8 = make_model("qwen3.5", tmp_path / "fp8", {"fp8": True})
    PreTrainedVLM.from_pretrained(fp8).save_artifacts(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())
    alone = AutoBridge.from_hf_config(released.QWEN3_VL_8B).hf_pretrained
    alone.save_artifacts(tmp_path / "alone")
    assert json.loads((tmp_path / "alone/config.json").read_text()) == released.QWEN3_VL_8B


def test_tensors_by_name(bridge: AutoBridge) -> None:
    hf = bridge.hf_pretrained
    assert hf.model_name_or_path == hf.name_or_path
    assert list(hf.state) == list(hf.weights)
    assert len(hf.state) == len(hf.weights)
    name = "model.visual.merger.norm.bias"
    assert name in hf.state
    assert torch.equal(hf.state[name], hf.weights.read(name))
    with pytest.raises(KeyError):
        hf.state["model.gone.weight"]


def test_exported_weights_have_the_names_of_other_bridges(
    bridge: AutoBridge, process_groups: None
) -> None:
    item = next(bridge.export_hf_weights(bridge.to_megatron_model()))
    assert (item.param_name, item.weight) == (item.name, item.tensor)


def test_copies_of_a_provider_that_loads(bridge: AutoBridge, process_groups: None) -> None:
    provider = bridge.to_megatron_provider()
    [model] = provider.provide_distributed_model(wrap_with_ddp=False)
    expected = model(input_ids=TOKENS)
    for again in (copy.deepcopy(provider), pickle.loads(pickle.dumps(provider))):
        [loaded] = again.provide_distributed_model(wrap_with_ddp=False)
        assert torch.equal(loaded(input_ids=TOKENS), expected)


def test_weights_are_loaded_into_what_a_hook_wrapped(
    bridge: AutoBridge, process_groups: None
) -> None:
    class Wrapped(torch.nn.Module):
        def __init__(self, module: Any) -> None:
            super().__init__()
            self.module = module

    provider = bridge.to_megatron_provider()
    provider.register_pre_wrap_hook(lambda chunks: list(map(Wrapped, chunks)), prepend=True)
    [wrapped] = provider.provide_distributed_model(wrap_with_ddp=False)
    assert type(wrapped) is Wrapped
    for name, tensor in bridge.export_hf_weights([wrapped]):
        assert torch.equal(tensor, bridge.hf_pretrained.state[name]), name


def test_hooks_that_change_loaded_weights_come_after_them(
    bridge: AutoBridge, process_groups: None
) -> None:
    @torch.no_grad()
    def fill(chunks: list[Any]) -> None:
        for parameter in chunks[0].parameters():
            parameter.fill_(3.0)

    for in_front in (False, True):
        provider = bridge.to_megatron_provider()
        provider.register_pre_wrap_hook(fill, prepend=in_front)
        [model] = provider.provide_distributed_model(wrap_with_ddp=False)
        norm = model.language_model.decoder.final_layernorm.weight
        assert bool((norm == 3.0).all()) is not in_front


@pytest.fixture
def registered() -> Iterator[None]:
    """What a test registers is gone afterwards."""
    before = dict(REGISTERED_BRIDGES)
    yield
    REGISTERED_BRIDGES.clear()
    REGISTERED_BRIDGES.update(before)


@pytest.mark.usefixtures("registered")
def test_a_later_bridge_takes_the_place_of_an_earlier_one(
    bridge: AutoBridge, process_groups: None
) -> None:
    class OwnProvider(Qwen3VLModelProvider):
        pass

    own = f"{__name__}.OwnProvider"
    globals()["OwnProvider"] = OwnProvider
    OwnProvider.__qualname__ = "OwnProvider"

    @MegatronModelBridge.register_bridge(
        source=ARCHITECTURE, target="own.Model", provider=OwnProvider, model_type="qwen3_vl"
    )
    class Own(Qwen3VLBridge):
        def provider_bridge(self, hf_pretrained: Any) -> Qwen3VLModelProvider:
            provider = super().provider_bridge(hf_pretrained)
            provider.calculate_per_token_loss = True
            return provider

    assert (Own.target, Own.provider, Own.model_type) == ("own.Model", own, "qwen3_vl")
    assert Qwen3VLBridge.provider != own
    assert type(bridge_for(ARCHITECTURE)) is Own
    provider = bridge.to_megatron_provider()
    assert type(provider) is OwnProvider
    assert provider.calculate_per_token_loss
    provider.provide_distributed_model(wrap_with_ddp=False)

    @MegatronModelBridge.register_bridge(source=ARCHITECTURE, target="late.Model", override=False)
    class Late(Qwen3VLBridge):
        """One that ships here, and whose module is imported after a client's."""

    assert type(bridge_for(ARCHITECTURE)) is Own


def test_a_provider_from_an_object_with_a_config() -> None:
    config = released.QWEN3_VL_8B | {"dtype": "bfloat16"}
    provider = bridge_for(ARCHITECTURE).provider_bridge(SimpleNamespace(config=config))
    assert (provider.num_layers, provider.hidden_size) == (36, 4096)
    assert provider.params_dtype == torch.bfloat16


def test_the_name_that_other_bridges_give_a_row() -> None:
    assert isinstance(ReplicatedMapping("a.weight", "b.weight"), MegatronParamMapping)


@pytest.mark.parametrize(
    ("hidden", "intermediate"), [(80, 80), (80, 40)], ids=["down is square", "gate_up is square"]
)
def test_square_experts_as_transformers_saves_them_load(
    hidden: int, intermediate: int, build: Any, processor: Any
) -> None:
    """The other matrix of the layer tells how they lie; what is said to the contrary is refused."""
    pair = build({"text_config": {"moe_intermediate_size": intermediate}}, case="qwen3_vl_moe")
    shapes = {
        name.rpartition(".")[2]: tuple(spec.shape[1:])
        for name, spec in pair.bridge.hf_pretrained.tensors.items()
        if ".experts." in name
    }
    assert shapes == {
        "gate_up_proj": (2 * intermediate, hidden),
        "down_proj": (hidden, intermediate),
    }
    inputs = tiny.prompt(processor, f"{tiny.IMAGE} A flower?", images=tiny.photographs()[:1])
    with torch.no_grad():
        expected = pair.hf(**inputs).logits
        found = pair.ours(**inputs, trim_vocab_padding=True)
    assert (found - expected).abs().max() <= 1e-4
    pair.bridge.load_hf_weights([pair.ours], experts="fused")
    AutoBridge.from_hf_pretrained(pair.folder, experts="fused").load_hf_weights([pair.ours])
    said = re.escape("lies fused, not fused-transposed")
    with pytest.raises(InputError, match=said):
        pair.bridge.load_hf_weights([pair.ours], experts="fused-transposed")
    with pytest.raises(InputError, match=said):
        pair.bridge.load_hf_weights([pair.ours], pair.folder, experts="fused-transposed")
    with pytest.raises(InputError, match=said):
        AutoBridge.from_hf_pretrained(pair.folder, experts="fused-transposed").plan()


@pytest.mark.usefixtures("process_groups")
def test_a_model_without_memory_is_not_filled(bridge: AutoBridge) -> None:
    provider = bridge.to_megatron_provider(load_weights=False)
    model = provider.provide_distributed_model(
        wrap_with_ddp=False, init_model_with_meta_device=True
    )
    with pytest.raises(InputError, match=r"parameter is on the meta device .*to_empty"):
        bridge.load_hf_weights(model)
