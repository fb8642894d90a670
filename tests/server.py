"""The HTTP server of the tests: real sockets on this machine, and every fault that we know of."""

import hashlib
import http.server
import re
import threading
import time
from typing import Any


class FileServer(http.server.ThreadingHTTPServer):
    """Serves bytes by path, and misbehaves where it is told to.

    Attributes:
        url: its address.
        files: bytes by path, such as "/folder/data.bin"; PUT adds to them.
        headers: more headers for every answer.
        etag: whether answers carry the SHA-256 of their file as its entity tag.
        requests: of each GET so far, path and headers.
        troubles: by path, what goes wrong with its next GETs, each a dictionary of `always`'s keys.
        always: what goes wrong with every GET: status; headers; content (in place of the file's);
            ranges, if_range (False: not heeded); length (announced); sent (bytes after which the
            line is cut); slow (seconds between pieces); stall (seconds before the end).
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}
        self.headers: dict[str, str] = {}
        self.etag = True
        self.requests: list[tuple[str, dict[str, str]]] = []
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

    def do_HEAD(self) -> None:
        self.path = self.path.partition("?")[0]
        content = self.server.files.get(self.path)
        self.answer(200 if content is not None else 404, content or b"", {}, sent=0)

    def do_GET(self) -> None:
        self.path = self.path.partition("?")[0]
        self.server.requests.append((self.path, dict(self.headers)))
        next_troubles = self.server.troubles.get(self.path)
        trouble = {**self.server.always, **(next_troubles.pop(0) if next_troubles else {})}
        content = trouble.get("content", self.server.files.get(self.path))
        status = trouble.get("status", 200 if content is not None else 404)
        body, headers = content if status == 200 else b"", dict(trouble.get("headers", {}))
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted and status == 200 and trouble.get("ranges", True) and self.same(trouble, content):
            start = int(wanted[1])
            status, body = (206, content[start:]) if start < len(content) else (416, b"")
            span = f"{start}-{len(content) - 1}" if body else "*"
            headers["Content-Range"] = f"bytes {span}/{len(content)}"
        if "length" in trouble:
            headers["Content-Length"] = trouble["length"]
        self.answer(status, body, headers, trouble.get("sent", len(body)),
                    trouble.get("slow", 0), trouble.get("stall", 0))
        self.close_connection |= "length" in trouble

    def do_PUT(self) -> None:
        self.server.files[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(200, b"", {})

    def same(self, trouble: dict[str, Any], content: bytes) -> bool:
        """Whether the version in If-Range, if there is one, is what is served."""
        version = self.headers.get("If-Range")
        return not trouble.get("if_range", True) or version in (None, self.etag(content))

    def etag(self, content: bytes) -> str:
        return f'"{hashlib.sha256(content).hexdigest()}"'

    def answer(self, status: int, body: bytes, headers: dict[str, str], sent: int | None = None,
               slow: float = 0, stall: float = 0) -> None:
        """Send headers, and of the body the first `sent` bytes."""
        content = self.server.files.get(self.path)
        if content is not None and self.server.etag:
            headers = {"ETag": self.etag(content), **headers}
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **self.server.headers, **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        sent_body = body[:sent]
        try:
            for place in range(0, len(sent_body), 8192):
                self.wfile.write(sent_body[place : place + 8192])
                time.sleep(slow)
            time.sleep(stall)
        except OSError:  # the other end was killed
            pass
        self.close_connection = len(sent_body) < len(body) and self.command == "GET"
