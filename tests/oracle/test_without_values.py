"""Models that are filled get no initial values, and no parameter of theirs stays without one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron.bridge import AutoBridge
from megatron.bridge.errors import PlanError
from megatron.bridge.live import weights
from megatron.bridge.models.model_provider import ModelProvider
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.vision_block import PatchEmbed
from megatron.bridge.models.without_values import build_without_values
from megatron.bridge.synthetic import make_model
from providers import PROVIDERS, small_provider

FAMILIES = {"qwen3-vl": {}, "qwen3.5-moe": {"tie_word_embeddings": True}}


@pytest.fixture(scope="module", params=list(FAMILIES))
def bridge(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AutoBridge:
    target = tmp_path_factory.mktemp("without_values") / "hf"
    return AutoBridge.from_hf_pretrained(make_model(request.param, target, FAMILIES[request.param]))


def build(provider: ModelProvider) -> Any:
    [chunk] = provider.provide_distributed_model(wrap_with_ddp=False)
    return chunk


def random_states() -> list[torch.Tensor]:
    return [torch.get_rng_state(), *get_cuda_rng_tracker().get_states().values()]


def initialization(model: torch.nn.Module) -> set[bool]:
    return {one.config.perform_initialization for one in model.modules() if hasattr(one, "config")}


@pytest.mark.parametrize("family", list(PROVIDERS))
@pytest.mark.parametrize("asked_for", [True, False])
def test_nothing_is_drawn_for_a_model_that_is_filled(
    family: str, asked_for: bool, process_groups: None
) -> None:
    provider = small_provider(family, perform_initialization=asked_for)
    provider.register_pre_wrap_hook(lambda _: None, fills=True)
    drawn = build(small_provider(family))
    before = random_states()
    model = build(provider)
    assert all(map(torch.equal, random_states(), before))
    assert provider.perform_initialization is asked_for
    assert initialization(model) == {asked_for}
    # What else a module makes of its config is there.
    for name, tensor in drawn.named_buffers():
        assert torch.equal(model.get_buffer(name), tensor), name
    for name, parameter in drawn.named_parameters():
        same = model.get_parameter(name)
        assert (same.shape, same.dtype) == (parameter.shape, parameter.dtype), name
        assert vars(same).keys() == vars(parameter).keys(), name  # how it is split, for instance


def test_buffers_are_drawn() -> None:
    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.full((3, 5), 7.0))
            torch.nn.init.kaiming_uniform_(self.weight)
            torch.nn.init.trunc_normal_(self.weight)
            self.register_buffer("signs", torch.full((4,), 7.0).uniform_(-1, 1), persistent=False)

    [module] = build_without_values(small_provider(), lambda: [Module()])
    assert module.signs.abs().max() <= 1


def test_the_config_is_as_it_was_when_building_fails() -> None:
    provider = small_provider()

    def fail() -> list[Any]:
        assert not provider.perform_initialization
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        build_without_values(provider, fail)
    assert provider.perform_initialization
    assert bool(torch.nn.Linear(3, 5).weight.any())


def test_the_filled_model_is_the_one_that_was_drawn_and_loaded(
    bridge: AutoBridge, process_groups: None
) -> None:
    loaded = build(bridge.to_megatron_provider(load_weights=False))
    bridge.load_hf_weights([loaded])
    filled = bridge.to_megatron_model()[0]
    assert initialization(filled) == {True}
    expected = loaded.state_dict()
    assert expected.keys() == filled.state_dict().keys()
    for name, tensor in filled.state_dict().items():
        assert expected[name] is tensor or torch.equal(expected[name], tensor), name


def test_a_model_filled_from_a_checkpoint(
    bridge: AutoBridge, process_groups: None, tmp_path: Path
) -> None:
    [model] = bridge.to_megatron_model()
    bridge.save_megatron_model([model], tmp_path / "megatron")
    before = random_states()
    [again] = bridge.load_megatron_model(tmp_path / "megatron")
    assert all(map(torch.equal, random_states(), before))
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name


def values(model: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_a_copy_that_is_missing_from_the_plan_is_refused(
    bridge: AutoBridge, process_groups: None
) -> None:
    """Before anything is filled: whichever copy it is, and the padding of the vocabulary too."""
    [model] = bridge.to_megatron_model(load_weights=False)
    before = values(model)
    plan = weights.plan_of_model(bridge.hf_pretrained, [model])
    faulty = {
        plan.copies[number].megatron_key: replace(
            plan, copies=plan.copies[:number] + plan.copies[number + 1 :]
        )
        for number in (0, len(plan.copies) // 2, len(plan.copies) - 1)
    }
    faulty[plan.padding[0][0]] = replace(plan, padding=plan.padding[1:])
    for key, broken in faulty.items():
        with pytest.raises(PlanError, match=f"{key}: the files fill .* of the .* values"):
            weights.load_weights([model], broken, bridge.hf_pretrained.weights)
    assert all(map(torch.equal, values(model), before))


def test_a_parameter_that_checkpoints_do_not_show_is_refused(
    bridge: AutoBridge, process_groups: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bridge.save_megatron_model(bridge.to_megatron_model(), tmp_path / "megatron")
    monkeypatch.setattr(PatchEmbed, "sharded_state_dict", lambda *_args, **_more: {}, raising=False)
    for fill in (
        bridge.to_megatron_model,
        lambda: bridge.load_megatron_model(tmp_path / "megatron"),
    ):
        with pytest.raises(PlanError) as error:
            fill()
        assert [one.partition(":")[0] for one in error.value.problems] == [
            "vision_model.patch_embed.proj.weight",
            "vision_model.patch_embed.proj.bias",
        ]

    # Half of it is not all of it.
    def half(self: PatchEmbed, prefix: str = "", *args: Any, **more: Any) -> Any:
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(
            {name: tensor[1:] for name, tensor in state.items()}, prefix
        )

    monkeypatch.setattr(PatchEmbed, "sharded_state_dict", half)
    with pytest.raises(PlanError, match=r"proj.bias: (\d+) of its \d+ values"):
        bridge.to_megatron_model()
