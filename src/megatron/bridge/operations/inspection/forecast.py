"""What a conversion of files will do, from headers and configs alone: nothing is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron.bridge.engine import DEFAULT_MEMORY
from megatron.bridge.errors import PlanError
from megatron.bridge.formats.iterations import Iteration
from megatron.bridge.models.conversion.model_bridge import PlanOptions
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.operations.amounts import TensorSummary
from megatron.bridge.operations.inspection.hf_report import (
    HFReport,
    headers_only,
    inspect_hf,
    inspect_model,
)
from megatron.bridge.tensors.spec import main_dtype
from megatron.bridge.text.document import UNSTATED, stated, to_document

if TYPE_CHECKING:
    from megatron.bridge.operations.inspection.cluster_layout import ParallelLayout
    from megatron.bridge.operations.inspection.refit_forecast import RefitForecast
    from megatron.bridge.runtime.parallel_sizes import ParallelSizes

ASSUMED_BYTES_PER_SECOND = 1_000_000_000
"""Speed of a disk that is read and written at once; assumed, not measured."""


@dataclass(frozen=True)
class ConversionCost:
    """What a conversion takes.

    Attributes:
        read_bytes: of tensor data.
        written_bytes: of tensor data.
        download_bytes: what has to be fetched from the hub first.
        memory_bytes: that buffers may take, by default.
        assumed_bytes_per_second: speed of the disk.
    """

    command: Literal["import", "export"]
    read_bytes: int
    written_bytes: int
    download_bytes: int = 0
    memory_bytes: int = DEFAULT_MEMORY
    assumed_bytes_per_second: int = ASSUMED_BYTES_PER_SECOND

    @stated
    def disk_bytes(self) -> int:
        """Room that has to be there: the target, and what is fetched into the hub's cache."""
        return self.written_bytes + self.download_bytes

    @stated
    def seconds(self) -> float:
        """Time of reading and writing at once, without a download."""
        return max(self.read_bytes, self.written_bytes) / self.assumed_bytes_per_second


@dataclass(frozen=True, kw_only=True)
class Forecast(HFReport):
    """A planned conversion, in either direction: the Hugging Face side with the plan, and more.

    Of a Megatron checkpoint, the Hugging Face side are the files that its config record or a
    reference describes. `format` is that of what is converted.

    Attributes:
        conversion: None where no plan is proven.
        dropped: tensors of a checkpoint that are not weights and stay behind.
        left_out: of an export, tensors that the config has and nothing at hand holds.
        sizes: of parallelism, where they are asked for.
        layout: what each rank holds then.
        illegal: why the model cannot be laid out so.
        refit: of an engine by this layout, where it is asked for.
    """

    conversion: ConversionCost | None = None
    dropped: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    sizes: ParallelSizes | None = field(default=None, metadata=UNSTATED)
    layout: ParallelLayout | None = field(default=None, metadata=UNSTATED)
    illegal: PlanError | None = field(default=None, metadata=UNSTATED)
    refit: RefitForecast | None = None

    @stated
    def problems(self) -> tuple[str, ...]:
        """Why the model does not convert, or cannot be laid out so."""
        return super().problems + (() if self.illegal is None else self.illegal.problems)

    @stated
    def parallel(self) -> Mapping[str, object] | None:
        """The sizes, those that follow from others filled in; whether they are legal, if known."""
        if self.sizes is None:
            return None
        legal = self.layout is not None if self.proven else None
        return {**to_document(self.sizes.filled_in()), "legal": legal}

    @stated
    def ranks(self) -> list[Mapping[str, object]]:
        """Where each rank stands, and what it holds."""
        if self.layout is None:
            return []
        shares = [to_document(share) for share in self.layout.stages]
        return [to_document(one) | shares[one.pp] for one in self.layout.positions]


def forecast_import(
    source: str,
    revision: str | None = None,
    experts: str | None = None,
    part: str | None = None,
) -> Forecast:
    """Look ahead to the import of a Hugging Face model. One that cannot be converted is reported.

    Args:
        source: a folder with or without weights, a config.json, or a hub id, of which only headers
            are fetched.
        revision: of a hub id.
        experts: the disk layout of routed experts, as the user says it, or for files to be.
        part: of the model, to be a model of its own.

    Raises:
        InputError: there is nothing to report on; also one of the kinds of this error.
    """
    return forecast_of(inspect_hf(source, revision, PlanOptions(experts=experts), part))


def forecast_of(model: HFReport) -> Forecast:
    """Look ahead to the import of a model that was looked at."""
    cost = None
    if model.megatron is not None and model.hf is not None:
        download = model.hf.bytes if model.origin == "hub headers" else 0
        cost = ConversionCost("import", model.hf.bytes, model.megatron.bytes, download)
    return Forecast(**_fields(model), conversion=cost)


def forecast_export(
    source: Path,
    reference: PreTrainedVLM | None = None,
    iteration: Iteration | None = None,
    experts: str | None = None,
    part: str | None = None,
) -> Forecast:
    """Look ahead to the export of a Megatron checkpoint.

    Args:
        source: the folder of a checkpoint, or of one iteration.
        reference: what it would be exported like, of which only headers are read; None for the
            config that the checkpoint keeps.
        iteration: see `export_checkpoint`.
        experts: see `export_checkpoint`.
        part: see `export_checkpoint`.

    Raises:
        InputError: there is nothing to report on; also one of the kinds of this error.
        PlanError: the checkpoint does not hold the model.
    """
    from megatron.bridge.formats.file_plans import left_out, plan_export, sides_of_export
    from megatron.bridge.formats.torch_dist.reader import TorchDistCheckpoint

    checkpoint = TorchDistCheckpoint(source, iteration)
    given = None if reference is None else headers_only(reference)
    sides = sides_of_export(checkpoint, given, part)
    hf, bridge = sides.files, sides.bridge
    plan, dropped = plan_export(checkpoint, sides, experts)
    dtype = main_dtype(plan.hf.values())
    megatron = TensorSummary.of(checkpoint.tensors[key] for key in plan.megatron)
    model = replace(
        inspect_model(hf, str(source), PlanOptions(experts=experts), sides),
        format="megatron",
        origin="checkpoint" if reference is None else "reference",
        plan=plan,
        hf=TensorSummary.of(plan.hf.values()),
        megatron=megatron,
        settings=bridge.provider_settings(sides.config, dtype, plan.hf),
        problem=None,
    )
    return Forecast(
        **_fields(model),
        conversion=ConversionCost("export", megatron.bytes, plan.hf_bytes),
        dropped=dropped,
        left_out=left_out(sides, plan, experts),
    )


def _fields(model: HFReport) -> dict[str, Any]:
    return {one.name: getattr(model, one.name) for one in fields(model)}
