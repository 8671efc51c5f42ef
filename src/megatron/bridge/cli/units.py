"""Numbers as people read them. Units are powers of ten, as those of disks and of the hub."""


def format_bytes(size: float) -> str:
    """``8.88 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


def format_rate(size: int, seconds: float) -> str:
    """``1.10 GB/s``."""
    return f"{format_bytes(size / max(seconds, 1e-9))}/s"


def gigabytes_per_second(size: int, seconds: float) -> float:
    """10^9 bytes per second."""
    return size / 1e9 / max(seconds, 1e-9)


def count(number: int, noun: str) -> str:
    """``1 tensor``, ``2 tensors``."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
