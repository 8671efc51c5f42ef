"""Results as JSON documents. docs/reference/cli.md describes each; keys are never removed.

Numbers that are not finite have no JSON form: they are null. Seconds are wall time, bytes are of
tensor data without headers.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.bridge.cli.units import gigabytes_per_second
from megatron.bridge.errors import BridgeError

if TYPE_CHECKING:
    from megatron.bridge.models.hf_pretrained.quantization import BlockFP8
    from megatron.bridge.operations.convert import Converted
    from megatron.bridge.operations.inspection.hf_report import HFReport
    from megatron.bridge.operations.inspection.megatron_report import MegatronReport
    from megatron.bridge.operations.inspection.summary import FileSummary, TensorSummary
    from megatron.bridge.operations.verification.distance import Distance
    from megatron.bridge.operations.verification.logits import CompareReport
    from megatron.bridge.operations.verification.report import FastReport, VerifyReport

type Document = dict[str, Any]


def hf_document(report: HFReport) -> Document:
    """`inspect` of a Hugging Face model."""
    plan = report.plan
    return {
        "format": "huggingface",
        "source": report.source,
        "folder": str(report.folder),
        "architecture": report.architecture,
        "model_type": report.model_type,
        "bridge": report.bridge,
        "origin": report.origin,
        "hf": None if report.hf is None else summary_document(report.hf),
        "shards": _files(report.shards),
        "side_files": list(report.side_files),
        **{key: fact.value for key, fact in report.description.items()},
        "filled_in": dict(report.filled_in),
        "tied": report.tied,
        "quantization": _quantization(report.quantization),
        "dtypes_assumed": report.dtypes_assumed,
        "carried": {} if plan is None else dict(plan.carried),
        "proven": report.problem is None,
        "problems": _problems(report.problem),
        "message": None if report.problem is None else str(report.problem),
        "megatron": (
            None if plan is None else {"keys": len(plan.megatron), "bytes": plan.megatron_bytes}
        ),
        "rows": [
            {
                "megatron": row.megatron,
                "hf": list(row.hf),
                "layout": row.layout,
                "count": row.count,
            }
            for row in report.rows
        ],
    }


def megatron_document(report: MegatronReport) -> Document:
    """`inspect` of a Megatron checkpoint."""
    return {
        "format": "megatron",
        "source": report.source,
        "folder": str(report.folder),
        "iteration": report.iteration,
        "iterations": list(report.iterations),
        "tracked_iteration": report.tracked,
        "checkpoint_format": report.format.name,
        "exportable": report.format.is_torch_dist,
        "architecture": report.architecture,
        "config_record": report.config_record,
        "other_record": report.other_record,
        "hf_model_id": report.hf_model_id,
        "megatron": summary_document(report.megatron),
        "state": summary_document(report.state),
        "files": [{"name": name, "bytes": size} for name, size in report.files.items()],
        "objects": len(report.objects),
        "tensors": [
            {"key": key, "shape": list(spec.shape), "dtype": spec.dtype}
            for key, spec in report.tensors.items()
        ],
    }


def conversion_document(command: str, source: str, done: Converted, seconds: float) -> Document:
    """`import` and `export`; keys and bytes are those of the side that was written."""
    plan = done.plan
    written = plan.megatron if command == "import" else done.hf
    hf_bytes = sum(spec.nbytes for spec in done.hf.values())
    size = plan.megatron_bytes if command == "import" else hf_bytes
    moved = max(0, size - done.written.resumed_bytes)
    return {
        "command": command,
        "source": source,
        "target": str(done.target),
        "reference": done.reference,
        "architecture": done.architecture,
        "hf": {"keys": len(done.hf), "bytes": hf_bytes},
        "megatron": {"keys": len(plan.megatron), "bytes": plan.megatron_bytes},
        "quantization": _quantization(done.quantization),
        "written": {
            "bytes": done.written.written_bytes,
            "resumed_bytes": done.written.resumed_bytes,
            "verified": done.written.checked,
        },
        "carried": dict(plan.carried),
        "dropped": list(done.dropped),
        "left_out": list(done.left_out),
        "side_files": list(done.side_files),
        "inexact": [{"name": name, "max_abs_error": error} for name, error in done.inexact],
        "keys": len(written),
        "bytes": size,
        "seconds": seconds,
        "gigabytes_per_second": gigabytes_per_second(moved, seconds),
    }


def verify_document(report: VerifyReport, seconds: float) -> Document:
    """`verify`."""
    side_files = report.side_files
    return {
        "a": {"source": report.a, "format": report.a_kind},
        "b": {"source": report.b, "format": report.b_kind},
        "identical": report.identical,
        "compared": report.compared,
        "equal": report.equal,
        "bytes": report.compared_bytes,
        "different": [
            {
                "name": tensor.name,
                "what": tensor.what,
                "a": tensor.a or None,
                "b": tensor.b or None,
                "elements": tensor.elements if tensor.what == "bits" else None,
                "of": tensor.of if tensor.what == "bits" else None,
                "max_abs_diff": _finite(tensor.max_abs) if tensor.what == "bits" else None,
            }
            for tensor in report.different
        ],
        "only_in_a": report.only_in_a,
        "only_in_b": report.only_in_b,
        "padding_elements": report.padding,
        "ignored": report.ignored,
        "carried": report.carried,
        "side_files": (
            None if side_files is None else [{"file": f.file, "what": f.what} for f in side_files]
        ),
        "seconds": seconds,
    }


def verify_fast_document(report: FastReport) -> Document:
    """`verify --fast`; bytes are of files."""
    source = None
    if report.source is not None:
        source = {
            "source": report.source,
            "format": report.source_kind,
            "changes": report.source_changes,
        }
    return {
        "target": {"source": report.target, "format": report.target_kind},
        "converted_from": source,
        "identical": report.identical,
        "files": report.files,
        "bytes": report.nbytes,
        "different": [
            {
                "file": found.file,
                "offset": found.offset,
                "bytes": found.nbytes,
                "problem": found.problem,
                "tensors": list(found.tensors),
            }
            for found in report.different
        ],
        "seconds": report.seconds,
    }


def compare_document(report: CompareReport) -> Document:
    """`compare`."""
    logits = report.logits
    return {
        "source": report.source,
        "architecture": report.architecture,
        "dtype": report.dtype,
        "prompt": report.prompt,
        "image": report.image,
        "tokens": report.tokens,
        "image_tokens": report.image_tokens,
        "agrees": report.agrees,
        "tolerance": report.tolerance,
        "logits": {
            **_distance(logits),
            "kl": _finite(logits.kl),
            "top1_agreement": logits.top1_agreement,
        },
        "layers": [{"layer": number, **_distance(d)} for number, d in enumerate(report.layers)],
        "next_token": {
            "hf": {"id": report.hf_next.id, "text": report.hf_next.text},
            "megatron": {"id": report.megatron_next.id, "text": report.megatron_next.text},
        },
        "seconds": {"hf": report.hf_seconds, "megatron": report.megatron_seconds},
    }


def made_model_document(family: str, out: Path, seed: int) -> Document:
    """`make-model`: what lies in the new folder."""
    from megatron.bridge.models.hf_pretrained.tensors import TensorIndex
    from megatron.bridge.operations.inspection.summary import TensorSummary

    tensors = TensorIndex.from_folder(out)
    return {
        "family": family,
        "out": str(out),
        "seed": seed,
        "hf": summary_document(TensorSummary.of(tensors.values())),
        "files": sorted(path.name for path in out.iterdir()),
    }


def summary_document(summary: TensorSummary) -> Document:
    """How many tensors and bytes, in which dtypes."""
    return {
        "keys": summary.keys,
        "bytes": summary.bytes,
        "dtypes": {
            name: {"keys": keys, "bytes": size} for name, (keys, size) in summary.dtypes.items()
        },
    }


def _files(files: Iterable[FileSummary]) -> list[Document]:
    return [{"name": file.name, "keys": file.keys, "bytes": file.bytes} for file in files]


def _quantization(quantization: BlockFP8 | None) -> Document | None:
    if quantization is None:
        return None
    return {"method": "fp8", "block": [quantization.rows, quantization.columns]}


def _problems(problem: BridgeError | None) -> list[str]:
    if problem is None:
        return []
    return list(problem.problems) or [str(problem)]


def _distance(distance: Distance) -> Document:
    return {
        "max_abs_diff": _finite(distance.max_abs),
        "mean_abs_diff": _finite(distance.mean_abs),
        "largest": _finite(distance.largest),
        "relative_rms_diff": _finite(distance.relative_rms),
        "cosine": _finite(distance.cosine),
    }


def _finite(number: float) -> float | None:
    return number if isfinite(number) else None
