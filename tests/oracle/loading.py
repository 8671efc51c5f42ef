"""What transformers says of a model folder."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
import transformers

FAMILIES = {
    "qwen3-vl": "qwen3_vl",
    "qwen3-vl-moe": "qwen3_vl_moe",
    "qwen3.5": "qwen3_5",
    "qwen3.5-moe": "qwen3_5_moe",
}


@cache
def silent() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def missing_for_transformers(folder: Path) -> list[str]:
    """What transformers does not find in a folder; the error where it cannot be loaded at all."""
    silent()
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        model_class = getattr(transformers, config.architectures[0])
        with torch.device("meta"):
            count = model_class(config).num_parameters()
        held = sum(file.stat().st_size for file in folder.rglob("*.safetensors*"))
        if count > held:  # a model by default, of billions: making it would take minutes
            return [f"some of {count} parameters"]
        _, info = model_class.from_pretrained(folder, output_loading_info=True)
    except Exception as error:  # noqa: BLE001
        return [f"{type(error).__name__}: {error}"]
    return [str(name) for key in ("missing_keys", "mismatched_keys") for name in info[key]]
