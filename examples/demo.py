"""Models go to Megatron-Core, answer as transformers does, and come back.

    python examples/demo.py                                         a small model of each family
    python examples/demo.py --family qwen3.5-moe                    of one family
    python examples/demo.py --model Qwen/Qwen3-VL-2B-Instruct       real weights

Makes small random models in the released layouts (unless --model is given), and with each: inspects
it, imports it into a Megatron checkpoint, compares both models on a photograph (or on words, if it
takes no pictures), exports the checkpoint, and verifies the result bit for bit. The exit status is
not 0 if any of it fails.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron.bridge.errors import BridgeError, MismatchError

PROMPT = "What is in this picture?"
WIDTH = 320  # pixels; a real photograph, small enough to be quick on a CPU


@dataclass(frozen=True)
class Step:
    """One line of the closing table."""

    name: str
    done: bool
    figures: str
    seconds: float


class Demo:
    """The steps, one method each; each returns what the closing table says of it."""

    def __init__(self, model: str | None, family: str, out: Path) -> None:
        self.name = model or family
        self.family = family
        self.given = model
        self.source = model or str(out / "model")
        self.checkpoint = out / "megatron"
        self.exported = out / "exported"
        self.photograph = out / "photograph.png"

    def make_model(self) -> str:
        """A random model in the released disk layout."""
        from megatron.bridge.synthetic import make_model

        folder = make_model(self.family, self.source)
        return f"{count_bytes(folder):,} bytes in {len(list(folder.iterdir()))} files"

    def inspect(self) -> str:
        """What it holds, and the proof that it converts."""
        from megatron.bridge.operations.inspection.hf_report import inspect_hf

        report = inspect_hf(self.source)
        if report.problem is not None:
            raise report.problem
        assert report.hf is not None
        return (
            f"{report.architecture}: {report.hf.keys} tensors, {report.hf.bytes:,} bytes, "
            f"{len(report.rows)} rows, plan proven"
        )

    def import_model(self) -> str:
        """Hugging Face files to Megatron files."""
        from megatron.bridge import AutoBridge

        AutoBridge.import_ckpt(self.source, self.checkpoint)
        return f"{count_bytes(self.checkpoint):,} bytes of torch_dist checkpoint"

    def compare(self) -> str:
        """Both models on a photograph that ships with scikit-learn, if they take pictures."""
        from megatron.bridge import AutoBridge
        from megatron.bridge.operations.verification.logits import compare

        bridge = AutoBridge.from_hf_pretrained(self.source).model_bridge
        if bridge.auto_model == "AutoModelForImageTextToText":
            save_photograph(self.photograph)
            report = compare(self.source, self.photograph, PROMPT)
        else:
            report = compare(self.source)
        logits = report.logits
        if not report.agrees:
            raise MismatchError(f"the logits differ by up to {logits.max_abs_diff:.1e}")
        worst = max(layer.max_abs_diff for layer in report.layers)
        answers = dict.fromkeys((report.next_token.hf.text, report.next_token.megatron.text))
        return (
            f"{report.tokens} tokens; logits differ by at most {logits.max_abs_diff:.1e}, hidden "
            f"states by {worst:.1e}; top-1 {logits.top1_agreement:.0%}; next token "
            f"{' and '.join(map(repr, answers))}"
        )

    def export(self) -> str:
        """Megatron files to Hugging Face files."""
        from megatron.bridge import AutoBridge

        AutoBridge.from_hf_pretrained(self.source).export_ckpt(self.checkpoint, self.exported)
        return f"{count_bytes(self.exported):,} bytes in {len(list(self.exported.iterdir()))} files"

    def verify(self) -> str:
        """Original and result, tensor by tensor, bit by bit; and every other file."""
        from megatron.bridge.operations.verification.bitwise import verify

        report = verify(self.source, self.exported)
        if not report.identical:
            raise MismatchError(f"{len(report.different)} tensors differ")
        if report.side_files:
            raise MismatchError(f"{report.side_files[0].file} differs")
        return f"{report.equal} of {report.compared} tensors equal in every bit, side files too"

    def steps(self) -> list[tuple[str, Callable[[], str]]]:
        """In order; a model that is given is not made."""
        made = [] if self.given else [("make-model", self.make_model)]
        return [
            *made,
            ("inspect", self.inspect),
            ("import", self.import_model),
            ("compare", self.compare),
            ("export", self.export),
            ("verify", self.verify),
        ]


def save_photograph(path: Path) -> None:
    """A temple in China, from scikit-learn's sample images, at WIDTH pixels."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    image = Image.fromarray(load_sample_images().images[0])
    image.resize((WIDTH, image.height * WIDTH // image.width)).save(path)


def count_bytes(folder: Path) -> int:
    """Size of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def run(demo: Demo) -> list[Step]:
    """Run step after step, and stop at the first that fails."""
    done: list[Step] = []
    for name, step in demo.steps():
        print(f"{demo.name}: {name} ...", file=sys.stderr, flush=True)
        begin = time.perf_counter()
        try:
            figures = step()
        except BridgeError as error:
            print(f"error: {error}", file=sys.stderr)
            summary = str(error).partition("\n")[0]
            done.append(Step(name, False, summary, time.perf_counter() - begin))
            break
        done.append(Step(name, True, figures, time.perf_counter() - begin))
    return done


def show(runs: dict[str, list[Step]]) -> None:
    """The closing table: every step of every model."""
    table = Table("model", "step", "result", "figures", title="To Megatron-Core and back")
    table.add_column("seconds", justify="right")
    for model, steps in runs.items():
        for number, step in enumerate(steps):
            result = Text("done", style="green") if step.done else Text("failed", style="red")
            cells = ("" if number else model, step.name, result, Text(step.figures))
            table.add_row(*cells, f"{step.seconds:.1f}")
        table.add_section()
    console = Console()
    Console(width=min(console.width, 100) if console.is_terminal else 100).print(table)


def demos(options: argparse.Namespace, out: Path) -> list[Demo]:
    """One for the model or the family that is given, otherwise one for each family."""
    from megatron.bridge.models.catalog import small_models

    if options.model or options.family:
        return [Demo(options.model, options.family, out)]
    return [Demo(None, name, out / name) for name in small_models()]


def main() -> int:
    """Parse the arguments, run, and say how it went."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", help="a Hugging Face folder or hub id; by default some are made")
    what.add_argument("--family", help="make one model, of this family; by default one of each")
    parser.add_argument("--out", type=Path, help="keep the files here; by default they are removed")
    options = parser.parse_args()
    runs: dict[str, list[Step]] = {}
    with contextlib.ExitStack() as stack:
        out = options.out
        if out is None:
            out = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="megatron-bridge-")))
        for demo in demos(options, out):
            demo.photograph.parent.mkdir(parents=True, exist_ok=True)
            runs[demo.name] = run(demo)
    show(runs)
    return 0 if all(step.done for steps in runs.values() for step in steps) else 1


if __name__ == "__main__":
    sys.exit(main())
