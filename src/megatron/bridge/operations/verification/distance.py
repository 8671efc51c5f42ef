"""Distances between the activations of two models, accumulated in float64 over blocks of tokens."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import inf, nan

import torch

_BLOCK = 64  # tokens; a row of logits is up to 250,000 numbers


@dataclass(frozen=True, slots=True)
class Distance:
    """How far activations are from those expected.

    Where a value is infinite or NaN, `expected_finite` and `found_finite` say so, and all else
    means nothing.

    Attributes:
        max_abs_diff: the largest difference; infinite if a value is not finite.
        mean_abs_diff: the mean of the differences.
        largest: the largest absolute value of the expected ones.
        cosine: of the angle between the two, all values as one vector; NaN if either is zero.
        relative_rms_diff: root mean square of the differences, as a part of that of the expected
            values; NaN if these are zero. Unlike max_abs_diff it depends neither on the scale of
            the values nor on how many there are.
        expected_finite: whether every expected value is finite.
        found_finite: whether every found value is finite.
    """

    max_abs_diff: float
    mean_abs_diff: float
    largest: float
    cosine: float
    relative_rms_diff: float
    expected_finite: bool
    found_finite: bool


@dataclass(frozen=True, slots=True)
class LayerDistance(Distance):
    """Distance of the hidden states after a decoder layer, by its number."""

    layer: int


@dataclass(frozen=True, slots=True)
class LogitsDistance(Distance):
    """Distance of logits, with what it does to the distribution of the next token.

    Attributes:
        kl: Kullback-Leibler divergence of the found from the expected distribution, in nats, mean
            over positions.
        top1_agreement: part of the positions whose likeliest token is the same.
    """

    kl: float
    top1_agreement: float


def distance(expected: torch.Tensor, found: torch.Tensor) -> Distance:
    """Compare two tensors of one shape. Raises ValueError for different shapes."""
    if expected.shape != found.shape:
        raise ValueError(f"shapes differ: {tuple(expected.shape)} and {tuple(found.shape)}")
    width = expected.shape[-1]
    pairs = zip(
        expected.reshape(-1, width).split(_BLOCK),
        found.reshape(-1, width).split(_BLOCK),
        strict=True,
    )
    expected_finite = found_finite = True
    max_abs = total = largest = dot = apart_square = expected_square = found_square = 0.0
    for block, other in pairs:
        a, b = block.double(), other.double()
        expected_finite = expected_finite and bool(a.isfinite().all())
        found_finite = found_finite and bool(b.isfinite().all())
        apart = (a - b).abs()
        block_max = float(apart.max())
        max_abs = max(max_abs, min(inf, block_max))  # in this order NaN becomes inf
        total += float(apart.sum())
        largest = max(largest, float(a.abs().max()))
        dot += float((a * b).sum())
        apart_square += float((apart * apart).sum())
        expected_square += float((a * a).sum())
        found_square += float((b * b).sum())
    norms = (expected_square * found_square) ** 0.5
    return Distance(
        max_abs,
        total / expected.numel(),
        largest,
        cosine=dot / norms if norms else nan,
        relative_rms_diff=(apart_square / expected_square) ** 0.5 if expected_square else nan,
        expected_finite=expected_finite,
        found_finite=found_finite,
    )


def logits_distance(expected: torch.Tensor, found: torch.Tensor) -> LogitsDistance:
    """Compare logits [tokens, vocabulary]."""
    base = distance(expected, found)
    divergence, same = 0.0, 0
    for block, other in zip(expected.split(_BLOCK), found.split(_BLOCK), strict=True):
        log_p = block.double().log_softmax(dim=-1)
        log_q = other.double().log_softmax(dim=-1)
        divergence += float((log_p.exp() * (log_p - log_q)).sum())
        same += int((block.argmax(dim=-1) == other.argmax(dim=-1)).sum())
    tokens = expected.shape[0]
    return LogitsDistance(**asdict(base), kl=divergence / tokens, top1_agreement=same / tokens)
