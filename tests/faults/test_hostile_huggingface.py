"""Model folders of strangers: refused before anything is written, in bounded time and memory.

Single files as a reader sees them are in test_reading.py; here the command line is given a whole
model with one of its files exchanged.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron.bridge.cli import main
from megatron.bridge.errors import CheckpointError
from megatron.bridge.operations.inspection.hub_headers import hub_headers
from model_folders import INDEX, edit_index, safetensors_bytes, write_json
from refusals import NOWHERE, paths_below, refused

SHARD = "model-00002-of-00003.safetensors"
ESCAPE = "\x1b[2J\x1b]0;title\x07\nerror: forged"


@pytest.fixture
def model(small_model: Path, tmp_path: Path) -> Path:
    """A model to damage."""
    return Path(shutil.copytree(small_model, tmp_path / "model"))


@pytest.fixture
def checkpoint(small_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return Path(shutil.copytree(small_checkpoint, tmp_path / "checkpoint"))


def change_header(path: Path, change: Callable[[str], str]) -> None:
    """Change the text of a file's header, and leave the data as they are."""
    content = path.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    text = change(content[8:end].decode()).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[end:])


def header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Damage: one shard's header as an object."""

    def changed(text: str) -> str:
        entries = json.loads(text)
        change(entries)
        return json.dumps(entries)

    return lambda model: change_header(model / SHARD, changed)


def header_text(change: Callable[[str], str]) -> Callable[[Path], None]:
    return lambda model: change_header(model / SHARD, change)


def header_length(length: int) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        with (model / SHARD).open("r+b") as file:
            file.write(struct.pack("<Q", length))

    return damage


def first(entries: dict[str, Any]) -> dict[str, Any]:
    """The entry of a tensor that lies first, and is no scalar."""
    return min(
        (entry for name, entry in entries.items() if name != "__metadata__"),
        key=lambda entry: entry["data_offsets"],
    )


def shift(entries: dict[str, Any], by: int) -> None:
    first(entries)["data_offsets"] = [at + by for at in first(entries)["data_offsets"]]


def whole_index(content: str | bytes) -> Callable[[Path], None]:
    data = content if isinstance(content, bytes) else content.encode(errors="surrogatepass")
    return lambda model: (model / INDEX).write_bytes(data) and None


def index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        content = edit_index(model)
        change(content)
        write_json(model / INDEX, content)

    return damage


def place(file_name: str) -> Callable[[Path], None]:
    """Damage: the index places one tensor in another file."""
    return index(lambda content: content["weight_map"].update({"lm_head.weight": file_name}))


def instead(name: str, make: Callable[[Path], None]) -> Callable[[Path], None]:
    """Damage: something else in the place of a file."""

    def damage(model: Path) -> None:
        path = model / name
        path.unlink()
        make(path)

    return damage


def zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


def renamed(old: str, new: str) -> Callable[[str], str]:
    return lambda text: text.replace(old, new, 1)


NESTED = "[" * 5000 + "]" * 5000

HEADERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "longer than the file": (header_length(50_000_000), "is truncated: the header needs"),
    "longer than any": (header_length((1 << 64) - 1), "the limit is 100000000"),
    "length 0": (header_length(0), "the header is invalid"),
    "nested": (header_text(lambda _: '{"a":' * 60000), "nested too deeply"),
    "nested and complete": (
        header_text(renamed('"format"', f'"x": {NESTED}, "format"')), "nested too deeply"
    ),
    "an integer of 5000 digits": (
        header(lambda entries: first(entries).update(shape=[10**4000, 10**4000])), "shape must be"
    ),
    "an integer beyond what is parsed": (
        header_text(renamed('"shape":[', f'"shape":[{"9" * 5000},')), "the header is invalid"
    ),
    "NaN": (header_text(renamed('"shape":[', '"shape":[NaN,')), "NaN is not a valid JSON number"),
    "infinity": (header_text(renamed('"shape":[', '"shape":[-Infinity,')), "not a valid JSON"),
    "1e999": (header_text(renamed('"shape":[', '"shape":[1e999,')), "'1e999' is too large"),
    "true": (header_text(renamed('"shape":[', '"shape":[true,')), "shape must be"),
    "a size of 2**63": (
        header(lambda entries: first(entries).update(shape=[1 << 63, 0])), "shape must be"
    ),
    "sizes whose product overflows": (
        header(lambda entries: first(entries).update(shape=[1 << 32, 1 << 32])), "needs 368934881"
    ),
    "65 axes": (header(lambda entries: first(entries).update(shape=[1] * 65)), "shape must be"),
    "a million axes": (
        header(lambda entries: first(entries).update(shape=[1 << 60] * 1_000_000)), "shape must be"
    ),
    "a negative size": (
        header(lambda entries: first(entries).update(shape=[-1, -1])), "shape must be"
    ),
    "a negative offset": (header(lambda entries: shift(entries, -8)), "data_offsets must be"),
    "an overlap": (header(lambda entries: shift(entries, 2)), "a gap before"),
    "a key twice": (
        header_text(lambda text: text.rstrip()[:-1] + "," + text[1:]), "duplicate key"
    ),
    "a million keys twice": (
        header_text(lambda _: "{" + ",".join(f'"{n // 2}":0' for n in range(1_000_000)) + "}"),
        "duplicate key '0'",
    ),
    "an unknown dtype": (
        header(lambda entries: first(entries).update(dtype="F4" + ESCAPE)), "is not supported"
    ),
    "an object for a dtype": (
        header(lambda entries: first(entries).update(dtype={"F32": []})), "is not supported"
    ),
    "a name that the terminal obeys": (
        header(lambda entries: entries.update({ESCAPE: first(entries)})), r"'\x1b[2J"
    ),
    "a name of a megabyte": (
        header(lambda entries: entries.update({"x" * 1_000_000: first(entries)})), "too long"
    ),
    "half of a surrogate pair": (
        header(lambda entries: entries.update({"a\ud800": first(entries)})), r"a\ud800"
    ),
    "no tensors": (header_text(lambda _: "{}"), "behind the last tensor"),
}  # fmt: skip

