"""The legal pipeline layout nearest to one that is not: what a refusal proposes."""

from collections.abc import Sequence
from contextlib import suppress

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout


def nearest_layout(
    given: str, *, stages: int, chunks: int | None, layers: int, predictors: int
) -> str | None:
    """A layout that megatron-core takes, with as few layers moved as there have to be.

    Args:
        given: of E, t, m and L, stages divided by |.
        stages: pipeline ranks.
        chunks: of each rank; None to keep as many as `given` has about.
        layers: of the decoder.
        predictors: layers of multi-token prediction.

    Returns:
        None where `given` has other letters, or what it is closest to is not legal either.
    """
    with suppress(AssertionError, ValueError, KeyError, IndexError):
        rows = PipelineParallelLayerLayout.parse_str_to_list(given)
        count = stages * (chunks or max(1, round(len(rows) / stages)))
        decoders = _with_layers(
            _with_rows([row.count(LayerType.decoder) for row in rows], count), layers
        )
        predicts = [index for index, row in enumerate(rows) if LayerType.mtp in row]
        found = _text(decoders, predictors, _predicting(decoders, predicts, stages))
        legal = PipelineParallelLayerLayout(found, stages)
        legal.validate_layer_layout(layers, predictors)
        return found
    return None


def _with_rows(decoders: Sequence[int], count: int) -> list[int]:
    """The layers of so many stages."""
    rows = list(decoders)
    while len(rows) > count:
        last = rows.pop()
        rows[-1] += last
    while len(rows) < count:
        largest = rows.index(max(rows))
        half = rows[largest] // 2
        rows[largest] -= half
        rows.insert(largest + 1, half)
    return rows


def _with_layers(decoders: Sequence[int], layers: int) -> list[int]:
    """One more where there are fewest, one less where there are most, until they are as many.

    Stages that have none get none, unless all are such.
    """
    rows = list(decoders)
    # The last of several: the first stage has the embedding and the vision tower beside its layers.
    backwards = range(len(rows) - 1, -1, -1)
    filled = [index for index in backwards if rows[index]] or backwards
    while sum(rows) < layers:
        rows[min(filled, key=rows.__getitem__)] += 1
    while sum(rows) > layers:
        rows[max(backwards, key=rows.__getitem__)] -= 1
    return rows


def _predicting(decoders: Sequence[int], asked: Sequence[int], stages: int) -> int:
    """The stage that predicts: the one that was asked for, if it may; else the last."""
    last = len(decoders) - 1
    first = max(index for index in range(last + 1) if decoders[index] or not index)
    allowed = [one for one in asked if max(first, len(decoders) - stages) <= one <= last]
    return allowed[-1] if allowed else last


def _text(decoders: Sequence[int], predictors: int, predicting: int) -> str:
    rows = ["t" * count for count in decoders]
    rows[0] = f"E{rows[0]}"
    rows[predicting] += "m" * predictors
    rows[-1] += "L"
    return "|".join(rows)
