"""One prompt through transformers' own model, and through the Megatron model.

In float64 both compute in float64 throughout (see `float64`): they differ then by what they
compute, and hardly by how they round it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron.bridge.errors import InputError, UnsupportedModel
from megatron.bridge.models.catalog import bridge_for
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.operations.verification.distance import Distance, distance
from megatron.bridge.operations.verification.float64 import float64_throughout, restore_frequencies
from megatron.bridge.progress import Progress

if TYPE_CHECKING:
    from PIL.Image import Image


def prompt_inputs(
    hf: PreTrainedVLM, prompt: str, image: Image | None = None
) -> dict[str, torch.Tensor]:
    """What the processor makes of one turn of a user, ready for the answer.

    Without a chat template, as base models are, what the tokenizer makes of the prompt as it is.

    Raises:
        InputError: the model cannot take a picture.
    """
    from transformers import PreTrainedTokenizerBase

    processor = hf.processor
    text_only = isinstance(processor, PreTrainedTokenizerBase)
    if text_only and image is not None:
        raise InputError(
            f"{hf.name_or_path}: the model takes no pictures (it has a tokenizer and no "
            f"processor); leave the picture out"
        )
    if processor.chat_template is None:
        if image is not None:
            raise InputError(
                f"{hf.name_or_path}: there is no chat template, which says where a picture "
                f"stands; leave the picture out, or give the model its chat_template.jinja"
            )
        return dict(hf.tokenizer(prompt, return_tensors="pt"))
    content: Any = prompt
    if not text_only:
        content = [{"type": "text", "text": prompt}]
        if image is not None:
            content.insert(0, {"type": "image", "image": image})
    return dict(
        processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    )


@torch.no_grad()
def run_transformers(
    hf: PreTrainedVLM, inputs: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Run transformers' own model, with eager attention, on the CPU.

    Returns:
        Logits [1, s, vocab], and the hidden states [1, s, h] that leave each layer.

    Raises:
        UnsupportedModel: the model is of another build, without layers that can be read from.
    """
    # torch has no grouped matrix product of float64: one expert at a time.
    options: dict[str, Any] = {"experts_implementation": "eager"} if dtype is torch.float64 else {}
    bridge = bridge_for(hf.hf_config.architecture)
    spelling = bridge.spelling(hf.hf_config, hf.weights)
    if key_mapping := spelling.to_declared():  # transformers does not know these roots
        options["key_mapping"] = key_mapping
    with _no_progress_bars():
        model = hf.load_model(bridge.auto_model, dtype=dtype, **options).eval()
    decoder = model.get_decoder()
    if not (hasattr(decoder, "layers") and hasattr(decoder, "norm")):
        raise UnsupportedModel(
            f"{type(model).__name__}: its decoder, a {type(decoder).__name__}, has no `layers` "
            f"that end in a `norm`, where hidden states could be read"
        )
    if dtype is torch.float64:
        restore_frequencies(model)
    hidden: list[torch.Tensor] = []

    def record(_module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        hidden.append(args[0] if args else kwargs["hidden_states"])

    with ExitStack() as hooks:
        # A model may add to the hidden states between two layers: what enters the next one counts.
        for module in (*decoder.layers[1:], decoder.norm):
            handle = module.register_forward_pre_hook(record, with_kwargs=True)
            hooks.callback(handle.remove)
        with _arithmetic(dtype):
            logits = model(**inputs, use_cache=False).logits
    del model, decoder
    gc.collect()
    return logits, hidden


@torch.no_grad()
def run_megatron(
    hf: PreTrainedVLM,
    inputs: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    hidden: list[torch.Tensor],
    progress: Progress | None = None,
) -> tuple[torch.Tensor, list[Distance]]:
    """Run the Megatron model, and measure the output of each layer. In float64 on the CPU only.

    Args:
        hf: the model whose weights it gets.
        inputs: those of transformers' model, by name.
        dtype: of weights and activations.
        hidden: the expected hidden states [1, s, h] after each layer; used up.
        progress: told of the weights that are read.

    Returns:
        Logits [1, s, vocab], and how far each layer's output is from `hidden`.

    Raises:
        UnsupportedModel: `hidden` is not one per layer.
    """
    from megatron.bridge.live.weights import fill_from_files

    family = bridge_for(hf.hf_config.architecture)
    provider = family.provider_bridge(hf)
    # megatron-core knows no float64; every dtype of a checkpoint fits into float32.
    provider.params_dtype = torch.float32 if dtype is torch.float64 else dtype
    provider.bf16, provider.fp16 = dtype is torch.bfloat16, dtype is torch.float16
    provider.register_pre_wrap_hook(lambda _: None, fills=True)  # below, in its own arithmetic
    with _process_groups():
        with _arithmetic(dtype):  # buffers of frequencies are made with the model
            chunks = list(provider.provide_distributed_model(wrap_with_ddp=False))
        fill_from_files(chunks, hf, progress)
        model = chunks[0].eval()
        if dtype is torch.float64:
            model = model.double()
        layers = list(model.get_submodule(family.layer_paths[0].rstrip(".")).children())
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
            with _arithmetic(dtype):
                logits = family.logits(model, on_device).cpu()
    return logits, [measured for measured in found if measured is not None]


def _arithmetic(dtype: torch.dtype) -> AbstractContextManager[None]:
    return float64_throughout() if dtype is torch.float64 else nullcontext()


def _measure(
    number: int, hidden: list[torch.Tensor], found: list[Distance | None]
) -> Callable[[torch.nn.Module, Any, Any], None]:
    def hook(_module: torch.nn.Module, _args: Any, output: Any) -> None:
        # Megatron-Core's layers return (hidden states [s, b, h], context).
        found[number] = distance(hidden[number], output[0].transpose(0, 1).cpu())
        hidden[number] = hidden[number].new_empty(0)

    return hook


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
