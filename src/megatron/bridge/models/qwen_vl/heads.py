"""Models without an output layer, and what stands in its place."""

import re
from collections.abc import Collection
from dataclasses import dataclass

from megatron.bridge.models.hf_pretrained.config import HFConfig
from megatron.bridge.models.qwen_vl.config_keys import language_of

_OTHER_HEAD = re.compile(
    r"(?:.*\.)?(?:score|classifier|v_head|value_head|reward_head|rm_head|regression_head)\.(?:.*)"
)
_OF_EMBEDDING_MODELS = frozenset({"modules.json", "config_sentence_transformers.json"})
"""Files of sentence-transformers: the folder is a model that gives vectors, not tokens."""


def is_other_head(name: str) -> bool:
    """Whether a tensor belongs to the head of a reward, value or classification model."""
    return _OTHER_HEAD.fullmatch(name) is not None


def is_classifier(config: HFConfig) -> bool:
    """Whether the architecture scores sequences or tokens."""
    return config.architecture.endswith(("ForSequenceClassification", "ForTokenClassification"))


def is_headless(config: HFConfig) -> bool:
    """Whether the architecture has no output layer."""
    return config.architecture.endswith("Model") or is_classifier(config)


def needs_no_head(config: HFConfig, names: Collection[str], files: Collection[str]) -> bool:
    """Whether files without an output layer are whole.

    Args:
        config: config of the model.
        names: names of the tensors.
        files: names of the files beside the weights.
    """
    return (
        is_headless(config)
        or not _OF_EMBEDDING_MODELS.isdisjoint(files)
        or any(map(is_other_head, names))
    )


@dataclass(frozen=True)
class Scores:
    """The head of a classifier: a linear layer with one score for each label.

    Attributes:
        labels: number of labels.
        each_token: whether every token is scored; otherwise a sequence is, at its last token.
        bias: whether the layer has a bias.
        dropout: rate of the dropout on the hidden states that are scored.
        pad_token_id: the token that does not count as the last one; None if any does.
    """

    labels: int
    each_token: bool
    bias: bool
    dropout: float
    pad_token_id: int | None


def scores_of(config: HFConfig) -> Scores | None:
    """The head of a classifier, with what transformers fills in; None for another model.

    Raises:
        ConfigError: a value makes no sense.
    """
    if not is_classifier(config):
        return None
    language = language_of(config)
    each_token = config.architecture.endswith("ForTokenClassification")
    dropout = 0.0
    if each_token:
        keys = [key for key in ("classifier_dropout", "hidden_dropout") if config.has(key)]
        dropout = config.positive(keys[0], 1.0, least=0.0) if keys else 0.1
    return Scores(
        labels=_labels(config),
        each_token=each_token,
        bias=each_token and config.get("token_classification_bias", True),
        dropout=dropout,
        pad_token_id=(
            language.count("pad_token_id", least=0) if language.has("pad_token_id") else None
        ),
    )


def _labels(config: HFConfig) -> int:
    """The labels as transformers counts them: two where the config does not say.

    A number that is stated holds, whatever names there are for labels.
    """
    if config.has("num_labels"):
        return config.count("num_labels")
    return max(len(config.require("id2label", dict)), 1) if config.has("id2label") else 2
