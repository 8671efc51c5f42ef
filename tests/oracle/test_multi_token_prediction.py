"""The predictor of the token after the next, against `Predictor`."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from oracle import tiny
from oracle.predictor import Predictor
from oracle.test_gradients import assert_equal_gradients, gradients_in_hf_names, gradients_on_disk
from oracle.test_gradients import labels_of as all_labels_of
from oracle.test_logits import image_and_video
from oracle.test_packed import batch_of_rows, packed, packed_by_the_model

TOLERANCE = 1e-4
CASES = {
    "dense": ("qwen3_5-3x_value_heads-one_kv_head", {}),
    "experts": ("qwen3_5_moe-2x_value_heads", {}),
    "biases": ("qwen3_5-3x_value_heads-one_kv_head", {"attention_bias": True}),
}
# Large, so that the gradients of the second loss weigh as much as those of the first.
FACTOR = 40.0
FIELDS = {"mtp_num_layers": 1, "mtp_loss_scaling_factor": FACTOR, "moe_aux_loss_coeff": 0.0}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def pair(build: Any, request: pytest.FixtureRequest) -> SimpleNamespace:
    """hf, ours, bridge, and `predictor`, whose weights are in ours too."""
    predictors: list[Predictor] = []

    def add_predictor(hf: Any, folder: Any) -> None:
        predictors.append(Predictor(hf))
        predictors[0].add_to(folder)

    case, text = request.param
    config = {"text_config": {"mtp_num_hidden_layers": 1, **text}}
    pair = build(config, FIELDS, case=case, prepare=add_predictor)
    pair.predictor = predictors[0]
    return pair


@contextmanager
def predictions(model: Any) -> Iterator[list[Tensor]]:
    """Collects what the predictor gives to the output layer, [b, s, h]."""
    found: list[Tensor] = []
    hook = model.language_model.mtp.layers[0].register_forward_hook(
        lambda _module, _args, output: found.append(output[0].transpose(0, 1))
    )
    yield found
    hook.remove()


def labels_of(inputs: dict[str, Tensor]) -> Tensor:
    """As for the first loss; padding has none."""
    labels = all_labels_of(inputs)
    labels[inputs["attention_mask"].roll(-1, dims=1) == 0] = -100
    return labels


def assert_equal_predictions(pair: SimpleNamespace, inputs: dict[str, Tensor]) -> None:
    with torch.no_grad(), predictions(pair.ours) as found:
        _, expected = pair.predictor(pair.hf, inputs)
        pair.ours(**inputs, labels=labels_of(inputs))
    real = inputs["attention_mask"].bool()
    has_next = real & real.roll(-1, dims=1)
    has_next[:, -1] = False
    assert expected[has_next].std() > 0.1
    assert (found[0] - expected)[has_next].abs().max() <= TOLERANCE


def test_predictions_for_text_images_and_video(pair: SimpleNamespace, processor: Any) -> None:
    assert_equal_predictions(pair, tiny.prompt(processor, "A sentence without a picture."))
    assert_equal_predictions(pair, image_and_video(processor))


def test_pictures_matter_to_the_predictor(
    pair: SimpleNamespace, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison would notice the embeddings of placeholders in the place of features."""
    from megatron.bridge.models.qwen_vl.modelling_qwen3_vl import text_model

    following = text_model.FollowingTokens
    words, pictures = tiny.prompt(processor, "Only words do not."), image_and_video(processor)
    for inputs in words, pictures:
        ids = inputs["input_ids"]
        monkeypatch.setattr(
            text_model,
            "FollowingTokens",
            lambda model, _, padding, ids=ids: following(
                model, model.embedding(ids, None), padding
            ),
        )
        if inputs is words:
            assert_equal_predictions(pair, inputs)
        else:
            with pytest.raises(AssertionError):
                assert_equal_predictions(pair, inputs)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch(pair: SimpleNamespace, processor: Any, side: str) -> None:
    texts = [f"{tiny.IMAGE} A flower?", f"Here {tiny.IMAGE} is a longer question.", "No picture."]
    inputs = tiny.prompt(
        processor, texts, images=tiny.photographs(), padding=True, padding_side=side
    )
    assert_equal_predictions(pair, inputs)


