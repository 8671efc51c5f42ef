"""Training steps by megatron-core's own schedules and optimizers, at any layout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

LENGTH = 112


@dataclass(frozen=True)
class Training:
    """What is trained, and how.

    Attributes:
        model: name of a folder.
        provider, ddp, optimizer: fields of the provider, DistributedDataParallelConfig and
            OptimizerConfig.
        batches: name of a list of microbatches.
    """

    model: str = "dense"
    provider: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    batches: str = "mixed"


@dataclass
class Trained:
    """The chunks of a rank in DistributedDataParallel, and their optimizer."""

    chunks: list[Any]
    optimizer: Any

    @property
    def config(self) -> Any:
        return self.chunks[0].config

    def steps(self, number: int, batches: list[dict[str, Tensor]]) -> list[tuple[float, ...]]:
        """Loss by token, norm of the gradient and its zeros if counted, for each step."""
        from megatron.core import parallel_state
        from megatron.core.pipeline_parallel import get_forward_backward_func

        ranks = parallel_state.get_data_parallel_world_size()
        mine = batches[parallel_state.get_data_parallel_rank() :: ranks]
        found = []
        for _ in range(number):
            for chunk in self.chunks:
                chunk.train()
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            losses = get_forward_backward_func()(
                forward_step_func=self._forward_step,
                data_iterator=[iter(mine) for _ in self.chunks],
                model=self.chunks,
                num_microbatches=len(mine),
                seq_length=LENGTH,
                micro_batch_size=1,
                forward_only=False,
            )
            _, norm, zeros = self.optimizer.step()
            total = torch.stack([one["sum, tokens"] for one in losses] or [torch.zeros(2)]).sum(0)
            for group in (
                parallel_state.get_data_parallel_group(),
                parallel_state.get_pipeline_model_parallel_group(),
            ):
                dist.all_reduce(total, group=group)
            found.append((float(total[0] / total[1]), float(norm), zeros or 0))
        return found

    def _forward_step(self, batches: Iterator[dict[str, Tensor]], chunk: Any) -> Any:
        batch = next(batches)

        def of_loss(loss: Tensor) -> Any:
            tokens = (batch["labels"] != -100).sum().int()
            seen = {"sum, tokens": torch.stack([loss.detach().sum(), tokens.float()])}
            if self.config.calculate_per_token_loss:
                return loss.sum(), tokens, seen
            return loss.sum() / tokens, seen

        return chunk(**batch), of_loss

    def sharded_state_dict(self, sharding: str | None, *, is_loading: bool = False) -> Any:
        """Of model and optimizer, as trainers put it together."""
        from megatron.core.utils import unwrap_model

        models = [one.sharded_state_dict() for one in unwrap_model(self.chunks)]
        state = {f"model{index}": model for index, model in enumerate(models)}
        metadata = {"chained_optim_avoid_prefix": True}
        if sharding:
            metadata |= {"distrib_optim_sharding_type": sharding}
        of_optimizer = self.optimizer.sharded_state_dict(
            state if len(models) > 1 else models[0], is_loading=is_loading, metadata=metadata
        )
        return state | {"optimizer": of_optimizer}

    def load_state_dict(self, state: Any) -> None:
        from megatron.core.utils import unwrap_model

        for index, model in enumerate(unwrap_model(self.chunks)):
            model.load_state_dict(state[f"model{index}"])
        self.optimizer.load_state_dict(state["optimizer"])


@contextmanager
def built(training: Training, folder: Path, *, filled: bool = True) -> Iterator[Trained]:
    """With the weights of the folder, or with others; its parallel state goes with it."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker

    from megatron.bridge import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(str(folder / training.model))
    provider = bridge.to_megatron_provider(load_weights=filled)
    fields = {"params_dtype": torch.float32, "bf16": False, "calculate_per_token_loss": True}
    for name, value in (fields | training.provider).items():
        setattr(provider, name, value)
    ddp = DistributedDataParallelConfig(**training.ddp)
    chunks = provider.provide_distributed_model(ddp)
    defaults: dict[str, Any] = {"optimizer": "adam", "lr": 1e-3, "weight_decay": 0.01}
    config = OptimizerConfig(
        **defaults
        | {name: getattr(provider, name) for name in ("params_dtype", "bf16", "fp16")}
        | {"use_distributed_optimizer": ddp.use_distributed_optimizer}
        | {"overlap_param_gather": ddp.overlap_param_gather}
        | training.optimizer
    )
    trained = Trained(chunks, get_megatron_optimizer(config, chunks))
    of_chunks = trained.config
    of_chunks.finalize_model_grads_func = finalize_model_grads
    of_chunks.grad_scale_func = trained.optimizer.scale_loss
    if ddp.overlap_grad_reduce:
        of_chunks.no_sync_func = _each(chunks, "no_sync")
    if ddp.overlap_param_gather:
        of_chunks.param_sync_func = _each(chunks, "start_param_sync")
    yield trained
    destroy_moe_metrics_tracker()  # which is as long as the first model is deep
    parallel_state.destroy_model_parallel()


def _each(chunks: list[Any], method: str) -> Any:
    """As the schedules want it: of the chunk, or of each of them."""
    methods = [getattr(chunk, method) for chunk in chunks]
    return methods if len(methods) > 1 else methods[0]
