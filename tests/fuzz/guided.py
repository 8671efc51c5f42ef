"""What ``python -m fuzz`` runs: folder for files of this process, target, options of libFuzzer."""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

WORDS = (
    "dtype shape data_offsets __metadata__ weight_map metadata total_size format BF16 F32 U8 true "
    "false null NaN Infinity -1 1e999 9223372036854775807 hf config model _target_ torch Size "
    "!!python/object/apply:os.system &a *a <<:"
).split()

LIMITS = ["-timeout=20", "-rss_limit_mb=3000", "-max_len=4096", "-print_final_stats=1"]


def main() -> None:
    """Fuzz until there is a fault, or as long as the options say."""
    folder, name, *options = sys.argv[1:]
    with atheris.instrument_imports(include=["megatron.bridge", "yaml", "zipfile"]):
        from fuzz.targets import TARGETS

        target, honest = TARGETS[name]
        seeds = honest()
        for seed in seeds:
            target(seed)  # imports what it needs
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
    main()
