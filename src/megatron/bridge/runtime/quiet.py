"""The one place where messages of megatron-core that say nothing to our users are silenced.

Only exact, known messages are dropped; everything else is left alone. Importing
`megatron.bridge.runtime` is enough.
"""

import logging
import warnings

_WARNINGS = (
    # The default of its own cuda_graph_modules.
    r"full scope is deprecated\. Use empty cuda_graph_modules",
    # Optional packages of megatron-core, for each of which it has a fallback.
    r"Apex is not installed\. Falling back to Torch Norm",
    r"Transformer Engine and Apex are not installed\. Falling back to",
    r"absl\.logging is not installed\. Using logging\.getLogger",
    # torch's checkpoint loader, about how megatron-core calls it.
    r"torch\.distributed is disabled, unavailable or uninitialized, assuming the intent is to load",
    r"The argument order of load has been changed",
    r"Please use DTensor instead and we are deprecating ShardedTensor",
)

_LOG_MESSAGES = {
    # The parameter names of GPTModel are the public names of the checkpoints.
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    # Asked for by megatron-core's import of a compiler it does not use here.
    "torch.utils.cpp_extension": "No CUDA runtime is found",
}


class DropMessage(logging.Filter):
    """Drop the log records that start with `prefix`."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is to be logged."""
        return not record.getMessage().startswith(self.prefix)


def silence_megatron_core() -> None:
    """Install the filters; calling it again changes nothing."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=Warning)
    for name, prefix in _LOG_MESSAGES.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, DropMessage) for known in logger.filters):
            logger.addFilter(DropMessage(prefix))
