"""Files to files: a Hugging Face folder to a Megatron checkpoint and back, by the plan.

Neither direction builds a model, needs a GPU or starts a process group; memory is bounded by a
budget. Nothing is written before the plan is proven, and a target appears complete or not at all.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.bridge.dtypes import DType, weight_dtype
from megatron.bridge.errors import InputError
from megatron.bridge.formats.file_plans import left_out, plan_export, plan_of, recorded_model
from megatron.bridge.formats.hf_folder import side_file_copies, weight_files
from megatron.bridge.formats.iterations import Iteration
from megatron.bridge.models.catalog import bridge_for
from megatron.bridge.models.conversion.model_bridge import PlanOptions
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.models.hf_pretrained.fp8 import check_scales
from megatron.bridge.models.hf_pretrained.quantization import BlockFP8
from megatron.bridge.models.hf_pretrained.tensors import TensorIndex, TensorInfo
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.target.fingerprint import hf_fingerprint, megatron_fingerprint
from megatron.bridge.target.interruption import done_means_done
from megatron.bridge.target.run import Conversion, Run, Written
from megatron.bridge.target.targets import check_target
from megatron.bridge.tensors.boxes import Box
from megatron.bridge.tensors.spec import TensorSpec, main_dtype

if TYPE_CHECKING:
    import torch


_DEFAULTS = Run()
_WAYS_OUT = '--dtype float32 (dtype="float32") keeps them, --round (round=True) rounds them'
_WAYS_OUT_OF_FP8 = "--round (round=True) rounds them before they are quantized"


@dataclass(frozen=True)
class Converted:
    """What a conversion did.

    written: bytes that were written, taken over from an earlier run and read back.
    dropped: tensors of a Megatron checkpoint that are no weights (optimizer state).
    left_out: names of tensors that the config has and an export without a reference cannot take
        from anywhere (a layer that the model was trained without).
    reference, side_files: of an export, what it is laid out like, None for the config that the
        checkpoint keeps; the files beside the weights and their index.
    inexact: tensors that will not come back exactly, with the largest error; only norms that
        Megatron keeps as w - 1, and only for values outside of [0.5, 2].
    hf: tensors of the Hugging Face files as they lie there; those of the plan are dequantized.
    quantization: of the Hugging Face files, None if they are not quantized.
    """

    architecture: str
    target: Path
    plan: ConversionPlan
    hf: Mapping[str, TensorSpec]
    written: Written
    quantization: BlockFP8 | None = None
    dropped: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    reference: str | None = None
    side_files: tuple[str, ...] = ()
    inexact: tuple[tuple[str, float], ...] = ()


@done_means_done()
def import_checkpoint(
    source: PreTrainedVLM, target: Path, *, experts: str | None = None, run: Run = _DEFAULTS
) -> Converted:
    """Write `source` as a Megatron checkpoint: target/iter_0000000 and the tracker file.

    The weights of an FP8 release are dequantized to BF16. experts: how the source's routed experts
    lie (ExpertLayout); found from their shapes if not given.
    Raises PlanError, CheckpointError or ConfigError before anything is written, TargetExists if
    `target` exists and is not to be replaced.
    """
    from megatron.bridge.formats.megatron_folder import megatron_files
    from megatron.bridge.formats.torch_dist.reader import TorchDistCheckpoint
    from megatron.bridge.models.conversion.transfer import fill_megatron, inexact_offsets

    check_target(target, [source.name_or_path], force=run.force)
    bridge = bridge_for(source.hf_config.architecture)
    plan = plan_of(source, PlanOptions(experts=experts))
    weights = source.weights
    check_scales(weights)
    files = megatron_files(
        plan,
        provider=bridge.provider,
        settings=bridge.provider_settings(
            source.hf_config, main_dtype(plan.hf.values()), source.tensors
        ),
        hf_config=source.unquantized_config,
        piece_bytes=run.budget.piece_bytes,
        max_file_bytes=run.max_shard_bytes,
    )
    inexact = tuple(inexact_offsets(plan, weights))

    def fill(key: str, box: Box, out: "torch.Tensor") -> None:
        fill_megatron(plan, key, box, out, weights)

    written = run.write(
        target,
        Conversion(
            "import",
            {"experts": experts},
            {"source": hf_fingerprint(source, side_files=False)},
            files,
            fill,
            plan.megatron.values(),
            TorchDistCheckpoint,
        ),
    )
    return Converted(
        source.hf_config.architecture,
        target,
        plan,
        _specs(source.tensors),
        written,
        source.quantization,
        inexact=inexact,
    )


@done_means_done()
def export_checkpoint(
    source: Path,
    target: Path,
    reference: PreTrainedVLM | None = None,
    *,
    iteration: Iteration | None = None,
    experts: str | None = None,
    fp8: bool = False,
    dtype: DType | None = None,
    round: bool = False,  # noqa: A002 - the name of the option
    run: Run = _DEFAULTS,
) -> Converted:
    """Write the Megatron checkpoint `source` as a Hugging Face folder laid out like `reference`.

    Names, shapes, dtypes, shards and side files are those of the reference; where it holds no
    weights, the dtypes are the checkpoint's. What the checkpoint has no place for, such as a
    layer that the model was trained without, comes from the reference.

    reference: None for the config that the checkpoint keeps, which has no tokenizer and no other
    side files. iteration: see `iteration_folder`. experts: another disk layout of routed experts
    (ExpertLayout). fp8: quantize what the reference has quantized; without it the weights are BF16,
    and config.json says nothing else. dtype: of the tensors ("bfloat16"), instead of each one's in
    the reference; what the release keeps in float32 stays so, and what comes from the reference as
    it is. round: round values that do not fit their dtype. Raises PlanError, InputError or one of
    its kinds before anything is written, TargetExists if `target` exists and is not to be replaced,
    and InexactCast, which leaves nothing behind, for a value that does not fit and is not to be
    rounded.
    """
    from megatron.bridge.formats.fp8_writer import Requantizer, fp8_reference
    from megatron.bridge.formats.torch_dist.reader import TorchDistCheckpoint
    from megatron.bridge.models.conversion.casting import Casting
    from megatron.bridge.models.conversion.transfer import fill_export

    given = reference
    check_target(
        target, [source, *([] if given is None else [given.name_or_path])], force=run.force
    )
    checkpoint = TorchDistCheckpoint(source, iteration)
    if reference is None:
        reference = recorded_model(checkpoint)
    if fp8 and experts is not None:
        raise InputError(
            "FP8 files are written in the layout of their reference: fp8 and experts exclude each "
            "other"
        )
    if fp8 and dtype is not None:
        raise InputError(
            "FP8 files have the dtypes of their reference: fp8 and dtype exclude each other"
        )
    wanted = None if dtype is None else weight_dtype(dtype)
    quantized = fp8_reference(reference) if fp8 else None
    plan, dropped = plan_export(checkpoint, reference, experts)
    if wanted is not None:
        bridge = bridge_for(reference.hf_config.architecture)
        plan = bridge.in_dtype(plan, reference.hf_config, wanted)
    casting = Casting(round, _WAYS_OUT_OF_FP8 if fp8 else _WAYS_OUT)
    checkpoint.locate(plan.megatron)
    if fp8 or plan.carried:
        check_scales(reference.weights)

    def fill_weight(name: str, box: Box, out: "torch.Tensor") -> None:
        fill_export(plan, name, box, out, checkpoint, lambda: reference.weights, casting)

    requantizer = None if quantized is None else Requantizer(quantized, fill_weight)
    rows_multiple = {} if requantizer is None else requantizer.rows_multiple
    hf = plan.hf if quantized is None else _specs(quantized.index)
    side_files = tuple(side_file_copies(reference, quantized=fp8, dtype=wanted))
    files = (
        *weight_files(
            hf,
            reference,
            max_shard_bytes=run.max_shard_bytes,
            piece_bytes=run.budget.piece_bytes,
            rows_multiple=rows_multiple,
        ),
        *side_files,
    )
    written = run.write(
        target,
        Conversion(
            "export",
            {"experts": experts, "fp8": fp8, "dtype": wanted, "round": round},
            {
                "source": megatron_fingerprint(source, iteration),
                "reference": hf_fingerprint(reference, side_files=True),
            },
            files,
            fill_weight if requantizer is None else requantizer.fill,
            hf.values(),
            TensorIndex.from_folder,
            rows_multiple,
            keep_manifest=run.keep_manifest,
        ),
    )
    return Converted(
        reference.hf_config.architecture,
        target,
        plan,
        hf,
        written,
        reference.quantization if fp8 else None,
        dropped,
        left_out(reference, plan, experts),
        None if given is None else given.name_or_path,
        tuple(file.name for file in side_files),
    )


def _specs(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(name, info.shape, info.dtype) for name, info in tensors.items()}
