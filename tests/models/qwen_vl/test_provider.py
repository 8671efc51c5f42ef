"""Providers: what they refuse, what they build, and where megatron-core says each part lives."""

import copy
import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron.bridge.errors import ConfigError, InputError
from megatron.bridge.runtime.parallel import fake_cluster
from megatron.bridge.runtime.parallel_sizes import ParallelSizes
from providers import PROVIDERS, one_process, released_provider, small_provider, small_vision
from released_configs import VISION_24, qwen3_vl

pytestmark = pytest.mark.usefixtures("on_the_gpu")

SIZE_OF_2B = qwen3_vl(2048, 24, 16, 8, 6144, VISION_24, tied=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_layers": 0}, "num_layers is 0"),
        ({"kv_channels": None}, "kv_channels is None"),
        ({"mrope_section": [4, 4]}, r"mrope_section is \[4, 4\]: expected three counts"),
        ({"mrope_section": [9, -1, 0]}, "mrope_section is .*: expected three counts"),
        ({"rotary_percent": 1.2}, "rotary_percent is 1.2, which rotates 20 channels of a head"),
        ({"attention_dropout": 1.5}, "attention_dropout is 1.5: expected a share"),
        ({"vision": None}, "vision is None"),
        ({"image_token_id": 307}, "image_token_id is 307, outside of vocab_size = 307"),
        ({"sequence_parallel": True}, "sequence_parallel is True"),
        ({"hybrid_context_parallel": True}, "hybrid_context_parallel is True: .* set it to False"),
        (
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
            "is 2 with pipeline_model_parallel_size = 2: interleaving needs more than 2 stages",
        ),
        ({"num_moe_experts": 4}, "num_moe_experts is 4"),
        ({"position_embedding_type": "rope"}, "position_embedding_type is 'rope'"),
        ({"apply_rope_fusion": True}, "apply_rope_fusion is True"),
        (
            {"tensor_model_parallel_size": 2, "should_pad_vocab": False},
            "vocab_size is 307, not a multiple of tensor_model_parallel_size = 2",
        ),
        ({"vision": small_vision(hidden_act="gleu")}, "vision.hidden_act is 'gleu': transformers"),
        ({"vision": small_vision(rope_type="yarn")}, "vision.rope_type is 'yarn': .* 'axial' only"),
        ({"vision": small_vision(hidden_size=52)}, "hidden_size is 52, not a multiple of 4"),
        ({"vision": small_vision(num_position_embeddings=50)}, "50, not a square"),
        ({"vision": small_vision(out_hidden_size=81)}, "out_hidden_size is 81"),
        ({"vision": small_vision(deepstack_visual_indexes=(2, 0))}, "expected ascending"),
        ({"vision": small_vision(deepstack_visual_indexes=(0, 3))}, "between 0 and 2"),
        (
            {"tensor_model_parallel_size": 2, "vision": small_vision(num_heads=3)},
            "vision.num_heads is 3, not a multiple of tensor_model_parallel_size = 2",
        ),
        ({"tensor_model_parallel_size": 0}, "tensor_model_parallel_size is 0: expected 1 or more"),
        ({"pipeline_model_parallel_size": -1}, "pipeline_model_parallel_size is -1: expected 1"),
        ({"context_parallel_size": 0}, "context_parallel_size is 0: expected 1 or more"),
        ({"gtp_weight_remat_size": 2}, "gtp_weight_remat_size is 2: no process groups .* 1"),
        ({"tensor_parallel_num_weight_shards": 2}, "num_weight_shards is 2: .* expected None"),
        ({"qk_l2_norm": True}, "qk_l2_norm is True: .* needs False"),
        ({"heterogeneous_block_specs": True}, "heterogeneous_block_specs is True"),
        ({"fused_single_qkv_rope": True}, "fused_single_qkv_rope is True: .* needs False"),
        ({"transformer_impl": "inference_optimized"}, "'inference_optimized' is not one of"),
        # megatron-core's own checks arrive as the same kind of error, its mistakes too.
        ({"fine_grained_activation_offloading": True}, "refuses: AssertionError .*in '.+'"),
        ({"fp16": True, "bf16": True}, "megatron-core refuses: Only one of"),
        (
            {"pipeline_model_parallel_size": 5, "variable_seq_lengths": False},
            "variable_seq_lengths is False, and decoder layers .* on a later .* stage .*: set True",
        ),
        (
            {
                "pipeline_model_parallel_size": 4,
                "pipeline_model_parallel_layout": "E|t|t|t|t||t|L",
            },
            "overlap_p2p_comm is False, and decoder layers .* on a later .* stage .*: set True",
        ),
        (
            {"pipeline_model_parallel_size": 5, "moe_token_dispatcher_type": "allgather"},
            "moe_token_dispatcher_type is 'allgather', and .*: set 'alltoall'",
        ),
    ],
)
def test_what_cannot_be_built(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small_provider(**fields).finalize()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        # megatron-core computes without a word in the dtype of the parameters.
        ({"fp8": "hybrid"}, "fp8 is 'hybrid': .* have None alone"),
        ({"fp4": "e2m1"}, "fp4 is 'e2m1'"),
        ({"use_kitchen": True}, "use_kitchen is True"),
        ({"use_te_activation_func": True}, "use_te_activation_func is True"),
        ({"use_grouped_gemm_for_shared_expert": True}, "for_shared_expert is True"),
        ({"softmax_type": "learnable"}, "softmax_type is 'learnable': .* have 'vanilla' alone"),
        ({"qk_clip": True}, "qk_clip is True"),
        ({"gradient_accumulation_fusion": True}, "it needs APEX's"),
        ({"moe_router_fusion": True}, "moe_router_fusion is True: it needs TransformerEngine 2.6"),
        ({"moe_token_dispatcher_type": "flex"}, r"'deepep': DeepEP \(deep_ep\) is not installed"),
        (
            {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "ncclep"},
            "TransformerEngine with NCCL EP is not installed",
        ),
        ({"moe_apply_probs_on_input": True}, "with moe_router_topk = 3: it is for one expert"),
        ({"moe_router_topk_limited_devices": 2}, "limited_devices is 2: .* needs None"),
    ],
)
def test_what_plain_torch_does_not_have(fields: dict[str, Any], message: str) -> None:
    """It is known before there is a process group."""
    with pytest.raises(ConfigError, match=message):
        small_provider("qwen3_vl_moe", transformer_impl="local", **fields).finalize()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_graphs_need_a_gpu() -> None:
    with pytest.raises(ConfigError, match="cuda_graph_impl is 'local', and there is no GPU"):
        small_provider(cuda_graph_impl="local").finalize()


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("qwen3_vl_moe", {"num_moe_experts": None}, "num_moe_experts is None: it must be set"),
        ("qwen3_vl_moe", {"moe_ffn_hidden_size": None}, "moe_ffn_hidden_size is None"),
        ("qwen3_vl_moe", {"moe_router_pre_softmax": True}, "moe_router_pre_softmax is True"),
        ("qwen3_vl_moe", {"moe_router_score_function": "sigmoid"}, "is 'sigmoid': .* 'softmax'"),
        ("qwen3_vl_moe", {"mtp_num_layers": 1}, "mtp_num_layers is 1: .* needs None"),
        ("qwen3_vl_moe", {"moe_router_topk": 8}, "moe_router_topk is 8, more than num_moe_experts"),
        ("qwen3_5", {"attention_output_gate": False}, "attention_output_gate is False"),
        ("qwen3_5", {"layernorm_zero_centered_gamma": False}, "zero_centered_gamma is False"),
        ("qwen3_5", {"num_moe_experts": 4}, "num_moe_experts is 4: .* needs None"),
        ("qwen3_5", {"linear_num_value_heads": 0}, "linear_num_value_heads is 0"),
        ("qwen3_5", {"linear_num_value_heads": 3}, "megatron-core refuses: .*must be a multiple"),
        ("qwen3_5", {"linear_attention_freq": [1, 0]}, "linear_attention_freq has 2 entries, .* 5"),
        ("qwen3_vl_moe", {"moe_layer_freq": [1, 0]}, "moe_layer_freq has 2 entries"),
        (
            "qwen3_5",
            {
                "mtp_num_layers": 1,
                "recompute_granularity": "full",
                "recompute_method": "uniform",
                "recompute_num_layers": 2,
            },
            "with mtp_num_layers needs 'uniform' and 1",
        ),
        ("qwen3_5", {"pipeline_model_parallel_size": 2}, "refuses: num_layers=5 should be"),
        (
            "qwen3_5",
            {"context_parallel_size": 4},
            "linear_num_key_heads is 2, not a multiple of .* = 1 times context_parallel_size = 4",
        ),
        (
            "qwen3_5",
            {"context_parallel_size": 2, "mtp_num_layers": 1},
            "context_parallel_size is 2 with mtp_num_layers = 1: .* or mtp_num_layers=None",
        ),
        (
            "qwen3_5_moe",
            {"moe_shared_expert_intermediate_size": None},
            "moe_shared_expert_intermediate_size is None",
        ),
        ("qwen3_5_moe", {"moe_shared_expert_gate": False}, "moe_shared_expert_gate is False"),
    ],
)
def test_what_cannot_be_built_in_other_families(
    family: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        small_provider(family, **fields).finalize()


def test_all_problems_are_told_at_once() -> None:
    provider = small_provider(num_layers=0, sequence_parallel=True, vision=None)
    with pytest.raises(ConfigError) as error:
        provider.finalize()
    assert str(error.value).count("\n") == 3


def values(provider: Any) -> dict[str, Any]:
    return {one.name: getattr(provider, one.name) for one in dataclasses.fields(provider)}


@pytest.mark.parametrize("family", PROVIDERS)
def test_finalize_changes_no_given_field_and_is_idempotent(family: str) -> None:
    provider = small_provider(family)
    given = values(provider)
    provider.finalize()
    once = values(provider)
    for name, value in given.items():
        if value is not None and name != "cuda_graph_modules":  # which megatron-core normalizes
            assert once[name] == value, name
    provider.finalize()
    again = values(provider)
    # Initializers are new closures each time.
    assert {name for name in once if once[name] != again[name]} <= {
        "init_method",
        "embedding_init_method",
        "output_layer_init_method",
    }


def test_finalize_again_after_a_change() -> None:
    provider = small_provider()
    provider.finalize()
    torch.manual_seed(0)
    narrow = provider.init_method(torch.empty(1000)).std()
    provider.init_method_std, provider.params_dtype = 2.0, torch.bfloat16
    provider.tensor_model_parallel_size = 2
    provider.finalize()
    assert provider.init_method(torch.empty(1000)).std() > 50 * narrow
    assert provider.pipeline_dtype == torch.bfloat16
    assert copy.deepcopy(provider).padded_vocab_size == provider.padded_vocab_size == 512


@pytest.mark.parametrize(
    ("vocab_size", "ranks", "pad", "padded"),
    [
        (151936, 1, True, 151936),
        (151936, 2, True, 152064),
        (307, 3, True, 384),
        (307, 1, False, 307),
    ],
)
def test_padded_vocabulary(vocab_size: int, ranks: int, pad: bool, padded: int) -> None:
    provider = small_provider(
        vocab_size=vocab_size, tensor_model_parallel_size=ranks, should_pad_vocab=pad
    )
    assert provider.padded_vocab_size == padded


def build_on_meta(provider: Any) -> list[Any]:
    stages = provider.virtual_pipeline_model_parallel_size
    with torch.device("meta"):
        return (
            [provider.provide(vp_stage=stage) for stage in range(stages)]
            if stages
            else [provider.provide()]
        )


def sharded_tensors(chunks: list[Any]) -> Iterator[ShardedTensor]:
    for chunk in chunks:
        for entry in nested_values(chunk.sharded_state_dict()):
            if isinstance(entry, ShardedTensorFactory):
                yield from nested_values(entry.build())
            elif isinstance(entry, ShardedTensor):
                yield entry


# (tensor, pipeline, virtual pipeline), beside those of oracle/test_sharding.py: 16 ranks are more
# than the 8 key/value heads.
TOPOLOGIES = ((1, 1, None), (16, 1, None), (1, 4, 2))


def test_shards_of_all_ranks_tile_every_parameter() -> None:
    shapes_of_one: dict[str, tuple[int, ...]] = {}
    for tensor, pipeline, virtual in TOPOLOGIES:
        sizes = ParallelSizes(tensor, pipeline, virtual)
        elements: dict[str, int] = defaultdict(int)
        shapes: dict[str, tuple[int, ...]] = {}
        for rank in range(sizes.ranks_per_replica):
            provider = released_provider(
                SIZE_OF_2B,
                **sizes.fields,
                sequence_parallel=tensor > 1,
                make_vocab_size_divisible_by=128 // tensor,
                perform_initialization=False,  # there are no values
            )
            with fake_cluster(rank, sizes.ranks_per_replica, sizes):
                chunks = build_on_meta(provider)
                assert all(weight.is_meta for chunk in chunks for weight in chunk.parameters())
                for entry in sharded_tensors(chunks):
                    assert entry.dtype == torch.bfloat16
                    shapes[entry.key] = entry.global_shape
                    if set(entry.replica_id) == {0}:
                        elements[entry.key] += entry.data.numel()
        shapes_of_one = shapes_of_one or shapes
        assert shapes == shapes_of_one, "the global layout does not depend on the parallelism"
        for key, shape in shapes.items():
            assert elements[key] == torch.Size(shape).numel(), (key, sizes)


def test_mergers_are_sharded() -> None:
    with fake_cluster(1, 2, ParallelSizes(tp=2)):
        [model] = build_on_meta(small_provider(tensor_model_parallel_size=2))
        entries = {entry.key: entry for entry in sharded_tensors([model])}
    for merger in ("merger", "decoder.deepstack_merger_list.1"):
        fc1 = entries[f"vision_model.{merger}.linear_fc1.weight"]
        fc2 = entries[f"vision_model.{merger}.linear_fc2.weight"]
        assert (fc1.global_shape, fc1.global_offset) == ((192, 192), (96, 0))
        assert (fc2.global_shape, fc2.global_offset) == ((80, 192), (0, 96))


def test_checkpoint_keys_are_the_fused_names() -> None:
    with fake_cluster(0, 1, ParallelSizes()):
        [model] = build_on_meta(small_provider())
        keys = {entry.key for entry in sharded_tensors([model])}
    for part in ("vision_model", "language_model"):
        assert f"{part}.decoder.layers.self_attention.linear_qkv.layer_norm_weight" in keys
        assert f"{part}.decoder.layers.mlp.linear_fc1.layer_norm_weight" in keys
    assert not [key for key in keys if "input_layernorm" in key or "pre_mlp_layernorm" in key]


def test_first_stage_alone_has_the_encoder() -> None:
    sizes = ParallelSizes(pp=2)
    fields = {
        "pipeline_model_parallel_size": 2,
        "num_layers": 6,
    }
    for rank in range(2):
        with fake_cluster(rank, 2, sizes):
            [model] = build_on_meta(small_provider(**fields))
        assert hasattr(model, "vision_model") == (rank == 0)
        assert hasattr(model.language_model, "output_layer") == (rank == 1)


@pytest.mark.parametrize(
    ("flag", "frozen"),
    [
        ("freeze_language_model", ("language_model.",)),
        (
            "freeze_vision_model",
            (
                "vision_model.patch_embed.",
                "vision_model.pos_embed.",
                "vision_model.decoder.layers.",
            ),
        ),
        (
            "freeze_vision_projection",
            ("vision_model.merger.", "vision_model.decoder.deepstack_merger_list."),
        ),
    ],
)
def test_freezing(flag: str, frozen: tuple[str, ...]) -> None:
    with fake_cluster(0, 1, ParallelSizes()):
        [model] = build_on_meta(small_provider(**{flag: True}))
    parts = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert set(parts.values()) == {True, False}
    assert all(trained != name.startswith(frozen) for name, trained in parts.items())


def test_model_without_deepstack() -> None:
    """Qwen3.5 has none: it is the config that says so, not the class."""
    with fake_cluster(0, 1, ParallelSizes()):
        provider = small_provider(vision=small_vision(deepstack_visual_indexes=()))
        [model] = build_on_meta(provider)
    assert not [name for name, _ in model.named_parameters() if "deepstack" in name]


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    with one_process():
        yield small_provider().provide_distributed_model(wrap_with_ddp=False)[0]


PIXELS = torch.zeros(24, 3 * 2 * 16 * 16)
GRID = torch.tensor([[1, 4, 6]])
SIX_TOKENS = torch.tensor([[1, 302, *[300] * 6, 303, 2]])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"pixel_values": PIXELS}, "pixel_values was given without image_grid_thw"),
        ({"video_grid_thw": GRID}, "video_grid_thw was given without pixel_values_videos"),
        ({}, "6 image tokens .* give 0 features"),
        ({"position_ids": torch.zeros(3, 1, 10).long()}, "6 image tokens .* give 0 features"),
        (
            {
                "pixel_values": torch.cat((PIXELS, PIXELS)),
                "image_grid_thw": GRID.repeat(2, 1),
                "position_ids": torch.zeros(3, 1, 10).long(),
            },
            "6 image tokens .* give 12 features",
        ),
        (
            {"pixel_values": PIXELS[:20], "image_grid_thw": GRID},
            r"shape \[20, 1536\], and image_grid_thw asks for \[24, 1536\]",
        ),
        ({"pixel_values": PIXELS, "image_grid_thw": torch.tensor([[1, 3, 8]])}, "multiple of"),
        ({"pixel_values": PIXELS, "image_grid_thw": GRID[0]}, r"shape \[3\], expected \[n, 3\]"),
        (
            {
                "pixel_values": PIXELS,
                "image_grid_thw": GRID,
                "position_ids": torch.zeros(1, 10).long(),
            },
            r"pass \[3, 1, 10\], or None",
        ),
        ({"position_ids": torch.zeros(4, 1, 10).long()}, r"expected \[3, 1, 10\], temporal"),
        ({"attention_mask": torch.ones(1, 1, 10, 10)}, r"expected \[1, 10\]"),
    ],
)
def test_inputs_that_contradict_each_other(
    model: Any, inputs: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        model(input_ids=SIX_TOKENS, **inputs)


@pytest.mark.parametrize(
    "flags",
    [
        ("freeze_language_model",),
        ("freeze_vision_model",),
        ("freeze_vision_projection",),
        ("freeze_language_model", "freeze_vision_model"),
        ("freeze_vision_model", "freeze_vision_projection"),
    ],
    ids="+".join,
)
@pytest.mark.usefixtures("model")
def test_frozen_parts_have_no_gradient_and_the_others_do(flags: tuple[str, ...]) -> None:
    provider = small_provider(**dict.fromkeys(flags, True))
    [frozen] = provider.provide_distributed_model(wrap_with_ddp=False)
    loss = frozen(
        input_ids=SIX_TOKENS,
        labels=SIX_TOKENS.roll(-1, 1),
        pixel_values=torch.randn(PIXELS.shape),
        image_grid_thw=GRID,
    )
    loss.sum().backward()
    for name, parameter in frozen.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_ignored_labels_have_no_loss(model: Any) -> None:
    tokens = torch.randint(0, 299, (2, 7))
    labels = tokens.roll(-1, 1)
    labels[0, 3] = labels[1, 6] = -100
    loss = model(input_ids=tokens, labels=labels)
    assert loss.shape == (2, 7)
    assert (loss == 0).nonzero().tolist() == [[0, 3], [1, 6]]


def test_trimmed_and_padded_logits(model: Any) -> None:
    tokens = torch.randint(0, 299, (2, 7))
    padded, trimmed = model(input_ids=tokens), model(input_ids=tokens, trim_vocab_padding=True)
    assert padded.shape == (2, 7, 384)
    assert torch.equal(trimmed, padded[..., :307])


def test_hooks_see_the_chunks_before_they_are_wrapped() -> None:
    seen: list[Any] = []
    with one_process():
        provider = small_provider()
        provider.register_pre_wrap_hook(seen.extend)
        [wrapped] = provider.provide_distributed_model()
    assert seen == [wrapped.module]


@pytest.fixture
def one_of_two_context_ranks() -> Iterator[Any]:
    with fake_cluster(0, 2, ParallelSizes(cp=2)), torch.device("meta"):
        yield small_provider(context_parallel_size=2).provide()


@pytest.mark.parametrize(
    ("length", "labels", "message"),
    [
        (10, None, r"sequence lengths \[10\]: context_parallel_size = 2 cuts each into 4 .* of 4"),
        (
            12,
            12,
            r"labels has shape \[1, 12\], expected \[1, 6\], .* of context_.* = 2 this rank's",
        ),
    ],
)
def test_batches_that_context_parallelism_cannot_take(
    one_of_two_context_ranks: Any, length: int, labels: int | None, message: str
) -> None:
    ids = torch.zeros(1, length, dtype=torch.long, device="cpu")
    with pytest.raises(InputError, match=message):
        one_of_two_context_ranks(ids, labels=None if labels is None else ids[:, :labels])


def test_pictures_are_not_cut(one_of_two_context_ranks: Any) -> None:
    """megatron-core's own attention would turn each rank's part of the patches by other angles."""
    [words, patches] = (
        part.decoder.layers[0].self_attention.pg_collection.cp.size()
        for part in (
            one_of_two_context_ranks.language_model,
            one_of_two_context_ranks.vision_model,
        )
    )
    assert (words, patches) == (2, 1)
