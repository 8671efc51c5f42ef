"""A model in megatron-core's own pipeline schedules: logits and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.bridge.tensors.boxes import box_shape, full_box, intersect, relative, slices

type Batch = dict[str, Any]


@contextmanager
def built_chunks(folder: Path, fields: dict[str, Any], **options: Any) -> Iterator[list[Any]]:
    """The chunks of this rank with the weights of a folder, and options of how they are built."""
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker

    from megatron.bridge import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(folder)
    provider = bridge.to_megatron_provider(load_weights=False)
    provider.params_dtype, provider.bf16 = torch.float32, False
    provider.make_vocab_size_divisible_by = 64
    provider.parallel_output = False
    provider.set_fields(fields)
    chunks = provider.provide_distributed_model(**{"wrap_with_ddp": False} | options)
    bridge.load_hf_weights(chunks)
    yield chunks
    destroy_moe_metrics_tracker()  # which is as long as the first model is deep
    parallel_state.destroy_model_parallel()


def logits_of(
    chunks: Sequence[Any], batches: Sequence[Batch], length: int | None = None
) -> list[Tensor]:
    """Of each batch, where the last stage is; nothing elsewhere. length: see `run_schedule`."""

    def kept(output: Tensor, **_: Any) -> Tensor:
        return output.detach()

    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        return run_schedule(
            chunks,
            batches,
            lambda _: kept,
            length,
            forward_only=True,
            collect_non_loss_data=True,
        )


def run_schedule(
    chunks: Sequence[Any],
    batches: Sequence[Batch],
    for_output: Callable[[Batch], Any],
    length: int | None = None,
    **options: Any,
) -> list[Any]:
    """What is made of the output for each batch, where the last stage is.

    Args:
        chunks: of this rank.
        batches: the microbatches.
        for_output: makes what the schedule calls with the output for a batch.
        length: of the whole sequences, where the ids of a batch are a part of them.
        **options: of the schedule.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def step(iterator: Iterator[Batch], chunk: Any) -> tuple[Tensor, Any]:
        batch = next(iterator)
        return chunk(**batch), for_output(batch)

    iterators = [iter(batches) for _ in chunks]
    rows, own_length = batches[0]["input_ids"].shape
    found: list[Any] = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=len(batches),
        seq_length=length or own_length,
        micro_batch_size=rows,
        **options,
    )
    return found


def number(error: Tensor) -> float:
    """One that is no number is infinite: a comparison of NaN says nothing."""
    return float(error.nan_to_num(nan=torch.inf))


@torch.no_grad()
def gradients_of(chunks: Sequence[Any]) -> list[tuple[str, tuple[int, ...], Any, Tensor]]:
    """(checkpoint key, its shape, box, gradient) of everything that this rank holds."""
    from megatron.bridge.live.local_tensors import local_tensors

    parameters = [one for chunk in chunks for one in chunk.parameters()]
    values = [one.clone() for one in parameters]
    for parameter in parameters:
        parameter.copy_(parameter.main_grad)
    found = [
        (one.key, one.key_shape, one.box, one.data.reshape(box_shape(one.box)).clone())
        for one in local_tensors(chunks)
    ]
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
    return found


def whole_gradients(chunks: Sequence[Any]) -> dict[str, Tensor]:
    """Those of a model that one process has all of, by checkpoint key."""
    found: dict[str, Tensor] = {}
    for key, shape, box, gradient in gradients_of(chunks):
        whole = found.setdefault(key, torch.zeros(shape))
        whole[slices(box)] = gradient
    return found


def gradient_errors(chunks: Sequence[Any], expected: dict[str, Tensor]) -> dict[str, float]:
    """Relative error of the gradient of each key, the largest of this rank's boxes of it."""
    errors: dict[str, float] = {}
    for key, _, box, gradient in gradients_of(chunks):
        # The vocabulary is padded by the number of ranks that share it.
        wanted, whole = torch.zeros_like(gradient), expected[key]
        if (shared := intersect(box, full_box(tuple(whole.shape)))) is not None:
            wanted[slices(relative(shared, box))] = whole[slices(shared)]
        error = (gradient - wanted).norm() / wanted.norm().clamp(min=1e-9)
        errors[key] = max(errors.get(key, 0.0), number(error))
    return errors
