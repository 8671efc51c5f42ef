"""examples/refit.py: the engine answers as the trainer does, after each step."""

import re
import runpy
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from forked import run_ranks
from megatron.bridge.synthetic import make_model

EXAMPLE = Path(__file__).parents[2] / "examples/refit.py"
STEP = re.compile(r"step \d: loss ([\d.]+), ([\d,]+) bytes sent(.*), logits differ by (\S+)")


def example(rank: int, printed: str, model: str) -> None:
    with redirect_stdout(StringIO()) as out:
        runpy.run_path(str(EXAMPLE))["main"]([model])
    if rank == 0:
        Path(printed).write_text(out.getvalue())


@pytest.mark.slow
def test_the_engine_answers_as_the_trainer(tmp_path: Path) -> None:
    model = make_model("qwen3.5", tmp_path / "model")
    run_ranks(example, str(tmp_path / "printed"), str(model), world=2)
    steps = STEP.findall((tmp_path / "printed").read_text())
    assert len(steps) == 10
    assert all(float(difference) <= 1e-4 for *_, difference in steps)
    assert len({loss for loss, *_ in steps}) > 5
    assert [changes for _, _, changes, _ in steps] == ["", *[" of changes"] * 9]
