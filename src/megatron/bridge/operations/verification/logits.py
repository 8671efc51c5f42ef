"""The same prompt through transformers' own model and through the Megatron model.

transformers (eager attention) is the reference. The two models run one after the other, so that
only one of them is in memory; of the reference the hidden states and logits are kept.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron.bridge.errors import InputError, MismatchError, UnsupportedModel
from megatron.bridge.formats.file_plans import plan_of
from megatron.bridge.models.catalog import bridge_for
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.operations.verification.distance import (
    Distance,
    LayerDistance,
    LogitsDistance,
    logits_distance,
)
from megatron.bridge.operations.verification.forward import (
    prompt_inputs,
    run_megatron,
    run_transformers,
)
from megatron.bridge.operations.verification.memory import at_most, needed, require_memory
from megatron.bridge.paths import local_path
from megatron.bridge.progress import Progress
from megatron.bridge.text.document import stated

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_PROMPT = "Describe this image."
TEXT_PROMPT = "Why is the sky blue?"

TOLERANCES = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
"""Largest difference of logits by dtype, as a part of the largest logit."""


@dataclass(frozen=True, slots=True)
class NextToken:
    """The token that a model finds likeliest after the prompt."""

    id: int
    text: str


@dataclass(frozen=True, slots=True)
class OfEach[Value]:
    """Something of transformers' model, and of the Megatron model."""

    hf: Value
    megatron: Value


@dataclass(frozen=True)
class CompareReport:
    """How far the Megatron model is from transformers' on one prompt.

    Attributes:
        tokens: of the whole prompt.
        image_tokens: those that stand for the image.
        tolerance: largest difference of logits allowed, as a part of the largest logit.
        layers: hidden states after each decoder layer.
        seconds: to load the model and run it once.
    """

    source: str
    architecture: str
    dtype: str
    prompt: str
    image: str | None
    tokens: int
    image_tokens: int
    tolerance: float
    logits: LogitsDistance
    layers: tuple[LayerDistance, ...]
    next_token: OfEach[NextToken]
    seconds: OfEach[float]

    @stated
    def agrees(self) -> bool:
        """Whether no logit differs by more than the tolerance; False where one is not finite."""
        apart, largest = self.logits.max_abs_diff, self.logits.largest
        return isfinite(apart) and apart <= self.tolerance * largest


