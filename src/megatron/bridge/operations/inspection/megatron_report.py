"""What a Megatron checkpoint holds, from its index and config record."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron.bridge.errors import CheckpointError
from megatron.bridge.formats.config_record import read_record
from megatron.bridge.formats.file_plans import is_state
from megatron.bridge.formats.iterations import Iteration, iterations, tracked_iteration
from megatron.bridge.formats.torch_dist.index_format import TORCH_DIST_SUFFIX, IndexFormat
from megatron.bridge.formats.torch_dist.reader import TorchDistCheckpoint
from megatron.bridge.operations.amounts import FileSize, TensorSummary
from megatron.bridge.tensors.spec import TensorSpec
from megatron.bridge.text.document import UNSTATED, stated


@dataclass(frozen=True)
class MegatronReport:
    """A distributed checkpoint, as its index describes it.

    Attributes:
        folder: of the iteration.
        iteration: "0", or "release".
        iterations: those that lie in the folder that was given; none in that of one iteration.
        tracked_iteration: the one of them that the tracker file names; None without a usable one.
        architecture: that of the recorded config.
        config_record: whether a record keeps the Hugging Face config.
        other_record: whether the record is of another program.
        hf_model_id: the model that the record names.
        megatron: the weights together.
        state: the other tensors together, which are state of training.
        files: of data.
        tensors: the weights one by one.
        object_names: of what is not a tensor.
        index: torch_dist, or another format with such an index.
    """

    format: Literal["megatron"] = field(default="megatron", init=False)
    source: str
    folder: Path
    iteration: str
    iterations: tuple[str, ...]
    tracked_iteration: str | None
    architecture: str | None
    config_record: bool
    other_record: bool
    hf_model_id: str | None
    megatron: TensorSummary
    state: TensorSummary
    files: tuple[FileSize, ...]
    tensors: tuple[TensorSpec, ...]
    object_names: tuple[str, ...] = field(metadata=UNSTATED)
    index: IndexFormat = field(metadata=UNSTATED)

    @stated
    def checkpoint_format(self) -> str:
        """The name of the format."""
        return self.index.name

    @stated
    def exportable(self) -> bool:
        """Whether its keys are those of megatron-core."""
        return self.index.is_torch_dist

    @stated
    def objects(self) -> int:
        """How many entries are not tensors."""
        return len(self.object_names)


def inspect_megatron(source: Path, iteration: Iteration | None = None) -> MegatronReport:
    """Look at an iteration of a checkpoint, or at the folder of one.

    A format that is not torch_dist is shown if its index can be read.

    Args:
        source: the folder.
        iteration: see `iteration_folder`.

    Raises:
        CheckpointError: as in `iteration_folder`, or the checkpoint cannot be read.
        InputError: as in `iteration_folder`.
    """
    checkpoint = TorchDistCheckpoint(source, iteration)
    folder = checkpoint.folder
    several = folder.absolute() != source.absolute()
    record = read_record(folder)
    hf = None if record is None else record.hf
    weights = [spec for key, spec in checkpoint.tensors.items() if not is_state(key)]
    state = [spec for key, spec in checkpoint.tensors.items() if is_state(key)]
    files = sorted(folder.glob(f"*{TORCH_DIST_SUFFIX}"))
    return MegatronReport(
        source=str(source),
        folder=folder,
        iteration=_iteration(folder.name),
        iterations=tuple(iterations(source)) if several else (),
        tracked_iteration=_tracked(source) if several else None,
        architecture=None if hf is None else hf.architecture,
        config_record=hf is not None,
        other_record=record is not None and hf is None,
        hf_model_id=None if record is None else record.hf_model_id,
        megatron=TensorSummary.of(weights),
        state=TensorSummary.of(state),
        files=tuple(FileSize(file.name, file.stat().st_size) for file in files),
        tensors=tuple(weights),
        object_names=tuple(checkpoint.objects),
        index=checkpoint.format,
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
