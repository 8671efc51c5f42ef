"""What every family reads of a config in the same way."""

from typing import Any

from megatron.bridge.dtypes import MIXABLE, TORCH_NAME_OF
from megatron.bridge.errors import ConfigError
from megatron.bridge.models.hf_pretrained.config import HFConfig


def dtype_settings(config: HFConfig, dtype: str) -> dict[str, Any]:
    """The fields of a provider that say its dtype ("BF16"). Raises ConfigError if it cannot be."""
    if dtype not in MIXABLE:
        raise ConfigError(f"{config.origin}: weights in {dtype}; expected {', '.join(MIXABLE)}")
    return {
        "params_dtype": TORCH_NAME_OF[dtype],
        "bf16": dtype == "BF16",
        "fp16": dtype == "F16",
    }


def padded_vocabulary(language: HFConfig, rows: int | None) -> int:
    """Rows of the Megatron embedding: `rows`, or the vocabulary's next multiple of 128.

    That is what megatron-core's clients pad to before tensor parallelism.

    Args:
        language: config of the language model.
        rows: of an embedding that is there; None without one.

    Raises:
        ConfigError: the vocabulary has more tokens than `rows`.
    """
    tokens = language.count("vocab_size")
    if rows is None:
        return -(-tokens // 128) * 128
    if rows < tokens:
        raise ConfigError(
            f"{language.origin}: {tokens} tokens do not fit into an embedding of {rows} rows"
        )
    return rows
