"""Two checkpoints, tensor by tensor, bit by bit: Hugging Face or Megatron files on either side.

Both sides are read in blocks of bounded size; nothing is converted on disk, no model is built.
"""

from __future__ import annotations

import filecmp
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron.bridge.checkpoint.iterations import is_megatron_checkpoint
from megatron.bridge.errors import InputError
from megatron.bridge.models.catalog import bridge_for
from megatron.bridge.models.conversion.boxes import Box, volume
from megatron.bridge.models.conversion.plan import ConversionPlan, TensorSpec
from megatron.bridge.models.hf_pretrained.config import CONFIG_FILE
from megatron.bridge.models.hf_pretrained.fp8 import CONFIG_KEY
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.progress import Progress, Silent

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from megatron.bridge.checkpoint.torch_dist_reader import TorchDistCheckpoint
    from megatron.bridge.models.conversion.transfer import Read
    from megatron.bridge.verification.difference import Difference

type Kind = Literal["huggingface", "megatron"]
type Source = PreTrainedVLM | TorchDistCheckpoint

_OPTIMIZER_PREFIX = "optimizer."


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """One tensor that is not the same on both sides.

    what: "shape", "dtype" or "bits". a, b: the shape or dtype on each side; for bits, empty.
    elements: how many of `of` elements have other bits. max_abs: their largest distance, infinite
    where a NaN or an infinity differs.
    """

    name: str
    what: Literal["shape", "dtype", "bits"]
    a: str = ""
    b: str = ""
    elements: int = 0
    of: int = 0
    max_abs: float = 0.0


@dataclass(frozen=True, slots=True)
class SideFileDifference:
    """A file beside the weights that differs: in content, or it is on one side only."""

    file: str
    what: Literal["content", "only in a", "only in b"]


@dataclass
class VerifyReport:
    """What comparing two checkpoints found.

    compared, equal: tensors. compared_bytes: of tensor data on one side. padding: elements of the
    Megatron side that stand for no Hugging Face element and were not compared. ignored: tensors
    of a Megatron checkpoint that are no weights (optimizer state). side_files: for information,
    None unless both sides are Hugging Face folders.
    """

    a: str
    b: str
    a_kind: Kind
    b_kind: Kind
    compared: int = 0
    equal: int = 0
    compared_bytes: int = 0
    different: list[TensorDifference] = field(default_factory=list)
    only_in_a: list[str] = field(default_factory=list)
    only_in_b: list[str] = field(default_factory=list)
    padding: int = 0
    ignored: list[str] = field(default_factory=list)
    side_files: list[SideFileDifference] | None = None

    @property
    def identical(self) -> bool:
        """Whether both sides hold the same tensors, all bits equal."""
        return not (self.different or self.only_in_a or self.only_in_b)


def verify(
    a: str | os.PathLike[str], b: str | os.PathLike[str], progress: Progress | None = None
) -> VerifyReport:
    """Compare two checkpoints; each a Hugging Face folder or hub id, or a Megatron folder.

    Files of different formats are compared as Hugging Face tensors, through the plan that `export`
    would follow. FP8 files are compared as they are with files quantized in the same way, and as
    the BF16 weights that they stand for with anything else. Raises InputError for what cannot be
    read, PlanError for a Hugging Face side that cannot be converted; differences are no errors but
    in the report.
    """
    left, right = _open(a), _open(b)
    shown = progress or Silent()
    report = VerifyReport(os.fspath(a), os.fspath(b), _kind(left), _kind(right))
    if isinstance(left, PreTrainedVLM):
        if isinstance(right, PreTrainedVLM):
            as_stored = _stated_quantization(left) == _stated_quantization(right)
            here, there = (_hf_side(hf, as_stored=as_stored) for hf in (left, right))
            _compare(report, here, there, shown)
            report.side_files = list(_side_file_differences(left, right))
        else:
            _across(report, left, right, shown, hf_is_a=True)
    elif isinstance(right, PreTrainedVLM):
        _across(report, right, left, shown, hf_is_a=False)
    else:
        _compare(report, _megatron_side(left, report), _megatron_side(right, report), shown)
    return report


@dataclass(frozen=True)
class _Side:
    tensors: Mapping[str, TensorSpec]
    read: Read


def _open(reference: str | os.PathLike[str]) -> Source:
    folder = Path(reference).expanduser()
    if is_megatron_checkpoint(folder):
        from megatron.bridge.checkpoint.torch_dist_reader import TorchDistCheckpoint

        return TorchDistCheckpoint(folder)
    hf = PreTrainedVLM.from_pretrained(reference)
    if not hf.has_weights:
        raise InputError(
            f"{hf.name_or_path}: no weights to compare: neither *.safetensors files nor a Megatron "
            "checkpoint"
        )
    return hf


def _kind(source: Source) -> Kind:
    return "huggingface" if isinstance(source, PreTrainedVLM) else "megatron"


