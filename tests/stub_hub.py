"""A hub on 127.0.0.1 that serves folders as model repositories, and takes commits into them: what `snapshot_download` and
`create_commit` ask for and no more."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from huggingface_hub import constants

ROOT = Path(__file__).resolve().parents[1]


def hub_environment(endpoint: str, home: Path) -> dict[str, str]:
    """Environment of a process that uses this hub, with its cache in `home`."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return environment | {"PYTHONPATH": os.pathsep.join(paths), "NO_PROXY": "127.0.0.1"}


def use_hub(monkeypatch: pytest.MonkeyPatch, endpoint: str, home: Path) -> None:
    """Make this process use this hub: what `hub_environment` does to a new one."""
    changes = {
        "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
    }
    for name, value in changes.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)


@contextmanager
def stub_hub(
    repositories: dict[str, Path],
    requests: list[str],
    truncate: str | None = None,
    uploads: Path | None = None,
    token: str | None = None,
) -> Iterator[str]:
    """Serve `{"owner/name": folder}`; yields the endpoint. `requests` collects "METHOD path".

    truncate: the name of a file whose transfer breaks off in the middle. uploads: where the folders of new repositories
    are made, which are added to `repositories`; without it, and without `token` where one is asked for, nothing is taken.
    """
    blobs: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def do_POST(self) -> None:
            data, path = self.received(), self.noted()
            if token is not None and self.headers.get("Authorization") != f"Bearer {token}":
                return self.send(b"{}", True, 401, {"X-Error-Message": "Invalid username or password."})
            if uploads is None:
                return self.send(b"{}", True, 403, {"X-Error-Message": "Forbidden: pass a token with write access."})
            if "/commit/" in path:
                return self.json(self.commit(path, data))
            asked = json.loads(data or b"{}")
            if path == "api/repos/create":
                name = f"{asked.get('organization') or 'me'}/{asked['name']}"
                there = name in repositories
                repositories.setdefault(name, uploads / name.replace("/", "--")).mkdir(exist_ok=True)
                return self.json({"url": f"{self.endpoint}/{name}"}, 409 if there else 200)
            if path == "api/validate-yaml":
                front = yaml.safe_load(asked["content"].split("---\n")[1])
                return self.json(
                    {"errors": [] if isinstance(front, dict) else [{"message": "no mapping"}], "warnings": []}
                )
            if "/preupload/" in path:
                modes = [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                        "oid": None,
                    }
                    for file in asked["files"]
                ]
                return self.json({"files": modes})
            if path.endswith(".git/info/lfs/objects/batch"):
                actions = [
                    entry | {"actions": {"upload": {"href": f"{self.endpoint}/lfs/{entry['oid']}"}}}
                    for entry in asked["objects"]
                ]
                return self.json({"transfer": "basic", "objects": actions})
            return self.json({})  # a new branch

        def do_PUT(self) -> None:
            data, oid = self.received(), self.noted().split("/")[-1]
            good = hashlib.sha256(data).hexdigest() == oid
            blobs[oid] = data
            self.send(b"", True, 200 if good else 400, {})

        def commit(self, path: str, data: bytes) -> dict[str, Any]:
            name = "/".join(path.removeprefix("api/models/").split("/")[:2])
            folder = repositories[name]
            for line in data.splitlines():
                entry = json.loads(line)
                kind, value = entry["key"], entry["value"]
                if kind == "file":
                    (folder / value["path"]).write_bytes(base64.b64decode(value["content"]))
                elif kind == "lfsFile":
                    (folder / value["path"]).write_bytes(blobs[value["oid"]])
                elif kind == "deletedFile":
                    (folder / value["path"]).unlink()
                elif kind == "header":
                    requests.append(f"MESSAGE {value['summary']}")
            oid = commit_of(files_of(folder))
            url = f"{self.endpoint}/{name}/commit/{oid}"
            return {"commitUrl": url, "commitOid": oid, "pullRequestUrl": f"{self.endpoint}/{name}/discussions/1"}

        def answer(self, body: bool) -> None:
            path = self.noted()
            parts = path.removeprefix("api/models/").split("/")
            folder = repositories.get("/".join(parts[:2]))
            if folder is None:
                return self.send(b"", body, 404, {"X-Error-Code": "RepoNotFound"})
            files = files_of(folder)
            commit = commit_of(files)
            if not path.startswith("api/"):  # owner/name/resolve/revision/file
                if parts[-1] not in files:
                    return self.send(b"", body, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
                data = files[parts[-1]]
                tags = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": commit}
                return self.send(data, body, 200, tags, broken=parts[-1] == truncate)
            answer: Any
            if len(parts) > 2 and parts[2] == "tree":
                answer = [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in files.items()
                ]
            else:
                siblings = [{"rfilename": name} for name in files]
                answer = {"id": "/".join(parts[:2]), "sha": commit, "siblings": siblings, "private": False}
            self.send(json.dumps(answer).encode(), body, 200, {"Content-Type": "application/json"})

        @property
        def endpoint(self) -> str:
            return f"http://{self.headers['Host']}"

        def noted(self) -> str:
            path = unquote(urlsplit(self.path).path).strip("/")
            requests.append(f"{self.command} {path}")
            return path

        def received(self) -> bytes:
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data

        def json(self, answer: dict[str, Any], status: int = 200) -> None:
            self.send(json.dumps(answer).encode(), True, status, {"Content-Type": "application/json"})

        def send(self, data: bytes, body: bool, status: int, headers: dict[str, str], broken: bool = False) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(data[: len(data) // 2] if broken else data)
            self.close_connection = broken

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def commit_of(files: dict[str, bytes]) -> str:
    """Forty digits that change when a file does."""
    total = hashlib.sha1()
    for name, data in files.items():
        total.update(name.encode() + hashlib.sha1(data).digest())
    return total.hexdigest()
