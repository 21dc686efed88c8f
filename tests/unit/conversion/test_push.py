"""Uploads go to a hub of the test's own, over HTTP on this machine."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from megatron_moellava.config import ConfigError
from megatron_moellava.conversion.push import check_repo, planned, push


class Hub(BaseHTTPRequestHandler):
    """What `upload_folder` asks of the hub; files are taken as ordinary ones."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        address = f"{constants.ENDPOINT}/me/model"
        if self.server.refuses:
            return self.answer(403, {"error": "no write access"})
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for name in names]
            return self.answer(200, {"files": files})
        if "/commit/" in self.path:
            self.server.commit = [json.loads(line) for line in body.splitlines()]
            return self.answer(200, {"commitUrl": f"{address}/commit/1", "commitOid": "1", "success": True})
        return self.answer(200, {"url": address, "warnings": [], "errors": []})

    def do_GET(self) -> None:
        self.answer(200, {"id": "me/model", "sha": "0", "siblings": []})

    def answer(self, status: int, content: dict) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.commit, server.refuses = [], False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield server
    server.shutdown()


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# model\n")
    (folder / "model.safetensors").write_bytes(bytes(range(256)))
    return folder


def test_every_file_of_the_folder_is_uploaded_in_one_commit(hub, folder):
    assert push(folder, "me/model", private=True) == f"{constants.ENDPOINT}/me/model/commit/1"
    sent = {item["value"]["path"]: item["value"]["content"] for item in hub.commit if item["key"] == "file"}
    assert {name: base64.b64decode(content) for name, content in sent.items()} == {
        name: (folder / name).read_bytes() for name, _ in planned(folder)
    }
    assert planned(folder) == [("README.md", 36), ("model.safetensors", 256)]


def test_a_hub_that_refuses_is_one_sentence_and_leaves_the_folder(hub, folder):
    hub.refuses = True
    with pytest.raises(ConfigError, match=r"the hub did not take it .*403.*hf upload me/model"):
        push(folder, "me/model", private=False)
    assert len(planned(folder)) == 2 and not hub.commit


@pytest.mark.parametrize("repo", ["me/my model", "a/b/c", ""])
def test_a_name_that_the_hub_would_refuse_is_refused_before_the_export(repo):
    with pytest.raises(ConfigError, match="give USER/NAME"):
        check_repo(repo)
