"""What a conversion of files will do, from headers and configs alone: nothing is written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from megatron.bridge.checkpoint.config_record import read_hf_config
from megatron.bridge.checkpoint.stream import DEFAULT_MEMORY
from megatron.bridge.errors import InputError
from megatron.bridge.inspection.hf_folder import HFReport, inspect_hf, inspect_model
from megatron.bridge.inspection.summary import TensorSummary
from megatron.bridge.models.catalog import bridge_for
from megatron.bridge.models.conversion.model_bridge import PlanOptions
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.paths import local_path

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
    record describes. megatron: the tensors of the checkpoint. dropped: those of a Megatron source
    that are no weights and stay behind. cost: None, as `megatron`, where no plan is proven.
    """

    source: str
    format: Literal["huggingface", "megatron"]
    model: HFReport
    megatron: TensorSummary | None
    dropped: tuple[str, ...]
    cost: ConversionCost | None


def plan_source(source: str, revision: str | None = None, experts: str | None = None) -> PlanReport:
    """Plan the import of a Hugging Face model, or the export of a Megatron checkpoint.

    source: a folder with or without weights, a config.json, a hub id, of which only headers are
    fetched, or a checkpoint with a config record. experts: the disk layout of routed experts, where
    shapes cannot tell it, or for files to be. Raises InputError or one of its kinds where there is
    nothing to report on; a Hugging Face model that cannot be converted is reported.
    """
    from megatron.bridge.checkpoint.iterations import is_megatron_checkpoint

    path = local_path(source)
    if not is_megatron_checkpoint(path):
        return plan_model(inspect_hf(source, revision, PlanOptions(experts=experts)))
    if revision is not None:
        raise InputError(f"{source} is a folder: --revision means nothing for it")
    return _plan_export(path, experts)


def plan_model(model: HFReport) -> PlanReport:
    """Plan the import of a model that was looked at."""
    megatron, cost = None, None
    if model.plan is not None and model.hf is not None:
        megatron = TensorSummary.of(model.plan.megatron.values())
        download = model.hf.bytes if model.origin == "hub headers" else 0
        cost = ConversionCost("import", model.hf.bytes, megatron.bytes, download)
    return PlanReport(model.source, "huggingface", model, megatron, (), cost)


def _plan_export(source: Path, experts: str | None) -> PlanReport:
    from megatron.bridge.checkpoint.plans import main_dtype, plan_export
    from megatron.bridge.checkpoint.torch_dist_reader import TorchDistCheckpoint

    checkpoint = TorchDistCheckpoint(source)
    hf = PreTrainedVLM.from_config(read_hf_config(checkpoint.folder))
    plan, dropped = plan_export(checkpoint, hf, experts)
    bridge = bridge_for(hf.hf_config.architecture)
    dtype = main_dtype(plan.hf.values())
    model = replace(
        inspect_model(hf, str(source), PlanOptions(experts=experts)),
        origin="checkpoint",
        plan=plan,
        hf=TensorSummary.of(plan.hf.values()),
        settings=bridge.provider_settings(hf.hf_config, dtype, plan.hf),
        problem=None,
    )
    weights = [spec for key, spec in checkpoint.tensors.items() if key in plan.megatron]
    megatron = TensorSummary.of(weights)
    cost = ConversionCost("export", megatron.bytes, plan.hf_bytes)
    return PlanReport(str(source), "megatron", model, megatron, dropped, cost)
