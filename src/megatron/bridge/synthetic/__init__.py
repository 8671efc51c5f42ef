"""Small random models in the released disk layout: the input of tests, demos and first tries.

families       what each family's config.json, tokens and processors look like
settings       `key=value` settings on top of it, checked
side_files     tokenizer, processors, chat template, generation config
weights        random tensors, streamed to safetensors shards
make_model     all of it, as one folder
"""

from megatron.bridge.synthetic.families import FAMILIES
from megatron.bridge.synthetic.model_folder import make_model

__all__ = ["FAMILIES", "make_model"]
