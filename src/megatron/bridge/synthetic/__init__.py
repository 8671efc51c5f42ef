"""Small random models in the released disk layout: the input of tests, demos and first tries.

families       those that declare a small model: see models.small_model
settings       `key=value` settings on top of it, checked by `validation`
side_files     tokenizer, processors, chat template, generation config
disk_tensors   which tensors are on disk: experts, multi-token prediction, dtypes
fp8            the quantized form of a tensor
weights        random tensors, streamed to safetensors shards
make_model     all of it, as one folder
"""

from megatron.bridge.synthetic.model_folder import make_model

__all__ = ["make_model"]
