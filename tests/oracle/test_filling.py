"""How parameters are filled: in the order of the files, straight, several reads at once."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron.bridge import AutoBridge
from megatron.bridge.errors import CheckpointError, ConfigError
from megatron.bridge.live import filling
from megatron.bridge.live.weights import load_weights, plan_of_model
from megatron.bridge.progress import Progress
from megatron.bridge.synthetic import make_model
from megatron.bridge.tensors.torch_views import as_array

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("qwen3-vl", {"num_shards": 3}),
    "transposed": ("qwen3-vl-moe", {"num_shards": 3}),
    "per-expert": ("qwen3.5-moe", {"experts": "per-expert"}),
    "fp8": ("qwen3.5-moe", {"fp8": True}),
}


@pytest.fixture(
    scope="module",
    params=[
        "dense",
        "transposed",
        pytest.param("per-expert", marks=pytest.mark.slow),
        "fp8",
    ],
)
def bridge(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AutoBridge:
    family, settings = CASES[request.param]
    target = tmp_path_factory.mktemp("filling") / "hf"
    return AutoBridge.from_hf_pretrained(make_model(family, target, settings))


class Watched:
    """A source that keeps what was asked of it."""

    def __init__(self, source: Any) -> None:
        self.source = source
        self.asked: list[tuple[str, Any, Any]] = []

    def dtype_of(self, name: str) -> str:
        found: str = self.source.dtype_of(name)
        return found

    def read_into(self, name: str, box: Any, out: Any) -> None:
        self.asked.append((name, box, out))
        self.source.read_into(name, box, out)


class Counted:
    """A Progress that adds up."""

    def __init__(self) -> None:
        self.total = self.done = 0

    def start(self, task: str, total_bytes: int) -> None:
        self.total = total_bytes

    def advance(self, done_bytes: int) -> None:
        self.done += done_bytes


def blank(bridge: AutoBridge, value: float = float("nan")) -> Any:
    [model] = bridge.to_megatron_model(load_weights=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def load(bridge: AutoBridge, model: Any, source: Any, progress: Progress | None = None) -> None:
    load_weights([model], plan_of_model(bridge.hf_pretrained, [model]), source, progress)


def assert_holds_the_files(bridge: AutoBridge, model: Any) -> None:
    for name, tensor in bridge.export_hf_weights([model]):
        expected = bridge.hf_pretrained.weights.read(name)
        assert torch.equal(tensor.view(torch.uint8), expected.view(torch.uint8)), name


@pytest.mark.usefixtures("process_groups")
class TestFilling:
    """Of models of all disk layouts."""

    @pytest.mark.parametrize("piece_bytes", [1000, filling.PIECE_BYTES])
    def test_every_value_is_that_of_the_files(
        self, bridge: AutoBridge, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
    ) -> None:
        monkeypatch.setattr(filling, "PIECE_BYTES", piece_bytes)
        model, progress = blank(bridge), Counted()
        watched = Watched(bridge.hf_pretrained.weights)
        load(bridge, model, watched, progress)
        assert_holds_the_files(bridge, model)
        assert progress.done == progress.total > 0
        assert max(out.nbytes for _, _, out in watched.asked) <= max(piece_bytes, 160 * 160 * 4)

    def test_reads_are_in_the_order_of_the_files(
        self, bridge: AutoBridge, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(filling, "reading_threads", lambda: 1)
        watched = Watched(bridge.hf_pretrained.weights)
        load(bridge, blank(bridge), watched)
        tensors = bridge.hf_pretrained.tensors
        places = [
            (tensors[name].file, tensors[name].offset, [start for start, _ in box])
            for name, box, _ in watched.asked
        ]
        assert places == sorted(places)
        assert len({file for file, _, _ in places}) == len(tensors.shards)

    def test_files_are_read_straight_to_the_parameters(
        self, bridge: AutoBridge, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(filling, "empty", None)
        model = blank(bridge)
        watched = Watched(bridge.hf_pretrained.weights)
        load(bridge, model, watched)
        memory = [as_array(parameter) for parameter in model.parameters()]
        plan = plan_of_model(bridge.hf_pretrained, [model])
        moved = {copy.hf_name for copy in plan.copies if not copy.offset}
        straight = [one for one in watched.asked if one[0] in moved]
        assert len(straight) > 20
        for name, _, out in straight:
            assert any(np.shares_memory(out, whole) for whole in memory), name

    def test_a_model_of_another_dtype_is_filled_through_a_buffer(self, bridge: AutoBridge) -> None:
        provider = bridge.to_megatron_provider()
        provider.params_dtype, provider.bf16 = torch.float32, False
        [wide] = provider.provide_distributed_model(wrap_with_ddp=False)
        narrow = dict(bridge.to_megatron_model()[0].named_parameters())
        for name, parameter in wide.named_parameters():
            assert torch.equal(parameter, narrow[name].float()), name

    def test_several_reads_are_in_flight(self, bridge: AutoBridge) -> None:
        met = threading.Barrier(2, timeout=60)
        first_two = iter(range(2))  # taken one by one: next() is one step of the interpreter

        class Meeting(Watched):
            def read_into(self, name: str, box: Any, out: Any) -> None:
                super().read_into(name, box, out)
                if next(first_two, None) is not None:
                    met.wait()

        load(bridge, blank(bridge), Meeting(bridge.hf_pretrained.weights))

    def test_what_a_thread_cannot_read_is_said(self, bridge: AutoBridge) -> None:
        class Broken(Watched):
            def read_into(self, name: str, box: Any, out: Any) -> None:
                raise CheckpointError(f"{name}: cannot be read")

        with pytest.raises(CheckpointError, match="cannot be read"):
            load(bridge, blank(bridge), Broken(bridge.hf_pretrained.weights))


def test_a_padded_vocabulary_ends_in_zeros(bridge: AutoBridge, process_groups: None) -> None:
    model = blank(bridge)
    bridge.load_hf_weights([model])
    rows = model.language_model.embedding.word_embeddings.weight
    assert len(rows) == 384
    assert not rows[307:].any()


def test_a_token_that_no_file_has_is_no_padding(tmp_path: Path, process_groups: None) -> None:
    """A model of one token more would predict it; its rows look like those of padding."""
    bridge = AutoBridge.from_hf_pretrained(make_model("qwen3", tmp_path / "hf"))
    provider = bridge.to_megatron_provider(load_weights=False)
    provider.vocab_size += 1
    model = provider.provide_distributed_model(wrap_with_ddp=False)
    message = f"vocab_size = {provider.vocab_size}, and .* {provider.vocab_size - 1}: set the"
    with pytest.raises(ConfigError, match=message):
        bridge.load_hf_weights(model)
    with pytest.raises(ConfigError, match=message):
        list(bridge.export_hf_weights(model))


def test_the_memory_beside_the_model(tmp_path: Path, process_groups: None) -> None:
    """Loading holds less than a quarter of what it loads: small models are all in one piece."""
    import tracemalloc

    folder = make_model("qwen3-vl", tmp_path / "hf", {"text_config.num_hidden_layers": 9})
    bridge = AutoBridge.from_hf_pretrained(folder)
    model = blank(bridge)
    plan = plan_of_model(bridge.hf_pretrained, [model])
    weights = bridge.hf_pretrained.weights
    load_weights([model], plan, weights)  # what is made once, such as indexes of the plan
    tracemalloc.start()  # numpy tells it of its memory
    try:
        load_weights([model], plan, weights)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < sum(parameter.nbytes for parameter in model.parameters()) / 4
