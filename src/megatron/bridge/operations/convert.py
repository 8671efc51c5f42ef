"""Files to files: a Hugging Face folder to a Megatron checkpoint and back, by the plan.

Neither direction builds a model, needs a GPU or starts a process group; memory is bounded by a
budget. Nothing is written before the plan is proven, and a target appears complete or not at all.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron.bridge.dtypes import DType, weight_dtype
from megatron.bridge.errors import InputError
from megatron.bridge.formats.file_plans import (
    Sides,
    left_out,
    plan_export,
    plan_of,
    sides_of_export,
)
from megatron.bridge.formats.hf_folder import side_file_copies, weight_files
from megatron.bridge.formats.iterations import Iteration
from megatron.bridge.models.conversion.model_bridge import PlanOptions
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.models.conversion.transposed import Transposed
from megatron.bridge.models.hf_pretrained.fp8 import check_scales
from megatron.bridge.models.hf_pretrained.quantization import BlockFP8
from megatron.bridge.models.hf_pretrained.tensors import TensorIndex, TensorInfo
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.operations.amounts import TensorSummary
from megatron.bridge.target.fingerprint import hf_fingerprint, megatron_fingerprint
from megatron.bridge.target.interruption import done_means_done
from megatron.bridge.target.run import Conversion, Run, Written
from megatron.bridge.target.targets import check_target
from megatron.bridge.tensors.boxes import Box
from megatron.bridge.tensors.spec import TensorSpec, main_dtype
from megatron.bridge.text.document import UNSTATED, stated

if TYPE_CHECKING:
    from megatron.bridge.tensors.arrays import Array


_DEFAULTS = Run()
_WAYS_OUT = '--dtype float32 (dtype="float32") keeps them, --round (round=True) rounds them'
_WAYS_OUT_OF_FP8 = "--round (round=True) rounds them before they are quantized"


@dataclass(frozen=True, slots=True)
class Inexact:
    """A tensor that will not come back exactly, with the largest error."""

    name: str
    max_abs_diff: float


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What a conversion did.

    Attributes:
        reference: of an export, what it is laid out like; None for the config that the checkpoint
            keeps.
        hf: tensors as they lie in the Hugging Face files.
        megatron: tensors as they lie in the checkpoint.
        quantization: of the Hugging Face files; None if they are not quantized.
        written: bytes that were written, and taken over from an earlier run; whether they were read
            back.
        dropped: tensors of a Megatron checkpoint that are not weights (optimizer state).
        left_out: names of tensors that the config has and an export without a reference cannot take
            from anywhere (a layer that the model was trained without).
        side_files: of an export, the files beside the weights and their index.
        inexact: only norms that Megatron keeps as w - 1, and only for values outside of [0.5, 2].
        plan: what was followed; its tensors are dequantized, and have the dtypes of the Hugging
            Face side.
    """

    command: Literal["import", "export"]
    source: str
    target: Path
    reference: str | None = None
    architecture: str
    hf: TensorSummary
    megatron: TensorSummary
    quantization: BlockFP8 | None = None
    written: Written
    dropped: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    side_files: tuple[str, ...] = ()
    inexact: tuple[Inexact, ...] = ()
    seconds: float
    plan: ConversionPlan = field(metadata=UNSTATED)

    @stated
    def carried(self) -> Mapping[str, str]:
        """Tensors that have no place in the Megatron model, and why."""
        return self.plan.carried

    @property
    def result(self) -> TensorSummary:
        """The tensors of the side that was written."""
        return self.megatron if self.command == "import" else self.hf

    @stated
    def keys(self) -> int:
        """Tensors of the side that was written."""
        return self.result.keys

    @stated
    def bytes(self) -> int:
        """Bytes of tensor data on the side that was written."""
        return self.result.bytes

    @stated
    def gigabytes_per_second(self) -> float:
        """Speed of what was not taken over; 10^9 bytes are a gigabyte."""
        return max(0, self.bytes - self.written.resumed_bytes) / 1e9 / max(self.seconds, 1e-9)


