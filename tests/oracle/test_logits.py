"""Logits, hidden states and greedy tokens of the same weights in both models."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from oracle import tiny

TOLERANCE = 1e-4


def both(pair: SimpleNamespace, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        expected = pair.hf(**inputs).logits
        found = pair.ours(**inputs, trim_vocab_padding=True)
    assert found.shape == expected.shape
    assert expected.std() > 0.1, "the logits are too flat to compare"
    return expected, found


def assert_equal_logits(pair: SimpleNamespace, inputs: dict[str, Tensor]) -> None:
    expected, found = both(pair, inputs)
    real = inputs["attention_mask"].bool()
    assert (expected - found)[real].abs().max() <= TOLERANCE


def image_and_video(processor: Any) -> dict[str, Tensor]:
    return tiny.prompt(
        processor,
        f"First {tiny.IMAGE} then {tiny.VIDEO} and {tiny.IMAGE}: which?",
        images=tiny.photographs(),
        videos=[tiny.video()],
    )


def test_text(pair: SimpleNamespace, processor: Any) -> None:
    assert_equal_logits(pair, tiny.prompt(processor, "A sentence without a picture."))


def test_two_images_of_different_sizes(pair: SimpleNamespace, processor: Any) -> None:
    text = f"Compare {tiny.IMAGE} with {tiny.IMAGE}, please."
    inputs = tiny.prompt(processor, text, images=tiny.photographs())
    first, second = inputs["image_grid_thw"].tolist()
    assert first != second
    assert_equal_logits(pair, inputs)


def test_video(pair: SimpleNamespace, processor: Any) -> None:
    inputs = tiny.prompt(processor, f"What moves? {tiny.VIDEO}", videos=[tiny.video()])
    assert inputs["video_grid_thw"][0, 0] > 1
    assert_equal_logits(pair, inputs)


def test_frames_do_not_see_each_other(
    pair: SimpleNamespace, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison with a video would notice attention across its frames."""
    from megatron.bridge.models.qwen_vl.modelling_qwen3_vl import vision_model

    per_frame = vision_model._one_sequence_per_frame
    inputs = tiny.prompt(processor, f"What moves? {tiny.VIDEO}", videos=[tiny.video()])
    expected, _ = both(pair, inputs)

    def per_video(grid_thw: Tensor) -> Any:
        frames, height, width = grid_thw.unbind(1)
        return per_frame(torch.stack((torch.ones_like(frames), frames * height, width), dim=1))

    monkeypatch.setattr(vision_model, "_one_sequence_per_frame", per_video)
    _, found = both(pair, inputs)
    assert (expected - found).abs().max() > 100 * TOLERANCE


def test_images_and_video_in_one_prompt(pair: SimpleNamespace, processor: Any) -> None:
    assert_equal_logits(pair, image_and_video(processor))


def test_the_same_bits_with_and_without_gradients(pair: SimpleNamespace, processor: Any) -> None:
    """Recomputation runs a layer once without and once with them, and a router chooses in both."""
    inputs = image_and_video(processor)
    with torch.no_grad():
        without = pair.ours(**inputs)
    assert torch.equal(pair.ours(**inputs).detach(), without)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch(pair: SimpleNamespace, processor: Any, side: str) -> None:
    texts = [f"{tiny.IMAGE} A flower?", f"Here {tiny.IMAGE} is a longer question.", "No picture."]
    inputs = tiny.prompt(
        processor, texts, images=tiny.photographs(), padding=True, padding_side=side
    )
    assert not inputs["attention_mask"].all()
    assert_equal_logits(pair, inputs)


def test_padding_does_not_change_a_prompt(pair: SimpleNamespace, processor: Any) -> None:
    alone = tiny.prompt(processor, f"{tiny.IMAGE} A flower?", images=tiny.photographs()[:1])
    batch = tiny.prompt(
        processor,
        [f"{tiny.IMAGE} A flower?", "x" * 200],
        images=tiny.photographs()[:1],
        padding=True,
        padding_side="left",
    )
    with torch.no_grad():
        expected, found = pair.ours(**alone), pair.ours(**batch)
    assert (expected[0] - found[0, -expected.shape[1] :]).abs().max() <= TOLERANCE


def test_bool_mask_and_missing_token_types(pair: SimpleNamespace, processor: Any) -> None:
    inputs = image_and_video(processor)
    expected, _ = both(pair, inputs)
    del inputs["mm_token_type_ids"]
    inputs["attention_mask"] = inputs["attention_mask"].bool()
    with torch.no_grad():
        found = pair.ours(**inputs, trim_vocab_padding=True)
    assert (expected - found).abs().max() <= TOLERANCE


def test_given_position_ids(pair: SimpleNamespace, processor: Any) -> None:
    inputs = tiny.prompt(processor, "Positions that nobody would compute.")
    length = inputs["input_ids"].shape[1]
    inputs["position_ids"] = torch.randint(0, 50, (3, 1, length))
    assert_equal_logits(pair, inputs)


def test_hidden_states_of_every_layer(pair: SimpleNamespace, processor: Any) -> None:
    inputs = image_and_video(processor)
    found: list[Tensor] = []
    layers = pair.ours.language_model.decoder.layers
    handles = [
        layer.register_forward_hook(lambda _module, _args, output: found.append(output[0]))
        for layer in layers
    ]
    # In Hugging Face the features of deepstack are added outside of the layer, so its own record
    # of hidden states is what enters each layer.
    expected: list[Tensor] = []
    text = pair.hf.model.language_model
    for module in (*text.layers[1:], text.norm):
        handles.append(
            module.register_forward_pre_hook(
                lambda _module, args, kwargs: expected.append(
                    args[0] if args else kwargs["hidden_states"]
                ),
                with_kwargs=True,
            )
        )
    try:
        both(pair, inputs)
    finally:
        for handle in handles:
            handle.remove()
    assert len(found) == len(expected) == len(layers)
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        difference = (ours.transpose(0, 1) - theirs).abs().max()
        assert difference <= TOLERANCE, f"after layer {number}: {difference}"


def test_sixteen_greedy_tokens(pair: SimpleNamespace, processor: Any) -> None:
    inputs = tiny.prompt(processor, f"Describe {tiny.IMAGE}:", images=tiny.photographs()[:1])
    # A random model may say one of these, which then stands for a picture that is not there.
    special = processor.tokenizer.convert_tokens_to_ids(list(tiny.SPECIAL_TOKENS))
    with torch.no_grad():
        expected = pair.hf.generate(
            **inputs,
            max_new_tokens=16,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            suppress_tokens=special,
        )
        tokens = inputs.pop("input_ids")
        pictures = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
        for _ in range(16):
            logits = pair.ours(input_ids=tokens, trim_vocab_padding=True, **pictures)
            logits[..., special] = -torch.inf
            tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), dim=1)
    assert tokens.tolist() == expected.tolist()
