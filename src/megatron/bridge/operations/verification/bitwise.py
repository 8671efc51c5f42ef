"""Two checkpoints, tensor by tensor, bit by bit: Hugging Face or Megatron files on either side.

Both sides are read in blocks of bounded size; nothing is converted on disk, no model is built.
"""

from __future__ import annotations

import filecmp
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

from megatron.bridge.dtypes import numpy_dtype, widest
from megatron.bridge.engine import DEFAULT_MEMORY
from megatron.bridge.engine.stream import Budget
from megatron.bridge.errors import InexactCast, InputError
from megatron.bridge.formats.file_plans import (
    Sides,
    plan_of,
    require_common_key,
    sides_of_export,
    weight_tensors,
)
from megatron.bridge.formats.iterations import METADATA_FILE, Iteration, is_megatron_folder
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.models.hf_pretrained.config import CONFIG_FILE
from megatron.bridge.models.hf_pretrained.quantization import CONFIG_KEY
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.operations.verification.report import (
    Files,
    Format,
    SideFileDifference,
    TensorDifference,
    VerifyReport,
)
from megatron.bridge.paths import local_path
from megatron.bridge.progress import Progress, Silent
from megatron.bridge.tensors.boxes import Box, full_box, volume
from megatron.bridge.tensors.spec import TensorSpec

if TYPE_CHECKING:
    from megatron.bridge.engine.pieces import FillTensor
    from megatron.bridge.formats.torch_dist.reader import TorchDistCheckpoint
    from megatron.bridge.tensors.arrays import Array

type Checkpoint = PreTrainedVLM | TorchDistCheckpoint


def verify(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    progress: Progress | None = None,
    *,
    iteration: Iteration | None = None,
    part: str | None = None,
    memory: int = DEFAULT_MEMORY,
) -> VerifyReport:
    """Compare two checkpoints; each a Hugging Face folder or hub id, or a Megatron folder.

    Files of different formats are compared as Hugging Face tensors, through the plan that `export`
    would follow. FP8 files are compared as they are with files quantized in the same way, and as
    the BF16 weights that they stand for with anything else. Differences are in the report.

    Args:
        a: one of the checkpoints.
        b: the other one.
        progress: told of the bytes that are compared.
        iteration: of each side that holds several; see `iteration_folder`.
        part: of the model, between files of different formats; see `sides_of_export`.
        memory: bytes that buffers may take.

    Raises:
        InputError: a side cannot be read; also one of the kinds of this error.
        PlanError: a Hugging Face side cannot be converted.
    """
    begin = time.perf_counter()
    budget = Budget.of(memory)
    if iteration is not None and not any(_has_iterations(side, iteration) for side in (a, b)):
        raise InputError(
            f"neither {os.fspath(a)} nor {os.fspath(b)} holds iterations: --iteration (iteration=) "
            "means nothing for them"
        )
    left, right = (_open(side, iteration) for side in (a, b))
    if part is not None and isinstance(left, PreTrainedVLM) == isinstance(right, PreTrainedVLM):
        raise InputError(
            f"{os.fspath(a)} and {os.fspath(b)} are of one format and compared as they are: --part "
            "(part=) is for a Hugging Face folder and a Megatron checkpoint"
        )
    report = VerifyReport(Files(os.fspath(a), _format(left)), Files(os.fspath(b), _format(right)))
    if isinstance(left, PreTrainedVLM):
        if isinstance(right, PreTrainedVLM):
            as_stored = _stated_quantization(left) == _stated_quantization(right)
            here, there = (_hf_side(hf, as_stored=as_stored) for hf in (left, right))
            report.side_files = list(_side_file_differences(left, right))
        else:
            here, there = _across(report, left, right, part, hf_is_a=True)
    elif isinstance(right, PreTrainedVLM):
        there, here = _across(report, right, left, part, hf_is_a=False)
    else:
        here, there = (_megatron_side(checkpoint, report) for checkpoint in (left, right))
    _compare(report, here, there, budget, progress or Silent())
    report.seconds = time.perf_counter() - begin
    return report


