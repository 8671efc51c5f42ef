"""Qwen3-VL on megatron-core: a vision encoder, deepstack, and a GPTModel with interleaved mRoPE."""

from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.model import Qwen3VLModel

__all__ = ["Qwen3VLModel"]