def _stated_quantization(hf: PreTrainedVLM) -> Any:
    """What config.json says of it; files alone are compared as they are."""
    if not (hf.folder / CONFIG_FILE).exists():
        return None
    return hf.hf_config.data.get(CONFIG_KEY)


def _hf_side(hf: PreTrainedVLM, *, as_stored: bool = False) -> _Side:
    """The weights of a folder, dequantized unless they are wanted as they are stored."""
    tensors = hf.tensors if as_stored else hf.weights
    specs = {name: TensorSpec(name, info.shape, info.dtype) for name, info in tensors.items()}
    return _Side(specs, tensors.read)


def _weights(checkpoint: TorchDistCheckpoint, report: VerifyReport) -> dict[str, TensorSpec]:
    weights = {}
    for key, spec in checkpoint.tensors.items():
        if key.startswith(_OPTIMIZER_PREFIX):
            report.ignored.append(key)
        else:
            weights[key] = spec
    return weights


def _megatron_side(checkpoint: TorchDistCheckpoint, report: VerifyReport) -> _Side:
    return _Side(_weights(checkpoint, report), checkpoint.read)


def _across(
    report: VerifyReport,
    hf: PreTrainedVLM,
    checkpoint: TorchDistCheckpoint,
    shown: Progress,
    *,
    hf_is_a: bool,
) -> None:
    """Compare a Hugging Face folder with what `export` would make of a Megatron checkpoint."""
    from megatron.bridge.models.conversion.transfer import read_hf

    found = _weights(checkpoint, report)
    bridge = bridge_for(hf.hf_config.architecture)
    plan = bridge.plan(hf.hf_config, hf.weights, bridge.options_of_checkpoint(found))
    report.padding = sum(volume(box) for _, box in plan.padding)

    only_in_megatron = report.only_in_b if hf_is_a else report.only_in_a
    only_in_megatron.extend(key for key in found if key not in plan.megatron)
    unusable = _unusable_keys(report, plan, found, hf_is_a=hf_is_a)

    here = _hf_side(hf)
    absent = {copy.hf_name for copy in plan.copies if copy.megatron_key in unusable}
    absent |= set(plan.carried)
    only_in_hf = report.only_in_a if hf_is_a else report.only_in_b
    only_in_hf.extend(plan.carried)
    comparable = {name: spec for name, spec in here.tensors.items() if name not in absent}

    def read_there(name: str, box: Box) -> torch.Tensor:
        return read_hf(plan, name, box, checkpoint.read)

    there = _Side(comparable, read_there)
    here = _Side(comparable, here.read)
    _compare(report, *((here, there) if hf_is_a else (there, here)), shown)


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


def _compare(report: VerifyReport, a: _Side, b: _Side, shown: Progress) -> None:
    report.only_in_a.extend(name for name in a.tensors if name not in b.tensors)
    report.only_in_b.extend(name for name in b.tensors if name not in a.tensors)
    common = [name for name in a.tensors if name in b.tensors]
    shown.start("verify", sum(a.tensors[name].nbytes for name in common))
    for name in common:
        spec, other = a.tensors[name], b.tensors[name]
        report.compared += 1
        if (spec.shape, spec.dtype) != (other.shape, other.dtype):
            report.different.append(_described(name, spec, other))
            shown.advance(spec.nbytes)
            continue
        found = _bits(spec, a.read, b.read, shown.advance)
        report.compared_bytes += spec.nbytes
        if found.elements:
            report.different.append(
                TensorDifference(
                    name,
                    "bits",
                    elements=found.elements,
                    of=prod(spec.shape),
                    max_abs=found.max_abs,
                )
            )
        else:
            report.equal += 1


def _bits(spec: TensorSpec, a: Read, b: Read, advance: Callable[[int], None]) -> Difference:
    from megatron.bridge.verification.difference import Difference, blocks, difference

    total = Difference()
    for box in blocks(spec.shape, spec.dtype):
        block = a(spec.name, box)
        total += difference(block, b(spec.name, box))
        advance(block.nbytes)
    return total


def _described(name: str, a: TensorSpec, b: TensorSpec) -> TensorDifference:
    if a.shape != b.shape:
        return TensorDifference(name, "shape", _shape(a.shape), _shape(b.shape))
    return TensorDifference(name, "dtype", a.dtype, b.dtype)


def _shape(shape: Sequence[int]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _side_file_differences(a: PreTrainedVLM, b: PreTrainedVLM) -> Iterator[SideFileDifference]:
    in_a, in_b = set(a.side_files), set(b.side_files)
    for file in sorted(in_a | in_b):
        if file not in in_b:
            yield SideFileDifference(str(file), "only in a")
        elif file not in in_a:
            yield SideFileDifference(str(file), "only in b")
        elif not filecmp.cmp(a.folder / file, b.folder / file, shallow=False):
            yield SideFileDifference(str(file), "content")
