"""The HTTP server of the tests: real sockets on this machine, and every fault that we know of.

`publish` makes it a stand-in of the Hugging Face hub.
"""

import hashlib
import http.server
import json
import re
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any


class FileServer(http.server.ThreadingHTTPServer):
    """Serves bytes by path, and misbehaves where it is told to.

    Attributes:
        url: its address.
        files: bytes by path, such as "/folder/data.bin"; PUT adds to them.
        headers: more headers for every answer.
        etag: whether answers carry the SHA-256 of their file as its entity tag.
        requests: of each GET so far, path and headers.
        posts: of each POST so far, path and body; it is answered with the file of its path.
        troubles: by path, what goes wrong with its next GETs or POSTs, each a dictionary of
            `always`'s keys.
        always: what goes wrong with all of them: status; headers; content (in place of the
            file's); ranges, if_range (False: not heeded); sent (bytes after which the line is
            cut); slow (seconds between pieces); stall (seconds before the end).
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}
        self.headers: dict[str, str] = {}
        self.etag = True
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.posts: list[tuple[str, bytes]] = []
        self.troubles: dict[str, list[dict[str, Any]]] = {}
        self.always: dict[str, Any] = {}
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def paths(self) -> list[str]:
        """The path of each GET so far."""
        return [path for path, _ in self.requests]

    def ranges(self) -> list[str | None]:
        """The header Range of each GET so far."""
        return [headers.get("Range") for _, headers in self.requests]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_PUT(self) -> None:
        self.server.files[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(200, b"", {})

    def do_POST(self) -> None:
        self.server.posts.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
        self.do_GET()

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, trouble = self.path.partition("?")[0], {}
        if self.command == "GET":
            self.server.requests.append((path, dict(self.headers)))
        if self.command != "HEAD":
            troubles = self.server.troubles.get(path)
            trouble = {**self.server.always, **(troubles.pop(0) if troubles else {})}
        content = trouble.get("content", self.server.files.get(path))
        status = trouble.get("status", 404 if content is None else 200)
        headers = dict(trouble.get("headers", {}))
        if content is None or status != 200:
            self.answer(status, b"", headers)
            return
        tag = f'"{hashlib.sha256(content).hexdigest()}"'
        if self.server.etag:
            headers["ETag"] = tag
        same = not trouble.get("if_range", True) or self.headers.get("If-Range", tag) == tag
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted and same and trouble.get("ranges", True):
            status, content = 206, content[int(wanted[1]):]
        self.answer(status, content, headers, **{
            name: trouble[name] for name in ("sent", "slow", "stall") if name in trouble})

    def answer(self, status: int, body: bytes, headers: dict[str, str], sent: int | None = None,
               slow: float = 0, stall: float = 0) -> None:
        """Send headers, and of the body the first `sent` bytes."""
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **self.server.headers, **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        part = b"" if self.command == "HEAD" else body[:sent]
        with suppress(OSError):  # the other end was killed
            for place in range(0, len(part), 8192):
                self.wfile.write(part[place : place + 8192])
                time.sleep(slow)
            time.sleep(stall)
        self.close_connection = self.command == "GET" and (
            sent is not None or "Content-Length" in headers)


COMMIT = "0" * 40


def publish(server: FileServer, folder: Path, name: str, revision: str = "main",
            kind: str = "models") -> None:
    """Serve the model or data set in `folder` as the Hugging Face hub does.

    Beside weights in one format lie those in another and a README, which nobody should fetch.
    """
    contents = {path.relative_to(folder).as_posix(): path.read_bytes()
                for path in folder.rglob("*") if path.is_file()}
    if "model.safetensors" in contents:
        contents = {**dict.fromkeys(("pytorch_model.bin", "README.md"), b"never read"), **contents}
    tree = [{"type": "file", "path": path, "size": len(content), "oid": COMMIT}
            for path, content in contents.items()]
    info = {"id": name, "modelId": name, "sha": COMMIT, "siblings": []}
    server.headers["X-Repo-Commit"] = COMMIT
    server.files[f"/api/{kind}/{name}/revision/{revision}"] = json.dumps(info).encode()
    server.files[f"/api/{kind}/{name}/tree/{COMMIT}"] = json.dumps(tree).encode()
    prefix = "" if kind == "models" else f"/{kind}"
    for path, content in contents.items():
        server.files[f"{prefix}/{name}/resolve/{COMMIT}/{path}"] = content
