"""Running megatron-core: on a machine without a GPU, quietly, and with its process groups."""

from megatron.bridge.runtime.as_written import import_megatron_core_as_written
from megatron.bridge.runtime.quiet import silence_megatron_core

silence_megatron_core()
import_megatron_core_as_written()
