"""Moving tensors: files of both formats, and live models."""
