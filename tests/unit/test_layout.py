"""Layouts: each agrees with an independent formula in torch, inverts, and refuses misfits."""

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron.bridge.models.conversion.layout import (
    HF,
    Concatenate,
    Layout,
    LayoutError,
    Offset,
    PadRows,
    PickExpert,
    Same,
    Transposed,
    gated_qkv,
    packed_qkv,
    qkv,
)
from megatron.bridge.models.conversion.module_weights import assemble, disassemble
from megatron.bridge.tensors.boxes import Shape, tiling_faults

# Layout, shapes of its tensors by role; no shape is square and no two extents are equal by chance.
CASES: dict[str, tuple[Layout, dict[str, Shape]]] = {
    "same": (Same(), {HF: (5, 7)}),
    "scalar": (Same(), {HF: ()}),
    "gate and up": (Concatenate(("gate", "up")), {"gate": (11, 6), "up": (11, 6)}),
    "columns": (Concatenate(("a", "b"), axis=1, sizes=(2, 5)), {"a": (3, 2), "b": (3, 5)}),
    "sections": (
        Concatenate(("qkv", "z", "b", "a"), sizes=(22, 6, 3, 4)),
        {"qkv": (22, 5), "z": (6, 5), "b": (3, 5), "a": (4, 5)},
    ),
    "qkv": (qkv(6, 2, 4), {"q": (24, 13), "k": (8, 13), "v": (8, 13)}),
    "qkv bias": (qkv(6, 3, 4), {"q": (24,), "k": (12,), "v": (12,)}),
    "gated qkv": (gated_qkv(6, 2, 4), {"q": (48, 13), "k": (8, 13), "v": (8, 13)}),
    "packed qkv": (packed_qkv(3, 4), {HF: (36, 13)}),
    "expert": (PickExpert(Same(), 2, 5), {HF: (5, 8, 3)}),
    "transposed expert": (PickExpert(Transposed(Same()), 1, 4), {HF: (4, 3, 8)}),
    "transposed parts": (
        Transposed(Concatenate(("gate", "up"))),
        {"gate": (5, 9), "up": (5, 9)},
    ),
    "minus one": (Offset(Same(), -1.0), {HF: (9,)}),
    "vocabulary": (PadRows(Same(), 10, 16), {HF: (10, 3)}),
}

pytestmark = pytest.mark.filterwarnings("error")


def tensors_of(shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        role: torch.randint(-9999, 9999, shape, generator=generator).double()
        for role, shape in shapes.items()
    }


def by_formula(name: str, t: dict[str, Tensor]) -> Tensor:
    """What each layout should make, written with torch's own operations."""
    match name:
        case "same" | "scalar":
            return t[HF]
        case "gate and up":
            return torch.cat([t["gate"], t["up"]])
        case "columns":
            return torch.cat([t["a"], t["b"]], dim=1)
        case "sections":
            return torch.cat([t["qkv"], t["z"], t["b"], t["a"]])
        case "qkv":
            parts = [t["q"].view(2, 12, 13), t["k"].view(2, 4, 13), t["v"].view(2, 4, 13)]
            return torch.cat(parts, dim=1).reshape(40, 13)
        case "qkv bias":
            parts = [t["q"].view(3, 8), t["k"].view(3, 4), t["v"].view(3, 4)]
            return torch.cat(parts, dim=1).reshape(48)
        case "gated qkv":
            heads = t["q"].view(2, 3, 2, 4, 13)
            queries, gates = heads[:, :, 0], heads[:, :, 1]
            parts = [
                queries.reshape(2, 12, 13),
                gates.reshape(2, 12, 13),
                t["k"].view(2, 4, 13),
                t["v"].view(2, 4, 13),
            ]
            return torch.cat(parts, dim=1).reshape(64, 13)
        case "packed qkv":
            return t[HF].view(3, 3, 4, 13).transpose(0, 1).reshape(36, 13)
        case "expert":
            return t[HF][2]
        case "transposed expert":
            return t[HF][1].T
        case "transposed parts":
            return torch.cat([t["gate"].T, t["up"].T])
        case "minus one":
            return t[HF] - 1
        case "vocabulary":
            return torch.cat([t[HF], torch.zeros(6, 3)])
    raise AssertionError(name)


