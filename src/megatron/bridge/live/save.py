"""Live Megatron models to Hugging Face folders."""

from collections.abc import Sequence
from pathlib import Path

import torch

from megatron.bridge.dtypes import DType, weight_dtype
from megatron.bridge.engine.stream import write_files
from megatron.bridge.formats.hf_folder import side_file_copies, weight_files
from megatron.bridge.live.local_tensors import LiveTensors
from megatron.bridge.live.sharded_state import Ranks
from megatron.bridge.live.weights import plan_of_model
from megatron.bridge.models.conversion.casting import EXACTLY, Casting
from megatron.bridge.models.conversion.transfer import fill_export
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.progress import Progress
from megatron.bridge.target.interruption import done_means_done
from megatron.bridge.target.staging import staged_folder
from megatron.bridge.target.targets import check_target
from megatron.bridge.tensors.arrays import Array
from megatron.bridge.tensors.boxes import Box


@done_means_done()
def save_folder(
    model: Sequence[torch.nn.Module],
    target: Path,
    reference: PreTrainedVLM,
    *,
    experts: str | None = None,
    side_files: bool,
    dtype: DType | None = None,
    casting: Casting = EXACTLY,
    force: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write the weights of a model as a folder laid out like `reference`.

    Of several ranks, all of which have to call it, the first writes.

    Args:
        model: the chunks of this rank.
        target: the folder, which is complete or not there. What a folder holds that is no model
            stays in it.
        reference: also where the tensors come from that the plan carries over.
        experts: see `plan_of_model`.
        side_files: whether everything else in the folder is copied, too.
        dtype: of the tensors, and then config.json states it; None leaves both.
        casting: of values that the dtypes in the files do not hold.
        force: replace a target that holds a model.
        progress: is told how many bytes are written.

    Raises:
        TargetExists: see `check_target`; `force` is not set.
        InputError: this rank does not hold all of the model.
        InexactCast: see `casting`.
    """

    def write() -> None:
        check_target(target, [reference.name_or_path], force=force, beside_files=True)
        plan = plan_of_model(reference, model, experts=experts, dtype=dtype)
        source = LiveTensors(model, plan)

        def fill(name: str, box: Box, out: Array) -> None:
            fill_export(plan, name, box, out, source, lambda: reference.weights, casting)

        files = [*weight_files(plan.hf, reference)]
        if side_files:
            stated = None if dtype is None else weight_dtype(dtype)
            files += side_file_copies(reference, dtype=stated)
        with staged_folder(target, force=force, beside_files=True) as staged:
            write_files(staged, files, fill, progress)

    Ranks().first(write)
