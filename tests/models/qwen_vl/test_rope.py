"""Positions of tokens and patches, against transformers."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron.bridge.errors import InputError
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.rope import (
    InterleavedMultimodalRotaryEmbedding,
)
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.rope_frequencies import RotaryFrequencies
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.rope_index import (
    get_packed_rope_index,
    get_rope_index,
    token_types,
)
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.vision_positions import (
    interpolated_embedding,
    patch_positions,
    rotary_angles,
)


@pytest.fixture(scope="module")
def hf() -> Any:
    """A Qwen3VLModel without weights, for its methods."""
    from transformers import Qwen3VLConfig, Qwen3VLModel

    text = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 16, "vocab_size": 9}
    vision = {"depth": 1, "hidden_size": 48, "num_heads": 3, "deepstack_visual_indexes": [0]}
    with torch.device("meta"):
        return Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision))


# A prompt: text runs, images (rows, columns) and videos (frames, rows, columns) in language tokens.
side = st.integers(1, 5)
part = st.one_of(st.integers(1, 6), st.tuples(side, side), st.tuples(st.integers(1, 3), side, side))
prompts = st.lists(st.lists(part, min_size=1, max_size=6), min_size=1, max_size=3)


def tokens(parts: list[Any]) -> tuple[list[int], list[list[int]], list[list[int]]]:
    """Types of the tokens, and the grids in patches; as in prompts, text is between grids."""
    types, images, videos = [0], [], []
    for one in parts:
        if isinstance(one, int):
            types += [0] * one
        elif len(one) == 2:
            types += [1] * (one[0] * one[1]) + [0]
            images.append([1, 2 * one[0], 2 * one[1]])
        else:
            types += ([2] * (one[1] * one[2]) + [0, 0]) * one[0]
            videos.append([one[0], 2 * one[1], 2 * one[2]])
    return types, images, videos


@settings(max_examples=60, deadline=None)
@given(batch=prompts, left=st.booleans())
def test_rope_index_is_that_of_transformers(hf: Any, batch: list[Any], left: bool) -> None:
    rows = [tokens(parts) for parts in batch]
    longest = max(len(types) for types, _, _ in rows)
    types = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(types)
    for row, (row_types, _, _) in enumerate(rows):
        where = slice(-len(row_types), None) if left else slice(len(row_types))
        types[row, where] = torch.tensor(row_types)
        mask[row, where] = 1
    images, videos = (
        torch.tensor(grids) if (grids := [grid for one in rows for grid in one[which]]) else None
        for which in (1, 2)
    )
    expected, _ = hf.get_rope_index(types, types, images, videos, mask)
    found = get_rope_index(types, images, videos, mask, spatial_merge_size=2)
    assert torch.equal(found, expected)

    lengths = torch.tensor([len(row_types) for row_types, _, _ in rows])
    packed = get_packed_rope_index(
        types[mask.bool()][None],
        images,
        videos,
        torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
        spatial_merge_size=2,
    )
    assert torch.equal(packed[:, 0], expected[:, mask.bool()])


def test_token_types() -> None:
    ids = torch.tensor([[5, 8, 8, 5, 9]])
    assert token_types(ids, image_token_id=8, video_token_id=9).tolist() == [[0, 1, 1, 0, 2]]


def test_grids_that_do_not_fit_the_tokens() -> None:
    types = torch.tensor([[0, 1, 1, 1, 0]])
    grid = torch.tensor([[1, 4, 4]])
    with pytest.raises(InputError, match=r"3 consecutive image tokens .* grid of \(2, 2\)"):
        get_rope_index(types, grid, None, None, 2)
    with pytest.raises(InputError, match="tokens remain, and all grids are used"):
        get_rope_index(types, None, None, None, 2)
    with pytest.raises(InputError, match="1 video grids have no tokens"):
        get_rope_index(torch.zeros(1, 3).long(), None, grid, None, 2)
    with pytest.raises(InputError, match="an image of 2 frames"):
        get_rope_index(types, torch.tensor([[2, 2, 2]]), None, None, 2)


@pytest.mark.parametrize(("percent", "section"), [(1.0, [24, 20, 20]), (0.25, [6, 5, 5])])
def test_interleaved_rotary_embedding(percent: float, section: list[int]) -> None:
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

    rotated = int(128 * percent)
    parameters = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": section}
    theirs = Qwen3VLTextRotaryEmbedding(
        Qwen3VLTextConfig(head_dim=rotated, rope_parameters=parameters)
    )
    positions = torch.randint(0, 100_000, (3, 2, 7))
    cos, sin = theirs(torch.zeros(1), positions)
    ours = InterleavedMultimodalRotaryEmbedding(RotaryFrequencies(128, percent, 5e6, {}))
    angles = ours(positions, section)
    assert angles.shape == (7, 2, 1, rotated)
    torch.testing.assert_close(angles.cos()[:, :, 0].transpose(0, 1), cos, atol=0, rtol=0)
    torch.testing.assert_close(angles.sin()[:, :, 0].transpose(0, 1), sin, atol=0, rtol=0)


YARN = {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 50}


@pytest.mark.parametrize("parameters", [{}, YARN])
def test_frequencies_survive_meta_and_casts(parameters: dict[str, Any]) -> None:
    positions = torch.arange(21).view(3, 1, 7)
    frequencies = RotaryFrequencies(16, 1.0, 5e6, parameters)
    expected = InterleavedMultimodalRotaryEmbedding(frequencies)(positions, [4, 2, 2])
    with torch.device("meta"):
        assert not frequencies.problems()
        assert frequencies.attention_scaling() == pytest.approx(1.11 if parameters else 1, abs=1e-3)
        module = InterleavedMultimodalRotaryEmbedding(RotaryFrequencies(16, 1.0, 5e6, parameters))
    module = module.to_empty(device="cpu").bfloat16()
    assert torch.equal(module(positions, [4, 2, 2]), expected)
    assert not module.state_dict()


GRIDS = torch.tensor([[1, 6, 10], [3, 2, 4], [1, 2, 2]])


def test_position_table_is_interpolated_as_in_transformers() -> None:
    from transformers.vision_utils import get_vision_interpolation_indices_and_weights

    table = torch.randn(49, 5)
    indices, weights = get_vision_interpolation_indices_and_weights(
        GRIDS, 7, mode="bilinear", align_corners=True, spatial_merge_size=2
    )
    expected = (table[indices] * weights[:, :, None]).sum(1)
    found = interpolated_embedding(table, patch_positions(GRIDS, 2), 7)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_one_row_of_patches_takes_the_corner_of_the_table() -> None:
    table = torch.arange(9.0)[:, None]
    found = interpolated_embedding(table, patch_positions(torch.tensor([[1, 1, 3]]), 1), 3)
    assert found.flatten().tolist() == [0.0, 1.0, 2.0]


def test_vision_angles() -> None:
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionRotaryEmbedding
    from transformers.vision_utils import get_vision_position_ids

    theirs = Qwen3VLVisionRotaryEmbedding(Qwen3VLVisionConfig(hidden_size=48, num_heads=3))
    cos, sin = theirs(torch.zeros(1), get_vision_position_ids(GRIDS, 2))
    angles: Tensor = rotary_angles(patch_positions(GRIDS, 2), 16, 10000.0)[:, 0, 0]
    torch.testing.assert_close(angles.cos(), cos, atol=1e-6, rtol=0)
    torch.testing.assert_close(angles.sin(), sin, atol=1e-6, rtol=0)
