"""What the families of vision-language models declare for `make-model`, by name."""

from megatron.bridge.models.catalog import small_models

FAMILIES = {
    name: small_models()[name] for name in ("qwen3-vl", "qwen3-vl-moe", "qwen3.5", "qwen3.5-moe")
}
