"""What only a GPU shows: where parameters lie, memory, NCCL, and the kernels of a GPU.

The rest of `tests/oracle` runs on the GPU, too, where there is one: logits and gradients of all
families beside transformers' on the same device.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.bridge import AutoBridge
from megatron.bridge.synthetic import make_model
from oracle import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

FAMILIES = ("qwen3-vl", "qwen3-vl-moe", "qwen3.5", "qwen3.5-moe")
WIDE = {
    "text_config.hidden_size": 1024,
    "text_config.intermediate_size": 2816,
    "text_config.num_hidden_layers": 12,
    "text_config.vocab_size": 30_000,
}


@pytest.fixture(scope="module", params=FAMILIES)
def bridge(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AutoBridge:
    folder = tmp_path_factory.mktemp("gpu") / "hf"
    return AutoBridge.from_hf_pretrained(make_model(request.param, folder))


@pytest.fixture(scope="module")
def model(bridge: AutoBridge, process_groups: None) -> Any:
    return bridge.to_megatron_model()[0]


def asked(bridge: AutoBridge, text: str | list[str], **media: Any) -> dict[str, torch.Tensor]:
    """A prompt in the tokens of the model's own folder."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(bridge.hf_pretrained.name_or_path)
    return tiny.prompt(processor, text, **media)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().view(torch.uint8)


def test_parameters_are_on_the_gpu_and_hold_the_files(bridge: AutoBridge, model: Any) -> None:
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    names = set()
    for name, tensor in bridge.export_hf_weights([model], cpu=False):
        assert tensor.device.type == "cuda"
        assert torch.equal(bits(tensor), bits(bridge.hf_pretrained.weights.read(name)))
        names.add(name)
    assert len(names) > 100


def test_saved_and_loaded_again(bridge: AutoBridge, model: Any, tmp_path: Path) -> None:
    bridge.save_megatron_model([model], tmp_path / "megatron")
    [loaded] = bridge.load_megatron_model(tmp_path / "megatron")
    expected = dict(model.named_parameters())
    for name, parameter in loaded.named_parameters():
        assert parameter.device.type == "cuda"
        assert torch.equal(bits(parameter), bits(expected[name])), name


def test_the_default_group_is_of_nccl(model: Any) -> None:
    assert torch.distributed.get_backend() == "nccl"
    told: list[Any] = [None]
    torch.distributed.all_gather_object(told, {"rank": 0})
    assert told == [{"rank": 0}]


@pytest.fixture
def allocated() -> Callable[[], int]:
    """How much memory of the GPU was used at most since the test began."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    return lambda: torch.cuda.max_memory_allocated() - before


def test_loading_takes_little_more_memory_than_the_model(
    process_groups: None, tmp_path: Path, allocated: Callable[[], int]
) -> None:
    bridge = AutoBridge.from_hf_pretrained(make_model("qwen3-vl", tmp_path / "hf", WIDE))
    [model] = bridge.to_megatron_model()
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    assert nbytes > 256 << 20
    assert allocated() < nbytes + (64 << 20)


def test_a_training_step_in_bf16(bridge: AutoBridge, process_groups: None) -> None:
    """Of one rank in DistributedDataParallel over NCCL: every parameter has a finite gradient."""
    from megatron.core.distributed import DistributedDataParallelConfig

    config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    provider = bridge.to_megatron_provider()
    [wrapped] = provider.provide_distributed_model(config, wrap_with_ddp=True)
    inputs = asked(bridge, f"{tiny.IMAGE} A flower?", images=tiny.photographs()[:1])
    wrapped.zero_grad_buffer()
    losses = wrapped(**inputs, labels=inputs["input_ids"].roll(-1, dims=1))
    losses.float().mean().backward()
    wrapped.finish_grad_sync()
    for name, parameter in wrapped.named_parameters():
        assert parameter.main_grad.isfinite().all(), name
    assert sum(float(one.main_grad.norm()) for one in wrapped.parameters()) > 0


@pytest.mark.parametrize("family", ["qwen3.5", "qwen3.5-moe"])
def test_the_kernels_of_flash_linear_attention(
    family: str, process_groups: None, tmp_path: Path
) -> None:
    pytest.importorskip("fla", reason="flash-linear-attention is not installed")
    from megatron.bridge.models.backends import gated_delta_net

    bridge = AutoBridge.from_hf_pretrained(make_model(family, tmp_path / "hf"))
    inputs = asked(bridge, ["A longer question.", "Short."], padding=True)
    logits = []
    for kernels in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gated_delta_net, "HAVE_FLA", kernels)
            [model] = bridge.to_megatron_model()
        with torch.no_grad():
            logits.append(model.eval()(**inputs)[inputs["attention_mask"].bool()].float())
    assert (logits[0] - logits[1]).norm() <= 0.02 * logits[1].norm()
