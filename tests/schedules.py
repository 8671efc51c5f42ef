"""A model in megatron-core's own pipeline schedules: logits, loss and gradients of a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

type Batch = dict[str, Tensor]


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


def logits_of(chunks: Sequence[Any], batches: Sequence[Batch]) -> list[Tensor]:
    """Of each batch, where the last stage is; nothing elsewhere."""

    def kept(output: Tensor, **_: Any) -> Tensor:
        return output.detach()

    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        return _run(chunks, batches, kept, forward_only=True, collect_non_loss_data=True)


def train_step(chunks: Sequence[Any], batches: Sequence[Batch]) -> list[Tensor]:
    """The loss [b, s] of each batch, where the last stage is; gradients are in `main_grad`."""
    from megatron.core.distributed import finalize_model_grads

    def summed(losses: Tensor) -> tuple[Tensor, Tensor]:
        return losses.sum(), losses.detach().clone()

    for chunk in chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    losses = _run(chunks, batches, summed, forward_only=False)
    finalize_model_grads(list(chunks))
    return losses


def _run(
    chunks: Sequence[Any], batches: Sequence[Batch], of_output: Any, **options: Any
) -> list[Tensor]:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def step(iterator: Iterator[Batch], chunk: Any) -> tuple[Tensor, Any]:
        return chunk(**next(iterator)), of_output

    iterators = [iter(batches) for _ in chunks]
    rows, length = batches[0]["input_ids"].shape
    found: list[Tensor] = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=len(batches),
        seq_length=length,
        micro_batch_size=rows,
        **options,
    )
    return found


def number(error: Tensor) -> float:
    """One that is no number is infinite: a comparison of NaN says nothing."""
    return float(error.nan_to_num(nan=torch.inf))


@torch.no_grad()
def gradients_of(chunks: Sequence[Any]) -> list[tuple[str, tuple[int, ...], Any, Tensor]]:
    """(checkpoint key, its shape, box, gradient) of everything that this rank holds.

    The parameters are lost.
    """
    from megatron.bridge.live.local_tensors import local_tensors

    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.copy_(parameter.main_grad)
    return [
        (one.key, one.key_shape, one.box, one.data.reshape([end - start for start, end in one.box]))
        for one in local_tensors(chunks)
    ]


def whole_gradients(chunks: Sequence[Any]) -> dict[str, Tensor]:
    """Those of a model that one process has all of, by checkpoint key."""
    found: dict[str, Tensor] = {}
    for key, shape, box, gradient in gradients_of(chunks):
        whole = found.setdefault(key, torch.zeros(shape))
        whole[tuple(slice(*ends) for ends in box)] = gradient
    return found


def gradient_errors(chunks: Sequence[Any], expected: dict[str, Tensor]) -> dict[str, float]:
    """Relative error of the gradient of each key, the largest of this rank's boxes of it."""
    errors: dict[str, float] = {}
    for key, _, box, gradient in gradients_of(chunks):
        theirs = expected[key]
        # The vocabulary is padded by the number of ranks that share it.
        cut = [
            slice(start, min(end, size))
            for (start, end), size in zip(box, theirs.shape, strict=True)
        ]
        mine = gradient[tuple(slice(0, one.stop - one.start) for one in cut)]
        wanted = theirs[tuple(cut)]
        error = (mine - wanted).norm() / wanted.norm().clamp(min=1e-6)
        errors[key] = max(errors.get(key, 0.0), number(error))
    return errors
