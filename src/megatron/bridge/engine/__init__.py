"""Bytes from sources into files: pieces, threads, checksums."""

DEFAULT_MEMORY = 1 << 30
"""Bytes that the buffers of all threads may take together."""
