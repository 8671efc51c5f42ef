"""`verify`: two checkpoints, tensor by tensor, bit by bit; or one against its checksums."""

from __future__ import annotations

import click

from megatron.bridge.cli import parameters
from megatron.bridge.cli.output import Output, open_output

_SIDE = "Hugging Face folder, hub id (org/name or org/name@revision), or Megatron checkpoint."


@click.argument("a", help=_SIDE)
@click.argument("b", required=False, help="The other side. With --fast it may be left out.")
@click.option(
    "--fast",
    is_flag=True,
    help="Read one side only, which import or export --keep-manifest wrote, and compare its files "
    "with the checksums that were taken then. The other side, if it is given, has to be what was "
    "converted, not modified since.",
)
@parameters.iteration
@parameters.part(
    "language: compare the language model alone, where one side is a vision-language model or "
    "both are"
)
@parameters.memory
@parameters.as_json
def verify(
    *,
    a: str,
    b: str | None,
    fast: bool,
    iteration: str | None,
    part: str | None,
    memory: str | None,
    as_json: bool,
) -> None:
    """Compare A and B tensor by tensor, bit by bit; exits with 1 if they differ.

    Bits are compared, not values: equal NaNs are equal, and -0.0 is not 0.0. Files of different
    formats are compared through the mapping that `export` follows; the padding of the vocabulary
    belongs to no Hugging Face tensor and is not compared.
    """
    with open_output(as_json=as_json) as output:
        from megatron.bridge.engine import DEFAULT_MEMORY
        from megatron.bridge.errors import InputError
        from megatron.bridge.text.sizes import size_of

        size = DEFAULT_MEMORY if memory is None else size_of(memory, "--memory")
        if fast and part is not None:
            raise InputError(
                "--fast reads one side only, and compares all of its files: leave out --part"
            )
        if fast:
            _verify_fast(output, a, b, iteration, size)
        elif b is None:
            raise InputError(
                f"B is missing: give what {a} is to be compared with, or --fast to compare it with "
                "the checksums that were taken when it was written"
            )
        else:
            _verify(output, a, b, iteration, part, size)


def _verify(
    output: Output, a: str, b: str, iteration: str | None, part: str | None, memory: int
) -> None:
    from megatron.bridge.cli.units import count
    from megatron.bridge.errors import MismatchError
    from megatron.bridge.operations.verification.bitwise import verify as compare_tensors

    with output.progress() as progress:
        report = compare_tensors(a, b, progress, iteration=iteration, part=part, memory=memory)
    output.show(report)
    if not report.identical:
        raise MismatchError(
            f"{a} and {b} differ: {count(len(report.different), 'tensor')} not equal, "
            f"{len(report.only_in_a)} only in A, {len(report.only_in_b)} only in B"
        )


def _verify_fast(output: Output, a: str, b: str | None, iteration: str | None, memory: int) -> None:
    from megatron.bridge.cli.units import count
    from megatron.bridge.errors import MismatchError
    from megatron.bridge.operations.verification.fast import verify_fast

    with output.progress() as progress:
        report = verify_fast(a, b, progress, iteration=iteration, memory=memory)
    output.show(report)
    if report.different:
        raise MismatchError(
            f"{report.target.source} is not what was written: "
            f"{count(len(report.different), 'range')} of "
            f"{count(len({found.file for found in report.different}), 'file')} changed"
        )
    if (source := report.converted_from) and source.changes:
        raise MismatchError(
            f"{source.source} is not what {report.target.source} was converted from, or it was "
            "modified since: compare their bits without --fast"
        )