def test_packed_sequences(pair: SimpleNamespace, processor: Any) -> None:
    prompts = [
        tiny.prompt(processor, f"{tiny.IMAGE} What is it?", images=tiny.photographs()[:1]),
        tiny.prompt(processor, "Only words."),
        tiny.prompt(processor, f"Frames {tiny.VIDEO}", videos=[tiny.video()]),
    ]
    inputs = packed(prompts)
    with torch.no_grad(), predictions(pair.ours) as found:
        pair.ours(**inputs, labels=inputs["input_ids"])
        expected = torch.cat([pair.predictor(pair.hf, one)[1] for one in prompts], dim=1)
    has_next = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    has_next[:, inputs["packed_seq_params"].cu_seqlens_q[1:].long() - 1] = False
    assert (found[0] - expected)[has_next].abs().max() <= TOLERANCE


def test_logits_are_those_without_the_predictor(pair: SimpleNamespace, processor: Any) -> None:
    inputs = image_and_video(processor)
    with torch.no_grad(), predictions(pair.ours) as found:
        expected = pair.hf(**inputs).logits
        in_use = pair.ours(**inputs, trim_vocab_padding=True)
        assert not found, "the predictor ran, and nobody needs it"
        in_training = pair.ours.train()(**inputs, trim_vocab_padding=True)
        pair.ours.eval()
        assert found
    assert (in_use - expected).abs().max() <= TOLERANCE
    assert (in_training - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("training", [False, True])
def test_loss_and_every_gradient(pair: SimpleNamespace, processor: Any, training: bool) -> None:
    inputs = image_and_video(processor)
    labels = labels_of(inputs)
    labels[:, :5] = -100
    expected_loss, expected = expected_gradients(pair, inputs, labels)

    pair.ours.train(training).zero_grad()
    loss = pair.ours(**inputs, labels=labels)
    loss.sum().backward()
    pair.ours.eval()
    assert (loss - expected_loss).abs().max() <= TOLERANCE, "the first loss is returned alone"
    assert_equal_gradients(dict(gradients_in_hf_names(pair)), expected)


def expected_gradients(
    pair: SimpleNamespace, inputs: dict[str, Tensor], labels: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of the first loss, and of FACTOR times the mean of the second."""
    pair.hf.zero_grad(set_to_none=False)
    pair.predictor.zero_grad()
    logits, hidden_states = pair.predictor(pair.hf, inputs)
    loss = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    second_labels = labels.roll(-1, dims=1)
    second_labels[:, -1] = -100
    second_logits = pair.hf.lm_head(hidden_states)
    second_loss = F.cross_entropy(second_logits.transpose(1, 2), second_labels)
    (loss.sum() + FACTOR * second_loss).backward()
    gradients = gradients_on_disk(pair.hf)
    for name, weight in pair.predictor.named_parameters():
        gradients[f"mtp.{name}"] = weight.grad.cpu()
    return loss.detach(), gradients


def test_gradients_of_a_batch_do_not_depend_on_its_padding(
    pair: SimpleNamespace, processor: Any
) -> None:
    """Rows padded on the right, on the left, and in a pack that tells of its padding or not."""
    found = []
    for given in ("right", "left", "pack", "pack that tells"):
        inputs: dict[str, Any] = batch_of_rows(processor, "left" if given == "left" else "right")
        labels = labels_of(inputs).masked_fill(inputs["attention_mask"] == 0, -100)
        labels[:, -1] = -100
        if "pack" in given:
            tells = given == "pack that tells"
            inputs, labels = packed_by_the_model(inputs, labels, 16, tells_padding=tells)
        pair.ours.train().zero_grad()
        pair.ours(**inputs, labels=labels).sum().backward()
        found.append({name: one.grad.clone() for name, one in pair.ours.named_parameters()})
    pair.ours.eval()
    for gradients in found[1:]:
        assert_equal_gradients(gradients, found[0])
