"""The live models of text alone against transformers on the same files, and against each other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron.bridge import AutoBridge
from megatron.bridge.cli import main
from megatron.bridge.errors import ConfigError, InputError, UnsupportedModel
from oracle import text_models, tiny
from oracle.test_gradients import (
    assert_equal_gradients,
    gradients_as_weights,
    gradients_in_hf_names,
    gradients_on_disk,
)

type Build = Callable[..., SimpleNamespace]


def ours_of(folder: Path, **fields: Any) -> SimpleNamespace:
    bridge = AutoBridge.from_hf_pretrained(folder)
    provider = bridge.to_megatron_provider()
    for name, value in fields.items():
        setattr(provider, name, value)
    [model] = provider.provide_distributed_model(wrap_with_ddp=False)
    return SimpleNamespace(bridge=bridge, ours=model.eval(), folder=folder)


@pytest.fixture(scope="module")
def build(process_groups: None, tmp_path_factory: pytest.TempPathFactory) -> Build:
    def build(name: str, fields: dict[str, Any] | None = None, **entries: Any) -> SimpleNamespace:
        hf = text_models.build(name, **entries)
        pair = ours_of(text_models.save(hf, tmp_path_factory.mktemp("hf")), **(fields or {}))
        pair.hf = hf
        return pair

    return build


def tokens(batch: int = 2, length: int = 11) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(3)
    ids = torch.randint(6, 300, (batch, length), generator=generator, device="cpu")
    return ids.to(torch.get_default_device())


def packed(*lengths: int) -> PackedSeqParams:
    """Sequences of these lengths, one behind the other."""
    boundaries = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )


def padded(side: str) -> dict[str, Tensor]:
    """A batch in which one sequence is shorter; 5 is the token of padding."""
    ids = tokens()
    where = slice(0, 4) if side == "left" else slice(-4, None)
    mask = torch.ones_like(ids)
    mask[1, where], ids[1, where] = 0, 5
    return {"input_ids": ids, "attention_mask": mask}


def logits_of(pair: SimpleNamespace, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        theirs = pair.hf(**inputs, use_cache=False).logits
        ours = pair.ours(**inputs)
    return theirs, ours[..., : theirs.shape[-1]]


def assert_close(theirs: Tensor, ours: Tensor, mask: Tensor | None = None) -> None:
    assert ours.shape == theirs.shape
    real = slice(None) if mask is None else mask.bool()
    assert theirs[real].abs().max() > 0.5
    assert (ours[real] - theirs[real]).abs().max() <= 1e-4


ENTRIES: dict[str, dict[str, Any]] = {
    "": {},
    "tied and biased": {"tie_word_embeddings": True, "attention_bias": True},
    "scaled": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1_000_000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
}
CASES = [
    *((name, "") for name in text_models.LANGUAGE_MODELS),
    *(("Qwen3ForCausalLM", entries) for entries in ENTRIES if entries),
    ("Qwen3_5ForCausalLM", "tied and biased"),
    ("Qwen3MoeForCausalLM", "scaled"),
]


@pytest.mark.parametrize(("name", "entries"), CASES)
def test_logits(name: str, entries: str, build: Build) -> None:
    pair = build(name, **ENTRIES[entries])
    assert_close(*logits_of(pair, {"input_ids": tokens()}))
    for side in ("left", "right"):
        inputs = padded(side)
        assert_close(*logits_of(pair, inputs), inputs["attention_mask"])


@pytest.mark.parametrize("topk", [1, 3])
@pytest.mark.parametrize("normalized", [True, False])
def test_weights_of_the_chosen_experts(topk: int, normalized: bool, build: Build) -> None:
    entries = {"norm_topk_prob": normalized, "num_experts_per_tok": topk, "mlp_only_layers": [1]}
    pair = build("Qwen3MoeForCausalLM", **entries)
    assert pair.ours.config.moe_router_pre_softmax is not normalized
    assert_close(*logits_of(pair, {"input_ids": tokens()}))


@pytest.mark.parametrize("name", text_models.LANGUAGE_MODELS)
def test_positions_that_are_given(name: str, build: Build) -> None:
    """Distances count: every token twice as far from the next."""
    pair = build(name)
    # Without a mask transformers takes gaps between positions for the ends of packed sequences.
    positions = 2 * torch.arange(11).expand(2, 11)
    inputs = {"input_ids": tokens(), "attention_mask": torch.ones(2, 11).long()}
    inputs["position_ids"] = positions
    theirs, ours = logits_of(pair, inputs)
    assert_close(theirs, ours)
    without, _ = logits_of(pair, {"input_ids": inputs["input_ids"]})
    assert (theirs - without).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["Qwen3MoeForCausalLM", "Qwen3_5ForCausalLM"])
def test_packed_sequences(name: str, build: Build) -> None:
    pair = build(name)
    first, second = tokens()[0, :7], tokens()[1, :5]
    with torch.no_grad():
        ours = pair.ours(torch.cat((first, second))[None], packed_seq_params=packed(7, 5))
        alone = [pair.hf(input_ids=one[None], use_cache=False).logits for one in (first, second)]
    assert_close(torch.cat(alone, dim=1), ours[..., : tiny.VOCAB_SIZE])


@pytest.mark.parametrize("name", text_models.LANGUAGE_MODELS)
def test_loss_and_every_gradient(name: str, build: Build) -> None:
    pair, ids = build(name), tokens()
    labels = ids.roll(-1, dims=1)
    labels[:, -1] = -100
    logits = pair.hf(input_ids=ids, use_cache=False).logits
    expected_loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    expected_loss.sum().backward()
    loss = pair.ours(ids, labels=labels)
    loss.sum().backward()
    assert (loss.flatten() - expected_loss).abs().max() <= 1e-4
    assert_equal_gradients(dict(gradients_in_hf_names(pair)), gradients_on_disk(pair.hf))


# --- the language half of a vision-language model ---

HALVES = {
    "qwen3_vl": "Qwen3ForCausalLM",
    "qwen3_vl_moe": "Qwen3MoeForCausalLM",
    "qwen3_5-3x_value_heads-one_kv_head": "Qwen3_5ForCausalLM",
    "qwen3_5_moe-2x_value_heads": "Qwen3_5MoeForCausalLM",
}


@pytest.mark.parametrize("case", HALVES)
def test_the_language_half_of_a_model_with_vision(
    case: str, processor: Any, process_groups: None, tmp_path: Path
) -> None:
    """The same numbers to the last bit, from the same files with the names and config of text."""
    whole = tiny.build_hf_model(tiny.build_case(processor, case))
    whole.save_pretrained(tmp_path / "whole")
    processor.save_pretrained(tmp_path / "whole")
    half = tmp_path / "half"
    half.mkdir()
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    text = {
        name.replace("model.language_model.", "model."): tensor
        for name, tensor in tensors.items()
        if not name.startswith("model.visual.")
    }
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    name = HALVES[case]
    config_class, _ = text_models.MODELS[name]
    import transformers

    model_type = getattr(transformers, config_class).model_type
    flat = config["text_config"] | {"architectures": [name], "model_type": model_type}
    flat |= {"norm_topk_prob": True, "tie_word_embeddings": config["tie_word_embeddings"]}
    save_file(text, half / "model.safetensors", metadata={"format": "pt"})
    (half / "config.json").write_text(json.dumps(flat))
    ids = tokens()
    with torch.no_grad():
        expected = ours_of(tmp_path / "whole").ours(ids)
        assert torch.equal(ours_of(half).ours(ids), expected)


# --- classifiers ---


@pytest.mark.parametrize("name", text_models.CLASSIFIERS)
def test_scores(name: str, build: Build) -> None:
    pair = build(name)
    for side in ("left", "right"):
        inputs = padded(side)
        mask = inputs["attention_mask"] if "Token" in name else None
        theirs, ours = logits_of(pair, inputs)
        assert ours.shape[-1] == 3
        assert_close(theirs, ours, mask)


@pytest.mark.parametrize("kind", ["Sequence", "Token"])
def test_scores_of_text_and_a_picture(kind: str, processor: Any, tmp_path: Path) -> None:
    import transformers

    config = tiny.build_case(processor, "qwen3_5-3x_value_heads-one_kv_head", num_labels=4)
    config.text_config.pad_token_id = 5
    hf = getattr(transformers, f"Qwen3_5For{kind}Classification")._from_config(
        config, attn_implementation="eager", dtype=torch.float32
    )
    tiny.randomize(hf, 0)
    hf.eval().save_pretrained(tmp_path / "hf")
    processor.save_pretrained(tmp_path / "hf")
    pair = ours_of(tmp_path / "hf")
    pair.hf = hf
    image = tiny.photographs()[:1]
    inputs = tiny.prompt(processor, f"What {tiny.IMAGE} is it?", images=image)
    theirs, ours = logits_of(pair, inputs)
    assert_close(theirs, ours)


@pytest.mark.parametrize("name", text_models.CLASSIFIERS)
def test_gradients_of_scores(name: str, build: Build) -> None:
    pair = build(name)
    inputs = padded("right")
    found = []
    for model in (pair.hf, pair.ours):
        scores = model(**inputs)
        scores = getattr(scores, "logits", scores)
        if "Token" in name:
            scores = scores[inputs["attention_mask"].bool()]
        scores.square().sum().backward()
    with gradients_as_weights(pair.ours):
        found = {name: one.clone() for name, one in pair.bridge.export_hf_weights([pair.ours])}
    for tensor, gradient in found.items():
        if tensor.endswith("linear_attn.norm.weight"):
            gradient -= 1.0
    assert_equal_gradients(found, gradients_on_disk(pair.hf))


def test_a_classifier_that_cannot_tell_where_sequences_end(build: Build) -> None:
    pair = build("Qwen3ForSequenceClassification", pad_token_id=None)
    assert_close(*logits_of(pair, {"input_ids": tokens(batch=1)}))
    with pytest.raises(InputError, match=r"2 sequences.* no pad_token_id"):
        pair.ours(tokens())


def test_a_classifier_of_sequences_takes_no_pack(build: Build) -> None:
    """It would score the last of several sequences, and say nothing of the others."""
    pair = build("Qwen3ForSequenceClassification")
    with pytest.raises(InputError, match="scores the last token of each row"):
        pair.ours(tokens(batch=1), packed_seq_params=packed(4, 7))


def test_a_classifier_has_no_loss_of_its_own(build: Build) -> None:
    pair = build("Qwen3ForTokenClassification")
    with pytest.raises(InputError, match="compute the loss of its scores"):
        pair.ours(tokens(), labels=tokens())


def test_dropout_of_what_is_scored(build: Build) -> None:
    """As in transformers: a tenth, in training, where the config does not say."""
    pair = build("Qwen3ForTokenClassification")
    assert pair.ours.output_layer.dropout.p == pair.hf.dropout.p == 0.1
    pair = build("Qwen3ForTokenClassification", classifier_dropout=0.3)
    assert pair.ours.output_layer.dropout.p == pair.hf.dropout.p == 0.3
    first, again = (pair.ours.train()(tokens()) for _ in range(2))
    assert not torch.equal(first, again)


# --- what cannot be computed ---


def test_attention_in_a_window(tmp_path: Path) -> None:
    """Files are converted; the live model has no such attention."""
    window = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2}
    folder = text_models.save(text_models.build("Qwen3ForCausalLM", **window), tmp_path / "hf")
    assert main(["import", str(folder), str(tmp_path / "megatron")]) == 0
    provider = AutoBridge.from_hf_pretrained(folder).to_megatron_provider()
    with pytest.raises(ConfigError, match=r"window_size is \(2, 0\)"):
        provider.finalize()


def test_a_window_that_no_layer_uses(build: Build) -> None:
    window = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 5}
    assert_close(*logits_of(build("Qwen3ForCausalLM", **window), {"input_ids": tokens()}))


def test_a_model_without_an_output_layer(tmp_path: Path) -> None:
    folder = text_models.save(text_models.build("Qwen3Model"), tmp_path / "hf")
    with pytest.raises(UnsupportedModel, match="Qwen3ForCausalLM"):
        AutoBridge.from_hf_pretrained(folder).to_megatron_provider()


def test_positions_of_another_shape(build: Build) -> None:
    pair = build("Qwen3ForCausalLM")
    with pytest.raises(InputError, match=r"position_ids has shape \[3, 2, 11\]"):
        pair.ours(tokens(), position_ids=torch.zeros(3, 2, 11, dtype=torch.long))
