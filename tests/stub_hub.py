"""A hub on 127.0.0.1 that serves folders as model repositories: what `snapshot_download` asks for and no more."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def stub_hub(repositories: dict[str, Path], requests: list[str], truncate: str | None = None) -> Iterator[str]:
    """Serve `{"owner/name": folder}`; yields the endpoint. `requests` collects "METHOD path".

    truncate: the name of a file whose transfer breaks off in the middle.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            requests.append(f"{self.command} {path}")
            parts = path.removeprefix("api/models/").split("/")
            folder = repositories.get("/".join(parts[:2]))
            if folder is None:
                return self.send(b"", body, 404, {"X-Error-Code": "RepoNotFound"})
            files = {p.name: p.read_bytes() for p in sorted(folder.iterdir())}
            if not path.startswith("api/"):  # owner/name/resolve/revision/file
                if parts[-1] not in files:
                    return self.send(b"", body, 404, {"X-Error-Code": "EntryNotFound"})
                data = files[parts[-1]]
                tags = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
                return self.send(data, body, 200, tags, broken=parts[-1] == truncate)
            if len(parts) > 2 and parts[2] == "tree":
                answer = [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in files.items()
                ]
            else:
                siblings = [{"rfilename": name} for name in files]
                answer = {"id": "/".join(parts[:2]), "sha": COMMIT, "siblings": siblings, "private": False}
            self.send(json.dumps(answer).encode(), body, 200, {"Content-Type": "application/json"})

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
