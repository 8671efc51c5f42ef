"""Import, export and verify against a plain copy of the same files, interleaved in one run.

    make bench ARGS="--layers 28 --repeat 5"

The model has the real widths of Qwen3-VL-2B and as many layers as asked for, random weights. Every
figure is a ratio to the copy of the same run; the first round warms the caches and is not counted.
"""

import argparse
import json
import resource
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron.bridge.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.synthetic import make_model
from megatron.bridge.verification.tensors import verify

WIDTHS: dict[str, object] = {
    "text.hidden_size": 2048,
    "text.intermediate_size": 6144,
    "text.num_attention_heads": 16,
    "text.num_key_value_heads": 8,
    "text.head_dim": 128,
    "text.rope_scaling.mrope_section": [24, 20, 20],
    "text.vocab_size": 151936,
    "vision.hidden_size": 1024,
    "vision.intermediate_size": 4096,
    "vision.num_heads": 16,
    "vision.depth": 6,
    "tie_word_embeddings": True,
}


@dataclass
class Figures:
    """Medians over the rounds; `ratio` is the throughput as a part of the copy's."""

    seconds: float
    gb_per_second: float
    ratio: float
    cpu_seconds: float
    peak_anonymous_mib: float


def anonymous_mib() -> float:
    """Anonymous memory of this process: pages of mapped files do not count."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("the kernel does not report RssAnon")


class PeakMemory:
    """The highest anonymous memory while the block runs, sampled every 10 ms."""

    def __enter__(self) -> "PeakMemory":
        self.mib = anonymous_mib()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._done.wait(0.01):
            self.mib = max(self.mib, anonymous_mib())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def cpu_seconds() -> float:
    """User and system time of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measure(folder: Path, repeat: int) -> tuple[int, dict[str, Figures]]:
    """Bytes of tensor data, and the figures of every step."""
    source = folder / "hf"
    nbytes = PreTrainedVLM.from_pretrained(source).tensors.total_bytes

    def hf() -> PreTrainedVLM:
        return PreTrainedVLM.from_pretrained(source)

    steps: dict[str, Callable[[], object]] = {
        "copy": lambda: shutil.copytree(source, folder / "copy"),
        "import": lambda: import_checkpoint(hf(), folder / "megatron"),
        "export": lambda: export_checkpoint(folder / "megatron", folder / "back", hf()),
        "verify": lambda: verify(source, folder / "back"),
    }
    samples: dict[str, list[tuple[float, float, float]]] = {name: [] for name in steps}
    for number in range(repeat + 1):
        for name, step in steps.items():
            with PeakMemory() as peak:
                started, cpu = time.perf_counter(), cpu_seconds()
                step()
                sample = time.perf_counter() - started, cpu_seconds() - cpu
            if number:
                samples[name].append((*sample, peak.mib))
        for made in ("copy", "megatron", "back"):
            shutil.rmtree(folder / made)
    medians = {
        name: [statistics.median(column) for column in zip(*rows, strict=True)]
        for name, rows in samples.items()
    }
    copy = medians["copy"][0]
    return nbytes, {
        name: Figures(seconds, nbytes / seconds / 1e9, copy / seconds, cpu, mib)
        for name, (seconds, cpu, mib) in medians.items()
    }


def main() -> None:
    """Make the model, measure, print a table, or JSON with --json."""
    parser = argparse.ArgumentParser(description="import, export and verify against a plain copy")
    parser.add_argument("--layers", type=int, default=4, help="decoder layers (28: the whole 2B)")
    parser.add_argument("--repeat", type=int, default=3, help="rounds that count")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="megatron-bridge-bench-") as name:
        folder = Path(name)
        settings = WIDTHS | {
            "text.num_hidden_layers": options.layers,
            "vision.deepstack_visual_indexes": [1, 3, 5][: options.layers],
        }
        make_model("qwen3-vl", folder / "hf", settings)
        nbytes, figures = measure(folder, options.repeat)
    if options.json:
        rows = {name: asdict(figure) for name, figure in figures.items()}
        json.dump({"bytes": nbytes, "repeat": options.repeat, "steps": rows}, sys.stdout, indent=2)
        print()
        return
    print(f"{nbytes / 1e9:.2f} GB of tensors, median of {options.repeat} rounds")
    print("step      seconds    GB/s   of copy   CPU s   peak MiB")
    for name, row in figures.items():
        print(
            f"{name:8} {row.seconds:8.2f} {row.gb_per_second:7.2f} {row.ratio:9.2f} "
            f"{row.cpu_seconds:7.2f} {row.peak_anonymous_mib:10.0f}"
        )


if __name__ == "__main__":
    main()
