"""`inspect` and `plan` of a hub id, against a hub on this machine: weights are not fetched."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, hf_api

import forked
from megatron.bridge.cli import main

REPOSITORY = "someone/on-the-hub"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves one folder as the repository REPOSITORY; counts the bytes of weights it hands out."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder = folder
        self.weight_bytes = 0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    """The few questions that huggingface_hub asks."""

    server: Hub

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        api = f"/api/models/{REPOSITORY}"
        if path in (api, *(f"{api}/revision/{name}" for name in ("main", COMMIT))):
            files = [{"rfilename": file.name} for file in self.server.folder.iterdir()]
            self.send({"id": REPOSITORY, "sha": COMMIT, "siblings": files}, body=body)
        elif path.startswith(f"{api}/tree/"):
            entries = [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": self.etag(f)}
                for f in self.server.folder.iterdir()
            ]
            self.send(entries, body=body)
        else:
            file = self.server.folder / path.rpartition("/")[2]
            if path.startswith(f"/{REPOSITORY}/resolve/") and file.is_file():
                self.send_file(file, body=body)
            else:
                self.send({"error": "not found"}, body=body, status=404)

    def etag(self, file: Path) -> str:
        return hashlib.sha1(file.read_bytes(), usedforsecurity=False).hexdigest()

    def send(self, content: Any, *, body: bool, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if body:
            self.wfile.write(data)

    def send_file(self, file: Path, *, body: bool) -> None:
        data, wanted = file.read_bytes(), self.headers.get("Range")
        self.send_response(206 if wanted else 200)
        if wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            data = data[int(first) : int(last) + 1 if last else None]
        self.send_header("ETag", f'"{self.etag(file)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            if file.suffix == ".safetensors":
                self.server.weight_bytes += len(data)
            self.wfile.write(data)


@contextmanager
def serving(folder: Path) -> Iterator[Hub]:
    with Hub(folder) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def hub(small_model: Path) -> Iterator[Hub]:
    with serving(small_model) as server:
        yield server


@pytest.fixture
def pickled(small_model: Path, tmp_path: Path) -> Iterator[Hub]:
    """A hub whose repository has weights in another format."""
    (tmp_path / "pickled").mkdir()
    shutil.copy(small_model / "config.json", tmp_path / "pickled")
    (tmp_path / "pickled" / "pytorch_model.bin").write_text("not to be fetched")
    with serving(tmp_path / "pickled") as server:
        yield server


def online(hub: Hub, home: Path) -> dict[str, str]:
    """The environment of a command."""
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home)}
    for name in [*environment]:
        if name.lower() in ("http_proxy", "all_proxy", "hf_hub_offline"):
            del environment[name]
    return environment | {"HF_HUB_DISABLE_XET": "1"}


def run_forked(hub: Hub, home: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """The command in a process that is told of the hub when all is imported."""
    return forked.run(_online, online(hub, home), args)


def _online(environment: dict[str, str], args: tuple[str, ...]) -> int:
    os.environ.clear()
    os.environ.update(environment)
    importlib.reload(constants)
    hf_api.api.endpoint = constants.ENDPOINT
    return main(args)


def run_online(hub: Hub, home: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: huggingface_hub reads its endpoint when imported."""
    return subprocess.run(
        [sys.executable, "-m", "megatron.bridge", *args],
        env=online(hub, home),
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_headers_only(
    hub: Hub, small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run_online(hub, tmp_path / "home", "inspect", REPOSITORY, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert document["origin"] == "hub headers"
    main(["inspect", str(small_model), "--json"])
    local = json.loads(capsys.readouterr().out)
    for same in ("hf", "shards", "side_files", "rows", "megatron", "proven", "text", "rope"):
        assert document[same] == local[same]
    # huggingface_hub asks for the first 100 kB of each shard, where it expects the header.
    assert 0 < hub.weight_bytes <= 3 * 101_000 < document["hf"]["bytes"]
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_the_bars_of_downloads(hub: Hub, tmp_path: Path) -> None:
    """They are drawn on stderr, and with --json not at all, though all weights are fetched."""
    import_it = ("import", REPOSITORY, str(tmp_path / "out"), "--force")
    done = run_online(hub, tmp_path / "home", *import_it, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["command"] == "import"
    done = run_online(hub, tmp_path / "other-home", *import_it)
    assert done.returncode == 0
    assert "Fetching" in done.stderr


def test_a_plan_needs_headers_only(
    hub: Hub, small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also the parallel layout; and what is not in the cache has to be downloaded."""
    done = run_forked(hub, tmp_path / "home", "plan", REPOSITORY, "--tp", "2", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    main(["plan", str(small_model), "--tp", "2", "--json"])
    local = json.loads(capsys.readouterr().out)
    for same in ("hf", "megatron", "rows", "ranks"):
        assert document[same] == local[same]
    cost, size = document["conversion"], document["hf"]["bytes"]
    assert cost["download_bytes"] == size
    assert cost["disk_bytes"] == size + local["conversion"]["disk_bytes"]
    assert 0 < hub.weight_bytes <= 3 * 101_000
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_no_such_repository(hub: Hub, tmp_path: Path) -> None:
    done = run_forked(hub, tmp_path / "home", "inspect", "someone/else")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: someone/else: ")
    assert "Traceback" not in done.stderr


def test_weights_in_another_format(pickled: Hub, tmp_path: Path) -> None:
    """Named as in a folder, from the list of the repository's files."""
    for args in (("plan", REPOSITORY), ("import", REPOSITORY, str(tmp_path / "out"))):
        done = run_forked(pickled, tmp_path / "home", *args)
        assert done.returncode == 2
        assert done.stdout == ""
        *_, said = done.stderr.splitlines()  # behind the progress of a download
        assert said.startswith(f"error: {REPOSITORY}: no safetensors weights: it holds ")
        assert "pytorch_model.bin" in said
    assert not list((tmp_path / "home").rglob("*.bin"))


def test_a_reference_is_planned_with_by_its_headers(
    hub: Hub,
    small_checkpoint: Path,
    small_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = ("plan", str(small_checkpoint), "--json", "--hf")
    done = run_forked(hub, tmp_path / "home", *args, REPOSITORY)
    assert (done.returncode, done.stderr) == (0, "")
    main([*args, str(small_model)])
    assert json.loads(done.stdout) | {"folder": ""} == json.loads(capsys.readouterr().out) | {
        "folder": ""
    }
    assert 0 < hub.weight_bytes <= 2 * 3 * 101_000
    assert not list((tmp_path / "home").rglob("*.safetensors"))
