"""Small models of text alone, of every class that transformers has for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from megatron.bridge.models.catalog import bridge_for
from megatron.bridge.models.hf_pretrained.config import HFConfig
from oracle import tiny

ONE_POSITION = {"rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0}}
QWEN3 = tiny.TEXT | tiny.QWEN3_ATTENTION | ONE_POSITION | tiny.DENSE
QWEN3_MOE = QWEN3 | tiny.EXPERTS | {"norm_topk_prob": True}
HYBRID = tiny.TEXT | tiny.HYBRID_ATTENTION
QWEN3_5 = HYBRID | tiny.DENSE
QWEN3_5_MOE = HYBRID | tiny.EXPERTS | tiny.SHARED_EXPERT
LABELS = {"num_labels": 3, "pad_token_id": 5}

# class: (class of its config, its entries)
LANGUAGE_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3ForCausalLM": ("Qwen3Config", QWEN3),
    "Qwen3MoeForCausalLM": ("Qwen3MoeConfig", QWEN3_MOE),
    "Qwen3_5ForCausalLM": ("Qwen3_5TextConfig", QWEN3_5),
    "Qwen3_5MoeForCausalLM": ("Qwen3_5MoeTextConfig", QWEN3_5_MOE),
}
BARE_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3Model": ("Qwen3Config", QWEN3),
    "Qwen3MoeModel": ("Qwen3MoeConfig", QWEN3_MOE),
    "Qwen3_5TextModel": ("Qwen3_5TextConfig", QWEN3_5),
    "Qwen3_5MoeTextModel": ("Qwen3_5MoeTextConfig", QWEN3_5_MOE),
}
CLASSIFIERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3ForSequenceClassification": ("Qwen3Config", QWEN3 | LABELS),
    "Qwen3ForTokenClassification": ("Qwen3Config", QWEN3 | LABELS),
    "Qwen3MoeForSequenceClassification": ("Qwen3MoeConfig", QWEN3_MOE | LABELS),
    "Qwen3MoeForTokenClassification": ("Qwen3MoeConfig", QWEN3_MOE | LABELS),
    "Qwen3_5TextForSequenceClassification": ("Qwen3_5TextConfig", QWEN3_5 | LABELS),
}
MODELS = LANGUAGE_MODELS | BARE_MODELS | CLASSIFIERS


def build(name: str, seed: int = 0, **entries: Any) -> Any:
    """A model of a class of MODELS, fp32, with weights that make it lively."""
    return of_config(name, MODELS[name][1] | entries, seed)


def of_config(name: str, config: dict[str, Any], seed: int = 0) -> Any:
    """As `build`, of a config with nothing else in it."""
    import transformers

    model = getattr(transformers, name)._from_config(
        getattr(transformers, MODELS[name][0])(**config),
        attn_implementation="eager",
        experts_implementation="eager",
        dtype=torch.float32,
    )
    tiny.randomize(model, seed)
    return model.eval()


def save(model: Any, folder: Path, root: str | None = None) -> Path:
    """As transformers saves it; with `root` before the names of the language model."""
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    [embedding] = [name for name in tensors if name.endswith("embed_tokens.weight")]
    own = embedding.removesuffix("embed_tokens.weight")
    beside = ("lm_head.", "score.")
    if root is not None:
        tensors = {
            name if name.startswith(beside) else root + name.removeprefix(own): tensor
            for name, tensor in tensors.items()
        }
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def add_predictor(folder: Path) -> None:
    """The MTP layer that the config names, which transformers does not write."""
    config = HFConfig.from_file(folder)
    tensors = load_file(folder / "model.safetensors")
    for name, spec in bridge_for(config.architecture).expected_tensors(config, "F32").items():
        if name.startswith("mtp."):
            tensors[name] = torch.randn(spec.shape)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
