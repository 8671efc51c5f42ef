"""What a Megatron checkpoint holds, from its index and config record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron.bridge.errors import CheckpointError
from megatron.bridge.formats.config_record import read_record
from megatron.bridge.formats.file_plans import is_state
from megatron.bridge.formats.iterations import Iteration, iterations, tracked_iteration
from megatron.bridge.formats.torch_dist.index_format import IndexFormat
from megatron.bridge.formats.torch_dist.reader import TorchDistCheckpoint
from megatron.bridge.operations.inspection.summary import TensorSummary
from megatron.bridge.tensors.spec import TensorSpec


@dataclass(frozen=True)
class MegatronReport:
    """A distributed checkpoint, as its index describes it.

    folder: of the iteration. iteration: "0", or "release". iterations: those that lie in the
    folder that was given; none in that of one iteration. tracked: the one of them that the tracker
    file names, None without such a file. format: torch_dist, or another with such an index.
    megatron, tensors: the weights, by key. state: the other tensors, which are state of training.
    objects: names of what is no tensor. files: name -> bytes of the data files. config_record:
    whether a record keeps the Hugging Face config; architecture: that of this config. other_record:
    whether the record is of another program; hf_model_id: the model that it names.
    """

    source: str
    folder: Path
    iteration: str
    iterations: tuple[str, ...]
    tracked: str | None
    format: IndexFormat
    megatron: TensorSummary
    state: TensorSummary
    tensors: Mapping[str, TensorSpec]
    objects: tuple[str, ...]
    files: Mapping[str, int]
    config_record: bool
    architecture: str | None
    other_record: bool
    hf_model_id: str | None


def inspect_megatron(source: Path, iteration: Iteration | None = None) -> MegatronReport:
    """Look at an iteration of a checkpoint, or at the folder of one. Raises CheckpointError.

    iteration: see `iteration_folder`. A format that is not torch_dist is shown if its index can be
    read.
    """
    checkpoint = TorchDistCheckpoint(source, iteration)
    folder = checkpoint.folder
    several = folder.absolute() != source.absolute()
    record = read_record(folder)
    hf = None if record is None else record.hf
    weights = {key: spec for key, spec in checkpoint.tensors.items() if not is_state(key)}
    state = (spec for key, spec in checkpoint.tensors.items() if key not in weights)
    return MegatronReport(
        source=str(source),
        folder=folder,
        iteration=_iteration(folder.name),
        iterations=tuple(iterations(source)) if several else (),
        tracked=_tracked(source) if several else None,
        format=checkpoint.format,
        megatron=TensorSummary.of(weights.values()),
        state=TensorSummary.of(state),
        tensors=weights,
        objects=tuple(checkpoint.objects),
        files={file.name: file.stat().st_size for file in sorted(folder.glob("*.distcp"))},
        config_record=hf is not None,
        architecture=None if hf is None else hf.architecture,
        other_record=record is not None and hf is None,
        hf_model_id=None if record is None else record.hf_model_id,
    )


def _tracked(source: Path) -> str | None:
    """What the tracker file names; one that cannot be used was refused unless it was not needed."""
    try:
        return tracked_iteration(source)
    except CheckpointError:
        return None


def _iteration(name: str) -> str:
    """``iter_0000012`` -> ``12``; any other folder's name as it is."""
    number = name.removeprefix("iter_")
    return str(int(number)) if number.isdecimal() and number != name else name
