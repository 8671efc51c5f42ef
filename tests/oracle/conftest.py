"""The oracle: transformers' own model, and ours with the same weights."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from oracle import tiny

Build = Callable[..., Any]


@pytest.fixture(autouse=True, scope="module")
def everything_on_the_gpu(on_the_gpu: None) -> None:
    """Both models and their inputs."""


@pytest.fixture(scope="session")
def processor() -> Any:
    return tiny.build_processor()


@pytest.fixture(scope="module")
def process_groups() -> Iterator[None]:
    """A world of this one process, gone at the end of the module."""
    from megatron.bridge.runtime.parallel import (
        destroy_process_groups,
        initialize_process_groups,
    )
    from megatron.bridge.runtime.parallel_sizes import ParallelSizes

    initialize_process_groups(ParallelSizes())
    yield
    destroy_process_groups()


@pytest.fixture(scope="module")
def build(processor: Any, process_groups: None, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """build(hf config entries, provider fields, case) -> hf, ours, bridge, with the same weights.

    `case` is one of tiny.CASES; `prepare(hf, folder)` may change the files before we read them.
    """
    from megatron.bridge import AutoBridge

    def build(
        config: dict[str, Any] | None = None,
        fields: dict[str, Any] | None = None,
        case: str = "qwen3_vl",
        prepare: Callable[[Any, Path], None] | None = None,
    ) -> SimpleNamespace:
        hf = tiny.build_hf_model(tiny.build_case(processor, case, **(config or {})))
        folder = tmp_path_factory.mktemp("hf")
        hf.save_pretrained(folder)
        processor.save_pretrained(folder)
        if prepare is not None:
            prepare(hf, folder)
        bridge = AutoBridge.from_hf_pretrained(str(folder))
        provider = bridge.to_megatron_provider(load_weights=False)
        # The files are fp32, and so is the oracle.
        provider.params_dtype, provider.bf16 = torch.float32, False
        for name, value in (fields or {}).items():
            setattr(provider, name, value)
        chunks = provider.provide_distributed_model(wrap_with_ddp=False)
        bridge.load_hf_weights(chunks)
        return SimpleNamespace(hf=hf, ours=chunks[0].eval(), bridge=bridge, folder=Path(folder))

    return build


@pytest.fixture(scope="module", params=list(tiny.CASES))
def pair(build: Build, request: pytest.FixtureRequest) -> SimpleNamespace:
    """Both models of each family, in several shapes."""
    return build(case=request.param)
