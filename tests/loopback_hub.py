"""A loopback Hub that serves one repository to the real client, for reading."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c0ffee" + "0" * 34


@contextmanager
def serve(repo_id: str, folder: Path) -> Iterator[str]:
    """Serve ``folder`` as ``repo_id``; yields the endpoint. Branch ``main`` and tag ``v1`` are its only commit."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET(body=False)

        def do_GET(self, body: bool = True) -> None:
            path = self.path.split("?")[0]
            if match := re.fullmatch(rf"/api/models/{repo_id}(?:/revision/([^/]+))?", path):
                known = match[1] in (None, "main", "v1", COMMIT)
                self.answer_json(
                    {"id": repo_id, "sha": COMMIT, "siblings": [{"rfilename": n} for n in files]}, body, known
                )
            elif re.fullmatch(rf"/api/models/{repo_id}/tree/{COMMIT}", path):
                listed = [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in files.items()
                ]
                self.answer_json(listed, body)
            elif (match := re.fullmatch(rf"/{repo_id}/resolve/{COMMIT}/(.+)", path)) and match[1] in files:
                data = files[match[1]]
                self.answer(200, data, body, ETag=f'"{hashlib.sha1(data).hexdigest()}"')
            else:
                self.answer(404, b"{}", body, **{"X-Error-Code": "RepoNotFound"})

        def answer_json(self, content: object, body: bool, known: bool = True) -> None:
            if known:
                self.answer(200, json.dumps(content).encode(), body, **{"Content-Type": "application/json"})
            else:
                self.answer(404, b"{}", body, **{"X-Error-Code": "RevisionNotFound"})

        def answer(self, status: int, data: bytes, body: bool, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
