"""What clients do with a provider: hooks, a layer spec of their own, fields by name, copies."""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron.bridge.errors import ConfigError, InputError
from megatron.bridge.models.backends.selection import get_backend
from megatron.bridge.models.backends.torch_attention import TorchCoreAttention
from megatron.bridge.models.model_provider import ModelProvider
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.decoder_spec import decoder_spec
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.deepstack import DeepstackTransformerLayer
from megatron.bridge.models.wrapping import unwrapped
from providers import one_process, small_provider

pytestmark = pytest.mark.usefixtures("on_the_gpu")

TOKENS = torch.tensor([[1, 302, *[300] * 6, 303, 2]])
PICTURE = {
    "pixel_values": torch.linspace(-1, 1, 24 * 1536).reshape(24, 1536),
    "image_grid_thw": torch.tensor([[1, 4, 6]]),
}


@pytest.fixture(scope="module", autouse=True)
def process() -> Iterator[None]:
    with one_process():
        yield


class Wrapped(MegatronModule):  # type: ignore[misc]
    """A client's wrapper, with a parameter of its own."""

    def __init__(self, module: Any) -> None:
        super().__init__(config=module.config)
        self.module = module
        self.scale = torch.nn.Parameter(torch.ones(3))

    def forward(self, **inputs: Any) -> Any:
        return self.module(**inputs)


def wrap(chunks: list[Any]) -> list[Any]:
    return [Wrapped(chunk) for chunk in chunks]


def build(provider: ModelProvider, **kwargs: Any) -> Any:
    [chunk] = provider.provide_distributed_model(**{"wrap_with_ddp": False} | kwargs)
    return chunk


def test_what_a_hook_returns_is_used_from_there_on() -> None:
    seen: list[Any] = []
    provider = small_provider()
    provider.register_pre_wrap_hook(wrap)
    provider.register_pre_wrap_hook(seen.extend)
    provider.register_pre_wrap_hook(tuple)
    model = build(provider, wrap_with_ddp=True)
    assert isinstance(model, DistributedDataParallel)
    assert isinstance(model.module, Wrapped)
    assert seen == [model.module]
    assert model.module.scale.main_grad.shape == (3,)  # DDP takes care of the wrapper's, too
    assert unwrapped([model]) == [model.module.module]


def test_hooks_are_called_in_order_and_some_in_front() -> None:
    called: list[str] = []
    provider = small_provider()
    provider.register_pre_wrap_hook(lambda _: called.append("second"))
    provider.register_pre_wrap_hook(lambda _: called.append("third"))
    provider.register_pre_wrap_hook(lambda _: called.append("first"), prepend=True)
    build(provider)
    assert called == ["first", "second", "third"]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda chunks: chunks[0], "an object of type Qwen3VLModel"),
        (lambda _: True, "an object of type bool"),
        (lambda _: [3], "a list with an object of type int"),
        (lambda _: [], "a list of 0 modules"),
        (lambda chunks: chunks * 2, "a list of 2 modules"),
    ],
)
def test_a_hook_that_returns_no_list_of_modules(
    returned: Callable[[Any], Any], message: str
) -> None:
    provider = small_provider()

    def counts_layers(chunks: list[Any]) -> Any:
        return returned(chunks)

    provider.register_pre_wrap_hook(counts_layers)
    with pytest.raises(InputError, match=rf"counts_layers returned {message}; expected a list"):
        build(provider)


def test_a_misspelled_field_is_refused() -> None:
    provider = small_provider()
    provider.tensor_model_parallel = 2  # type: ignore[attr-defined]
    provider._notes_of_a_client = "private names are nobody's business"  # type: ignore[attr-defined]
    expected = (
        "tensor_model_parallel is set: Qwen3VLModelProvider has no field of this name; "
        "was tensor_model_parallel_size meant?"
    )
    with pytest.raises(ConfigError) as error:
        provider.finalize()
    assert expected in str(error.value)
    assert str(error.value).count("\n") == 1
    del provider.tensor_model_parallel  # type: ignore[attr-defined]
    provider.finalize()
    provider.finalize()  # what megatron-core set meanwhile is no mistake of a client