@done_means_done()
def import_checkpoint(
    source: PreTrainedVLM,
    target: Path,
    *,
    experts: str | None = None,
    part: str | None = None,
    transposed: Transposed = "copy",
    run: Run = _DEFAULTS,
) -> Converted:
    """Write `source` as a Megatron checkpoint: target/iter_0000000 and the tracker file.

    The weights of an FP8 release are dequantized to BF16. What cannot be converted is refused
    before anything is written.

    Args:
        source: a Hugging Face model with its weights.
        target: the folder to make.
        experts: how the source's routed experts lie (ExpertLayout); found from their shapes if not
            given.
        part: of the model, to be a model of its own ("language"); the rest of the source is not
            read.
        transposed: how matrices are stored that lie transposed in the source: as they lie there,
            with strides that say so ("strides"), or turned ("copy").
        run: how the conversion is carried out.

    Raises:
        PlanError: files and config are not of one model.
        CheckpointError: the files of the source cannot be read or used.
        ConfigError: its config cannot be used.
        TargetExists: `target` exists and is not to be replaced.
    """
    from megatron.bridge.formats.megatron_folder import megatron_files
    from megatron.bridge.formats.torch_dist.reader import TorchDistCheckpoint
    from megatron.bridge.models.conversion.transfer import fill_megatron, inexact_offsets

    begin = time.perf_counter()
    check_target(target, [source.name_or_path], force=run.force)
    sides = Sides.of(source, part)
    plan = plan_of(sides, PlanOptions(experts=experts))
    weights = source.weights
    check_scales(weights)
    files = megatron_files(
        plan,
        provider=sides.bridge.provider,
        settings=sides.bridge.provider_settings(
            sides.config, main_dtype(plan.hf.values()), source.tensors
        ),
        hf_config=sides.recorded_config,
        place=weights.place,
        strides=transposed == "strides",
        piece_bytes=run.budget.piece_bytes,
        max_file_bytes=run.max_shard_bytes,
    )
    inexact = tuple(Inexact(*one) for one in inexact_offsets(plan, weights))

    def fill(key: str, box: Box, out: "Array") -> None:
        fill_megatron(plan, key, box, out, weights)

    written = run.write(
        target,
        Conversion(
            "import",
            {"experts": experts, "part": part, "transposed": transposed},
            {"source": hf_fingerprint(source, side_files=False)},
            files,
            fill,
            plan.megatron.values(),
            TorchDistCheckpoint,
            all_checksums=run.verify,
        ),
    )
    return Converted(
        command="import",
        source=source.name_or_path,
        target=target,
        architecture=sides.config.architecture,
        hf=TensorSummary.of(source.tensors.values()),
        megatron=TensorSummary.of(plan.megatron.values()),
        quantization=source.quantization,
        written=written,
        inexact=inexact,
        seconds=time.perf_counter() - begin,
        plan=plan,
    )


