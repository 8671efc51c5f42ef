"""megatron-core's config of DistributedDataParallel, checked when it is finished."""

from dataclasses import dataclass
from typing import Any

from megatron.core import distributed

from megatron.bridge.errors import ConfigError


@dataclass(kw_only=True)
class DistributedDataParallelConfig(distributed.DistributedDataParallelConfig):
    """megatron-core's, whose fields may be set after construction.

    It is checked by `finalize`, which `provide_distributed_model` calls, too.
    """

    def __post_init__(self) -> None:
        """Deferred to `finalize()`."""

    def finalize(self) -> None:
        """Validate and derive; call it again after a change.

        Raises:
            ConfigError: megatron-core refuses the fields.
        """
        check: Any = super().__post_init__
        try:
            check()
        except (AssertionError, ValueError) as error:
            raise ConfigError(f"{type(self).__name__}: megatron-core refuses: {error}") from error