def compare(
    source: str | os.PathLike[str],
    image: str | os.PathLike[str] | Image | None = None,
    prompt: str | None = None,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    tolerance: float | None = None,
    max_pixels: int | None = None,
    progress: Progress | None = None,
) -> CompareReport:
    """Run one prompt, optionally with an image, through both models. A difference is in the report.

    Args:
        source: a folder or hub id.
        image: a picture, or the path of one.
        prompt: None for IMAGE_PROMPT or TEXT_PROMPT.
        revision: of a hub id.
        dtype: of weights and activations in both models, a key of TOLERANCES; with float64, on the
            CPU only, all arithmetic is in float64.
        tolerance: None for that of the dtype.
        max_pixels: a larger image is made smaller, for both models.
        progress: told of the weights that are read for the Megatron model.

    Raises:
        InputError: the input cannot be used, the memory is not enough, or transformers' values are
            not finite.
        UnsupportedModel: there is no bridge.
        PlanError: the model cannot be converted.
        MismatchError: the values of the Megatron model alone are not finite.
    """
    if dtype not in TOLERANCES:
        raise InputError(f"dtype must be one of {', '.join(TOLERANCES)}, found {dtype!r}")
    if dtype == "float64" and torch.cuda.is_available():
        raise InputError(
            "float64 was asked for, and there is a GPU: the kernels of its backends have no "
            "float64. Hide it with CUDA_VISIBLE_DEVICES=, or compare in float32."
        )
    hf = PreTrainedVLM.from_pretrained(source, revision)
    architecture = hf.hf_config.architecture
    if architecture.endswith("Classification"):
        raise UnsupportedModel(
            f"{os.fspath(source)}: a {architecture} scores labels, and logits of tokens are what "
            f"is compared: compare the language model that it was made of, or its scores from "
            f"Python (AutoBridge.to_megatron_model)"
        )
    # What cannot be converted, or has no live model, is said before gigabytes are loaded.
    plan_of(hf)
    bridge_for(architecture).provider_bridge(hf)
    picture = _open_image(image)
    if picture is not None and max_pixels is not None:
        picture = at_most(picture, max_pixels)
    text = prompt if prompt is not None else IMAGE_PROMPT if picture else TEXT_PROMPT
    inputs = prompt_inputs(hf, text, picture)
    if not inputs["input_ids"].numel():
        raise InputError(
            f"{os.fspath(source)}: its tokenizer makes no tokens of the prompt; are its files "
            f"complete, such as tokenizer.json?"
        )
    require_memory(os.fspath(source), needed(hf, inputs, getattr(torch, dtype)))

    begin = time.perf_counter()
    expected, hidden = run_transformers(hf, inputs, getattr(torch, dtype))
    between = time.perf_counter()
    found, layers = run_megatron(hf, inputs, getattr(torch, dtype), hidden, progress)
    end = time.perf_counter()
    distances = logits_distance(expected[0], found[0])
    require_finite(os.fspath(source), layers, distances)

    # A tokenizer, which is all that a model of text alone has, knows no such token.
    image_token = getattr(hf.processor, "image_token_id", None)
    image_tokens = 0 if image_token is None else int((inputs["input_ids"] == image_token).sum())
    return CompareReport(
        source=os.fspath(source),
        architecture=hf.hf_config.architecture,
        dtype=dtype,
        prompt=text,
        image=_image_name(image),
        tokens=inputs["input_ids"].shape[1],
        image_tokens=image_tokens,
        tolerance=TOLERANCES[dtype] if tolerance is None else tolerance,
        logits=distances,
        layers=tuple(LayerDistance(**asdict(one), layer=n) for n, one in enumerate(layers)),
        next_token=OfEach(_next_token(hf, expected), _next_token(hf, found)),
        seconds=OfEach(between - begin, end - between),
    )


def require_finite(source: str, layers: Sequence[Distance], logits: LogitsDistance) -> None:
    """Refuse to compare what is infinite or NaN, naming the first layer where it is.

    Raises:
        InputError: it is so in transformers, where the weights are to blame or the dtype.
        MismatchError: it is so in Megatron-Core alone.
    """
    places = [(f"the hidden states after layer {n}", layer) for n, layer in enumerate(layers)]
    for place, distance in [*places, ("the logits", logits)]:
        if not distance.expected_finite:
            both = "" if distance.found_finite else " and in Megatron-Core"
            raise InputError(
                f"{source}: {place} are not finite in transformers{both}, so that there is nothing "
                "to compare; look for NaN and infinity in the weights, and in place of float16, "
                "whose range is short, take float32"
            )
        if not distance.found_finite:
            raise MismatchError(
                f"{source}: {place} are not finite in Megatron-Core, in transformers they are; "
                "the two models do not compute the same"
            )


def _open_image(image: str | os.PathLike[str] | Image | None) -> Image | None:
    if image is None or not isinstance(image, (str, os.PathLike)):
        return image
    from PIL import Image as pillow

    try:
        with pillow.open(local_path(image)) as opened:
            return opened.convert("RGB")
    except (OSError, ValueError, pillow.DecompressionBombError) as error:
        raise InputError(f"{os.fspath(image)}: cannot be read as an image: {error}") from error


def _image_name(image: str | os.PathLike[str] | Image | None) -> str | None:
    if image is None or isinstance(image, (str, os.PathLike)):
        return None if image is None else Path(image).name
    return f"{image.width}x{image.height} image"


def _next_token(hf: PreTrainedVLM, logits: torch.Tensor) -> NextToken:
    token = int(logits[0, -1].argmax())
    return NextToken(token, str(hf.tokenizer.decode([token])))
