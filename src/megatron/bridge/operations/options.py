"""The options of a conversion, as the commands and AutoBridge take them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Self, TypedDict

from megatron.bridge.dtypes import DType
from megatron.bridge.engine import DEFAULT_MEMORY
from megatron.bridge.errors import InputError
from megatron.bridge.formats.iterations import Iteration
from megatron.bridge.models.conversion.transposed import TRANSPOSED, Transposed
from megatron.bridge.progress import Progress, Silent
from megatron.bridge.target.processes import Processes
from megatron.bridge.target.reflink import REFLINK, Reflink
from megatron.bridge.text.quoting import quoted
from megatron.bridge.text.sizes import Size, size_of

if TYPE_CHECKING:
    from megatron.bridge.target.run import Run


class CommonKeywords(TypedDict, total=False):
    """The options of both directions, see ConversionOptions."""

    experts: str | None
    part: str | None
    memory: Size | None
    max_shard_size: Size | None
    verify: bool
    resume: bool
    force: bool
    reflink: Reflink


class ImportKeywords(CommonKeywords, total=False):
    """The options of an import, see ConversionOptions."""

    transposed: Transposed


class ExportKeywords(CommonKeywords, total=False):
    """The options of an export, see ConversionOptions."""

    iteration: Iteration | None
    fp8: bool
    dtype: DType | None
    round: bool
    hard_links: bool
    keep_manifest: bool


@dataclass(frozen=True, kw_only=True)
class ConversionOptions:
    """What decides how a conversion is done, beside its source and target.

    Attributes:
        experts: a disk layout of routed experts (ExpertLayout): of an import's source where shapes
            cannot tell it, of an export's target where it should not be the reference's.
        part: of the model, which is a model of its own on one of the sides ("language").
        memory: bytes that buffers of each process may take, or a text such as "512MiB"; None for 1
            GiB.
        max_shard_size: of tensor data per output file, in bytes or as such a text.
        verify: read back what was written and compare it with the source, bit by bit, before the
            target appears.
        resume: go on with what an interrupted run left.
        force: replace a target.
        reflink: share blocks with the files that are read, where the file system can ("auto"), or
            refuse where it cannot ("always"), or "never".
        transposed: how an import stores matrices that lie transposed in the source, see
            `import_checkpoint`.
        iteration: another one than the tracker file names; of exports only, as all that follows.
        fp8: quantize what the reference has quantized.
        dtype: of the tensors ("bfloat16"), where it should not be the reference's.
        round: round values that do not fit their dtype.
        hard_links: let weights that are a whole file of the reference, bit for bit, become hard
            links to it.
        keep_manifest: leave the checksums of the files in the target.
    """

    experts: str | None = None
    part: str | None = None
    memory: Size | None = None
    max_shard_size: Size | None = None
    verify: bool = False
    resume: bool = False
    force: bool = False
    reflink: Reflink = "auto"
    transposed: Transposed = "copy"
    iteration: Iteration | None = None
    fp8: bool = False
    dtype: DType | None = None
    round: bool = False
    hard_links: bool = False
    keep_manifest: bool = False

    def __post_init__(self) -> None:
        for name, known in (("reflink", REFLINK), ("transposed", TRANSPOSED)):
            if (value := getattr(self, name)) not in known:
                raise InputError(
                    f"{name} (--{name}): {quoted(value)} is none of {', '.join(known)}"
                )

    @classmethod
    def of(cls, command: str, taken: type[CommonKeywords], given: Mapping[str, Any]) -> Self:
        """The options that were given by name.

        Args:
            command: what they were given to, in messages.
            taken: the keywords that it takes.
            given: the values by their names.

        Raises:
            InputError: it does not take a name.
        """
        known = [field.name for field in fields(cls) if field.name in taken.__annotations__]
        for name in given:
            if name not in known:
                raise InputError(
                    f"{command} takes no option {quoted(name)}; its options: {', '.join(known)}"
                )
        return cls(**given)

    @property
    def of_import(self) -> dict[str, Any]:
        """What decides what an import writes, by the names of `import_checkpoint`."""
        return {name: getattr(self, name) for name in ("experts", "part", "transposed")}

    @property
    def of_export(self) -> dict[str, Any]:
        """What decides what an export writes, by the names of `export_checkpoint`."""
        names = ("iteration", "experts", "part", "fp8", "dtype", "round")
        return {name: getattr(self, name) for name in names}

    @contextmanager
    def run(
        self, progress: Callable[[], AbstractContextManager[Progress]] | None = None
    ) -> Iterator[Run]:
        """What carries the conversion out: this process, or those that torchrun started.

        Args:
            progress: entered by the first of them alone.

        Yields:
            The run.

        Raises:
            InputError: a size is not a valid one, or the other processes cannot be reached.
        """
        from megatron.bridge.target.run import Run

        memory, largest = self.memory, self.max_shard_size
        budget = DEFAULT_MEMORY if memory is None else size_of(memory, "memory (--memory)")
        shard = None if largest is None else size_of(largest, "max_shard_size (--max-shard-size)")
        with (
            Processes.from_environment() as processes,
            progress() if progress and processes.is_first else nullcontext(Silent()) as shown,
        ):
            yield Run(
                memory=budget,
                max_shard_bytes=shard,
                force=self.force,
                resume=self.resume,
                verify=self.verify,
                reflink=self.reflink,
                hard_links=self.hard_links,
                keep_manifest=self.keep_manifest,
                processes=processes,
                progress=shown,
            )
