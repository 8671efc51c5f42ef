"""Trains a vision-language model on CPUs, by megatron-core's own parts.

    megatron-bridge make-model --family qwen3-vl --out small --set text.num_hidden_layers=8
    torchrun --nproc-per-node 2 examples/train_on_cpu.py small --tp 2 --save checkpoint
    torchrun --nproc-per-node 2 examples/train_on_cpu.py small --pp 2 --load checkpoint

The second run goes on where the first one stopped, with the model split in another way.
"""

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import unwrap_model
from sklearn.datasets import load_sample_image

from megatron.bridge import AutoBridge

LENGTH = 160


def microbatch(processor: Any, text: str, images: list[Any] | None) -> dict[str, torch.Tensor]:
    """One sample with its labels; neither padding nor pictures are to be learnt."""
    how = {"padding": "max_length", "max_length": LENGTH, "return_tensors": "pt"}
    batch = dict(processor(text=[text], images=images, padding_side="right", **how))
    labels = batch["input_ids"].roll(-1, dims=1)
    labels[(batch["attention_mask"] == 0) | (batch["mm_token_type_ids"] != 0)] = -100
    return batch | {"labels": labels}


def forward_step(batches: Any, model: Any) -> Any:
    """The part of a step that the schedules leave to their caller."""
    batch = next(batches)

    def of_loss(losses: torch.Tensor) -> Any:
        loss, tokens = losses.sum(), (batch["labels"] != -100).sum().int()
        return loss, tokens, torch.stack([loss.detach(), tokens])

    return model(**batch), of_loss


def main(arguments: list[str] | None = None) -> None:
    """Train, and print the loss of each step."""
    parser = ArgumentParser()
    parser.add_argument("model", help="a folder or hub id")
    for option, default in (("--tp", 1), ("--pp", 1), ("--steps", 3)):
        parser.add_argument(option, type=int, default=default)
    parser.add_argument("--load", help="the folder of a checkpoint")
    parser.add_argument("--save", type=Path, help="an empty folder")
    given = parser.parse_args(arguments)

    bridge = AutoBridge.from_hf_pretrained(given.model)
    provider = bridge.to_megatron_provider()
    provider.tensor_model_parallel_size, provider.pipeline_model_parallel_size = given.tp, given.pp
    provider.params_dtype, provider.bf16 = torch.float32, False
    provider.calculate_per_token_loss = True
    sharded = {"use_distributed_optimizer": True}
    [model] = provider.provide_distributed_model(DistributedDataParallelConfig(**sharded))
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=1e-3, **sharded), [model])
    model.config.finalize_model_grads_func = finalize_model_grads

    def state(*, is_loading: bool) -> dict[str, Any]:
        parts = {"model": unwrap_model(model).sharded_state_dict()}
        how = {"metadata": {"distrib_optim_sharding_type": "fully_reshardable"}}
        parts["optimizer"] = optimizer.sharded_state_dict(parts["model"], is_loading, **how)
        return parts

    if given.load:
        found = dist_checkpointing.load(state(is_loading=True), given.load)
        unwrap_model(model).load_state_dict(found["model"])
        optimizer.load_state_dict(found["optimizer"])

    text = "<|vision_start|><|image_pad|><|vision_end|> A temple."
    samples = [(text, [load_sample_image("china.jpg")[::2, ::2]]), ("Only words.", None)]
    batches = [microbatch(bridge.hf_pretrained.processor, *sample) for sample in samples]
    step = {"forward_step_func": forward_step, "model": model, "forward_only": False}
    step |= {"num_microbatches": len(batches), "micro_batch_size": 1, "seq_length": LENGTH}
    for _ in range(given.steps):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        losses = get_forward_backward_func()(data_iterator=iter(batches), **step)
        optimizer.step()
        if losses and dist.get_rank() == dist.get_world_size() - 1:
            print(f"{torch.div(*sum(losses)):.4f}", flush=True)

    if given.save:
        given.save.mkdir(parents=True, exist_ok=True)
        dist_checkpointing.save(state(is_loading=False), str(given.save))
    dist.destroy_process_group()


if __name__ == "__main__":  # saving starts processes, which import this file
    main()
