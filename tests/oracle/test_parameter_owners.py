"""A parameter is read by the forward of the module that owns it.

megatron-core's DistributedDataParallel with `overlap_param_gather` waits for a parameter when the
module that owns it is called. What is read before that is the value of the step before.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron.bridge import AutoBridge
from oracle import text_models, tiny
from oracle.predictor import Predictor
from oracle.test_gradients import labels_of

RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


class _Reads(TorchDispatchMode):
    """The operations of torch on memory that still waits for the call of its module."""

    def __init__(self, waiting: dict[int, str]) -> None:
        super().__init__()
        self.waiting, self.early = waiting, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for one in tree_leaves((args, kwargs)):
            if isinstance(one, Tensor) and (name := self.waiting.get(_memory(one))):
                self.early.add(f"{name} by {func}")
        return func(*args, **(kwargs or {}))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextmanager
def read_early(model: torch.nn.Module) -> Iterator[set[str]]:
    """The parameters that are read before their modules are called, in one forward pass."""
    waiting = {_memory(parameter): name for name, parameter in model.named_parameters()}

    def called(module: torch.nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            waiting.pop(_memory(parameter), None)

    handles = [module.register_forward_pre_hook(called) for module in model.modules()]
    try:
        with _Reads(waiting) as reads:
            yield reads.early
    finally:
        for handle in handles:
            handle.remove()
    assert not waiting, f"never called: {sorted(waiting.values())}"


@pytest.mark.parametrize("case", ["qwen3_vl", "qwen3_vl_moe", "qwen3_5_moe-2x_value_heads"])
def test_with_pictures(build: Any, processor: Any, case: str) -> None:
    pair = build(case=case)
    pair.ours.train()
    inputs = tiny.prompt(processor, f"A {tiny.IMAGE}", images=tiny.photographs()[:1])
    with read_early(pair.ours) as early:
        pair.ours(**inputs, labels=labels_of(inputs))
    assert not early


def test_without_pictures(build: Any, processor: Any) -> None:
    config = {"tie_word_embeddings": True, "text_config": {"attention_bias": True}}
    pair = build(config)
    pair.ours.train()
    inputs = tiny.prompt(processor, "Only words.")
    with read_early(pair.ours) as early:
        pair.ours(**inputs, labels=labels_of(inputs))
    assert not early


@pytest.mark.parametrize("recompute", [{}, RECOMPUTE])
def test_prediction_of_several_tokens(
    build: Any, processor: Any, recompute: dict[str, Any]
) -> None:
    config = {"text_config": {"mtp_num_hidden_layers": 1}}
    pair = build(
        config,
        {"mtp_num_layers": 1} | recompute,
        "qwen3_5_moe-2x_value_heads",
        lambda hf, folder: Predictor(hf).add_to(folder),
    )
    pair.ours.train()
    inputs = tiny.prompt(processor, f"A {tiny.IMAGE}", images=tiny.photographs()[:1])
    with read_early(pair.ours) as early:
        pair.ours(**inputs, labels=labels_of(inputs))
    assert not early


@pytest.mark.parametrize("name", ["Qwen3MoeForCausalLM", "Qwen3_5ForCausalLM"])
def test_of_text(process_groups: None, tmp_path: Path, name: str) -> None:
    folder = text_models.save(text_models.build(name), tmp_path / "hf")
    provider = AutoBridge.from_hf_pretrained(folder).to_megatron_provider()
    [model] = provider.provide_distributed_model(wrap_with_ddp=False)
    ids = torch.randint(6, 300, (2, 12), generator=torch.Generator().manual_seed(3))
    with read_early(model.train()) as early:
        model(ids, labels=ids)
    assert not early


def test_early_reads_are_seen() -> None:
    class Careless(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = torch.nn.Linear(3, 5), torch.nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.linear(self.inner(x), self.outer.weight)

    model = Careless()
    with (
        pytest.raises(AssertionError, match=r"never called.*outer\.weight"),
        read_early(model) as early,
    ):
        model(torch.ones(4, 3))
    assert any(one.startswith("outer.weight by") for one in early)
