"""Which layers each pipeline stage has: from the config alone, so that every rank says the same.

megatron-core asks the process groups for some of this. Here nothing is asked: what a rank would
refuse is found before there are ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron.bridge.models.nearest_layout import nearest_layout


@dataclass(frozen=True)
class PipelineStage:
    """What one stage has of a model; with interleaving, what one of its chunks has.

    Attributes:
        layers: numbers of its decoder layers, from 0.
        predicts: it has the layers of multi-token prediction.
    """

    layers: range
    predicts: bool


def pipeline_stages(config: TransformerConfig) -> list[PipelineStage]:
    """The stages in the order in which hidden states pass them.

    With interleaving that is the first chunk of every stage, then the second of every stage:
    `stage_index` says which one a rank has.

    Args:
        config: need not be finalized.

    Raises:
        AssertionError: megatron-core cannot deal out the layers so; the message says why.
    """
    layout = parsed_layout(config)
    stages, chunks = config.pipeline_model_parallel_size, virtual_stages(config)
    found: list[PipelineStage] = []
    for chunk in range(chunks or 1):
        for stage in range(stages):
            last = chunk + 1 == (chunks or 1) and stage + 1 == stages
            if layout is None:
                count = get_num_layers_to_build(config, None if chunks is None else chunk, stage)
                predicts = last and bool(config.mtp_num_layers)
            else:
                kinds = layout.layout[stage][chunk]
                count = kinds.count(LayerType.decoder)
                predicts = LayerType.mtp in kinds
            first = found[-1].layers.stop if found else 0
            found.append(PipelineStage(range(first, first + count), predicts))
    if (dealt := found[-1].layers.stop) != config.num_layers:
        raise AssertionError(
            f"the stages get {dealt} layers together, num_layers={config.num_layers}"
        )
    return found


def stage_index(config: TransformerConfig, vp_stage: int | None, pp_rank: int) -> int:
    """Where a rank's chunk stands among the `pipeline_stages`.

    Args:
        config: of the model.
        vp_stage: the chunk; None without interleaving.
        pp_rank: pipeline rank.
    """
    return (vp_stage or 0) * config.pipeline_model_parallel_size + pp_rank


def embedding_stages(config: TransformerConfig) -> list[int]:
    """Pipeline ranks that hold the weight of the embedding, and sum up its gradients.

    The first does; those that predict, and the last where the output layer has the same weight.
    """
    stages = config.pipeline_model_parallel_size
    predict = {index % stages for index, one in enumerate(pipeline_stages(config)) if one.predicts}
    tied = {stages - 1} if config.share_embeddings_and_output_weights else set()
    return sorted({0} | predict | tied)


def virtual_stages(config: TransformerConfig) -> int | None:
    """Chunks of each stage; None without interleaving. A layout says it where no field does."""
    layout = parsed_layout(config)
    given: int | None = config.virtual_pipeline_model_parallel_size
    if given is None and layout is not None and layout.virtual_pipeline_model_parallel_size > 1:
        return int(layout.virtual_pipeline_model_parallel_size)
    return given


def can_interleave(config: TransformerConfig) -> bool:
    """Whether a stage may have several chunks.

    With two stages the previous and the next rank are the same one, and batched messages of the two
    directions get mixed up.
    """
    stages = config.pipeline_model_parallel_size
    return stages > 2 or (stages == 2 and config.overlap_p2p_comm and not config.batch_p2p_comm)


def parsed_layout(config: TransformerConfig) -> PipelineParallelLayerLayout | None:
    """`pipeline_model_parallel_layout` for the pipeline that the config has now.

    Raises:
        AssertionError: it is none.
    """
    layout = as_given(config.pipeline_model_parallel_layout)
    if layout is None:
        return None
    return PipelineParallelLayerLayout(layout, config.pipeline_model_parallel_size)


def as_given(layout: Any) -> str | list[Any] | None:
    """What a layout was parsed from: megatron-core puts the parsed one in the place of it."""
    return layout.input_data if isinstance(layout, PipelineParallelLayerLayout) else layout


def layout_problems(config: TransformerConfig) -> Iterator[str]:
    """What is wrong with `pipeline_model_parallel_layout`, what it has to be, and the nearest."""
    given = as_given(config.pipeline_model_parallel_layout)
    if given is None or (problem := _layout_problem(config)) is None:
        return
    nearest = None
    if isinstance(given, str):
        nearest = nearest_layout(
            given,
            stages=config.pipeline_model_parallel_size,
            chunks=config.virtual_pipeline_model_parallel_size if can_interleave(config) else 1,
            layers=config.num_layers,
            predictors=config.mtp_num_layers or 0,
        )
    yield (
        f"pipeline_model_parallel_layout is {given!r}{problem}"
        + (f"; the nearest legal: {nearest!r}" if nearest else "")
    )


def _layout_problem(config: TransformerConfig) -> str | None:
    stages = config.pipeline_model_parallel_size
    try:
        layout = parsed_layout(config)
    except AssertionError as error:
        return f" with pipeline_model_parallel_size = {stages}: {error}"
    if layout is None:
        return None
    chunks = config.virtual_pipeline_model_parallel_size
    if chunks is not None and layout.virtual_pipeline_model_parallel_size != chunks:
        return (
            f", of {layout.virtual_pipeline_model_parallel_size * stages} stages: expected "
            f"{stages * chunks}, pipeline_model_parallel_size = {stages} times "
            f"virtual_pipeline_model_parallel_size = {chunks}"
        )
    for kind, letter, field in (
        (LayerType.decoder, "t", "num_layers"),
        (LayerType.mtp, "m", "mtp_num_layers"),
    ):
        found, expected = layout.flatten_layout.count(kind), getattr(config, field) or 0
        if found != expected:
            return f", with {found} layers {letter}: expected {field} = {expected}"
    try:
        layout.validate_layer_layout(config.num_layers, config.mtp_num_layers)
    except (AssertionError, NotImplementedError) as error:
        return f": {error}"
    return None
