"""``python -m fuzz TARGET [options of libFuzzer]``: fuzz one target, guided by coverage.

Runs until it finds a fault, or as long as the options say. The bytes of a fault are left in
build/fuzz. Needs atheris.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

WORDS = (
    "dtype shape data_offsets __metadata__ weight_map metadata total_size format BF16 F32 U8 true "
    "false null NaN Infinity -1 1e999 9223372036854775807 hf config model _target_ torch Size "
    "!!python/object/apply:os.system &a *a <<:"
).split()


def main() -> None:
    """Fuzz the target that the first argument names; without one, say which there are."""
    with atheris.instrument_imports(include=["megatron.bridge", "yaml", "zipfile"]):
        from fuzz.targets import TARGETS

        if len(sys.argv) == 1:
            print(*TARGETS)
            return
        name, *options = sys.argv[1:]
        target, honest = TARGETS[name]
        seeds = honest()
        for seed in seeds:
            target(seed)  # imports what it needs
    faults = Path("build", "fuzz")
    faults.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fuzz-corpus-") as folder:
        corpus = Path(folder, "corpus")
        corpus.mkdir()
        for number, seed in enumerate(seeds):
            (corpus / str(number)).write_bytes(seed)
        words = Path(folder, "words")
        words.write_text("".join(f'"{word}"\n' for word in WORDS))
        limits = ["-timeout=20", "-rss_limit_mb=3000", "-max_len=4096", "-print_final_stats=1"]
        atheris.Setup(
            [sys.argv[0], *limits, *options, f"-dict={words}", f"-artifact_prefix={faults}/",
             str(corpus)],
            target,
        )  # fmt: skip
        atheris.Fuzz()


main()