def test_overrides_by_name() -> None:
    provider = small_provider()
    overrides = {"vocab_size": 311, "tensor_model_parallel_size": 2}
    same = provider.apply_overrides_and_finalize(dtype=torch.bfloat16, overrides=overrides)
    assert same is provider
    assert (provider.params_dtype, provider.bf16, provider.fp16) == (torch.bfloat16, True, False)
    assert (provider.pipeline_dtype, provider.padded_vocab_size) == (torch.bfloat16, 512)
    with pytest.raises(AttributeError, match=r"vocabsize: .* was vocab_size meant\?"):
        provider.apply_overrides_and_finalize(torch.float16, {"vocab_size": 7, "vocabsize": 9})
    assert (provider.vocab_size, provider.params_dtype) == (311, torch.bfloat16)
    with pytest.raises(ConfigError, match="num_layers is 0"):
        provider.apply_overrides_and_finalize(overrides={"num_layers": 0})


def test_copies_of_a_provider() -> None:
    class Bridge:
        """Has files open, say."""

        def load(self, chunks: list[Any]) -> None:
            called.append(chunks)

        def __deepcopy__(self, memo: dict[int, Any]) -> "Bridge":
            raise AssertionError("hooks are not copied")

    called: list[Any] = []
    provider = small_provider("qwen3_5_moe")
    provider.register_pre_wrap_hook(Bridge().load)
    provider.finalize()
    copied = copy.deepcopy(provider)
    copied.register_pre_wrap_hook(lambda _: None)
    copied.num_layers, copied.mrope_section[0] = 9, 4
    assert (provider.num_layers, provider.mrope_section[0]) == (5, 3)
    copied.num_layers, copied.mrope_section[0] = 5, 3
    build(copied)
    assert len(called) == 1
    build(provider)
    assert len(called) == 2
    # What finalize() derived is derived anew in the copy, too.
    copied.init_method_std = 3.0
    copied.finalize()
    assert copied.init_method(torch.empty(1000)).std() > 1
    assert provider.init_method(torch.empty(1000)).std() < 0.1


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_5_moe"])
def test_a_provider_is_pickled(family: str) -> None:
    provider = small_provider(family)
    provider.finalize()
    restored = pickle.loads(pickle.dumps(provider))
    assert restored.vision == provider.vision
    assert restored.padded_vocab_size == provider.padded_vocab_size
    restored.finalize()
    model, again = build(provider).eval(), build(restored).eval()
    again.load_state_dict(model.state_dict())
    tokens = torch.arange(1, 8)[None]
    with torch.no_grad():
        assert torch.equal(again(input_ids=tokens), model(input_ids=tokens))


class OwnAttention(TorchCoreAttention):
    """A client's, for instance one that quantizes."""


def own_spec(config: Any) -> Any:
    """megatron-core's layers with the client's attention, and norms that run on any machine."""
    spec = get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm")
    norm = get_backend(config.transformer_impl).layer_norm(rms_norm=True)
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = norm
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = OwnAttention
    attention.q_layernorm = attention.k_layernorm = norm
    return spec


@torch.no_grad()
def test_a_layer_spec_of_the_client_is_built() -> None:
    """Also where it is of megatron-core's plain layer, which knows nothing of deepstack."""
    expected = build(small_provider()).eval()
    stages: list[int | None] = []

    def spec_of_stage(config: Any, vp_stage: int | None = None) -> Any:
        stages.append(vp_stage)
        return decoder_spec(config, vp_stage)

    own: list[bool] = []
    for spec in (own_spec, own_spec(small_provider()), spec_of_stage, decoder_spec):
        model = build(small_provider(transformer_layer_spec=spec)).eval()
        layers = model.language_model.decoder.layers
        assert all(isinstance(layer, DeepstackTransformerLayer) for layer in layers)
        attentions = {type(layer.self_attention.core_attention) for layer in layers}
        own.append(attentions == {OwnAttention})
        parameters = dict(model.named_parameters())
        for name, parameter in expected.named_parameters():
            parameters[name].copy_(parameter)
        logits = model(input_ids=TOKENS, **PICTURE)
        assert (logits - expected(input_ids=TOKENS, **PICTURE)).abs().max() < 1e-5
    assert own == [True, True, False, False]
    assert stages == [None]


class OtherLayer(TransformerLayer):  # type: ignore[misc]
    pass


def of_another_class(config: Any) -> Any:
    spec = own_spec(config)
    spec.module = OtherLayer
    return spec


def too_few(config: Any) -> Any:
    spec = decoder_spec(config)
    spec.layer_specs = spec.layer_specs[1:]
    return spec


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("decoder", "transformer_layer_spec is 'decoder'; expected a ModuleSpec of a layer"),
        (lambda config: None, "transformer_layer_spec returns None; expected"),
        (of_another_class, "layers of class OtherLayer, .* deepstack"),
        (too_few, "gives 4 layers, expected the 5 of this pipeline stage"),
    ],
)
def test_a_layer_spec_that_cannot_be_built(spec: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(small_provider(transformer_layer_spec=spec))
