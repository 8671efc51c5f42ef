"""The files beside the index of a stranger's checkpoint: the tracker, the record of a config."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron.bridge.cli import main
from megatron.bridge.formats.config_record import CONFIG_RECORD, config_record, read_hf_config
from megatron.bridge.formats.iterations import TRACKER_FILE
from megatron.bridge.models.hf_pretrained.config import HFConfig
from refusals import export_refused, refused

ITERATION = "iter_0000000"
ESCAPE = "\x1b[2J\x07\nerror: forged"

TRACKERS: dict[str, tuple[bytes, str]] = {
    "above": (b"../x", "found '../x'"),
    "absolute": (b"/etc", "found '/etc'"),
    "a number of 5000 digits": (b"9" * 5000, "the limit is 100"),
    "a number of 90 digits": (b"9" * 90, "which holds no .metadata"),
    "a NUL": (b"1\0", r"found '1\x00'"),
    "bytes that are no text": (b"\xff\xfe", "expected a number or 'release'"),
    "what the terminal obeys": (ESCAPE.encode(), r"found '\x1b[2J"),
    "digits of another script": ("\u0661".encode(), "expected a number"),
}


@pytest.mark.parametrize("case", TRACKERS)
def test_trackers(
    case: str, small_model: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, said = TRACKERS[case]
    (checkpoint / TRACKER_FILE).write_bytes(content)
    message = export_refused(checkpoint, small_model, capsys)
    assert said in message
    assert TRACKER_FILE in message


BILLION = "a0: &a0 [x, x]\n" + "".join(f"a{n + 1}: &a{n + 1} [*a{n}, *a{n}]\n" for n in range(60))
MERGED = "a0: &a0 {x: 1}\n" + "".join(
    f"a{n + 1}: &a{n + 1} {{<<: [*a{n}, *a{n}]}}\n" for n in range(60)
)

RECORDS: dict[str, tuple[str, str]] = {
    "a tag that runs code": ("hf: !!python/object/apply:os.system [true]", "ConstructorError"),
    "a tag of a module": ("hf: !!python/module:os", "ConstructorError"),
    "a tag that makes an object": ("hf: !!python/object/new:set {}", "ConstructorError"),
    "a milliard of laughs": (f"{BILLION}hf: {{config: {{a: *a60}}}}", "it has an alias"),
    "a milliard of merges": (f"{MERGED}hf: {{config: *a60}}", "it has an alias"),
    "a list in itself": ("hf: {config: &a [*a]}", "it has an alias"),
    "nested": ("hf: {config: " + "[" * 5000, "cannot be read"),
    "a date": ("hf: {config: {day: 2026-01-01}}", "cannot be read"),
    "a set": ("hf: {config: !!set {a, b}}", "cannot be read"),
    "bytes": ("hf: {config: {a: !!binary aGVsbG8=}}", "cannot be read"),
    "NaN": ("hf: {config: {a: .nan}}", "NaN is not a valid JSON number"),
    "a list for a config": ("hf: {config: [1]}", "expected a JSON object"),
    "an integer of 5000 digits": ("hf: {config: {a: " + "9" * 5000 + "}}", "cannot be read"),
    "a key of two types": ("hf: {config: {1: a, '1': b}}", "duplicate key '1'"),
    "two documents": ("hf: 1\n---\nhf: 2", "cannot be read"),
    "what the terminal obeys": ('hf: {config: {architectures: ["\\e[2J"]}}', r"\x1b[2J"),
}  # fmt: skip


@pytest.mark.parametrize("case", RECORDS)
def test_records(case: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, said = RECORDS[case]
    (checkpoint / ITERATION / CONFIG_RECORD).write_text(content)
    for command in ("inspect", "plan"):
        message = refused(capsys, command, checkpoint)
        assert said in message
        assert CONFIG_RECORD in message
        assert len(message) < 20_000
        assert message.count("\n") == 1


FOREIGN: dict[str, tuple[str, str | None]] = {
    "nothing": ("", None),
    "text": ("hf", None),
    "two megabytes": ("#" * (2 << 20) + "\nmodel: {hf_model_id: a/b}", None),
    "a milliard of laughs": (f"{BILLION}hf_model_id: a/b", "a/b"),
    "a milliard of merges": (f"{MERGED}hf_model_id: [a/b]", None),
    "tags that run code": (
        "model: !!python/object/apply:os.system\n  args: [false]\n  hf_model_id: a/b", "a/b"
    ),
    "an alias": ("names: [&id a/b]\nmodel: {hf_model_id: *id}", "a/b"),
    "an alias of nothing": ("model: {hf_model_id: *id}", None),
    "deep inside": ("model: [{inner: {? [x] : y, hf_model_id: 'a/b'}}]", "a/b"),
    "as a value": ("model: hf_model_id\nother: a/b", None),
    "null": ("hf_model_id: null\nmodel: {hf_model_id: a/b}", "a/b"),
    "a list": ("hf_model_id: [a/b]", None),
    "what the terminal obeys": ('hf_model_id: "\\e[2J"', None),
    "damaged behind it": ("model: {hf_model_id: a/b}\nother: [", "a/b"),
    "damaged before it": ("other: ]\nmodel: {hf_model_id: a/b}", None),
    "nested": ("hf_model_id: a/b\nmodel: " + "[" * 5000, "a/b"),
    "bytes that are no text": ("\udcff\udcfe", None),
    "an empty entry of our name": ("model: {hf_model_id: a/b}\nhf: null", "a/b"),
    "another entry of our name": ("hf: {hf_model_id: a/b, revision: main}", "a/b"),
    "a list of our name": ("hf: [a/b]", None),
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN)
def test_records_of_other_programs(
    case: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They describe nothing, whatever is in them; nothing in them is built or followed."""
    content, model_id = FOREIGN[case]
    path = checkpoint / ITERATION / CONFIG_RECORD
    path.write_bytes(content.encode(errors="surrogateescape"))
    assert main(["inspect", str(checkpoint), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["config_record"], found["architecture"]) == (False, None)
    assert (found["other_record"], found["hf_model_id"]) == (True, model_id)
    message = refused(capsys, "plan", checkpoint)
    assert f"{path}: a record of another program" in message
    assert ("--hf a/b" in message) == (model_id is not None)


def test_a_checkpoint_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for name in ("file", "mistyped"):
        message = refused(capsys, "export", tmp_path / name, tmp_path / "target")
        assert f"{tmp_path / name}: there is no such folder" in message


def test_what_we_write_has_no_alias(tmp_path: Path) -> None:
    shared = [1, 2]
    hf = HFConfig.from_dict({"a": shared, "b": shared, "text": "ü\x1b", "none": None})
    (tmp_path / CONFIG_RECORD).write_bytes(config_record("x.Y", {"c": shared, "d": shared}, hf))
    assert read_hf_config(tmp_path).data == hf.data
