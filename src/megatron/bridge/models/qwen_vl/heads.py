"""Models without an output layer, and what stands in its place."""

import re
from collections.abc import Collection
from typing import Any

from megatron.bridge.models.conversion.boxes import Shape
from megatron.bridge.models.hf_pretrained.config import HFConfig

_OTHER_HEAD = re.compile(
    r"(?:.*\.)?(?:score|classifier|v_head|value_head|reward_head|rm_head|regression_head)\.(?:.*)"
)
_OF_EMBEDDING_MODELS = frozenset({"modules.json", "config_sentence_transformers.json"})
"""Files of sentence-transformers: the folder is a model that gives vectors, not tokens."""


def is_other_head(name: str) -> bool:
    """Whether a tensor is of the head of a reward, value or classification model."""
    return _OTHER_HEAD.fullmatch(name) is not None


def is_classifier(config: HFConfig) -> bool:
    """Whether the architecture scores sequences or tokens."""
    return config.architecture.endswith(("ForSequenceClassification", "ForTokenClassification"))


def is_headless(config: HFConfig) -> bool:
    """Whether the architecture has no output layer."""
    return config.architecture.endswith("Model") or is_classifier(config)


def needs_no_head(config: HFConfig, names: Collection[str], files: Collection[str]) -> bool:
    """Whether files without an output layer are whole.

    files: names of the files beside the weights.
    """
    return (
        is_headless(config)
        or not _OF_EMBEDDING_MODELS.isdisjoint(files)
        or any(map(is_other_head, names))
    )


def classifier_tensors(
    config: HFConfig, names: Collection[str], prefix: str, hidden_size: int
) -> dict[str, tuple[Shape, str]]:
    """The tensors that a classifier has in place of an output layer: shape, and what it is for.

    prefix: what stands before the names of the files.
    """
    if not is_classifier(config):
        return {}
    labels, data = _labels(config.data), config.data
    found = [name for name in names if name.endswith("score.weight")]
    root = found[0].removesuffix("weight") if len(found) == 1 else f"{prefix}score."
    purpose = f"the head of a {config.architecture}"
    needed: dict[str, tuple[Shape, str]] = {f"{root}weight": ((labels, hidden_size), purpose)}
    biased = data.get("token_classification_bias", True)
    if config.architecture.endswith("ForTokenClassification") and biased:
        needed[f"{root}bias"] = ((labels,), purpose)
    return needed


def _labels(data: dict[str, Any]) -> int:
    """As transformers counts them: two where the config does not say."""
    names = data.get("id2label")
    if isinstance(names, dict):
        return len(names)
    stated = data.get("num_labels")
    return stated if type(stated) is int else 2
