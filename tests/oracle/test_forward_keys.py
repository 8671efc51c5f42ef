"""Keys of a config that only the forward pass needs: the logits of transformers, or a refusal."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from oracle import tiny

TOLERANCE = 1e-4  # of the largest logit
CASE_OF = {
    "qwen3_vl": "qwen3_vl",
    "qwen3_vl_moe": "qwen3_vl_moe",
    "qwen3_5": "qwen3_5-3x_value_heads-one_kv_head",
    "qwen3_5_moe": "qwen3_5_moe-2x_value_heads",
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262144}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# The prompt of text is shorter than it was trained on, that with pictures longer.
LONGROPE = {
    "rope_type": "longrope",
    "factor": 5.0,
    "original_max_position_embeddings": 40,
    "short_factor": [1.0 + 0.5 * j for j in range(8)],
    "long_factor": [2.0 + 1.5 * j for j in range(8)],
}


@pytest.fixture(scope="module")
def prompts(processor: Any) -> list[dict[str, Tensor]]:
    """Text, and text with pictures and a video."""
    return [
        tiny.prompt(processor, "A sentence without a picture."),
        tiny.prompt(
            processor,
            f"First {tiny.IMAGE} then {tiny.VIDEO} and {tiny.IMAGE}: which?",
            images=tiny.photographs(),
            videos=[tiny.video()],
        ),
    ]


def rope(family: str, **changes: Any) -> dict[str, Any]:
    """The family's rope_parameters with changes; None leaves a key out."""
    parameters = tiny.FAMILIES[family][1]["rope_parameters"] | changes
    return {"rope_parameters": {key: x for key, x in parameters.items() if x is not None}}


def assert_equal_logits(pair: SimpleNamespace, prompts: list[dict[str, Tensor]]) -> None:
    for inputs in prompts:
        with torch.no_grad():
            expected = pair.hf(**inputs).logits
            found = pair.ours(**inputs, trim_vocab_padding=True)
        assert expected.std() > 0.1, "the logits are too flat to compare"
        assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


def ordinary_logits(build: Any, family: str, prompts: list[dict[str, Tensor]]) -> list[Tensor]:
    """Those of the same weights with an ordinary config."""
    ours = build(case=CASE_OF[family]).ours
    with torch.no_grad():
        return [ours(**inputs, trim_vocab_padding=True) for inputs in prompts]


@pytest.mark.parametrize("family", CASE_OF)
def test_yarn_and_theta_of_the_vision_encoder(
    build: Any, prompts: list[dict[str, Tensor]], family: str
) -> None:
    """As the configs for a million tokens have it; the encoder's theta is far from 10000."""
    changed = {
        "text_config": rope(family, **YARN),
        "vision_config": {"rope_parameters": {"rope_type": "axial", "rope_theta": 100.0}},
    }
    pair = build(changed, case=CASE_OF[family])
    assert_equal_logits(pair, prompts)
    scaling = pair.hf.model.language_model.rotary_emb.attention_scaling
    assert scaling == pytest.approx(1.1386, abs=1e-4)
    for inputs, ordinary in zip(prompts, ordinary_logits(build, family, prompts), strict=True):
        with torch.no_grad():
            found = pair.ours(**inputs, trim_vocab_padding=True)
        assert (found - ordinary).abs().max() > 100 * TOLERANCE * ordinary.abs().max()


