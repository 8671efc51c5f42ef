"""A config.json that states another dtype of the weights."""

from megatron.bridge.models.hf_pretrained.config import DTYPE_KEYS, TEXT, VISION, HFConfig


def config_in_dtype(config: HFConfig, name: str) -> HFConfig:
    """The same config for weights in the dtype `name` ("bfloat16"), wherever it states one.

    A config that states none is left so: transformers then goes by the files.
    """
    data = config.data
    sections = [
        data,
        *(data[parent] for parent in (TEXT, VISION) if isinstance(data.get(parent), dict)),
    ]
    for section in sections:
        section.update({key: name for key in DTYPE_KEYS if section.get(key) is not None})
    return HFConfig.from_dict(data, config.origin)
