"""Bytes from sources into files: pieces, threads, checksums."""
