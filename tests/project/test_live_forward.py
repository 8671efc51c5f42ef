"""The comparison of passes with transformers' runs, and notices a model that computes otherwise."""

import pytest
import torch
from benchmarks import live_forward
from benchmarks.live_forward import TINY, Comparison, compare


def test_both_steps_of_a_small_model() -> None:
    threads = torch.get_num_threads()
    try:
        found = compare("qwen3-vl", TINY, threads=1, rounds=2)
    finally:
        torch.set_num_threads(threads)
    assert [one.step for one in found] == ["forward", "forward and backward"]
    assert all(len(one.ours) == len(one.theirs) == 2 and one.ratio > 0 for one in found)


def test_the_ratio_is_the_median_over_the_rounds() -> None:
    one = Comparison("qwen3-vl", 1, "forward", [1.0, 9.0, 3.0], [2.0, 3.0, 3.0])
    assert one.ratio == 1.0


def test_other_logits_are_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    both = live_forward.both_models

    def other(*arguments: object) -> object:
        ours, theirs = both(*arguments)  # type: ignore[arg-type]
        with torch.no_grad():
            ours.language_model.output_layer.weight.add_(1.0)
        return ours, theirs

    monkeypatch.setattr(live_forward, "both_models", other)
    with pytest.raises(SystemExit, match="qwen3-vl: the logits differ by"):
        compare("qwen3-vl", TINY, threads=torch.get_num_threads(), rounds=1)