@done_means_done()
def export_checkpoint(
    source: Path,
    target: Path,
    reference: PreTrainedVLM | None = None,
    *,
    iteration: Iteration | None = None,
    experts: str | None = None,
    part: str | None = None,
    fp8: bool = False,
    dtype: DType | None = None,
    round: bool = False,  # noqa: A002 - the name of the option
    run: Run = _DEFAULTS,
) -> Converted:
    """Write the Megatron checkpoint `source` as a Hugging Face folder laid out like `reference`.

    Names, shapes, dtypes, shards and side files are those of the reference; where it holds no
    weights, the dtypes are the checkpoint's. What the checkpoint has no place for, such as a layer
    that the model was trained without, comes from the reference. What cannot be converted is
    refused before anything is written.

    Args:
        source: the folder of a checkpoint, or of one iteration.
        target: the folder to make.
        reference: None for the config that the checkpoint keeps, which has no tokenizer and no
            other side files.
        iteration: see `iteration_folder`.
        experts: another disk layout of routed experts (ExpertLayout).
        part: of the model ("language"); see `sides_of_export` for what is written.
        fp8: quantize what the reference has quantized; without it the weights are BF16, and
            config.json says nothing else.
        dtype: of the tensors ("bfloat16"), instead of each one's in the reference; what the release
            keeps in float32 stays so, and what comes from the reference as it is.
        round: round values that do not fit their dtype.
        run: how the conversion is carried out.

    Raises:
        PlanError: the checkpoint does not hold the model.
        InputError: checkpoint, reference and options do not fit together; also one of the kinds of
            this error.
        TargetExists: `target` exists and is not to be replaced.
        InexactCast: a value does not fit its dtype and is not to be rounded; nothing is left
            behind.
    """
    from megatron.bridge.formats.fp8_writer import Requantizer, fp8_reference
    from megatron.bridge.formats.torch_dist.reader import TorchDistCheckpoint
    from megatron.bridge.formats.unchanged_ranges import as_copy, ranges_of_export, with_ranges
    from megatron.bridge.models.conversion.casting import Casting
    from megatron.bridge.models.conversion.transfer import fill_export

    begin, given = time.perf_counter(), reference
    check_target(
        target, [source, *([] if given is None else [given.name_or_path])], force=run.force
    )
    checkpoint = TorchDistCheckpoint(source, iteration)
    sides = sides_of_export(checkpoint, reference, part)
    reference = sides.files
    if fp8:
        taken_out = part if sides.config is reference.hf_config else None
        _check_fp8_alone({"experts": experts, "part": taken_out, "dtype": dtype})
    wanted = None if dtype is None else weight_dtype(dtype)
    quantized = fp8_reference(reference) if fp8 else None
    plan, dropped = plan_export(checkpoint, sides, experts)
    if wanted is not None:
        plan = sides.bridge.in_dtype(plan, sides.config, wanted)
    casting = Casting(round, _WAYS_OUT_OF_FP8 if fp8 else _WAYS_OUT)
    checkpoint.locate(plan.megatron)
    if fp8 or plan.carried:
        check_scales((given or reference).weights)

    def fill_weight(name: str, box: Box, out: "Array") -> None:
        fill_export(plan, name, box, out, checkpoint, lambda: reference.weights, casting)

    requantizer = None if quantized is None else Requantizer(quantized, fill_weight)
    rows_multiple = {} if requantizer is None else requantizer.rows_multiple
    hf = plan.hf if quantized is None else _specs(quantized.index)
    side_files = tuple(side_file_copies(reference, quantized=fp8, dtype=wanted))
    weights = weight_files(
        hf,
        reference,
        max_shard_bytes=run.max_shard_bytes,
        piece_bytes=run.budget.piece_bytes,
        rows_multiple=rows_multiple,
    )
    if requantizer is None:

        def place(name: str) -> TensorInfo | None:
            return reference.weights.place(name)

        ranges = ranges_of_export(plan, checkpoint, place)
        weights = (as_copy(with_ranges(file, ranges)) for file in weights)
    files = (*weights, *side_files)
    written = run.write(
        target,
        Conversion(
            "export",
            {"experts": experts, "part": part, "fp8": fp8, "dtype": wanted, "round": round},
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
            all_checksums=run.keep_manifest,
        ),
    )
    return Converted(
        command="export",
        source=str(source),
        target=target,
        reference=None if given is None else given.name_or_path,
        architecture=reference.hf_config.architecture,
        hf=TensorSummary.of(hf.values()),
        megatron=TensorSummary.of(checkpoint.tensors[key] for key in plan.megatron),
        quantization=reference.quantization if fp8 else None,
        written=written,
        dropped=dropped,
        left_out=left_out(sides, plan, experts),
        side_files=tuple(file.name for file in side_files),
        seconds=time.perf_counter() - begin,
        plan=plan,
    )


def _check_fp8_alone(options: Mapping[str, object]) -> None:
    """Raise InputError for an option beside fp8 that asks for what only the reference decides."""
    for name, value in options.items():
        if value is not None:
            raise InputError(
                f"FP8 files have names, layout and dtypes of their reference: fp8 and {name} "
                "exclude each other; leave out one of the two"
            )


def _specs(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(name, info.shape, info.dtype) for name, info in tensors.items()}
