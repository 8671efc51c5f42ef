"""Files to files: a Hugging Face folder to a Megatron checkpoint and back, by the plan.

Neither direction builds a model, needs a GPU or starts a process group; memory is bounded by a
budget. Nothing is written before the plan is proven, and a target appears complete or not at all.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.bridge.checkpoint.fingerprint import hf_fingerprint, megatron_fingerprint
from megatron.bridge.checkpoint.hf_folder import side_file_copies, weight_files
from megatron.bridge.checkpoint.interruption import done_means_done
from megatron.bridge.checkpoint.plans import main_dtype, plan_export, plan_of
from megatron.bridge.checkpoint.run import Conversion, Run, Written
from megatron.bridge.checkpoint.targets import check_target
from megatron.bridge.errors import InputError
from megatron.bridge.models.catalog import bridge_for
from megatron.bridge.models.conversion.boxes import Box
from megatron.bridge.models.conversion.model_bridge import PlanOptions
from megatron.bridge.models.conversion.plan import ConversionPlan, TensorSpec
from megatron.bridge.models.hf_pretrained.fp8 import BlockFP8, check_scales
from megatron.bridge.models.hf_pretrained.tensors import TensorIndex, TensorInfo
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM

if TYPE_CHECKING:
    import torch


_DEFAULTS = Run()


@dataclass(frozen=True)
class Converted:
    """What a conversion did.

    written: bytes that were written, taken over from an earlier run and read back.
    dropped: tensors of a Megatron checkpoint that are no weights (optimizer state).
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
    inexact: tuple[tuple[str, float], ...] = ()


@done_means_done()
def import_checkpoint(
    source: PreTrainedVLM, target: Path, *, experts: str | None = None, run: Run = _DEFAULTS
) -> Converted:
    """Write `source` as a Megatron checkpoint: target/iter_0000000 and the tracker file.

    The weights of an FP8 release are dequantized to BF16. experts: how the source's routed experts
    lie (ExpertLayout), where square shapes cannot tell.
    Raises PlanError, CheckpointError or ConfigError before anything is written, TargetExists if
    `target` exists and is not to be replaced.
    """
    from megatron.bridge.checkpoint.megatron_folder import megatron_files
    from megatron.bridge.checkpoint.torch_dist_reader import TorchDistCheckpoint
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
        bridge.source,
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
    reference: PreTrainedVLM,
    *,
    experts: str | None = None,
    fp8: bool = False,
    run: Run = _DEFAULTS,
) -> Converted:
    """Write the Megatron checkpoint `source` as a Hugging Face folder laid out like `reference`.

    Names, shapes, dtypes, shards and side files are those of the reference; where it holds no
    weights, the dtype is the checkpoint's. What the checkpoint has no place for, such as the MTP
    layer of a model that was trained without it, comes from the reference.

    experts: another disk layout of routed experts (ExpertLayout). fp8: quantize what the reference
    has quantized; without it the weights are BF16, and config.json says nothing else. Raises
    PlanError, InputError or one of its kinds before anything is written, TargetExists if `target`
    exists and is not to be replaced.
    """
    from megatron.bridge.checkpoint.fp8_writer import Requantizer, fp8_reference
    from megatron.bridge.checkpoint.torch_dist_reader import TorchDistCheckpoint
    from megatron.bridge.models.conversion.transfer import fill_hf

    check_target(target, [source, reference.name_or_path], force=run.force)
    if fp8 and experts is not None:
        raise InputError(
            "FP8 files are written in the layout of their reference: fp8 and experts exclude each "
            "other"
        )
    quantized = fp8_reference(reference) if fp8 else None
    checkpoint = TorchDistCheckpoint(source)
    plan, dropped = plan_export(checkpoint, reference, experts)
    checkpoint.locate(plan.megatron)
    if fp8 or plan.carried:
        check_scales(reference.weights)

    def fill_weight(name: str, box: Box, out: "torch.Tensor") -> None:
        if name in plan.carried:
            reference.weights.read_into(name, box, out)
        else:
            fill_hf(plan, name, box, out, checkpoint)

    requantizer = None if quantized is None else Requantizer(quantized, fill_weight)
    rows_multiple = {} if requantizer is None else requantizer.rows_multiple
    hf = plan.hf if quantized is None else _specs(quantized.index)
    files = (
        *weight_files(
            hf,
            reference,
            max_shard_bytes=run.max_shard_bytes,
            piece_bytes=run.budget.piece_bytes,
            rows_multiple=rows_multiple,
        ),
        *side_file_copies(reference, quantized=fp8),
    )
    written = run.write(
        target,
        Conversion(
            "export",
            {"experts": experts, "fp8": fp8},
            {
                "source": megatron_fingerprint(source),
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
    )


def _specs(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(name, info.shape, info.dtype) for name, info in tensors.items()}
