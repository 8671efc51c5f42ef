"""Attention whose rotation also scales what it rotates, as yarn has it."""

from typing import Any

from megatron.core.transformer.attention import SelfAttention

from megatron.bridge.errors import ConfigError

# megatron-core multiplies cos and sin by this attribute. It derives it from the fields of its own
# yarn, which a provider of another rope type does not have.
_SCALE_OF_COS_AND_SIN = "_yarn_concentration_factor"


class ScaledRotarySelfAttention(SelfAttention):
    """SelfAttention with cos and sin of the rotary embedding multiplied by `rotary_scaling`.

    Raises:
        ConfigError: this version of megatron-core has no place for the factor.
    """

    def __init__(self, *args: Any, rotary_scaling: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rotary_scaling = rotary_scaling
        if rotary_scaling == 1.0:
            return
        if not hasattr(self, _SCALE_OF_COS_AND_SIN):
            raise ConfigError(
                f"the attention of this megatron-core has no {_SCALE_OF_COS_AND_SIN}: a rope type "
                f"whose attention factor is not 1 (here {rotary_scaling}) needs version 0.19"
            )
        setattr(self, _SCALE_OF_COS_AND_SIN, rotary_scaling)
