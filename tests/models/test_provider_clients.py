"""What clients do with a provider: hooks, a layer spec of their own, fields by name, copies."""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron.bridge.errors import ConfigError, InputError
from megatron.bridge.models.backends.selection import get_backend
from megatron.bridge.models.backends.torch_attention import TorchCoreAttention
from megatron.bridge.models.model_provider import ModelProvider
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl import Qwen3VLModel
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


def test_hooks_given_to_the_call_come_after_those_registered() -> None:
    called: list[str] = []

    def of_name(name: str) -> Callable[[Any], Any]:
        return lambda chunks: called.append(f"{name} {type(chunks[0]).__name__}")

    provider = small_provider()
    provider.register_pre_wrap_hook(of_name("pre"))
    provider.register_post_wrap_hook(of_name("post"))
    provider.register_post_wrap_hook(of_name("early"), prepend=True)
    model = build(
        provider,
        wrap_with_ddp=True,
        pre_wrap_hook=[of_name("one"), of_name("two")],
        post_wrap_hook=wrap,
    )
    plain, wrapped = "Qwen3VLModel", "DistributedDataParallel"
    assert called == [
        *(f"{name} {plain}" for name in ("pre", "one", "two")),
        *(f"{name} {wrapped}" for name in ("early", "post")),
    ]
    assert type(model) is Wrapped
    assert type(model.module) is DistributedDataParallel
    build(copy.deepcopy(provider), wrap_with_ddp=True)
    assert called[5:] == [*called[:1], *called[3:5]]


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_dtypes_and_their_wrapper(name: str) -> None:
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[name]
    other = {"fp16": "bf16", "bf16": "fp16"}[name]
    provider = small_provider()
    model = build(
        provider, mixed_precision_wrapper=Float16Module, **{name: True, other: False}
    ).eval()
    assert type(model) is Float16Module
    assert (provider.params_dtype, getattr(provider, name)) == (dtype, True)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    with torch.no_grad():
        logits = model(input_ids=TOKENS, **PICTURE)
        assert logits.dtype == torch.float32
        assert torch.equal(model.module(input_ids=TOKENS, **PICTURE).float(), logits)
    # None of them: the provider's own.
    assert build(provider).language_model.output_layer.weight.dtype == dtype
    with pytest.raises(ConfigError, match=rf"{name}=False, and .* params_dtype is {dtype}; leave"):
        build(provider, **{name: False})
    setattr(provider, name, False)
    with pytest.raises(ConfigError, match=rf"fp16=False .* the wrapper reads; give {name}"):
        build(provider, mixed_precision_wrapper=Float16Module)
    with pytest.raises(ConfigError, match="fp16=True and bf16=True"):
        build(provider, fp16=True, bf16=True)
    # A model in float32 needs none.
    single = build(small_provider(), bf16=False, mixed_precision_wrapper=Float16Module)
    assert type(single) is Qwen3VLModel


@pytest.mark.parametrize("name", ["use_megatron_fsdp", "use_torch_fsdp2"])
def test_other_wrappers_are_refused(name: str) -> None:
    build(small_provider(), **{name: False})
    with pytest.raises(ConfigError, match=rf"^{name}=True: .*DataParallel alone; leave"):
        build(small_provider(), **{name: True})


def test_chunks_without_memory() -> None:
    model = build(small_provider("qwen3_5_moe"), init_model_with_meta_device=True)
    assert {tensor.device.type for tensor in model.parameters()} == {"meta"}
    provider = small_provider(init_model_with_meta_device=True)
    assert next(build(provider).parameters()).is_meta
    with pytest.raises(ConfigError, match=r"init_model_with_meta_device=True, and Dist.*=False"):
        build(provider, wrap_with_ddp=True)
    provider.register_pre_wrap_hook(lambda _: None, fills=True)
    with pytest.raises(ConfigError, match=r"and a hook fills .*load_weights=False"):
        build(provider)
    assert not next(build(provider, init_model_with_meta_device=False).parameters()).is_meta


def test_how_values_are_drawn() -> None:
    def drawn(seed: int | None, **arguments: Any) -> torch.Tensor:
        model = build(small_provider(), seed=seed, **arguments)
        weight = model.language_model.output_layer.weight
        assert isinstance(weight, torch.Tensor)
        return weight.detach()

    first, again = drawn(7), drawn(7, data_parallel_random_init=True)
    assert torch.equal(first, again)
    assert not torch.equal(drawn(None), first)
    on_cpu = drawn(7, use_cpu_initialization=True)
    assert on_cpu.device.type == "cpu"
    assert on_cpu.std() > 0


def test_one_bucket_of_gradients() -> None:
    config = {"overlap_grad_reduce": True, "bucket_size": 100}
    counts = []
    for asked in (False, True):
        model = build(
            small_provider(),
            wrap_with_ddp=True,
            ddp_config=DistributedDataParallelConfig(**config),
            overlap_param_gather_with_optimizer_step=asked,
        )
        counts.append(sum(len(buffer.buckets) for buffer in model.buffers))
    assert counts[0] > 5
    assert counts[1] == 1


def test_process_groups_of_the_client() -> None:
    groups = ProcessGroupCollection.use_mpu_process_groups()
    build(small_provider(), pg_collection=groups, wrap_with_ddp=True)
    some = ProcessGroupCollection()
    some.tp = groups.tp
    build(small_provider(), pg_collection=some)


def test_initialize_model_parallel() -> None:
    provider = small_provider()
    provider.initialize_model_parallel(seed=5, seed_kwargs={"force_reset_rng": True})
    drawn = build(provider).language_model.output_layer.weight
    provider.initialize_model_parallel(seed=5)
    assert torch.equal(build(provider).language_model.output_layer.weight, drawn)
    provider.initialize_model_parallel()  # leaves the states
    assert not torch.equal(build(provider).language_model.output_layer.weight, drawn)
    for arguments, message in (
        (
            {"seed_kwargs": {"tp_rnk": 3}},
            "cuda_manual_seed has no argument 'tp_rnk'",
        ),
        ({"seed_kwargs": {"seed": 3}}, "seed does not belong here"),
        ({"tensor_model_parallel_size": 2}, "tensor_model_parallel_size does not belong here"),
        ({"nccl": 2}, "initialize_model_parallel has no argument 'nccl'; it has .*order"),
    ):
        with pytest.raises(ConfigError, match=message):
            provider.initialize_model_parallel(**arguments)
    provider.tensor_model_parallel_size = 2
    with pytest.raises(ConfigError, match="the process groups were made for 1"):
        provider.initialize_model_parallel()


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
