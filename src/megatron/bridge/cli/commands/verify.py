"""`verify`: two checkpoints, tensor by tensor, bit by bit."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from megatron.bridge.cli.options import Json
from megatron.bridge.cli.output import import_torch, open_output

if TYPE_CHECKING:
    from rich.console import RenderableType

_SIDE = "Hugging Face folder, hub id (org/name or org/name@revision), or Megatron checkpoint."


def verify(
    a: Annotated[str, typer.Argument(metavar="A", help=_SIDE)],
    b: Annotated[str, typer.Argument(metavar="B", help=_SIDE)],
    *,
    as_json: Json = False,
) -> None:
    """Compare A and B tensor by tensor, bit by bit; exits with 1 if they differ.

    Bits are compared, not values: equal NaNs are equal, and -0.0 is not 0.0. Files of different
    formats are compared through the mapping that `export` follows; the padding of the vocabulary
    belongs to no Hugging Face tensor and is not compared.
    """
    with open_output(as_json=as_json) as output:
        from megatron.bridge.cli.documents import verify_document
        from megatron.bridge.cli.units import count
        from megatron.bridge.errors import MismatchError
        from megatron.bridge.verification.tensors import verify as compare_tensors

        import_torch()
        begin = time.perf_counter()
        with output.progress() as progress:
            report = compare_tensors(a, b, progress)
        seconds = time.perf_counter() - begin

        def render() -> RenderableType:
            from megatron.bridge.cli.render.verification import render_verify

            return render_verify(report, seconds)

        output.show(verify_document(report, seconds), render)
    if not report.identical:
        raise MismatchError(
            f"{a} and {b} differ: {count(len(report.different), 'tensor')} not equal, "
            f"{len(report.only_in_a)} only in A, {len(report.only_in_b)} only in B"
        )
