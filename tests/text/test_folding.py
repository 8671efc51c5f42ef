"""Folded names stand for exactly the names that were given."""

from __future__ import annotations

import itertools
import re

from hypothesis import given
from hypothesis import strategies as st

from megatron.bridge.text.folding import (
    fold,
    fold_numbers,
    fold_pattern,
    fold_texts,
    fold_words,
    listing,
)


def unfold(pattern: str) -> list[str]:
    """Every name that a pattern stands for."""
    parts = re.split(r"\{([^}]*)\}", pattern)
    choices = []
    for position, part in enumerate(parts):
        if position % 2 == 0:
            choices.append([part])
            continue
        numbers: list[str] = []
        for run in part.split(","):
            first, _, last = run.partition("...")
            numbers += map(str, range(int(first), int(last or first) + 1))
        choices.append(numbers)
    return ["".join(words) for words in itertools.product(*choices)]


def test_layers() -> None:
    names = [f"layers.{i}.{w}" for i in range(28) for w in ("a.weight", "b.weight")]
    assert fold(names) == ["layers.{0...27}.a.weight", "layers.{0...27}.b.weight"]


def test_gaps_single_numbers_and_pairs() -> None:
    assert fold(f"h.{i}" for i in (0, 1, 2, 5, 7, 8)) == ["h.{0...2,5,7,8}"]
    assert fold(["h.11.w"]) == ["h.11.w"]
    assert fold([]) == []


def test_numbers_inside_of_words_are_not_folded() -> None:
    assert fold(["norm1.weight", "norm2.weight"]) == ["norm1.weight", "norm2.weight"]


def test_a_grid_and_what_is_no_grid() -> None:
    grid = [f"l.{i}.e.{j}.w" for i in range(3) for j in range(4)]
    assert fold(grid) == ["l.{0...2}.e.{0...3}.w"]
    assert fold(["a.0.1", "a.1.0"]) == ["a.0.1", "a.1.0"]


@given(
    st.lists(
        st.tuples(st.sampled_from("xy"), st.integers(0, 5), st.integers(8, 12)),
        unique=True,
        max_size=25,
    )
)
def test_nothing_is_lost_or_invented(rows: list[tuple[str, int, int]]) -> None:
    names = [f"{word}.{i}.m.{j}.w1" for word, i, j in rows]
    assert sorted(itertools.chain.from_iterable(map(unfold, fold(names)))) == sorted(names)


def test_words() -> None:
    names = [f"layers.{{0...4}}.self_attn.{w}_proj.weight" for w in "qkv"]
    assert fold_words(names) == "layers.{0...4}.self_attn.{q,k,v}_proj.weight"
    assert fold_words(["one"]) == "one"
    assert fold_words(["one", "two"]) == "one, two"
    assert fold_words(["h.{0,1}.w", "h.{2,3}.w"]) == "h.{0,1}.w, h.{2,3}.w"


@given(st.sets(st.tuples(st.integers(0, 4), st.integers(7, 11)), max_size=15))
def test_a_pattern_stands_for_its_rows(rows: set[tuple[int, int]]) -> None:
    """Also where a wildcard is a part of a word."""
    folded = fold_pattern("l.*.e.weight*", [tuple(map(str, row)) for row in rows])
    names = [f"l.{i}.e.weight{j}" for i, j in rows]
    assert sorted(itertools.chain.from_iterable(map(unfold, folded))) == sorted(names)


def test_a_pattern_with_fewer_wildcards_than_numbers() -> None:
    rows = [(str(layer), str(expert)) for layer in range(3) for expert in range(4)]
    assert fold_pattern("l.*.e.weight*", rows) == ["l.{0...2}.e.weight{0...3}"]
    assert fold_pattern("h.*.experts", rows) == ["h.{0...2}.experts"]
    assert fold_pattern("norm", [()]) == ["norm"]
    assert fold_pattern("l.*.w", []) == []


def test_numbers() -> None:
    assert fold_numbers([5, 0, 2, 1, 9, 8]) == "0...2,5,8,9"
    assert fold_numbers([]) == ""


def test_sentences_about_layers_and_experts() -> None:
    """What repeats the numbers of another name counts with it."""
    said = "h.{0}.e.{1}.up: missing, needed for l.{0}.mlp.fc1.weight{1}; found (350, 160)"
    texts = [said.format(layer, expert) for layer in range(3, 6) for expert in range(128)]
    assert fold_texts(texts) == [said.format("{3...5}", "{0...127}")]


def test_sentences_that_are_no_grid() -> None:
    diagonal = [f"h.{n}.e.{n}: missing, needed for l.{n}.weight{n}" for n in range(2)]
    assert fold_texts(diagonal) == diagonal
    others = [f"h.{n}: needed for l.{n // 2}" for n in range(4)]
    assert fold_texts(others) == ["h.{0,1}: needed for l.0", "h.{2,3}: needed for l.1"]


def test_sentences_that_differ_in_other_numbers() -> None:
    texts = ["h.0: found (7, 5)", "h.1: found (7, 6)", "x0: 0.5", "x1: 0.7", "h.007: found (7, 5)"]
    assert fold_texts(texts) == texts


def test_a_listing_is_short() -> None:
    few = [f"x{n}: gone" for n in range(3)]
    assert listing(few) == "\n".join(f"  - {text}" for text in few)
    assert listing(few * 2) == listing(few)
    lines = listing([f"x{n}: {'gone ' * 1000}" for n in range(1000)]).splitlines()
    assert len(lines) == 4
    assert max(map(len, lines)) < 2100
    assert lines[-1] == "  and 997 more (--json lists all)"