@dataclass(frozen=True)
class _Side:
    tensors: Mapping[str, TensorSpec]
    fill: FillTensor


def _has_iterations(reference: str | os.PathLike[str], iteration: Iteration | None) -> bool:
    folder = local_path(reference)
    is_megatron = is_megatron_folder(folder, asked=iteration is not None)
    return is_megatron and not (folder / METADATA_FILE).is_file()


def _open(reference: str | os.PathLike[str], iteration: Iteration | None) -> Checkpoint:
    folder = local_path(reference)
    if not _has_iterations(reference, iteration):
        iteration = None
    if is_megatron_folder(folder, asked=iteration is not None):
        from megatron.bridge.formats.torch_dist.reader import TorchDistCheckpoint

        return TorchDistCheckpoint(folder, iteration)
    hf = PreTrainedVLM.from_pretrained(reference)
    if not hf.has_weights:
        raise InputError(
            f"{hf.name_or_path}: no weights to compare: neither *.safetensors files nor a Megatron "
            "checkpoint"
        )
    return hf


def _format(source: Checkpoint) -> Format:
    return "huggingface" if isinstance(source, PreTrainedVLM) else "megatron"


def _stated_quantization(hf: PreTrainedVLM) -> Any:
    """What config.json says of it; files alone are compared as they are."""
    if not (hf.folder / CONFIG_FILE).exists():
        return None
    return hf.hf_config.data.get(CONFIG_KEY)


def _hf_side(hf: PreTrainedVLM, *, as_stored: bool = False) -> _Side:
    """The weights of a folder, dequantized unless they are wanted as they are stored."""
    tensors = hf.tensors if as_stored else hf.weights
    return _Side(tensors, tensors.read_into)


def _weights(checkpoint: TorchDistCheckpoint, report: VerifyReport) -> dict[str, TensorSpec]:
    weights = weight_tensors(checkpoint)
    report.ignored.extend(key for key in checkpoint.tensors if key not in weights)
    return weights


def _megatron_side(checkpoint: TorchDistCheckpoint, report: VerifyReport) -> _Side:
    return _Side(_weights(checkpoint, report), checkpoint.read_into)


def _across(
    report: VerifyReport,
    hf: PreTrainedVLM,
    checkpoint: TorchDistCheckpoint,
    part: str | None,
    *,
    hf_is_a: bool,
) -> tuple[_Side, _Side]:
    """A Hugging Face folder, and what `export` would make of a Megatron checkpoint."""
    from megatron.bridge.models.conversion.casting import EXACTLY
    from megatron.bridge.models.conversion.transfer import fill_hf
    from megatron.bridge.tensors.arrays import copy, empty

    sides = Sides.of(hf) if part is None else sides_of_export(checkpoint, hf, part)
    weights = _weights(checkpoint, report)
    found = {key: spec for key, spec in weights.items() if key.startswith(sides.root)}
    report.ignored.extend(key for key in weights if key not in found)
    plan = plan_of(sides, sides.bridge.options_of_checkpoint(found))
    require_common_key(checkpoint, plan, sides.config)
    report.padding_elements = sum(volume(box) for _, box in plan.padding)

    only_in_megatron = report.only_in_b if hf_is_a else report.only_in_a
    only_in_megatron.extend(key for key in found if key not in plan.megatron)
    unusable = _unusable_keys(report, plan, found, hf_is_a=hf_is_a)

    here = _hf_side(sides.files)
    absent = {copy.hf_name for copy in plan.copies if copy.megatron_key in unusable}
    absent |= set(plan.carried)
    only_in_hf = report.only_in_a if hf_is_a else report.only_in_b
    only_in_hf.extend(name for name in plan.carried if name in plan.absent)
    report.carried.update({n: why for n, why in plan.carried.items() if n not in plan.absent})
    # A key that several tensors share may hold values that not every one of them would.
    comparable = {
        name: replace(spec, dtype=_common_dtype(plan, name, checkpoint))
        for name, spec in here.tensors.items()
        if name not in absent
    }

    def fill_from_hf(name: str, box: Box, out: Array) -> None:
        stored = here.tensors[name].dtype
        if out.dtype == numpy_dtype(stored):
            here.fill(name, box, out)
        else:
            array = empty(out.shape, stored)
            here.fill(name, box, array)
            copy(EXACTLY.cast(array, out.dtype, name), out)

    def fill(name: str, box: Box, out: Array) -> None:
        fill_hf(plan, name, box, out, checkpoint)

    return _Side(comparable, fill_from_hf), _Side(comparable, fill)


