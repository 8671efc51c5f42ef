"""The same prompt through transformers' own model and through the Megatron model.

transformers (eager attention) is the reference. The two models run one after the other, so that
only one of them is in memory; of the reference the hidden states and logits are kept.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron.bridge.errors import InputError, UnsupportedModel
from megatron.bridge.models.conversion.auto_bridge import AutoBridge
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.progress import Progress
from megatron.bridge.verification.distance import (
    Distance,
    LogitsDistance,
    distance,
    logits_distance,
)

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_PROMPT = "Describe this image."
TEXT_PROMPT = "Why is the sky blue?"

TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
"""Largest difference of logits by dtype, as a part of the largest logit."""


@dataclass(frozen=True, slots=True)
class NextToken:
    """The token that a model finds likeliest after the prompt."""

    id: int
    text: str


@dataclass(frozen=True)
class CompareReport:
    """How far the Megatron model is from transformers' on one prompt.

    tokens: of the whole prompt. image_tokens: those that stand for the image. layers: hidden states
    after each decoder layer. tolerance: largest difference of logits allowed, as a part of the
    largest logit. hf_seconds, megatron_seconds: to load the model and run it once.
    """

    source: str
    architecture: str
    dtype: str
    prompt: str
    image: str | None
    tokens: int
    image_tokens: int
    layers: tuple[Distance, ...]
    logits: LogitsDistance
    hf_next: NextToken
    megatron_next: NextToken
    tolerance: float
    hf_seconds: float
    megatron_seconds: float

    @property
    def agrees(self) -> bool:
        """Whether no logit differs by more than the tolerance; False where one is not finite."""
        apart, largest = self.logits.max_abs, self.logits.largest
        return isfinite(apart) and apart <= self.tolerance * max(1.0, largest)


def compare(
    source: str | os.PathLike[str],
    image: str | os.PathLike[str] | Image | None = None,
    prompt: str | None = None,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    tolerance: float | None = None,
    progress: Progress | None = None,
) -> CompareReport:
    """Run one prompt, optionally with an image, through both models.

    prompt: None for IMAGE_PROMPT or TEXT_PROMPT. dtype: of weights and activations in both models,
    a key of TOLERANCES. tolerance: None for that of the dtype. Raises InputError for input that
    cannot be used, UnsupportedModel without a bridge; a difference is no error but in the report.
    """
    if dtype not in TOLERANCES:
        raise InputError(f"dtype must be one of {', '.join(TOLERANCES)}, found {dtype!r}")
    hf = PreTrainedVLM.from_pretrained(source, revision)
    bridge = AutoBridge(hf)
    bridge.plan()  # what cannot be converted is said before gigabytes are loaded
    picture = _open_image(image)
    text = prompt if prompt is not None else IMAGE_PROMPT if picture else TEXT_PROMPT
    inputs = _inputs(hf, text, picture)

    begin = time.perf_counter()
    expected, hidden = _run_transformers(hf, inputs, getattr(torch, dtype))
    between = time.perf_counter()
    found, layers = _run_megatron(bridge, inputs, getattr(torch, dtype), hidden, progress)
    end = time.perf_counter()

    image_token = hf.hf_config.require("image_token_id", int)
    return CompareReport(
        source=os.fspath(source),
        architecture=hf.hf_config.architecture,
        dtype=dtype,
        prompt=text,
        image=_image_name(image),
        tokens=inputs["input_ids"].shape[1],
        image_tokens=int((inputs["input_ids"] == image_token).sum()),
        layers=tuple(layers),
        logits=logits_distance(expected[0], found[0]),
        hf_next=_next_token(hf, expected),
        megatron_next=_next_token(hf, found),
        tolerance=TOLERANCES[dtype] if tolerance is None else tolerance,
        hf_seconds=between - begin,
        megatron_seconds=end - between,
    )


def _open_image(image: str | os.PathLike[str] | Image | None) -> Image | None:
    if image is None or not isinstance(image, (str, os.PathLike)):
        return image
    from PIL import Image as pillow

    try:
        with pillow.open(image) as opened:
            return opened.convert("RGB")
    except (OSError, ValueError, pillow.DecompressionBombError) as error:
        raise InputError(f"{os.fspath(image)}: cannot be read as an image: {error}") from error


def _image_name(image: str | os.PathLike[str] | Image | None) -> str | None:
    if image is None or isinstance(image, (str, os.PathLike)):
        return None if image is None else Path(image).name
    return f"{image.width}x{image.height} image"


def _inputs(hf: PreTrainedVLM, prompt: str, image: Image | None) -> dict[str, torch.Tensor]:
    """What the processor makes of one turn of a user, ready for the answer."""
    content: list[dict[str, Any]] = [{"type": "text", "text": prompt}]
    if image is not None:
        content.insert(0, {"type": "image", "image": image})
    return dict(
        hf.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    )


@torch.no_grad()
def _run_transformers(
    hf: PreTrainedVLM, inputs: dict[str, torch.Tensor], dtype: torch.dtype
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits [1, s, vocab], and the hidden states [1, s, h] that leave each layer."""
    with _no_progress_bars():
        model = hf.load_model(dtype=dtype).eval()
    text = getattr(getattr(model, "model", None), "language_model", None)
    if text is None:
        raise UnsupportedModel(
            f"{type(model).__name__}: its decoder layers are not under model.language_model"
        )
    hidden: list[torch.Tensor] = []

    def record(_module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        hidden.append(args[0] if args else kwargs["hidden_states"])

    with ExitStack() as hooks:
        # Deepstack adds to the hidden states between two layers: what enters the next one counts.
        for module in (*text.layers[1:], text.norm):
            handle = module.register_forward_pre_hook(record, with_kwargs=True)
            hooks.callback(handle.remove)
        logits = model(**inputs, use_cache=False).logits
    del model, text
    gc.collect()
    return logits, hidden


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@torch.no_grad()
def _run_megatron(
    bridge: AutoBridge,
    inputs: dict[str, torch.Tensor],
    dtype: torch.dtype,
    hidden: list[torch.Tensor],
    progress: Progress | None,
) -> tuple[torch.Tensor, list[Distance]]:
    """Logits [1, s, vocab], and how far each layer's output is from `hidden`, which is used up."""
    provider = bridge.to_megatron_provider(load_weights=False)
    provider.params_dtype = dtype
    provider.bf16, provider.fp16 = dtype is torch.bfloat16, dtype is torch.float16
    with _process_groups():
        chunks = list(provider.provide_distributed_model(wrap_with_ddp=False))
        bridge.load_hf_weights(chunks, progress=progress)
        model = chunks[0].eval()
        layers = model.language_model.decoder.layers
        if len(layers) != len(hidden):
            raise UnsupportedModel(
                f"transformers ran {len(hidden)} decoder layers, this process holds {len(layers)}; "
                "run compare without a launcher, in one process"
            )
        found: list[Distance | None] = [None] * len(layers)
        with ExitStack() as hooks:
            for number, layer in enumerate(layers):
                handle = layer.register_forward_hook(_measure(number, hidden, found))
                hooks.callback(handle.remove)
            device = next(model.parameters()).device
            on_device = {name: tensor.to(device) for name, tensor in inputs.items()}
            logits = model(**on_device, trim_vocab_padding=True).cpu()
    return logits, [measured for measured in found if measured is not None]


def _measure(
    number: int, hidden: list[torch.Tensor], found: list[Distance | None]
) -> Callable[[torch.nn.Module, Any, Any], None]:
    def hook(_module: torch.nn.Module, _args: Any, output: Any) -> None:
        # Megatron-Core's layers return (hidden states [s, b, h], context).
        found[number] = distance(hidden[number], output[0].transpose(0, 1).cpu())
        hidden[number] = hidden[number].new_empty(0)

    return hook


@contextmanager
def _process_groups() -> Iterator[None]:
    """Leave no process groups behind where there were none."""
    from megatron.bridge.runtime.parallel import destroy_process_groups

    existed = dist.is_initialized()
    try:
        yield
    finally:
        if not existed:
            destroy_process_groups()


def _next_token(hf: PreTrainedVLM, logits: torch.Tensor) -> NextToken:
    token = int(logits[0, -1].argmax())
    return NextToken(token, str(hf.tokenizer.decode([token])))
