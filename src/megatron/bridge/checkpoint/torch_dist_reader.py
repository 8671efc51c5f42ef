"""Where scripts look for TorchDistCheckpoint; it is in `formats.torch_dist.reader`."""

from megatron.bridge.formats.torch_dist.reader import TorchDistCheckpoint

__all__ = ["TorchDistCheckpoint"]
