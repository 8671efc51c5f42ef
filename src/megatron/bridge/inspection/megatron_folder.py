"""What a Megatron checkpoint holds, from its index and config record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron.bridge.checkpoint.config_record import CONFIG_RECORD, read_hf_config
from megatron.bridge.checkpoint.plans import is_state
from megatron.bridge.checkpoint.torch_dist_reader import TorchDistCheckpoint
from megatron.bridge.inspection.summary import TensorSummary
from megatron.bridge.models.conversion.plan import TensorSpec


@dataclass(frozen=True)
class MegatronReport:
    """A torch_dist checkpoint, as its index describes it.

    folder: of the iteration. iteration: "0", or "release". megatron, tensors: the weights, by key.
    state: the other tensors, which are state of training. objects: names of what is no tensor.
    files: name -> bytes of the data files.
    architecture: the Hugging Face architecture in the config record, None without a record.
    """

    source: str
    folder: Path
    iteration: str
    megatron: TensorSummary
    state: TensorSummary
    tensors: Mapping[str, TensorSpec]
    objects: tuple[str, ...]
    files: Mapping[str, int]
    config_record: bool
    architecture: str | None


def inspect_megatron(source: Path) -> MegatronReport:
    """Look at a checkpoint, or at the folder of one iteration. Raises CheckpointError."""
    checkpoint = TorchDistCheckpoint(source)
    folder = checkpoint.folder
    weights = {key: spec for key, spec in checkpoint.tensors.items() if not is_state(key)}
    state = (spec for key, spec in checkpoint.tensors.items() if key not in weights)
    recorded = (folder / CONFIG_RECORD).is_file()
    return MegatronReport(
        source=str(source),
        folder=folder,
        iteration=_iteration(folder.name),
        megatron=TensorSummary.of(weights.values()),
        state=TensorSummary.of(state),
        tensors=weights,
        objects=tuple(checkpoint.objects),
        files={file.name: file.stat().st_size for file in sorted(folder.glob("*.distcp"))},
        config_record=recorded,
        architecture=read_hf_config(folder).architecture if recorded else None,
    )


def _iteration(name: str) -> str:
    """``iter_0000012`` -> ``12``; any other folder's name as it is."""
    number = name.removeprefix("iter_")
    return str(int(number)) if number.isdecimal() and number != name else name
