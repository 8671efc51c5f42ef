"""Small random models in the released disk layout: the input of tests, demos and first tries.

family           finds a family's declaration: see models.small_model
config_settings  `key=value` settings on top of it
validation       what the family's bridge and provider say of the result
disk_tensors     which tensors are on disk: experts, multi-token prediction, dtypes
quantize         the quantized form of a tensor
random_weights   random tensors, streamed to safetensors shards
processors       tokenizer, processors, chat template, generation config
model_folder     all of it, as one folder
"""

from megatron.bridge.synthetic.model_folder import make_model

__all__ = ["make_model"]