@pytest.mark.parametrize(
    ("family", "parameters"),
    [
        ("qwen3_vl", {"rope_type": "linear", "factor": 3.0}),
        ("qwen3_5", LLAMA3),
        ("qwen3_5", {"rope_type": "proportional", "partial_rotary_factor": 0.5}),
        ("qwen3_vl_moe", {"rope_type": "proportional", "partial_rotary_factor": 0.5}),
        ("qwen3_vl", LONGROPE),
        ("qwen3_vl", {key: value for key, value in LONGROPE.items() if key != "factor"}),
        # Other than this family's default, and no factor: that is the ratio of two lengths.
        ("qwen3_5_moe", YARN | {"factor": None, "original_max_position_embeddings": 1000}),
        ("qwen3_vl", YARN | {"beta_fast": 4.0, "beta_slow": 2.0, "attention_factor": 0.7}),
        ("qwen3_vl", YARN | {"mscale": 2.0, "mscale_all_dim": 0.5, "truncate": False}),
        # More frequencies than there are: transformers takes what it finds.
        ("qwen3_vl_moe", {"mrope_section": [24, 20, 20]}),
        ("qwen3_5", {"mrope_section": [1, 1, 5], "rope_theta": 500.0}),
    ],
)
def test_rope_types(
    build: Any, prompts: list[dict[str, Tensor]], family: str, parameters: dict[str, Any]
) -> None:
    text = rope(family, **parameters)
    if parameters.get("factor", 1.0) is None:
        text["rope_parameters"]["factor"] = None
    assert_equal_logits(build({"text_config": text}, case=CASE_OF[family]), prompts)


@pytest.mark.parametrize(("family", "parameters"), [("qwen3_5_moe", YARN), ("qwen3_vl", LONGROPE)])
def test_rope_types_in_float64(
    build: Any, prompts: list[dict[str, Tensor]], family: str, parameters: dict[str, Any]
) -> None:
    """What is left is rounding in float64: the frequencies are those of float64 on both sides."""
    from megatron.bridge.operations.verification.float64 import (
        float64_throughout,
        restore_frequencies,
    )

    pair = build({"text_config": rope(family, **parameters)}, case=CASE_OF[family])
    hf, ours = pair.hf.double(), pair.ours.double()
    restore_frequencies(hf)
    for inputs in prompts:
        with torch.no_grad(), float64_throughout():
            expected = hf(**inputs).logits
            found = ours(**inputs, trim_vocab_padding=True)
        assert expected.dtype is torch.float64
        assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()


def test_a_length_of_the_run_does_not_change_yarn(
    build: Any, prompts: list[dict[str, Tensor]]
) -> None:
    """Clients set seq_length; transformers takes a missing factor from the config's length."""
    text = rope("qwen3_vl", **YARN | {"original_max_position_embeddings": 1000})
    text["rope_parameters"]["factor"] = None
    pair = build({"text_config": text}, {"seq_length": 512})
    assert_equal_logits(pair, prompts)


@pytest.mark.parametrize("family", CASE_OF)
def test_activations(build: Any, prompts: list[dict[str, Tensor]], family: str) -> None:
    """In MLPs, experts, the shared expert and the convolution of the delta net, and in vision."""
    text = {"qwen3_vl": "relu2", "qwen3_vl_moe": "gelu", "qwen3_5": "mish", "qwen3_5_moe": "relu"}
    vision = {"qwen3_vl": "quick_gelu", "qwen3_5_moe": "silu"}
    changed = {
        "text_config": {"hidden_act": text[family]},
        "vision_config": {"hidden_act": vision.get(family, "gelu_pytorch_tanh")},
    }
    pair = build(changed, case=CASE_OF[family])
    assert_equal_logits(pair, prompts)
    assert not any("activation" in name for name, _ in pair.ours.named_modules())


def test_fewer_layers_than_features_of_deepstack(
    build: Any, prompts: list[dict[str, Tensor]]
) -> None:
    """As in a pruned model: the features that no layer is there for are left over."""
    assert_equal_logits(build({"text_config": {"num_hidden_layers": 1}}), prompts)


def test_dropout_is_for_training_only(build: Any, prompts: list[dict[str, Tensor]]) -> None:
    pair = build({"text_config": {"attention_dropout": 0.25}})
    assert_equal_logits(pair, prompts)
    attention = pair.ours.language_model.decoder.layers[0].self_attention.core_attention
    assert attention.attention_dropout == 0.25
    pair.ours.train()
    with torch.no_grad():
        first, second = (pair.ours(**prompts[0]) for _ in range(2))
    assert not torch.allclose(first, second)


