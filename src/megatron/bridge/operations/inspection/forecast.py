"""What a conversion of files will do, from headers and configs alone: nothing is written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from megatron.bridge.engine.stream import DEFAULT_MEMORY
from megatron.bridge.formats.iterations import Iteration
from megatron.bridge.models.catalog import bridge_for
from megatron.bridge.models.conversion.model_bridge import PlanOptions
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.operations.inspection.hf_report import (
    HFReport,
    headers_only,
    inspect_hf,
    inspect_model,
)
from megatron.bridge.operations.inspection.summary import TensorSummary
from megatron.bridge.tensors.spec import main_dtype

ASSUMED_BYTES_PER_SECOND = 1_000_000_000
"""Of a disk that is read and written at once; assumed, not measured."""


@dataclass(frozen=True)
class ConversionCost:
    """What a conversion takes, in bytes.

    download: what has to be fetched from the hub first. memory: that buffers may take, by default.
    """

    command: Literal["import", "export"]
    reads: int
    writes: int
    download: int = 0
    memory: int = DEFAULT_MEMORY

    @property
    def disk(self) -> int:
        """Room that has to be there: the target, and what is fetched into the hub's cache."""
        return self.writes + self.download

    @property
    def seconds(self) -> float:
        """Of reading and writing at once, without a download."""
        return max(self.reads, self.writes) / ASSUMED_BYTES_PER_SECOND


@dataclass(frozen=True)
class PlanReport:
    """A planned conversion, in either direction.

    model: the Hugging Face side with the plan; of a Megatron checkpoint, the files that its config
    record or a reference describes. megatron: the tensors of the checkpoint. dropped: those of a
    Megatron source that are no weights and stay behind. cost: None, as `megatron`, where no plan is
    proven. left_out: of an export, tensors that the config has and nothing at hand holds.
    """

    source: str
    format: Literal["huggingface", "megatron"]
    model: HFReport
    megatron: TensorSummary | None
    dropped: tuple[str, ...]
    cost: ConversionCost | None
    left_out: tuple[str, ...] = ()


def plan_import_of(
    source: str, revision: str | None = None, experts: str | None = None
) -> PlanReport:
    """Plan the import of a Hugging Face model.

    source: a folder with or without weights, a config.json, or a hub id, of which only headers are
    fetched. experts: the disk layout of routed experts, as the user says it, or for files to be.
    Raises InputError or one of its kinds where there is nothing to report on; a model that cannot
    be converted is reported.
    """
    return plan_model(inspect_hf(source, revision, PlanOptions(experts=experts)))


def plan_model(model: HFReport) -> PlanReport:
    """Plan the import of a model that was looked at."""
    megatron, cost = None, None
    if model.plan is not None and model.hf is not None:
        megatron = TensorSummary.of(model.plan.megatron.values())
        download = model.hf.bytes if model.origin == "hub headers" else 0
        cost = ConversionCost("import", model.hf.bytes, megatron.bytes, download)
    return PlanReport(model.source, "huggingface", model, megatron, (), cost)


def plan_export_of(
    source: Path,
    reference: PreTrainedVLM | None = None,
    iteration: Iteration | None = None,
    experts: str | None = None,
) -> PlanReport:
    """Plan the export of a Megatron checkpoint.

    reference: what it would be exported like, of which only headers are read; None for the config
    that the checkpoint keeps. iteration, experts: see `export_checkpoint`. Raises InputError or one
    of its kinds, PlanError if the checkpoint does not hold the model.
    """
    from megatron.bridge.formats.file_plans import left_out, plan_export, recorded_model
    from megatron.bridge.formats.torch_dist.reader import TorchDistCheckpoint

    checkpoint = TorchDistCheckpoint(source, iteration)
    hf = recorded_model(checkpoint) if reference is None else headers_only(reference)
    plan, dropped = plan_export(checkpoint, hf, experts)
    bridge = bridge_for(hf.hf_config.architecture)
    dtype = main_dtype(plan.hf.values())
    model = replace(
        inspect_model(hf, str(source), PlanOptions(experts=experts)),
        origin="checkpoint" if reference is None else "reference",
        plan=plan,
        hf=TensorSummary.of(plan.hf.values()),
        settings=bridge.provider_settings(hf.hf_config, dtype, plan.hf),
        problem=None,
    )
    weights = [spec for key, spec in checkpoint.tensors.items() if key in plan.megatron]
    megatron = TensorSummary.of(weights)
    cost = ConversionCost("export", megatron.bytes, plan.hf_bytes)
    return PlanReport(
        str(source), "megatron", model, megatron, dropped, cost, left_out(hf, plan, experts)
    )
