"""Live Megatron models to Hugging Face folders."""

from pathlib import Path

import torch

from megatron.bridge.checkpoint.hf_folder import side_file_copies, weight_files
from megatron.bridge.checkpoint.interruption import done_means_done
from megatron.bridge.checkpoint.live_model import LiveTensors
from megatron.bridge.checkpoint.staging import staged_folder
from megatron.bridge.checkpoint.stream import write_files
from megatron.bridge.models.conversion.boxes import Box
from megatron.bridge.models.conversion.casting import Casting
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.models.conversion.transfer import fill_export
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM


@done_means_done()
def save_folder(
    source: LiveTensors,
    target: Path,
    plan: ConversionPlan,
    reference: PreTrainedVLM,
    casting: Casting,
    *,
    side_files: bool,
    dtype: str | None = None,
    force: bool = False,
) -> None:
    """Write the weights of a model as a folder laid out like `reference`.

    Args:
        source: what the model holds.
        target: the folder, which is complete or not there.
        plan: of the model, with the dtypes that the files will have.
        reference: also where the tensors come from that the plan carries over.
        casting: of values that the dtypes in the files do not hold.
        side_files: whether everything else in the folder is copied, too.
        dtype: safetensors' name of the dtype that config.json is to state; None leaves it.
        force: replace a target that exists.

    Raises:
        TargetExists: the target exists, and `force` is not set.
        InputError: this rank does not hold all of the model.
        InexactCast: see `casting`.
    """

    def fill(name: str, box: Box, out: torch.Tensor) -> None:
        fill_export(plan, name, box, out, source, lambda: reference.weights, casting)

    files = [*weight_files(plan.hf, reference)]
    if side_files:
        files += side_file_copies(reference, dtype=dtype)
    with staged_folder(target, force=force) as staged:
        write_files(staged, files, fill)
