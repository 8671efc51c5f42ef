"""A Megatron checkpoint of one iteration: tracker file, torch_dist files, config record."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from megatron.bridge.engine.pieces import PIECE_BYTES, OutputFile
from megatron.bridge.formats.config_record import CONFIG_RECORD, TokenizerRecord, config_record
from megatron.bridge.formats.iterations import TRACKER_FILE, folder_name
from megatron.bridge.formats.torch_dist.file_layout import torch_dist_files
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.models.conversion.unchanged import chunks_of
from megatron.bridge.models.hf_pretrained.config import HFConfig
from megatron.bridge.models.hf_pretrained.safetensors_header import TensorInfo
from megatron.bridge.tensors.boxes import Box
from megatron.bridge.tensors.spec import TensorSpec

MAX_FILE_BYTES = 1 << 29
"""Bytes per torch_dist file: enough files for many processes to share, few enough for a disk."""

_ITERATION = 0


def megatron_files(
    plan: ConversionPlan,
    *,
    provider: str,
    settings: Mapping[str, Any],
    hf_config: HFConfig,
    tokenizer: TokenizerRecord | None = None,
    tensors: Mapping[str, TensorSpec] | None = None,
    place: Callable[[str], TensorInfo | None] = lambda _: None,
    strides: bool = False,
    chunks: Sequence[Iterable[tuple[str, Box]]] = (),
    piece_bytes: int = PIECE_BYTES,
    max_file_bytes: int | None = None,
) -> tuple[OutputFile, ...]:
    """Every file of the checkpoint that holds the Megatron side of a plan.

    Args:
        plan: what the checkpoint holds.
        provider: dotted path of the provider class, for the config record.
        settings: fields of the provider, for the config record.
        hf_config: of the model, for the config record.
        tokenizer: for the config record.
        tensors: those of the plan, where their dtypes differ.
        place: see `chunks_of`; where it says None, elements are put together.
        strides: see `chunks_of`.
        chunks: the boxes that each of several writers stores; if there is one, what `chunks_of`
            says.
        piece_bytes: of a part of a file.
        max_file_bytes: of one torch_dist file; None for MAX_FILE_BYTES.
    """
    folder = folder_name(_ITERATION)
    data = torch_dist_files(
        plan.megatron if tensors is None else tensors,
        chunks or [chunks_of(plan, place, strides=strides)],
        extra_states=plan.extra_states,
        iteration=_ITERATION,
        piece_bytes=piece_bytes,
        max_file_bytes=max_file_bytes or MAX_FILE_BYTES,
        folder=folder,
    )
    record = config_record(provider, settings, hf_config, tokenizer)
    return (
        *data,
        OutputFile.of_bytes(f"{folder}/{CONFIG_RECORD}", record),
        OutputFile.of_bytes(TRACKER_FILE, str(_ITERATION).encode()),
    )
