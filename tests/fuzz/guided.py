"""What ``python -m fuzz`` runs: folder for its files, targets, options of libFuzzer."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import atheris

WORDS = (
    "dtype shape data_offsets __metadata__ weight_map metadata total_size format BF16 F32 U8 true "
    "false null NaN Infinity -1 1e999 9223372036854775807 hf config model _target_ torch Size "
    "!!python/object/apply:os.system &a *a <<:"
).split()

LIMITS = ["-timeout=20", "-rss_limit_mb=3000", "-max_len=4096", "-print_final_stats=1"]


def main() -> int:
    """Fuzz each target until there is a fault, or as long as the options say."""
    given = sys.argv[2:]
    options = [word for word in given if word.startswith("-")]
    seeds = {}
    with atheris.instrument_imports(include=["megatron.bridge", "yaml", "zipfile"]):
        from fuzz.targets import TARGETS

        for name in given:
            if name not in options:
                target, honest = TARGETS[name]
                seeds[name] = honest()
                for seed in seeds[name]:
                    target(seed)  # imports what it needs
    for name in seeds:
        folder = Path(sys.argv[1], name)
        folder.mkdir()
        child = os.fork()  # libFuzzer ends its process
        if not child:
            fuzz(TARGETS[name][0], seeds[name], folder, options)
        if status := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            return status
    return 0


def fuzz(
    target: Callable[[bytes], None], seeds: list[bytes], folder: Path, options: list[str]
) -> None:
    """Fuzz one target in this process, and end it."""
    faults = Path("build", "fuzz")
    faults.mkdir(parents=True, exist_ok=True)
    corpus = Path(folder, "corpus")
    corpus.mkdir()
    for number, seed in enumerate(seeds):
        (corpus / str(number)).write_bytes(seed)
    words = Path(folder, "words")
    words.write_text("".join(f'"{word}"\n' for word in WORDS))
    files = [f"-dict={words}", f"-artifact_prefix={faults}/", str(corpus)]
    atheris.Setup([sys.argv[0], *LIMITS, *options, *files], target)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
