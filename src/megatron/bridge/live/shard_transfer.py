"""Values between the tensors that a rank holds and Hugging Face tensors, box by box."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

from megatron.bridge.dtypes import itemsize, safetensors_dtype
from megatron.bridge.engine.pieces import FillTensor
from megatron.bridge.live.local_tensors import LocalTensor
from megatron.bridge.live.shared_files import SharedFiles
from megatron.bridge.models.conversion.casting import Casting
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.models.conversion.transfer import fill_hf
from megatron.bridge.progress import Progress, Silent
from megatron.bridge.runtime.ranks import Ranks
from megatron.bridge.tensors.arrays import Array, copy
from megatron.bridge.tensors.box_pairs import hf_part
from megatron.bridge.tensors.boxes import Box, box_shape, relative, slices, volume
from megatron.bridge.tensors.source import Source
from megatron.bridge.tensors.torch_views import as_array


def write_by_ranks(
    files: SharedFiles,
    ranks: Ranks,
    plan: ConversionPlan,
    tensors: Sequence[LocalTensor],
    reference: Callable[[], Source],
    casting: Casting,
    progress: Progress | None = None,
) -> None:
    """Write Hugging Face files together: one rank what is not of the model, each what it holds.

    Args:
        files: laid out by the plan.
        ranks: all call this.
        plan: of the model and the files.
        tensors: those that this rank holds the main replica of.
        reference: gives the source of what is carried; it is asked for such a tensor only.
        casting: of values that the dtypes in the files do not hold.
        progress: told of the bytes that this rank writes of what it holds.

    Raises:
        CheckpointError: a file cannot be written.
        InexactCast: see `casting`.
        InputError: another rank cannot go on.
    """

    def carry(name: str, box: Box, out: Array) -> None:
        reference().read_into(name, box, out)

    def is_shared(name: str) -> bool:
        return name not in plan.carried or name in plan.equal

    ranks.first(lambda: files.make(carry, is_shared))
    shown = progress or Silent()

    def write() -> None:
        boxes = list(own_boxes(plan, tensors, casting))
        sizes = (volume(box) * itemsize(plan.hf[name].dtype) for name, box, _ in boxes)
        shown.start("save", sum(sizes))
        files.write(boxes, shown)

    ranks.together(write)


def own_boxes(
    plan: ConversionPlan, tensors: Iterable[LocalTensor], casting: Casting
) -> Iterator[tuple[str, Box, FillTensor]]:
    """Every box of a Hugging Face tensor that what a rank holds makes, and what makes it.

    Args:
        plan: of the model and the files.
        tensors: those that the rank holds.
        casting: of values that the dtypes in the files do not hold.

    Yields:
        Name, box, and a function that makes any part of the box.
    """
    equal = defaultdict(list)
    for name, other in plan.equal.items():
        equal[other.name].append(name)
    for local in tensors:
        fill = _filler(plan, _LocalSource(local), casting)
        for shared, pair in plan.copies_to(local.key, local.box):
            for name in (pair.hf_name, *equal[pair.hf_name]):
                yield name, hf_part(pair, shared), fill


def _filler(plan: ConversionPlan, source: Source, casting: Casting) -> FillTensor:
    def fill(name: str, box: Box, out: Array) -> None:
        copy_of = plan.equal.get(name)
        fill_hf(plan, name if copy_of is None else copy_of.name, box, out, source, casting)

    return fill


class _LocalSource:
    """What a rank holds of one tensor: a Source of the boxes within."""

    def __init__(self, local: LocalTensor) -> None:
        self._local, self._data = local, local.data.view(box_shape(local.box))

    def dtype_of(self, name: str) -> str:
        """That of the memory."""
        return safetensors_dtype(self._data.dtype)

    def read_into(self, name: str, box: Box, out: Array) -> None:
        """Copy a part of the box that the rank holds."""
        copy(as_array(self._data[slices(relative(box, self._local.box))].cpu()), out)
