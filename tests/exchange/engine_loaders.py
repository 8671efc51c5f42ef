"""Loaders in the idioms of inference engines: a rank's parameters, filled from whole tensors.

Each is written from what such loaders do, for one rank of tensor or expert parallelism: merged
projections, key heads that several ranks share, sections, fused experts in either form, experts one
by one, packed projections, a padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron.bridge.tensors.spec import TensorSpec

type Loader = Callable[[Tensor, Tensor], None]


@dataclass
class Engine:
    """One rank of an engine.

    Attributes:
        tp: how many ranks share a tensor.
        rank: which one this is.
        shapes: of the tensors that it takes.
        parameters: of this rank.
        loaders: by the name of a tensor: the parameter that it goes to, and how.
    """

    tp: int
    rank: int
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    parameters: dict[str, torch.nn.Parameter] = field(default_factory=dict)
    loaders: dict[str, tuple[str, Loader]] = field(default_factory=dict)

    @property
    def specs(self) -> list[TensorSpec]:
        return [TensorSpec(name, shape, "BF16") for name, shape in self.shapes.items()]

    def add(self, name: str, *shape: int) -> None:
        empty = torch.full(shape, 77.0, dtype=torch.bfloat16)
        self.parameters[name] = torch.nn.Parameter(empty, requires_grad=False)

    def takes(self, name: str, shape: tuple[int, ...], parameter: str, loader: Loader) -> None:
        self.shapes[name] = shape
        self.loaders[name] = parameter, loader

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        loaded = set()
        for name, weight in weights:
            parameter, loader = self.loaders[name]
            loader(self.parameters[parameter], weight)
            loaded.add(parameter)
        return loaded

    # --- loaders ---

    def rows(self, param: Tensor, weight: Tensor) -> None:
        size = param.shape[0]
        param.data.copy_(weight.narrow(0, self.rank * size, size))

    def columns(self, param: Tensor, weight: Tensor) -> None:
        size = param.shape[1]
        assert param.shape == weight[:, self.rank * size :][:, :size].shape
        param.data.copy_(weight[:, self.rank * size : (self.rank + 1) * size])

    def whole(self, param: Tensor, weight: Tensor) -> None:
        assert param.size() == weight.size()
        param.data.copy_(weight)

    def merged(self, offset: int, size: int) -> Loader:
        """A rank's rows of one of several projections that are one parameter."""

        def load(param: Tensor, weight: Tensor) -> None:
            shard = weight.narrow(0, self.rank * size, size)
            param.data.narrow(0, offset, size).copy_(shard)

        return load

    def shared_heads(self, offset: int, heads: int, width: int) -> Loader:
        """Key heads; with fewer heads than ranks several ranks have the same one."""

        def load(param: Tensor, weight: Tensor) -> None:
            own = max(1, heads // self.tp)
            first = self.rank * heads // self.tp if heads < self.tp else self.rank * own
            shard = weight.view(heads, width, -1)[first : first + own]
            param.data[offset : offset + own * width].copy_(shard.reshape(own * width, -1))

        return load

    def sections(self, sizes: list[int], offset: int = 0) -> Loader:
        """A rank's rows of each section of a projection, which lie one behind the other."""

        def load(param: Tensor, weight: Tensor) -> None:
            at = offset
            for section in weight.split(sizes, dim=0):
                shard = section.chunk(self.tp, dim=0)[self.rank]
                param.data[at : at + shard.shape[0], ...].copy_(shard)
                at += shard.shape[0]

        return load

    def gathered_sections(self, sizes: list[int]) -> Loader:
        """The same, put together before it is copied, as a transposed matrix."""

        def load(param: Tensor, weight: Tensor) -> None:
            parts = [one.chunk(self.tp)[self.rank] for one in weight.split(sizes)]
            param.data.copy_(torch.cat(parts, dim=0).contiguous())

        return load

    def vocabulary(self, param: Tensor, weight: Tensor) -> None:
        size = param.shape[0]
        shard = weight[self.rank * size : (self.rank + 1) * size]
        param[: shard.shape[0]].data.copy_(shard)
        param[shard.shape[0] :].data.fill_(0)


def attention(engine: Engine, heads: int, keys: int, width: int, hidden: int) -> None:
    own, own_keys = heads // engine.tp * width, max(1, keys // engine.tp) * width
    engine.add("qkv_proj", own + 2 * own_keys, hidden)
    engine.takes("q_proj", (heads * width, hidden), "qkv_proj", engine.merged(0, own))
    for index, name in enumerate(("k_proj", "v_proj")):
        load = engine.shared_heads(own + index * own_keys, keys, width)
        engine.takes(name, (keys * width, hidden), "qkv_proj", load)
    engine.add("o_proj", hidden, own)
    engine.takes("o_proj", (hidden, heads * width), "o_proj", engine.columns)
    engine.add("q_norm", width)
    engine.takes("q_norm", (width,), "q_norm", engine.whole)


def linear_attention(engine: Engine, keys: int, values: int, hidden: int) -> None:
    """Query, key, value and gate in one parameter, of two tensors; a convolution over the first."""
    sizes = [keys, keys, values]
    rows = sum(sizes)
    engine.add("in_proj_qkvz", (rows + values) // engine.tp, hidden)
    engine.takes("in_proj_qkv", (rows, hidden), "in_proj_qkvz", engine.sections(sizes))
    load = engine.sections([values], rows // engine.tp)
    engine.takes("in_proj_z", (values, hidden), "in_proj_qkvz", load)
    engine.add("in_proj_ba", 2 * values // 4 // engine.tp, hidden)
    for index, name in enumerate(("in_proj_b", "in_proj_a")):
        size = values // 4 // engine.tp
        load = engine.merged(index * size, size)
        engine.takes(name, (values // 4, hidden), "in_proj_ba", load)
    engine.add("conv1d", rows // engine.tp, 1, 4)
    engine.takes("conv1d.weight", (rows, 1, 4), "conv1d", engine.sections(sizes))
    engine.add("conv1d_gathered", rows // engine.tp, 1, 4)
    gathered = engine.gathered_sections(sizes)
    engine.takes("conv1d.again", (rows, 1, 4), "conv1d_gathered", gathered)
    engine.add("A_log", values // 4 // engine.tp)
    engine.takes("A_log", (values // 4,), "A_log", engine.rows)


def dense_mlp(engine: Engine, inner: int, hidden: int) -> None:
    own = inner // engine.tp
    engine.add("gate_up_proj", 2 * own, hidden)
    for index, name in enumerate(("gate_proj", "up_proj")):
        engine.takes(name, (inner, hidden), "gate_up_proj", engine.merged(index * own, own))
    engine.add("down_proj", hidden, own)
    engine.takes("down_proj", (hidden, inner), "down_proj", engine.columns)


def fused_experts(
    engine: Engine, experts: int, inner: int, hidden: int, *, transposed: bool
) -> None:
    own = inner // engine.tp
    engine.add("w13", experts, 2 * own, hidden)
    engine.add("w2", experts, hidden, own)

    def in_rows(weight: Tensor) -> Tensor:
        return weight.transpose(-1, -2) if transposed else weight

    def load_w13(param: Tensor, weight: Tensor) -> None:
        for index, half in enumerate(in_rows(weight).chunk(2, dim=1)):
            for expert, matrix in enumerate(half.unbind()):
                shard = matrix.narrow(0, engine.rank * own, own)
                param.data[expert].narrow(0, index * own, own).copy_(shard)

    def load_w2(param: Tensor, weight: Tensor) -> None:
        param.data.copy_(in_rows(weight)[..., engine.rank * own : (engine.rank + 1) * own])

    up, down = (experts, 2 * inner, hidden), (experts, hidden, inner)
    if transposed:
        up, down = (experts, hidden, 2 * inner), (experts, inner, hidden)
    engine.takes("experts.gate_up_proj", up, "w13", load_w13)
    engine.takes("experts.down_proj", down, "w2", load_w2)


def expert_parallel(engine: Engine, experts: int, inner: int, hidden: int) -> None:
    """Experts one by one, each whole on one rank; those of others are passed over."""
    local = experts // engine.tp
    engine.add("w13", local, 2 * inner, hidden)
    engine.add("w2", local, hidden, inner)

    def loader(expert: int, start: int | None) -> Loader:
        def load(param: Tensor, weight: Tensor) -> None:
            place = expert - engine.rank * local
            if not 0 <= place < local:
                return
            target = param.data[place]
            if start is not None:
                target = target.narrow(0, start, inner)
            target.copy_(weight.to(param.dtype))

        return load

    for expert in range(experts):
        for name, parameter, start, shape in (
            ("gate_proj", "w13", 0, (inner, hidden)),
            ("up_proj", "w13", inner, (inner, hidden)),
            ("down_proj", "w2", None, (hidden, inner)),
        ):
            full = f"experts.{expert}.{name}"
            engine.takes(full, shape, parameter, loader(expert, start))


def vision(engine: Engine, heads: int, width: int) -> None:
    """Query, key and value packed into one tensor, of which a rank has its heads of each."""
    hidden = heads * width
    own = heads // engine.tp
    engine.add("visual.qkv", 3 * own * width, hidden)
    engine.add("visual.qkv.bias", 3 * own * width)

    def load(param: Tensor, weight: Tensor) -> None:
        packed = weight.view(3, heads, width, *weight.shape[1:])
        shard = packed[:, engine.rank * own : (engine.rank + 1) * own]
        param.data.copy_(shard.reshape(param.shape))

    engine.takes("visual.qkv", (3 * hidden, hidden), "visual.qkv", load)
    engine.takes("visual.qkv.bias", (3 * hidden,), "visual.qkv.bias", load)
    engine.add("patch_embed", hidden, 3 * 2 * 4 * 5)

    def flattened(param: Tensor, weight: Tensor) -> None:
        param.data.copy_(weight.view(weight.shape[0], -1))

    engine.takes("patch_embed", (hidden, 3, 2, 4, 5), "patch_embed", flattened)


def vocabulary(engine: Engine, rows: int, hidden: int) -> None:
    padded = -(-rows // (8 * engine.tp)) * 8 * engine.tp
    for name in ("embed_tokens", "lm_head"):
        engine.add(name, padded // engine.tp, hidden)
        engine.takes(name, (rows, hidden), name, engine.vocabulary)


def engine_of(config: Any, rank: int) -> Engine:
    """One of two ranks of an engine that has a whole text model, with the names of its files."""
    engine, hidden = Engine(2, rank), config.hidden_size

    def add(prefix: str, part: Engine, name_of: Callable[[str], str]) -> None:
        for name, (parameter, load) in part.loaders.items():
            engine.takes(name_of(name), part.shapes[name], prefix + parameter, load)
        engine.parameters |= {prefix + name: one for name, one in part.parameters.items()}

    def norms(part: Engine, sizes: dict[str, int]) -> None:
        for name, size in sizes.items():
            part.add(name, size)
            part.takes(name, (size,), name, part.whole)

    heads = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for where in ("self_attn.", "mlp.", ""):
            part = Engine(2, rank)
            if where == "self_attn.":
                attention(part, *heads, hidden)
                norms(part, {"k_norm": config.head_dim})
            elif where == "mlp.":
                dense_mlp(part, config.intermediate_size, hidden)
            else:
                norms(part, {"input_layernorm": hidden, "post_attention_layernorm": hidden})
            add(prefix + where, part, f"{prefix}{where}{{}}.weight".format)
    part = Engine(2, rank)
    vocabulary(part, config.vocab_size, hidden)
    norms(part, {"norm": hidden})
    add("", part, lambda name: f"{'' if name == 'lm_head' else 'model.'}{name}.weight")
    return engine


PARTS: dict[str, Callable[[Engine], Any]] = {
    "uneven heads": lambda engine: attention(engine, 12, 4, 6, 10),
    "shared heads": lambda engine: attention(engine, 12, 2, 6, 10),
    "one key head": lambda engine: attention(engine, 8, 1, 3, 10),
    "linear attention": lambda engine: linear_attention(engine, 8, 16, 10),
    "dense": lambda engine: dense_mlp(engine, 12, 10),
    "fused experts": lambda engine: fused_experts(engine, 3, 8, 10, transposed=False),
    "transposed experts": lambda engine: fused_experts(engine, 3, 8, 10, transposed=True),
    "expert parallel": lambda engine: expert_parallel(engine, 8, 6, 10),
    "vision": lambda engine: vision(engine, 4, 6),
    "vocabulary": lambda engine: vocabulary(engine, 44, 10),
}
