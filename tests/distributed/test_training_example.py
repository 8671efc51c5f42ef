"""examples/train_on_cpu.py goes on at another layout as one process that does not stop."""

import runpy
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from forked import run_ranks
from megatron.bridge.synthetic import make_model

EXAMPLE = Path(__file__).parents[2] / "examples/train_on_cpu.py"


def example(_rank: int, printed: str, arguments: list[str]) -> None:
    with redirect_stdout(StringIO()) as out:
        runpy.run_path(str(EXAMPLE))["main"](arguments)
    if out.getvalue():
        Path(printed).write_text(out.getvalue())


@pytest.mark.slow
def test_goes_on_at_another_layout(tmp_path: Path) -> None:
    model = make_model("qwen3-vl", tmp_path / "model", {"text.num_hidden_layers": 8}, seed=6)

    def losses(world: int, *options: str) -> list[float]:
        printed = tmp_path / "printed"
        run_ranks(example, str(printed), [str(model), *options], world=world)
        return [float(line) for line in printed.read_text().splitlines()]

    folder = f"{tmp_path}/checkpoint"
    parts = losses(2, "--tp", "2", "--save", folder) + losses(2, "--pp", "2", "--load", folder)
    whole = losses(1, "--steps", "6")
    assert parts == pytest.approx(whole, abs=2e-4)  # printed with four digits
    assert whole[5] < 0.5 * whole[0]
