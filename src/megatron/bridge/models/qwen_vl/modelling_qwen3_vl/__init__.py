"""Qwen3-VL and Qwen3.5 on megatron-core: a vision encoder and a GPTModel with interleaved mRoPE.

One model class serves all families. What differs is in the fields of the provider: deepstack,
layers with attention or the gated delta rule, dense MLPs or experts, multi-token prediction.
"""

from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.model import Qwen3VLModel

__all__ = ["Qwen3VLModel"]
