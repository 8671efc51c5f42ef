"""Where the elements of tensors come from, through everything that moves and does not compute."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from megatron.bridge.dtypes import holds_all, safetensors_dtype
from megatron.bridge.errors import InputError
from megatron.bridge.exchange.strided import Axis, Boxed, boxes, contiguous_strides, without
from megatron.bridge.tensors.boxes import Shape, full_box, intersect


class Origin(NamedTuple):
    """What elements are copies of.

    Attributes:
        source: the name of a tensor; None for zeros.
        dtypes: that the elements had on the way.
    """

    source: str | None
    dtypes: frozenset[torch.dtype]


class Written(NamedTuple):
    """A box of a source and its place in a parameter; for zeros a box of the place alone."""

    source: str | None
    parameter: str
    to: Boxed


@dataclass
class _Memory:
    """The storage of a tensor in row-major order.

    Attributes:
        shape: of the tensor.
        zero: where it begins in the storage.
        source: its name, where it is one that was offered.
        parameter: its name, where it is one.
        filled: of other tensors: boxes, and where their elements are in what they are copies of.
        keeps: the tensor. While it lives, no other storage has its address.
    """

    keeps: torch.Tensor
    shape: Shape
    zero: int = 0
    source: str | None = None
    parameter: str | None = None
    filled: list[tuple[Boxed, Origin]] = field(default_factory=list)


class _Run(NamedTuple):
    """Elements of an origin that follow one another in some places."""

    origin: Origin
    offset: int
    axes: list[Axis]
    """Loops over the origin, and over the places."""
    place: int


_VIEWS_BY_NAME = {"aten::_unsafe_view"}
_NEW = {"empty", "zeros", "empty_strided", "new_empty", "new_zeros", "empty_like", "zeros_like"}
_NEW_NAMES = {f"aten::{name}" for name in _NEW}


class Trace(TorchDispatchMode):
    """Follows tensors that are offered to a loader, and does not let it write.

    Args:
        sources: on the meta device, each with a storage of its own.
        parameters: by name.

    Attributes:
        written: into parameters, in order.
    """

    def __init__(
        self, sources: Mapping[str, torch.Tensor], parameters: Mapping[str, torch.Tensor]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.written: list[Written] = []
        self._memories: dict[int, list[_Memory]] = {}
        for name, tensor in sources.items():
            self._add(_Memory(tensor, tuple(tensor.shape), source=name))
        for name, tensor in parameters.items():
            dense = in_memory_order(tensor)
            if any(
                size > 1 and not step
                for size, step in zip(dense.shape, dense.stride(), strict=True)
            ):
                raise InputError(f"{name}: the elements of the parameter share memory")
            self._add(
                _Memory(dense, tuple(dense.shape), int(dense.storage_offset()), parameter=name)
            )
        self._handlers: dict[str, Callable[..., Any]] = {
            "aten::copy_": self._copy,
            "aten::clone": self._copied,
            "aten::_to_copy": self._copied,
            "aten::cat": self._cat,
            "aten::stack": self._stack,
            "aten::fill_": self._fill,
            "aten::zero_": self._fill,
            "aten::constant_pad_nd": self._pad,
        }

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Follow what moves elements, pass what concerns none of ours, refuse the rest."""
        kwargs = kwargs or {}
        known = [one for one in _tensors((args, kwargs)) if self._memory(one) is not None]
        name = func._schema.name
        if name in _NEW_NAMES:
            return self._new(func, args, kwargs)
        if not known:
            return func(*args, **kwargs)
        if name in self._handlers:
            return self._handlers[name](func, *args, **kwargs)
        if _is_view(func):
            found = func(*args, **kwargs)
            if any(one.dtype != known[0].dtype for one in _tensors(found)):
                raise self._refusal(func, known[0], "looks at the bytes of")
            return found
        raise self._refusal(func, known[0], "computes with")

    def _refusal(self, func: Any, tensor: torch.Tensor, does: str) -> InputError:
        return InputError(
            f"{func} {does} {self._name(tensor)}: a recorded loader may only take views, copy, "
            f"cast, concatenate and stack; do that before the weights are offered, or load this "
            f"tensor by the engine itself"
        )

    def _name(self, tensor: torch.Tensor) -> str:
        memory = self._memory(tensor)
        if memory is None:
            return "a tensor that is no part of the model"
        if memory.parameter is not None:
            return f"the parameter {memory.parameter}"
        names = [memory.source, *(origin.source for _, origin in memory.filled)]
        return next((name for name in names if name is not None), "zeros")

    # --- memory ---

    def _add(self, memory: _Memory) -> None:
        self._memories.setdefault(memory.keeps.untyped_storage()._cdata, []).append(memory)

    def _memory(self, tensor: torch.Tensor) -> _Memory | None:
        """That a tensor is a view of; parameters may share a storage."""
        offset = tensor.storage_offset()
        for memory in self._memories.get(tensor.untyped_storage()._cdata, ()):
            if memory.zero <= offset < memory.zero + max(memory.keeps.numel(), 1):
                return memory
        return None

    def _new(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> torch.Tensor:
        made: torch.Tensor = func(*args, **kwargs)
        made = torch.empty_like(made, memory_format=torch.contiguous_format)
        return self._scratch(made, zeros="zeros" in func._schema.name)

    def _scratch(self, made: torch.Tensor, *, zeros: bool = False) -> torch.Tensor:
        shape = tuple(made.shape)
        memory = _Memory(made, shape)
        if zeros:
            nothing = Boxed(full_box(shape), 0, (0,) * len(shape))
            memory.filled.append((nothing, Origin(None, frozenset())))
        self._add(memory)
        return made

    def _empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return self._scratch(torch.empty(tuple(shape), dtype=dtype, device="meta"))

    # --- what moves elements ---

    def _copy(
        self, func: Any, out: torch.Tensor, source: torch.Tensor, non_blocking: bool = False
    ) -> torch.Tensor:
        if not out.numel():
            return out
        if (memory := self._memory(out)) is None:
            raise self._refusal(func, source, "copies to a tensor that is not the loader's own")
        if memory.source is not None:
            raise self._refusal(func, out, "changes")
        if (held := self._memory(source)) is None:
            raise self._refusal(func, out, "copies values of no offered tensor into")
        if tuple(out.shape) != tuple(source.shape):
            shapes = f"{tuple(source.shape)} to {tuple(out.shape)}"
            raise self._refusal(func, source, f"expands, from {shapes},")
        for one in (out, source):
            if any(
                size > 1 and not step for size, step in zip(one.shape, one.stride(), strict=True)
            ):
                raise self._refusal(func, one, "copies with expanded axes of")
        place = int(out.storage_offset()) - memory.zero
        for run in self._runs(func, held, source, out, place):
            self._write(func, memory, run)
        return out

    def _copied(self, func: Any, source: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        out = self._empty(source.shape, kwargs.get("dtype") or source.dtype)
        return self._copy(func, out, source)

    def _cat(self, func: Any, tensors: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
        shape = list(tensors[0].shape)
        dim %= len(shape)
        shape[dim] = sum(one.shape[dim] for one in tensors)
        out, start = self._empty(shape, tensors[0].dtype), 0
        for one in tensors:
            self._copy(func, out.narrow(dim, start, one.shape[dim]), one)
            start += one.shape[dim]
        return out

    def _stack(self, func: Any, tensors: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
        return self._cat(func, [one.unsqueeze(dim) for one in tensors], dim)

    def _pad(
        self, func: Any, source: torch.Tensor, pad: Sequence[int], value: float = 0
    ) -> torch.Tensor:
        if min(pad) < 0 or value:
            raise self._refusal(func, source, "cuts, or fills with another value than 0,")
        shape, starts = list(source.shape), [0] * source.dim()
        for axis, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True), 1):
            shape[-axis] += before + after
            starts[-axis] = before
        made = torch.empty(shape, dtype=source.dtype, device="meta")
        out = inner = self._scratch(made, zeros=True)
        for axis, start in enumerate(starts):
            inner = inner.narrow(axis, start, source.shape[axis])
        self._copy(func, inner, source)
        return out

    def _fill(self, func: Any, out: torch.Tensor, value: Any = 0) -> torch.Tensor:
        memory = self._memory(out)
        if memory is None or memory.source is not None or isinstance(value, torch.Tensor) or value:
            raise self._refusal(func, out, f"puts the value {value} into")
        axes = [Axis(size, 0, step) for size, step in zip(out.shape, out.stride(), strict=True)]
        place = int(out.storage_offset()) - memory.zero
        self._write(func, memory, _Run(Origin(None, frozenset()), 0, axes, place))
        return out

    def _runs(
        self, func: Any, memory: _Memory, source: torch.Tensor, out: torch.Tensor, place: int
    ) -> Iterator[_Run]:
        """What a view of a memory holds, in the order of `out`, which begins at a place."""
        if memory.parameter is not None:
            raise self._refusal(func, source, "reads")
        axes = list(map(Axis, out.shape, source.stride(), out.stride()))
        offset = int(source.storage_offset())
        if memory.source is not None:
            yield _Run(Origin(memory.source, frozenset()), offset, axes, place)
            return
        for read in boxes(memory.shape, offset, axes, place):
            left = [read.box]
            for filled, origin in memory.filled:
                if (shared := intersect(filled.box, read.box)) is None:
                    continue
                left = [rest for box in left for rest in without(box, shared)]
                part, to = filled.part(shared), read.part(shared)
                loops = [
                    Axis(stop - start, one, two)
                    for (start, stop), one, two in zip(
                        shared, part.strides, to.strides, strict=True
                    )
                ]
                passed = origin._replace(dtypes=origin.dtypes | {memory.keeps.dtype})
                yield _Run(passed, part.offset, loops, to.offset)
            if left:
                raise self._refusal(func, source, "reads elements that nothing filled of")

    def _write(self, func: Any, memory: _Memory, run: _Run) -> None:
        if memory.parameter is not None:
            self._write_parameter(func, memory, memory.parameter, run)
            return
        turned = [Axis(size, other, one) for size, one, other in run.axes]
        for to in boxes(memory.shape, run.place, turned, run.offset):
            memory.filled = [
                (rest, origin)
                for filled, origin in memory.filled
                for rest in map(filled.part, without(filled.box, to.box))
            ]
            memory.filled.append((to, run.origin))

    def _write_parameter(self, func: Any, memory: _Memory, parameter: str, run: _Run) -> None:
        place = run.place + memory.zero
        if run.origin.source is None:
            shape = tuple(one.size for one in run.axes)
            to = Boxed(full_box(shape), place, tuple(one.other for one in run.axes))
            self.written.append(Written(None, parameter, to))
            return
        source = self._source(run.origin.source)
        self._check_dtypes(func, source.keeps, run.origin.dtypes, memory)
        for to in boxes(source.shape, run.offset, run.axes, place):
            self.written.append(Written(run.origin.source, parameter, to))

    def _check_dtypes(
        self, func: Any, source: torch.Tensor, passed: Iterable[torch.dtype], to: _Memory
    ) -> None:
        own = safetensors_dtype(source.dtype)
        for dtype in passed:
            if dtype != to.keeps.dtype and not holds_all(safetensors_dtype(dtype), own):
                raise self._refusal(func, source, f"rounds to {dtype} on the way to {to.parameter}")

    def _source(self, name: str) -> _Memory:
        return next(one for ones in self._memories.values() for one in ones if one.source == name)


def in_memory_order(tensor: torch.Tensor) -> torch.Tensor:
    """A parameter with its axes in the order of its memory.

    Raises:
        InputError: its elements do not follow one another there.
    """
    strides: tuple[int, ...] = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda axis: (-strides[axis], axis))
    turned = tensor.detach().permute(order)
    wanted = contiguous_strides(tuple(turned.shape))
    steps = zip(turned.shape, turned.stride(), wanted, strict=True)
    if any(size > 1 and one != other for size, one, other in steps):
        raise InputError(
            f"a parameter of shape {tuple(tensor.shape)} has strides {tensor.stride()}: its "
            f"elements do not follow one another in memory, which a recording needs"
        )
    return turned


def _tensors(values: Any) -> list[torch.Tensor]:
    return [one for one in tree_iter(values) if isinstance(one, torch.Tensor)]


def _is_view(func: Any) -> bool:
    schema = func._schema
    returns = [one.alias_info for one in schema.returns]
    aliases = bool(returns) and all(one is not None and not one.is_write for one in returns)
    return aliases or schema.name in _VIEWS_BY_NAME
