"""Small models of Hugging Face with their processor, and real photographs to ask them about.

No two sizes are equal and no matrix is square; the norms and biases are far from ones and zeros.
"""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
VOCAB_SIZE = 307


def build_processor() -> Any:
    """Qwen3VLProcessor with the settings of the released models and a tokenizer of bytes."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer, Qwen3VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
        Qwen2VLImageProcessorPil,
    )
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    patches = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2}
    pixels = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return Qwen3VLProcessor(
        # The smallest image is a quarter of the released one's, to keep the tests short.
        image_processor=Qwen2VLImageProcessorPil(
            size={"shortest_edge": 16384, "longest_edge": 16777216}, **patches, **pixels
        ),
        tokenizer=Qwen2Tokenizer(
            vocab={byte: index for index, byte in enumerate(sorted(ByteLevel.alphabet()))},
            merges=[],
            additional_special_tokens=list(SPECIAL_TOKENS[1:]),
            pad_token=SPECIAL_TOKENS[0],
        ),
        video_processor=Qwen3VLVideoProcessor(
            size={"shortest_edge": 4096, "longest_edge": 25165824}, **patches, **pixels
        ),
    )


TEXT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 80,
    "num_hidden_layers": 5,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
}
QWEN3_ATTENTION = {
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5_000_000.0,
        "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
    },
}
HYBRID_ATTENTION = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000_000.0,
        "mrope_section": [3, 3, 2],
        "mrope_interleaved": True,
        "partial_rotary_factor": 0.25,
    },
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 120,
    "linear_value_head_dim": 104,
}
DENSE = {"intermediate_size": 144}
EXPERTS = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 28}
SHARED_EXPERT = {"shared_expert_intermediate_size": 36}
# model_type: (name of the class in transformers, text_config, deepstack)
FAMILIES: dict[str, tuple[str, dict[str, Any], list[int]]] = {
    "qwen3_vl": ("Qwen3VL", QWEN3_ATTENTION | DENSE, [0, 2]),
    "qwen3_vl_moe": ("Qwen3VLMoe", QWEN3_ATTENTION | DENSE | EXPERTS, [0, 2]),
    "qwen3_5": ("Qwen3_5", HYBRID_ATTENTION | DENSE, []),
    "qwen3_5_moe": ("Qwen3_5Moe", HYBRID_ATTENTION | EXPERTS | SHARED_EXPERT, []),
}
# case: (model_type, text_config over the defaults). Every family, and every ratio of heads, and
# one expert per token as well as several.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_vl": ("qwen3_vl", {}),
    "qwen3_vl_moe": ("qwen3_vl_moe", {}),
    "qwen3_vl_moe-dense_layers-one_kv_head-top1": (
        "qwen3_vl_moe",
        {"mlp_only_layers": [1], "num_key_value_heads": 1, "num_experts_per_tok": 1},
    ),
    "qwen3_5-3x_value_heads-one_kv_head": (
        "qwen3_5",
        {"linear_num_value_heads": 6, "num_key_value_heads": 1, "num_hidden_layers": 6},
    ),
    "qwen3_5_moe-2x_value_heads": ("qwen3_5_moe", {}),
    "qwen3_5_moe-1x_value_heads-one_kv_head-top1": (
        "qwen3_5_moe",
        {"linear_num_value_heads": 2, "num_key_value_heads": 1, "num_experts_per_tok": 1},
    ),
}


def build_config(processor: Any, family: str = "qwen3_vl", **top_level: Any) -> Any:
    """Config of `family`; `text_config` and `vision_config` are merged into the defaults."""
    import transformers

    token_id = processor.tokenizer.convert_tokens_to_ids
    name, text, deepstack = FAMILIES[family]
    vision = {
        "depth": 4,
        "hidden_size": 48,
        "intermediate_size": 112,
        "num_heads": 3,
        "patch_size": 16,
        "out_hidden_size": 80,
        "num_position_embeddings": 49,
        "deepstack_visual_indexes": deepstack,
    }
    return getattr(transformers, f"{name}Config")(
        text_config=TEXT | text | top_level.pop("text_config", {}),
        vision_config=vision | top_level.pop("vision_config", {}),
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        **top_level,
    )


def build_case(processor: Any, case: str, **top_level: Any) -> Any:
    """Config of one of CASES, with further entries as for `build_config`."""
    family, text = CASES[case]
    text = text | top_level.pop("text_config", {})
    return build_config(processor, family, text_config=text, **top_level)


def build_hf_model(config: Any, seed: int = 0) -> Any:
    """The model of `config`, fp32, eager attention, weights that make it lively."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_config(
        config,
        attn_implementation="eager",
        experts_implementation="eager",
        dtype=torch.float32,
    )
    randomize(model, seed)
    return model.eval()


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int) -> None:
    """Weights that keep activations at about 1, norms and biases far from ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, device="cpu").to(parameter.device)
        if name.endswith("A_log"):
            # Initialized at random: memories from long to short.
            parameter.copy_(noise - 2.0)
        elif parameter.ndim == 1:
            parameter.add_(0.3 * noise)
        elif "embed_tokens" in name or "pos_embed" in name:
            parameter.copy_(noise)
        else:
            # Experts are [experts, out, in].
            inputs = parameter.shape[-1] if parameter.ndim == 3 else parameter[0].numel()
            parameter.copy_(noise / inputs**0.5)


def photographs() -> list[Any]:
    """Two photographs of different sizes and shapes."""
    return [*_photographs()]


@cache
def _photographs() -> tuple[Any, ...]:
    from importlib.util import find_spec

    from PIL import Image

    spec = find_spec("sklearn")  # to import it takes a process seconds
    assert spec is not None
    assert spec.origin is not None
    images = Path(spec.origin).with_name("datasets") / "images"
    china, flower = (Image.open(images / name) for name in ("china.jpg", "flower.jpg"))
    return china.resize((190, 130)), flower.crop((100, 0, 420, 427)).resize((120, 230))


def video() -> np.ndarray:
    """Five frames that pan over a photograph, uint8 [5, height, width, 3]."""
    pixels = np.asarray(photographs()[0])
    return np.stack([pixels[10:74, 12 * step : 12 * step + 96] for step in range(5)])


def prompt(processor: Any, text: str | list[str], **media: Any) -> dict[str, torch.Tensor]:
    """What the processor makes of a prompt: tensors to pass to either model."""
    if "videos" in media:
        frames = len(media["videos"][0])
        metadata = [{"fps": 2.0, "total_num_frames": frames, "frames_indices": list(range(frames))}]
        media |= {"video_metadata": metadata, "do_sample_frames": False}
    return dict(processor(text=text, return_tensors="pt", **media).to(torch.get_default_device()))