INDEXES: dict[str, tuple[Callable[[Path], None], str]] = {
    "above": (place("../model.safetensors"), "not the path of a *.safetensors file"),
    "absolute": (place("/etc/x.safetensors"), "not the path of a *.safetensors file"),
    "backslash": (place("..\\x.safetensors"), "not the path of a *.safetensors file"),
    "NUL": (place("\0.safetensors"), "not the path of a *.safetensors file"),
    "a name that the terminal obeys": (
        place(ESCAPE + ".safetensors"), r"lm_head.weight points to '\x1b[2J"
    ),
    "too long a name": (place("x" * 300 + ".safetensors"), "not the path"),
    "a tensor that the terminal obeys": (
        index(lambda content: content["weight_map"].update({ESCAPE: SHARD})), r"'\x1b[2J"
    ),
    "a key twice": (
        whole_index('{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}'),
        "duplicate key 'a'",
    ),
    "nested": (whole_index(f'{{"weight_map": {NESTED}}}'), "nested too deeply"),
    "not UTF-8": (whole_index(b"\xff\xfe{}"), "cannot be read"),
    "NaN": (whole_index('{"weight_map": {"a": NaN}}'), "NaN is not a valid JSON number"),
    "a folder": (instead(INDEX, Path.mkdir), "it is not a regular file"),
    "a pipe": (instead(INDEX, os.mkfifo), "it is not a regular file"),
    "a device": (instead(INDEX, zeros), "it is not a regular file"),
    "a terabyte": (instead(INDEX, sparse), "the limit is 100000000"),
    "its shard is a folder": (instead(SHARD, Path.mkdir), "it is not a regular file"),
    "its shard is a pipe": (instead(SHARD, os.mkfifo), "it is not a regular file"),
    "its shard is a device": (instead(SHARD, zeros), "it is not a regular file"),
    "its shard is a terabyte of zeros": (instead(SHARD, sparse), "the header is invalid"),
    "ten thousand shards": (
        index(lambda c: c["weight_map"].update({f"x{n}": f"{n}{SHARD}" for n in range(10_000)})),
        "and 9997 more (--json lists all)",
    ),
}  # fmt: skip


def config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        content = json.loads((model / "config.json").read_text())
        change(content)
        (model / "config.json").write_text(json.dumps(content))

    return damage


def text_config(**values: object) -> Callable[[Path], None]:
    return config(lambda content: content["text_config"].update(values))


def vision_config(**values: object) -> Callable[[Path], None]:
    return config(lambda content: content["vision_config"].update(values))


