"""Trains a split model, and after each step gives its weights to an engine that is split otherwise.

    megatron-bridge make-model --family qwen3.5 --out small
    torchrun --nproc-per-node 2 examples/refit.py small

The trainer is split by tensor parallelism. The engine is transformers' own model; each rank keeps
uneven parts of its tensors, which the refit fills in place, and puts them together to run. After
each step the engine answers as the trainer does.
"""

from argparse import ArgumentParser
from typing import Any

import torch
import torch.distributed as dist
from sklearn.datasets import load_sample_image
from transformers import AutoModelForImageTextToText

from megatron.bridge import AutoBridge
from megatron.bridge.exchange.landing import Landing

PROMPT = "<|vision_start|><|image_pad|><|vision_end|> A temple."


class Engine:
    """transformers' model, whose tensors lie on two ranks: two fifths of the rows, and the rest."""

    def __init__(self, model: Any, names: list[str]) -> None:
        self.model, self.rank = model, dist.get_rank()
        state = model.state_dict()
        self.tensors = {name: state[name] for name in names}
        self.parts = [
            {
                name: torch.zeros_like(tensor[rows])
                for name, tensor in self.tensors.items()
                if len(tensor[rows := self.rows_of(tensor, rank)])
            }
            for rank in range(2)
        ]

    @staticmethod
    def rows_of(tensor: torch.Tensor, rank: int) -> slice:
        """Those that a rank keeps."""
        cut = len(tensor) * 2 // 5
        return (slice(0, cut), slice(cut, len(tensor)))[rank]

    def landings(self) -> list[Landing]:
        """Where the boxes that this rank keeps go."""
        found = []
        for name, part in self.parts[self.rank].items():
            start = self.rows_of(self.tensors[name], self.rank).start
            rest = ((0, size) for size in part.shape[1:])
            found.append(Landing(name, ((start, start + len(part)), *rest), part))
        return found

    @torch.no_grad()
    def logits(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """What the engine answers, once its parts are together."""
        for rank, parts in enumerate(self.parts):
            for name, part in parts.items():
                dist.broadcast(part, rank)
                self.tensors[name][self.rows_of(self.tensors[name], rank)] = part
        return self.model(**batch, use_cache=False).logits


def main(arguments: list[str] | None = None) -> None:
    """Train, refit, and compare logits."""
    parser = ArgumentParser()
    parser.add_argument("model", help="a folder or hub id")
    parser.add_argument("--steps", type=int, default=10)
    given = parser.parse_args(arguments)

    bridge = AutoBridge.from_hf_pretrained(given.model)
    provider = bridge.to_megatron_provider()
    provider.tensor_model_parallel_size = 2
    provider.parallel_output = False  # every rank is given all logits
    provider.params_dtype, provider.bf16 = torch.float32, False
    [model] = provider.provide_distributed_model(wrap_with_ddp=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    theirs = AutoModelForImageTextToText.from_pretrained(given.model, dtype=torch.float32).eval()
    names = [name for name, _ in bridge.export_hf_weights([model], dtype="float32")]
    engine = Engine(theirs, names)
    refit = bridge.refit([model], engine.landings(), dtype="float32", delta=True)

    image = load_sample_image("china.jpg")[::4, ::4]
    batch = dict(bridge.hf_pretrained.processor(text=[PROMPT], images=[image], return_tensors="pt"))
    labels = batch["input_ids"].roll(-1, 1)
    labels[batch["mm_token_type_ids"] != 0] = -100
    for step in range(given.steps):
        optimizer.zero_grad()
        loss = model(**batch, labels=labels).mean()
        loss.backward()
        optimizer.step()
        report = refit()
        with torch.no_grad():
            logits = model(**batch)
        answer = engine.logits(batch)
        logits = logits[..., : answer.shape[-1]]
        difference = float((logits - answer).abs().max() / answer.abs().max())
        if dist.get_rank() == 0:
            sent = f"{report.sent_bytes:,} bytes sent" + (" of changes" if report.is_delta else "")
            print(f"step {step}: loss {loss:.3f}, {sent}, logits differ by {difference:.1e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
