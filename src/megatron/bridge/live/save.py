"""Live Megatron models to Hugging Face folders."""

from collections.abc import Sequence
from pathlib import Path

import torch

from megatron.bridge.dtypes import DType, weight_dtype
from megatron.bridge.engine.pieces import OutputFile
from megatron.bridge.engine.stream import write_files
from megatron.bridge.exchange.roster import Roster
from megatron.bridge.formats.hf_folder import side_file_copies, weight_files
from megatron.bridge.live.local_tensors import LiveTensors, LocalTensor
from megatron.bridge.live.shard_transfer import write_by_ranks
from megatron.bridge.live.shared_files import SharedFiles
from megatron.bridge.live.shared_staging import staged_by_ranks
from megatron.bridge.live.weights import plan_of_model, planned_tensors
from megatron.bridge.models.conversion.casting import EXACTLY, Casting
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.models.conversion.transfer import fill_export
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.progress import Progress
from megatron.bridge.runtime.parallel import ranks_of_model
from megatron.bridge.target.interruption import done_means_done
from megatron.bridge.target.targets import check_target
from megatron.bridge.tensors.arrays import Array
from megatron.bridge.tensors.boxes import Box
from megatron.bridge.tensors.source import Source


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

    Every rank calls this, and writes what it holds the main replica of to its place in the files.

    Args:
        model: the chunks of this rank.
        target: the folder, which is complete or not there; all ranks see it. What a folder holds
            that is no model stays in it.
        reference: also where the tensors come from that the plan carries over.
        experts: see `plan_of_model`.
        side_files: whether everything else in the folder is copied, too.
        dtype: of the tensors, and then config.json states it; None leaves both.
        casting: of values that the dtypes in the files do not hold.
        force: replace a target that holds a model.
        progress: is told how many bytes are written.

    Raises:
        TargetExists: see `check_target`; `force` is not set.
        PlanError: the ranks do not hold the model.
        InexactCast: see `casting`.
        InputError: another rank cannot go on.
    """
    ranks = ranks_of_model()

    def planned() -> tuple[ConversionPlan, list[LocalTensor]]:
        check_target(target, [reference.name_or_path], force=force, beside_files=True)
        plan = plan_of_model(reference, model, experts=experts, dtype=dtype)
        return plan, planned_tensors(model, plan)

    plan, tensors = ranks.together(planned)
    Roster.of(ranks, tensors).check_held_once(plan.megatron)
    main = [one for one in tensors if one.is_main]
    files = [*weight_files(plan.hf, reference)]
    if side_files:
        stated = None if dtype is None else weight_dtype(dtype)
        files += side_file_copies(reference, dtype=stated)
    with staged_by_ranks(target, ranks, force=force, beside_files=True) as staged:
        if ranks.count > 1:
            shared = SharedFiles(staged, files, plan.hf)
            write_by_ranks(shared, ranks, plan, main, lambda: reference.weights, casting, progress)
        else:
            _write_alone(staged, files, plan, LiveTensors(main), reference, casting, progress)


def _write_alone(
    folder: Path,
    files: Sequence[OutputFile],
    plan: ConversionPlan,
    source: Source,
    reference: PreTrainedVLM,
    casting: Casting,
    progress: Progress | None,
) -> None:
    """From the first byte of each file to the last, past the page cache where that is faster."""

    def fill(name: str, box: Box, out: Array) -> None:
        fill_export(plan, name, box, out, source, lambda: reference.weights, casting)

    write_files(folder, files, fill, progress)
