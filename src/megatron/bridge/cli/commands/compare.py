"""`compare`: transformers against Megatron-Core, on one prompt."""

from __future__ import annotations

from pathlib import Path

import click

from megatron.bridge.cli import parameters
from megatron.bridge.cli.output import open_output


@parameters.hf_source
@click.option("--image", type=parameters.given_file, metavar="FILE", help="Image to ask about.")
@click.option(
    "--max-pixels",
    type=parameters.positive,
    metavar="N",
    help="Make a larger image smaller, for both models; attention takes memory by the square of "
    "it.",
)
@click.option("--prompt", metavar="TEXT", help="What to ask. By default a short question.")
@parameters.revision
@parameters.choice(
    "--dtype",
    ("float64", "float32", "bfloat16", "float16"),
    "of weights and activations; in float64 all arithmetic is in float64, so that next to no "
    "rounding is left, and what differs was computed differently",
    default="float32",
)
@click.option(
    "--tolerance",
    type=parameters.not_negative,
    metavar="NUMBER",
    help="Largest difference of logits, as a part of the largest logit. By default 1e-10 for "
    "float64, 1e-4 for float32, 5e-2 for bfloat16, 1e-2 for float16.",
)
@parameters.as_json
def compare(
    *,
    source: str,
    image: Path | None,
    max_pixels: int | None,
    prompt: str | None,
    revision: str | None,
    dtype: str,
    tolerance: float | None,
    as_json: bool,
) -> None:
    """Run one prompt through transformers and through Megatron-Core; exits with 1 if they differ.

    Compares the hidden states after every layer, and the logits. The two models run one after the
    other: memory is that of one of them in the chosen dtype, and of attention over the image. Where
    that is not there, it is said before anything is loaded.
    """
    with open_output(as_json=as_json) as output:
        parameters.hf_model(source, revision)  # first, and fast: says what is not a model
        output.note("loading torch, transformers and megatron-core")
        from megatron.bridge.errors import MismatchError
        from megatron.bridge.operations.verification.logits import compare as compare_models

        with output.progress() as progress:
            report = compare_models(
                source,
                image,
                prompt,
                revision=revision,
                dtype=dtype,
                tolerance=tolerance,
                max_pixels=max_pixels,
                progress=progress,
            )
        output.show(report)
    if not report.agrees:
        raise MismatchError(
            f"the logits of {source} differ by up to {report.logits.max_abs_diff:.2e}; allowed are "
            f"{report.tolerance:g} of the largest, {report.logits.largest:.3g}"
        )
