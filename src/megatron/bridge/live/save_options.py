"""The options of saving a live model as a Hugging Face folder, as AutoBridge takes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Self, TypedDict

from megatron.bridge.errors import InputError
from megatron.bridge.text.quoting import quoted

if TYPE_CHECKING:
    from megatron.bridge.dtypes import DType
    from megatron.bridge.paths import PathLike
    from megatron.bridge.progress import Progress


class SaveKeywords(TypedDict, total=False):
    """The options by name, see SaveOptions."""

    dtype: DType | None
    weight_dtype: DType | None
    round: bool
    force: bool
    show_progress: bool
    progress: Progress | None
    source_path: PathLike | None
    strict: bool
    merge_adapter_weights: bool
    distributed_save: bool
    save_every_n_ranks: int


@dataclass(frozen=True, kw_only=True)
class SaveOptions:
    """How a live model is saved.

    Attributes:
        dtype: of the tensors; what the release keeps in float32 stays so. None for the dtype that
            each has in its file.
        weight_dtype: `dtype`, as other bridges call it.
        round: round values that do not fit instead of raising InexactCast.
        force: replace a folder that holds a model.
        show_progress: as lines on stderr; of several ranks the first shows its own share.
        progress: is told how many bytes this rank writes.
        source_path: another model than the bridge's own to be laid out like.
        strict: accepted as other bridges have it; what is not proven is never written.
        merge_adapter_weights: accepted likewise; a model whose adapters are not merged into its
            weights is refused by the names of their parameters.
        distributed_save: accepted likewise; each rank always writes its part.
        save_every_n_ranks: accepted likewise, a whole number from 1.
    """

    dtype: DType | None = None
    weight_dtype: DType | None = None
    round: bool = False
    force: bool = False
    show_progress: bool = False
    progress: Progress | None = None
    source_path: PathLike | None = None
    strict: bool = True
    merge_adapter_weights: bool = True
    distributed_save: bool = False
    save_every_n_ranks: int = 1

    def __post_init__(self) -> None:
        every = self.save_every_n_ranks
        if type(every) is not int or every < 1:
            raise InputError(
                f"save_every_n_ranks is {quoted(every)}; expected a whole number from 1"
            )

    @classmethod
    def of(cls, method: str, given: Mapping[str, Any]) -> Self:
        """The options that were given to a method by name. Raises InputError for another name."""
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise InputError(
                    f"{method} takes no option {quoted(name)}; its options: {', '.join(known)}"
                )
        return cls(**given)

    @property
    def chosen_dtype(self) -> DType | None:
        """The dtype of the tensors, by whichever name; see `one_dtype`."""
        return one_dtype(self.dtype, self.weight_dtype)


def one_dtype(
    dtype: DType | None, other: DType | None, other_name: str = "weight_dtype"
) -> DType | None:
    """What one or both of the two names of an argument say.

    Raises:
        InputError: they say different things.
    """
    if dtype is not None and other is not None and dtype != other:
        raise InputError(
            f"dtype is {dtype} and {other_name} is {other}, which are two names for one thing; "
            f"give one of them"
        )
    return other if dtype is None else dtype
