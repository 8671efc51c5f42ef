"""What each process of the benchmark of the exchange does: ways to move the same weights, in turns.

The trainer's layout is TP2 and PP2 (with experts split over ranks, megatron-core's resharding does
not find those of its plain layers); the engine's is TP4, split as inference engines split: rows
of what widens, columns of what narrows, each expert's matrices as [out, in], norms whole.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist

from benchmarks.exchange import (
    DELTA,
    FLOOR,
    GATHERS,
    MEMCPY,
    REFIT,
    RESHARDING,
    WAYS,
    WORLD,
    RankFigures,
)
from megatron.bridge import AutoBridge
from megatron.bridge.exchange.demand import source_of
from megatron.bridge.exchange.landing import Landing
from megatron.bridge.exchange.roster import Roster
from megatron.bridge.live.local_tensors import LiveTensors, LocalTensor, local_tensors
from megatron.bridge.live.refit import Refit, RefitReport
from megatron.bridge.live.weights import plan_of_ranks
from megatron.bridge.models.conversion.casting import EXACTLY
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.models.conversion.transfer import read_hf
from megatron.bridge.runtime.ranks import Ranks
from megatron.bridge.tensors.boxes import Box, box_shape, full_box, slices
from megatron.bridge.tensors.torch_views import as_torch

TRAINER = {
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 2,
    "sequence_parallel": True,
}
ENGINE = {
    "tensor_model_parallel_size": WORLD,
    "expert_tensor_parallel_size": WORLD,
    "sequence_parallel": True,
}

_WHOLE = ("norm", "mlp.gate.", "patch_embed", "pos_embed", "linear_fc2.bias", "proj.bias")
_COLUMNS = ("o_proj.weight", "linear_fc2.weight", "attn.proj.weight")


def measure(model: str, folder: str, window_bytes: int, rounds: int, share: float) -> None:
    """Measure all ways; leaves `found{rank}.json` in the folder.

    Args:
        model: folder with the Hugging Face files.
        folder: for what is found.
        window_bytes: of the refits.
        rounds: that count, behind one that does not.
        share: of the values, that change before a refit of changes.
    """
    found = _Ways(Path(model), window_bytes, share).measured(rounds)
    Path(folder, f"found{Ranks().index}.json").write_text(json.dumps(asdict(found)), "utf-8")


class _Ways:
    """The ways, each with what it keeps from one time to the next."""

    def __init__(self, folder: Path, window_bytes: int, share: float) -> None:
        bridge = AutoBridge.from_hf_pretrained(folder)
        self._share = share
        self._model, self._target = _built(bridge, TRAINER), _built(bridge, ENGINE)
        self._held = local_tensors(self._model)
        self._plan = plan_of_ranks(bridge.hf_pretrained, self._model, Ranks())
        self._landings = engine_landings(self._plan, Ranks().index, WORLD)
        self._refit = bridge.refit(self._model, self._landings, window_bytes=window_bytes)
        self._changes = bridge.refit(
            self._model, self._landings, window_bytes=window_bytes, delta=True
        )
        self._gathers = _Gathers(self._plan, self._held, self._landings)
        self._reports: dict[str, RefitReport] = {}

    def measured(self, rounds: int) -> RankFigures:
        """All ways, `rounds` times, once it is seen that they move what they should."""
        ways: dict[str, Callable[[], None]] = {
            FLOOR: self._floor,
            MEMCPY: self._memcpy,
            REFIT: lambda: self._note(REFIT, self._refit),
            DELTA: lambda: self._note(DELTA, self._changes),
            RESHARDING: self._reshard,
            GATHERS: self._gathers.run,
        }
        wrong = self._wrong(ways)
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for number in range(-1, rounds):
            shift = number % len(WAYS)
            order = (*WAYS[shift:], *WAYS[:shift])
            for way in order if number % 2 else order[::-1]:
                if way == DELTA:
                    self._change(number)
                dist.barrier()
                begin = time.perf_counter()
                ways[way]()
                if number >= 0:
                    seconds[way].append(time.perf_counter() - begin)
        whole, changes = self._reports[REFIT], self._reports[DELTA]
        if not changes.is_delta:
            raise RuntimeError("all was sent where only changes were to be")
        return RankFigures(
            seconds=seconds,
            sent_bytes={
                FLOOR: whole.sent_bytes,
                REFIT: whole.sent_bytes,
                DELTA: changes.sent_bytes,
                GATHERS: self._gathers.sent_bytes,
            },
            collectives={
                FLOOR: whole.windows,
                REFIT: whole.collectives,
                DELTA: changes.collectives,
                GATHERS: self._gathers.count,
            },
            buffer_bytes={REFIT: whole.buffer_bytes, DELTA: changes.buffer_bytes},
            prepare_seconds=self._refit.prepare_seconds,
            wrong=wrong,
        )

    def _wrong(self, ways: Mapping[str, Callable[[], None]]) -> dict[str, int]:
        """How much each way that fills memory leaves other than the gathers do."""
        memory = {way: [one.out for one in self._landings] for way in (REFIT, DELTA)}
        memory[RESHARDING] = list(_parameters(self._target))
        self._gathers.run()
        expected = {way: list(map(_checksum, filled)) for way, filled in memory.items()}
        wrong = {}
        for way, filled in memory.items():
            for one in filled:
                one.zero_()
            ways[way]()
            pairs = zip(map(_checksum, filled), expected[way], strict=True)
            wrong[way] = sum(found != value for found, value in pairs)
        return wrong

    def _floor(self) -> None:
        under_way: dist.Work | None = None
        for window in self._refit.windows:
            send, receive = window.send.traffic, window.receive.traffic
            work = dist.all_to_all_single(
                receive.buffer,
                send.buffer,
                list(receive.sizes),
                list(send.sizes),
                async_op=True,
            )
            if under_way is not None:
                under_way.wait()
            under_way = work
        if under_way is not None:
            under_way.wait()

    def _memcpy(self) -> None:
        """As many bytes as this rank is sent, and gives itself, through one buffer."""
        first = self._refit.windows[0]
        buffers = first.send.traffic.buffer, first.receive.traffic.buffer
        most = min(len(one) for one in buffers)
        report = self._reports[REFIT]
        left = report.received_bytes + report.own_bytes
        while left > 0:
            part = min(left, most)
            buffers[1][:part].copy_(buffers[0][:part])
            left -= part

    def _note(self, way: str, refit: Refit) -> None:
        self._reports[way] = refit()

    def _reshard(self) -> None:
        from megatron.core.resharding import swap_model_weights

        empty = torch.empty

        def unpinned(*args: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
            return empty(*args, **options)

        torch.empty = unpinned  # its buffers for gloo are pinned, which takes a GPU
        try:
            swap_model_weights(self._model[0], self._target[0], "gloo")
        finally:
            torch.empty = empty

    @torch.no_grad()
    def _change(self, number: int) -> None:
        """Flip the last bit of some values; replicas change alike."""
        for one in self._held:
            seed = crc32(repr((number, one.key, one.box)).encode())
            draw = torch.Generator().manual_seed(seed)
            bits = one.data.view(torch.int16)
            bits ^= (torch.rand(bits.shape, generator=draw) < self._share).to(torch.int16)


class _Gathers:
    """Without a route: every Megatron tensor is put together on every rank, and converted there."""

    def __init__(
        self,
        plan: ConversionPlan,
        held: Sequence[LocalTensor],
        landings: Sequence[Landing],
    ) -> None:
        self._plan, self._own = plan, {(one.key, one.box): one for one in held}
        roster = Roster.of(Ranks(), held)
        self._parts: dict[str, list[tuple[int, Box]]] = {}
        for rank in range(Ranks().count):
            for shard in roster.main_of(rank):
                self._parts.setdefault(shard.key, []).append((rank, shard.box))
        self._landings: dict[str, list[Landing]] = {}
        for landing in landings:
            self._landings.setdefault(landing.name, []).append(landing)
        self._keys = {name: self._keys_of(name) for name in self._landings}
        self._last = {key: name for name, keys in self._keys.items() for key in keys}
        self.count = self.sent_bytes = 0

    def run(self) -> None:
        """Fill the landings."""
        self.count = self.sent_bytes = 0
        whole: dict[str, LocalTensor] = {}
        for name, landings in self._landings.items():
            for key in self._keys[name]:
                if key not in whole:
                    whole[key] = self._gathered(key)
            source = LiveTensors(whole.values())
            box = full_box(self._plan.hf[name].shape)
            tensor = as_torch(read_hf(self._plan, name, box, source, EXACTLY))
            for landing in landings:
                landing.out.copy_(tensor[slices(landing.box)])
            for key in self._keys[name]:
                if self._last[key] == name:
                    del whole[key]

    def _keys_of(self, name: str) -> list[str]:
        source = source_of(self._plan, name)
        box = full_box(self._plan.hf[source].shape)
        return list(
            dict.fromkeys(copy.megatron_key for _, copy in self._plan.copies_from(source, box))
        )

    def _gathered(self, key: str) -> LocalTensor:
        shape = self._plan.megatron[key].shape
        whole = torch.empty(shape, dtype=torch.bfloat16)
        for rank, box in self._parts[key]:
            if rank == Ranks().index:
                part = self._own[key, box].data.reshape(box_shape(box)).contiguous()
                self.sent_bytes += part.nbytes * (Ranks().count - 1)
            else:
                part = torch.empty(box_shape(box), dtype=torch.bfloat16)
            dist.broadcast(part, rank)
            self.count += 1
            whole[slices(box)] = part
        return LocalTensor(key, shape, full_box(shape), whole, is_padded=False, is_main=True)


def engine_landings(plan: ConversionPlan, rank: int, count: int) -> list[Landing]:
    """What one rank of the engine wants, in memory of its own.

    Args:
        plan: of the model.
        rank: of the engine.
        count: how many ranks it has.
    """
    found: list[Landing] = []
    for name, spec in plan.hf.items():
        if name in plan.carried:
            continue
        boxes = list(_engine_boxes(name, spec.shape, rank, count))
        turned = ".experts." in name
        for box in boxes:
            shape = box_shape(box)
            out = torch.zeros(
                (*shape[:-2], shape[-1], shape[-2]) if turned else shape, dtype=torch.bfloat16
            )
            found.append(Landing(name, box, out.mT if turned else out))
    return found


def _engine_boxes(name: str, shape: tuple[int, ...], rank: int, count: int) -> Iterator[Box]:
    if any(part in name for part in _WHOLE):
        yield full_box(shape)
        return
    axis, groups = 0, 1
    if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        axis, groups = (2, 2) if "gate_up" in name else (1, 1)  # [experts, in, out]
    elif ".qkv." in name:
        groups = 3
    elif any(part in name for part in _COLUMNS):
        axis = 1
    of_group = shape[axis] // groups
    part = of_group // count
    for group in range(groups):
        box = list(full_box(shape))
        start = group * of_group + rank * part
        box[axis] = start, start + part
        yield tuple(box)


def _built(bridge: AutoBridge, fields: Mapping[str, Any]) -> list[torch.nn.Module]:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    provider = bridge.to_megatron_provider()
    provider.set_fields(fields)
    return list(provider.provide_distributed_model(wrap_with_ddp=False))


def _checksum(tensor: torch.Tensor) -> int:
    return crc32(tensor.contiguous().view(torch.uint8).numpy())


def _parameters(model: Sequence[torch.nn.Module]) -> Iterator[torch.Tensor]:
    return (one.detach() for chunk in model for one in chunk.parameters())


if __name__ == "__main__":  # in each process of torchrun
    torch.set_num_threads(1)
    given = sys.argv[1:]
    measure(given[0], given[1], int(given[2]), int(given[3]), float(given[4]))
    dist.destroy_process_group()