@pytest.mark.parametrize("name", CASES)
def test_it_agrees_with_the_formula(name: str) -> None:
    layout, shapes = CASES[name]
    tensors = tensors_of(shapes)
    assert torch.equal(assemble(layout, tensors), by_formula(name, tensors))


@pytest.mark.parametrize("name", CASES)
def test_it_inverts(name: str) -> None:
    layout, shapes = CASES[name]
    tensors = tensors_of(shapes)
    whole = assemble(layout, tensors)
    assert layout.hf_shapes(tuple(whole.shape)) == shapes
    if isinstance(layout, PickExpert):  # gives back its own expert's part only
        back = disassemble(layout, whole)[HF][layout.expert]
        assert torch.equal(back, tensors[HF][layout.expert])
        return
    for role, tensor in disassemble(layout, whole).items():
        assert torch.equal(tensor, tensors[role]), role


@pytest.mark.parametrize("name", [n for n in CASES if "expert" not in n])
def test_pieces_tile_both_sides(name: str) -> None:
    layout, shapes = CASES[name]
    pieces = layout.pieces(shapes)
    for role, shape in shapes.items():
        boxes = [piece.hf_box for piece in pieces if piece.role == role]
        assert list(tiling_faults(shape, boxes)) == []
    whole = layout.megatron_shape(shapes)
    boxes = [piece.megatron_box for piece in pieces]
    if isinstance(layout, PadRows):
        padding = layout.padding(whole)
        assert padding == ((10, 16), (0, 3))
        boxes.append(padding)
    assert list(tiling_faults(whole, boxes)) == []


def test_all_experts_together_tile_the_tensor() -> None:
    boxes = [
        piece.hf_box
        for expert in range(5)
        for piece in PickExpert(Transposed(Same()), expert, 5).pieces({HF: (5, 3, 8)})
    ]
    assert list(tiling_faults((5, 3, 8), boxes)) == []


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.booleans())
def test_qkv_of_any_size_inverts(groups: int, per_group: int, dim: int, gated: bool) -> None:
    layout = (gated_qkv if gated else qkv)(groups * per_group, groups, dim)
    rows = groups * (per_group * (2 if gated else 1) + 2) * dim
    whole = torch.arange(rows * 3.0).view(rows, 3)
    assert torch.equal(assemble(layout, disassemble(layout, whole)), whole)


@pytest.mark.parametrize(
    ("layout", "shapes", "message"),
    [
        (Same(), {"other": (1,)}, "expected the tensors"),
        (Concatenate(("a", "b")), {"a": (2, 3), "b": (2, 4)}, "do not fit end to end"),
        (Concatenate(("a", "b")), {"a": (2, 3), "b": (4, 3)}, "should be equal"),
        (Concatenate(("a", "b"), sizes=(2, 5)), {"a": (2, 3), "b": (4, 3)}, "extents"),
        (Concatenate(("a", "b"), axis=1), {"a": (2,), "b": (2,)}, "no axis 1"),
        (qkv(6, 2, 4), {"q": (8, 5), "k": (24, 5), "v": (8, 5)}, "qkv by group needs"),
        (qkv(6, 2, 4), {"q": (24, 5), "k": (8, 5), "v": (8, 6)}, "qkv by group needs"),
        (packed_qkv(3, 4), {HF: (13, 36)}, "packed qkv by head needs"),
        (PickExpert(Same(), 0, 4), {HF: (5, 2, 3)}, "should hold 4 experts"),
        (Transposed(Same()), {HF: (5,)}, "no two axes"),
        (PadRows(Same(), 10, 16), {HF: (11, 3)}, "expected 10 rows"),
        (PadRows(Same(), 10, 8), {HF: (10, 3)}, "do not fit into 8"),
    ],
)
def test_misfits_are_refused(layout: Layout, shapes: dict[str, Shape], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        layout.pieces(shapes)


def test_heads_must_divide_into_groups() -> None:
    with pytest.raises(LayoutError, match="6 attention heads do not divide into 4"):
        qkv(6, 4, 8)
