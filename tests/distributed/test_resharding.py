"""megatron-core's own resharding of a live model, from tensor parallelism to pipeline stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from forked import run_ranks
from oracle import tiny

MODELS = {
    "qwen3_vl": {},
    "qwen3_5-3x_value_heads-one_kv_head": {"text_config": {"num_key_value_heads": 2}},
}
EVEN_VISION_HEADS = {"vision_config": {"num_heads": 6}}
# The vocabulary is padded for two ranks on both sides: resharding changes no shape of the whole.
FROM = {"tensor_model_parallel_size": 2, "make_vocab_size_divisible_by": 64}
TO = {
    "pipeline_model_parallel_size": 2,
    "make_vocab_size_divisible_by": 128,
    "num_layers_in_first_pipeline_stage": 3,
}


def model_of(folder: Path, fields: dict[str, Any]) -> Any:
    from megatron.core import parallel_state

    from megatron.bridge import AutoBridge

    provider = AutoBridge.from_hf_pretrained(folder).to_megatron_provider(load_weights=True)
    provider.set_fields(fields)
    [model] = provider.provide_distributed_model(wrap_with_ddp=False)
    parallel_state.destroy_model_parallel()
    return model


def worker(rank: int, folder: str) -> None:
    from megatron.core.resharding import swap_model_weights
    from megatron.core.resharding.refit import clear_all_caches

    empty = torch.empty

    def unpinned(*args: Any, pin_memory: bool = False, **options: Any) -> Any:
        return empty(*args, **options)

    torch.empty = unpinned  # its buffers of gloo are pinned, which takes a GPU
    found = {}
    for name in MODELS:
        source, target = model_of(Path(folder, name), FROM), model_of(Path(folder, name), TO)
        expected = {key: one.detach().clone() for key, one in target.named_parameters()}
        with torch.no_grad():
            for parameter in target.parameters():
                parameter.fill_(float("nan"))
        swap_model_weights(source, target, "gloo")
        clear_all_caches()  # the plan is kept by sizes, not by model
        found[name] = {
            key: torch.equal(one, expected[key]) for key, one in target.named_parameters()
        }
    torch.save(found, f"{folder}/found{rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, bool]]]:
    folder = tmp_path_factory.mktemp("resharding")
    processor = tiny.build_processor()
    for name, entries in MODELS.items():
        config = tiny.build_case(processor, name, **EVEN_VISION_HEADS, **entries)
        tiny.build_hf_model(config).save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    run_ranks(worker, str(folder), seconds=120)
    return [torch.load(folder / f"found{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_arrives(found: list[dict[str, dict[str, bool]]], name: str) -> None:
    for ranks in found:
        assert len(ranks[name]) > 15
        assert all(ranks[name].values()), [key for key, same in ranks[name].items() if not same]