def test_weights_that_are_not_loaded(process_groups: None, processor: Any) -> None:
    from megatron.bridge import AutoBridge

    changed = {
        "text_config": {"initializer_range": 0.3},
        "vision_config": {"initializer_range": 0.05},
    }
    config = tiny.build_config(processor, dtype="float32", **changed)
    provider = AutoBridge.from_hf_config(config).to_megatron_provider(load_weights=False)
    [ours] = provider.provide_distributed_model(wrap_with_ddp=False)
    layer = ours.language_model.decoder.layers[1]
    assert layer.mlp.linear_fc1.weight.std().item() == pytest.approx(0.3, rel=0.05)
    block = ours.vision_model.decoder.layers[1]
    assert block.mlp.linear_fc1.weight.std().item() == pytest.approx(0.05, rel=0.05)


@pytest.mark.parametrize(
    ("family", "text", "vision", "message"),
    [
        ("qwen3_vl", {"rope_type": "dynamic", "factor": 2.0}, {}, "rope_type is 'dynamic': .*long"),
        (
            "qwen3_vl",
            {"rope_type": "yarn", "original_max_position_embeddings": 2048},
            {},
            "rope_parameters has no factor.*'yarn' needs it",
        ),
        ("qwen3_vl", LLAMA3 | {"low_freq_factor": None}, {}, "Missing required keys.*low_freq"),
        ("qwen3_vl", {"rope_type": "linear", "factor": 0.0}, {}, "frequencies are not finite"),
        ("qwen3_vl", LONGROPE | {"long_factor": [1.0] * 7}, {}, "transformers refuses: .* size"),
        (
            "qwen3_vl",
            YARN | {"partial_rotary_factor": 0.5},
            {},
            "rotary_percent is 0.5 with rope_type 'yarn': transformers rotates whole heads",
        ),
        ("qwen3_5", {}, {"rope_type": "yarn", "factor": 2.0}, "vision.rope_type is 'yarn'"),
    ],
)
def test_rope_that_is_refused_by_name(
    processor: Any, family: str, text: dict[str, Any], vision: dict[str, Any], message: str
) -> None:
    config = config_data(processor, family)
    config["text_config"] |= rope(family, **text)
    config["vision_config"]["rope_parameters"] = {"rope_type": "axial", "rope_theta": 1e4} | vision
    assert_refused(config, message)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("text_config", {"hidden_act": "prelu"}, r"'prelu' \(hidden_act\): it has weights of its"),
        ("text_config", {"hidden_act": "sliu"}, r"'sliu' \(hidden_act\): transformers has no act"),
        ("vision_config", {"hidden_act": "xielu"}, "vision.hidden_act is 'xielu': it has weights"),
        ("text_config", {"attention_dropout": -0.5}, "attention_dropout is -0.5: expected a share"),
        ("vision_config", {"num_heads": 5}, "vision.hidden_size is 48, not a multiple of 4"),
    ],
)
def test_other_values_that_are_refused_by_name(
    processor: Any, part: str, change: dict[str, Any], message: str
) -> None:
    config = config_data(processor, "qwen3_vl_moe")
    config[part] |= change
    assert_refused(config, message)


def config_data(processor: Any, family: str) -> dict[str, Any]:
    data: dict[str, Any] = tiny.build_config(processor, family, dtype="float32").to_dict()
    name = tiny.FAMILIES[family][0]
    return data | {"architectures": [f"{name}ForConditionalGeneration"]}


def assert_refused(config: dict[str, Any], message: str) -> None:
    """When a model is built, and not before: the weights can be converted."""
    from megatron.bridge import AutoBridge
    from megatron.bridge.errors import ConfigError

    bridge = AutoBridge.from_hf_config(config)
    provider = bridge.to_megatron_provider(load_weights=False)
    with pytest.raises(ConfigError, match=message) as refusal:
        provider.finalize()
    assert len(str(refusal.value).splitlines()) == 2