CONFIGS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a milliard layers": (text_config(num_hidden_layers=10**9), "text_config.num_hidden_layers"),
    "a thousand digits of layers": (text_config(num_hidden_layers=10**1000), "from 1 to"),
    "a negative number of layers": (
        text_config(num_hidden_layers=-3), "num_hidden_layers must be a number from 1 to"
    ),
    "no layers": (text_config(num_hidden_layers=0), "num_hidden_layers must be a number from 1"),
    "layers by half": (text_config(num_hidden_layers=2.5), "must be of type int, found 2.5"),
    "true layers": (text_config(num_hidden_layers=True), "must be of type int, found True"),
    "layers in words": (text_config(num_hidden_layers="5"), "must be of type int, found '5'"),
    "layers in a list": (text_config(num_hidden_layers=[5]), "must be of type int"),
    "a milliard heads": (text_config(num_key_value_heads=10**9), "num_key_value_heads must"),
    "a milliard vision layers": (vision_config(depth=10**9), "vision_config.depth"),
    "a milliard vision heads": (vision_config(num_heads=10**9), "vision_config.num_heads must"),
    "no vision heads": (vision_config(num_heads=0), "vision_config.num_heads must be"),
    "half a million mergers": (
        vision_config(deepstack_visual_indexes=list(range(500_000))),
        "deepstack_visual_indexes should name some of 3 layers, found [0, 1, 2",
    ),
    "mergers of nothing": (
        vision_config(deepstack_visual_indexes=[{}, None]), "must be a list of int"
    ),
    "an infinite base": (text_config(rope_theta=float("inf")), "Infinity is not a valid JSON"),
    "too large a base": (text_config(rope_theta=10**400), "must be of type float"),
    "a base below zero": (text_config(rope_theta=-1), "rope_theta must be a number above 0"),
    "no base": (text_config(rope_theta=0), "text_config.rope_theta must be a number above 0"),
    "no epsilon": (text_config(rms_norm_eps=0.0), "rms_norm_eps must be a number above 0"),
    "no context": (text_config(max_position_embeddings=0), "max_position_embeddings must be"),
    "a token below zero": (
        config(lambda c: c.update(image_token_id=-1)), "image_token_id must be a number from 0 to"
    ),
    "another type of model": (
        config(lambda c: c.update(model_type="llama")),
        "model_type of a Qwen3VLForConditionalGeneration must be 'qwen3_vl', found 'llama'",
    ),
    "no dtype at the top": (config(lambda c: c.update(dtype="foo")), "dtype is 'foo', which is"),
    "no dtype of the text": (text_config(dtype="foo"), "text_config.dtype is 'foo', which is not"),
    "too wide": (text_config(hidden_size=1 << 31), "hidden_size must be a number from 1 to"),
    "text that is none": (config(lambda c: c.update(text_config=[])), "must be of type dict"),
    "an architecture that the terminal obeys": (
        config(lambda c: c.update(architectures=[ESCAPE])), r"['\x1b[2J"
    ),
    "a thousand levels": (
        config(lambda c: c.update(x=json.loads("[" * 500 + "]" * 500))), "nested too deeply"
    ),
    "a pipe": (instead("config.json", os.mkfifo), "it is not a regular file"),
    "a device": (instead("config.json", zeros), "it is not a regular file"),
    "a terabyte": (instead("config.json", sparse), "the limit is"),
    "a key twice": (
        lambda model: (model / "config.json").write_text('{"a": 1, "a": 2}') and None,
        "duplicate key 'a'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_headers(case: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = check_import(HEADERS[case], model, capsys)
    assert SHARD in message


@pytest.mark.parametrize("case", INDEXES)
def test_indexes(case: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_import(INDEXES[case], model, capsys)


def test_weights_of_nothing(
    model: Path, small_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in model.glob("model*"):
        file.unlink()
    (model / "model.safetensors").write_bytes(safetensors_bytes({"__metadata__": {}}))
    said = "model.safetensors: it holds no tensors"
    assert said in refused(capsys, "import", model, NOWHERE)
    assert said in refused(capsys, "export", small_checkpoint, NOWHERE, "--hf", model)
    assert said in refused(capsys, "verify", small_checkpoint, model)


@pytest.mark.parametrize("case", CONFIGS)
def test_configs(case: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = check_import(CONFIGS[case], model, capsys)
    assert "config.json" in message
    for file in model.glob("model*"):
        file.unlink()
    # A config alone is as hostile.
    assert main(["inspect", str(model)]) == 2
    assert CONFIGS[case][1] in capsys.readouterr().err


def check_import(
    case: tuple[Callable[[Path], None], str], model: Path, capsys: pytest.CaptureFixture[str]
) -> str:
    """The message, of a bearable length; nothing was written."""
    damage, said = case
    damage(model)
    before = paths_below(model.parent)
    message = refused(capsys, "import", model, NOWHERE)
    assert said in message
    assert len(message) < 20_000
    assert paths_below(model.parent) == before
    return message


@pytest.mark.parametrize("case", [HEADERS["an overlap"], INDEXES["a pipe"]])
@pytest.mark.parametrize("command", ["export", "verify", "inspect", "plan"])
def test_other_commands(
    case: tuple[Callable[[Path], None], str],
    command: str,
    model: Path,
    small_checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage, said = case
    damage(model)
    before = paths_below(model.parent)
    args: list[str | Path] = {
        "export": [small_checkpoint, NOWHERE, "--hf", model],
        "verify": [small_checkpoint, model],
        "inspect": [model],
        "plan": [model],
    }[command]
    assert said in refused(capsys, command, *args)
    assert paths_below(model.parent) == before


# --- what accompanies the weights ---

SIDE_FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a pipe": (instead("tokenizer.json", os.mkfifo), "tokenizer.json: it should be a file"),
    "a device": (instead("tokenizer.json", zeros), "tokenizer.json: it should be a file"),
    "a link that leads nowhere": (
        instead("tokenizer.json", lambda path: path.symlink_to("gone")), "leads nowhere"
    ),
    "a link to a folder": (
        lambda model: (model / "extra").symlink_to("/etc"), "is a link to a folder"
    ),
    "a pipe that the terminal obeys": (
        lambda model: os.mkfifo(model / ESCAPE), r"\x1b[2J\x1b]0;title\x07\nerror: forged: it"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SIDE_FILES)
def test_side_files(
    case: str, model: Path, small_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, said = SIDE_FILES[case]
    damage(model)
    before = paths_below(model.parent)
    assert said in refused(capsys, "export", small_checkpoint, NOWHERE, "--hf", model)
    assert paths_below(model.parent) == before


def test_a_side_file_that_the_terminal_would_obey_is_shown_escaped(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / f"{ESCAPE}.txt").write_text("x")
    (model / "\udcff.txt").write_text("not UTF-8")
    for form in ([], ["--json"]):
        assert main(["inspect", str(model), *form]) == 0
        printed = capsys.readouterr().out
        assert all(char.isprintable() for char in printed.replace("\n", ""))
        assert re.search(r"\\(x|u00)1b\[2J", printed)


def test_folders_that_the_terminal_would_obey(
    model: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`refused` looks at every character."""
    for source in (model, checkpoint):
        source = source.rename(source.parent / f"{source.name}{ESCAPE}")
        (source / "config.json").unlink(missing_ok=True)
        (source / "latest_checkpointed_iteration.txt").unlink(missing_ok=True)
        assert r"\x1b[2J" in refused(capsys, "inspect", source)


def tensor(dtype: str, shape: list[object]) -> SimpleNamespace:
    """As huggingface_hub gives it."""
    return SimpleNamespace(dtype=dtype, shape=shape)


@pytest.mark.parametrize(
    ("info", "said"),
    [
        (tensor("F4", [2, 3]), "dtype 'F4' is not supported"),
        (tensor("F32", [2, -3]), "shape must be a list of sizes"),
        (tensor("F32", ["2"]), "shape must be a list of sizes"),
        (TypeError("what is raised for a shape of words"), "no usable safetensors weights"),
    ],
)
def test_headers_on_the_hub(info: object, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(*_: object, **__: object) -> Any:
        if isinstance(info, Exception):
            raise info
        return SimpleNamespace(files_metadata={SHARD: SimpleNamespace(tensors={"w": info})})

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", answer)
    with pytest.raises(CheckpointError, match=said):
        hub_headers("someone/model", "main")


@pytest.mark.parametrize(
    "other", [tensor("F32", [2, 3]), tensor("F16", [2, 3]), tensor("F32", [6])]
)
def test_a_tensor_in_two_files_on_the_hub(other: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as headers tell it is one: whether the data differ is found when they are read."""
    files = {
        file: SimpleNamespace(tensors={"w": info})
        for file, info in (("a.safetensors", tensor("F32", [2, 3])), ("b.safetensors", other))
    }
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        "huggingface_hub.get_safetensors_metadata",
        lambda *_, **__: SimpleNamespace(files_metadata=files),
    )
    if (other.dtype, other.shape) == ("F32", [2, 3]):
        assert [found.shape for found in hub_headers("someone/model", "main").values()] == [(2, 3)]
        return
    with pytest.raises(CheckpointError, match=r"in two shards, a\.s.* and b\.s.* differ in it"):
        hub_headers("someone/model", "main")


def test_links_are_followed(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The hub's cache is a folder of links to blobs elsewhere, and may be a link itself."""
    snapshot = tmp_path / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(small_model.iterdir())):
        blob = tmp_path / "blobs" / str(number)
        blob.parent.mkdir(exist_ok=True)
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    (tmp_path / "link").symlink_to(snapshot)
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
    assert main(["import", str(tmp_path / "link"), str(checkpoint)]) == 0
    (tmp_path / "checkpoint-link").symlink_to(checkpoint)
    args = ["export", str(tmp_path / "checkpoint-link"), str(out), "--hf", str(tmp_path / "link")]
    assert main(args) == 0
    for file in small_model.iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes()
        assert not (out / file.name).is_symlink()