def _common_dtype(plan: ConversionPlan, name: str, checkpoint: TorchDistCheckpoint) -> str:
    """The dtype in which a tensor is compared: one that holds what either side has."""
    from megatron.bridge.models.conversion.transfer import read_hf

    spec = plan.hf[name]
    copies = [copy for _, copy in plan.copies_from(name, full_box(spec.shape))]
    if any(copy.offset for copy in copies):  # a small one; its key is wide whatever the files are
        try:
            read_hf(plan, name, full_box(spec.shape), checkpoint)
        except InexactCast:
            pass
        else:
            return spec.dtype
    dtypes = {plan.megatron[copy.megatron_key].dtype for copy in copies}
    return widest(spec.dtype, *dtypes) or spec.dtype


def _unusable_keys(
    report: VerifyReport,
    plan: ConversionPlan,
    found: Mapping[str, TensorSpec],
    *,
    hf_is_a: bool,
) -> set[str]:
    """Megatron keys that are missing or of another shape or dtype; they are reported here."""
    missing = {key for key in plan.megatron if key not in found}
    only_in_hf = report.only_in_a if hf_is_a else report.only_in_b
    only_in_hf.extend(
        dict.fromkeys(copy.hf_name for copy in plan.copies if copy.megatron_key in missing)
    )
    unusable = set(missing)
    for key, expected in plan.megatron.items():
        if key in found and found[key] != expected:
            pair = (expected, found[key]) if hf_is_a else (found[key], expected)
            report.different.append(_described(key, *pair))
            unusable.add(key)
    return unusable


def _compare(report: VerifyReport, a: _Side, b: _Side, budget: Budget, progress: Progress) -> None:
    from megatron.bridge.engine.comparison import compare_tensors

    report.only_in_a.extend(name for name in a.tensors if name not in b.tensors)
    report.only_in_b.extend(name for name in b.tensors if name not in a.tensors)
    common = [name for name in a.tensors if name in b.tensors]
    report.compared = len(common)
    alike = [spec for name in common if (spec := a.tensors[name]).form == b.tensors[name].form]
    report.bytes = sum(spec.nbytes for spec in alike)
    found = compare_tensors(alike, a.fill, b.fill, budget, progress)
    for name in common:
        spec = a.tensors[name]
        if name not in found:
            report.different.append(_described(name, spec, b.tensors[name]))
        elif found[name].elements:
            bits, of = found[name], prod(spec.shape)
            report.different.append(
                TensorDifference(
                    name, "bits", elements=bits.elements, of=of, max_abs_diff=bits.max_abs
                )
            )
        else:
            report.equal += 1


def _described(name: str, a: TensorSpec, b: TensorSpec) -> TensorDifference:
    return TensorDifference(name, "dtype" if a.shape == b.shape else "shape", a.form, b.form)


def _side_file_differences(a: PreTrainedVLM, b: PreTrainedVLM) -> Iterator[SideFileDifference]:
    in_a, in_b = set(a.side_files), set(b.side_files)
    for file in sorted(in_a | in_b):
        if file not in in_b:
            yield SideFileDifference(str(file), "only in a")
        elif file not in in_a:
            yield SideFileDifference(str(file), "only in b")
        elif not filecmp.cmp(a.folder / file, b.folder / file, shallow=False):
            yield SideFileDifference(str(file), "content")
