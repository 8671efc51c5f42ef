"""Whatever a config states or leaves out, the logits are those of transformers."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from drawn_configs import drawn_config
from megatron.bridge.models.qwen_vl.config_keys import CONFIG_KEYS, Derived, Field
from oracle import text_models, tiny
from small_configs import (
    ALONE,
    FAMILIES,
    OTHERS,
    WINDOW,
    WITH_VISION,
    Key,
    changed_alone,
    changed_together,
)

TOLERANCE = 1e-4
"""Of the largest logit."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    from megatron.bridge.runtime.parallel import (
        destroy_process_groups,
        initialize_process_groups,
    )
    from megatron.bridge.runtime.parallel_sizes import ParallelSizes

    initialize_process_groups(ParallelSizes())
    yield tmp_path_factory.mktemp("drawn")
    destroy_process_groups()


def prompts(model: Any) -> list[dict[str, torch.Tensor]]:
    """A text, and a picture between words, for whatever the vision tower takes."""
    if not hasattr(model.config, "vision_config"):
        return [{"input_ids": torch.tensor([[9, 17, 23, 42, 5, 88, 101, 7]])}]
    vision = model.config.vision_config
    merged = vision.spatial_merge_size**2
    grid = torch.tensor([[1, 4 * vision.spatial_merge_size, 3 * vision.spatial_merge_size]])
    patches = int(grid.prod())
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    generator = torch.Generator().manual_seed(1)
    text = torch.tensor([[9, 17, 23, 42, 5, 88, 101, 7]])
    picture, start = model.config.image_token_id, model.config.vision_start_token_id
    shown = torch.tensor([[9, start, *[picture] * (patches // merged), 27, 17, 23, 42]])
    return [
        {"input_ids": text, "mm_token_type_ids": torch.zeros_like(text)},
        {
            "input_ids": shown,
            "mm_token_type_ids": (shown == picture).int(),
            "pixel_values": torch.randn(patches, values, generator=generator, device="cpu").to(
                grid.device
            ),
            "image_grid_thw": grid,
        },
    ]


def compare(config: dict[str, Any], folder: Path) -> None:
    from safetensors.torch import save_file
    from transformers import AutoConfig

    from megatron.bridge import AutoBridge

    data = {key: value for key, value in copy.deepcopy(config).items() if key != "model_type"}
    if config["model_type"] in ALONE:
        model = text_models.of_config(ALONE[config["model_type"]], data)
    else:
        model = tiny.build_hf_model(AutoConfig.for_model(config["model_type"], **data))
    tensors = model.state_dict()
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    (folder / "config.json").write_text(json.dumps(config))
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    [ours] = AutoBridge.from_hf_pretrained(folder).to_megatron_model()
    ours.eval()
    for inputs in prompts(model):
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            expected = model(**inputs, use_cache=False, return_dict=True).logits
            found = ours(**inputs, trim_vocab_padding=True)
        assert expected.std() > 0.01
        assert (expected - found).abs().max() <= TOLERANCE * expected.abs().max()


def run(model_type: str, folder: Path, draws: int) -> None:
    @settings(
        max_examples=draws,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],  # shrinking builds hundreds of models
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def check(data: st.DataObject) -> None:
        config = drawn_config(data.draw, model_type)
        note(json.dumps(config))
        compare(config, folder)

    check()


def read_keys(model_type: str) -> list[Key]:
    """Keys that the forward reads, and that have another value to try."""
    return [
        (section, key)
        for section, uses in CONFIG_KEYS[model_type].items()
        for key, use in uses.items()
        if isinstance(use, Field | Derived) and OTHERS[key] is not None
        # The oracle computes in float32 alone, and nothing computes attention in a window.
        if key not in ("dtype", "torch_dtype")
        and not ("use_sliding_window" in uses and key in WINDOW)
    ]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_all_keys_that_the_forward_reads(model_type: str, folder: Path) -> None:
    """With another value of many keys at once."""
    keys = read_keys(model_type)
    assert len(keys) > (30 if model_type in WITH_VISION else 15)
    configs = changed_together(model_type, keys)
    assert len(configs) < 12
    for changed, config in configs:
        try:
            compare(config, folder)
        except Exception as error:
            error.add_note(f"with other values of {changed}")
            raise


@pytest.mark.slow
@pytest.mark.parametrize("model_type", FAMILIES)
def test_each_key_that_the_forward_reads(model_type: str, folder: Path) -> None:
    """With another value of one key after the other."""
    for section, key in read_keys(model_type):
        try:
            compare(changed_alone(model_type, section, key), folder)
        except Exception as error:
            error.add_note(f"{section}.{key}")
            raise


@pytest.mark.slow
@pytest.mark.parametrize("model_type", WITH_VISION)
def test_two_hundred_draws(model_type: str, folder: Path) -> None:
    run(model_type, folder, 200)
