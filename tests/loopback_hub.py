"""A loopback Hub for the real client: repositories with commits and branches, LFS, and faults on demand.

Speaks what huggingface_hub 1.31 to 2.4 sends. Blobs are served under another host name than the API, as the Hub does.
"""

import base64
import hashlib
import itertools
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

import yaml
from warm import SESSION

TOKEN = "hf_loopback"
LARGE = 2000
"""Bytes from which a file is stored apart; small, so that tests need no large ones."""


Files = dict[str, Any]
"""Content by name: bytes, or what the store holds."""


@dataclass
class Repo:
    """Commits by id, each a folder by name, and branches."""

    commits: dict[str, Files] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)
    private: bool = True
    gated: bool = False
    """Shown to everybody, but its files are given to nobody."""

    def commit(self, branch: str, files: Files) -> str:
        content = "".join(f"{name} {_entry(name, data)['oid']}" for name, data in sorted(files.items()))
        identity = hashlib.sha1(f"{self.heads.get(branch)} {content}".encode()).hexdigest()
        self.commits[identity] = files
        self.heads[branch] = identity
        return identity


@dataclass(frozen=True)
class Stored:
    """A file that only the content-addressed store holds."""

    oid: str
    size: int
    xet: str


@dataclass
class Fault:
    """Something that goes wrong ``times`` times on requests whose line matches."""

    kind: str
    """A status such as 503, or: reset, short, wrong, slow."""
    match: str
    times: int = 1


class Hub:
    """What the server knows; tests look into it and change it."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.bytes_sent = 0
        self.authorized: list[tuple[str, bool]] = []
        """Host and whether the token came along, for every request."""
        self.lock = threading.Lock()
        self.store: Path | None = None
        """Folder of the content-addressed store, where the client's own Xet code writes and reads."""
        self.endpoint = self.cdn = ""
        self.home = Path()
        """Where the first client finds its caches, by a link: a path that later Hubs use again."""

    def add(self, repo_id: str, files: dict[str, bytes]) -> str:
        """A repository with one commit, tagged v1."""
        repo = self.repos.setdefault(repo_id, Repo(private=False))
        identity = repo.commit("main", dict(files))
        repo.heads["v1"] = identity
        return identity

    def add_set(self, repo_id: str, files: dict[str, bytes], *, gated: bool = False) -> str:
        """A data set with one commit."""
        commit = self.add(f"datasets/{repo_id}", files)
        self.repos[f"datasets/{repo_id}"].gated = gated
        return commit

    def head(self, repo_id: str) -> Files:
        repo = self.repos[repo_id]
        return repo.commits[repo.heads["main"]]

    def xet_hash(self, oid: str) -> str | None:
        """What Xet calls a file, by its SHA-256: the store's shards say so."""
        shards = self.store.rglob("*.mdb") if self.store else ()
        return next((found[oid] for shard in shards if oid in (found := shard_files(shard.read_bytes()))), None)

    def fault(self, line: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.match, line):
                    fault.times -= 1
                    return fault
        return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def handle_one(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self._chunks()
        else:
            self.body = self.rfile.read(length)
        line = f"{self.command} {self.path}"
        self.hub.requests.append(line)
        self.hub.authorized.append((self.headers.get("Host", "").split(":")[0], "Authorization" in self.headers))
        self.wrong = self.short = False
        if fault := self.hub.fault(line):
            if fault.kind == "reset":
                self.close_connection = True
                return
            if fault.kind == "slow":
                time.sleep(1.0)
            elif fault.kind in ("wrong", "short"):
                setattr(self, fault.kind, True)
            else:
                self.answer(int(fault.kind), b'{"error": "as asked"}')
                return
        path = self.path.split("?")[0]
        for pattern, answer in ROUTES:
            if match := re.fullmatch(pattern, line.split(" ")[0] + " " + path):
                answer(self, **match.groupdict())
                return
        self.missing("RepoNotFound")

    do_HEAD = do_GET = do_POST = do_PUT = handle_one

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    # Answers

    def answer(self, status: int, data: bytes = b"", **headers: str) -> None:
        if self.wrong and data:
            data = data[:-1] + bytes([data[-1] ^ 1])
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.hub.bytes_sent += len(data)
            self.wfile.write(data[: len(data) // 2] if self.short else data)
            if self.short:
                self.close_connection = True

    def json(self, content: Any, status: int = 200, **headers: str) -> None:
        self.answer(status, json.dumps(content).encode(), **{"Content-Type": "application/json", **headers})

    def missing(self, code: str) -> None:
        self.answer(404, b"{}", **{"X-Error-Code": code})

    def found(self, repo_id: str, revision: str | None) -> tuple[str, Files] | None:
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and not self.headers.get("Authorization")):
            self.missing("RepoNotFound")
            return None
        identity = repo.heads.get(revision or "main", revision or "")
        if identity not in repo.commits:
            self.missing("RevisionNotFound")
            return None
        return identity, repo.commits[identity]

    # Routes

    def create(self) -> None:
        asked = json.loads(self.body)
        repo_id = "/".join(filter(None, [asked.get("organization") or "tester", asked["name"]]))
        url = f"{self.hub.endpoint}/{repo_id}"
        if not self.headers.get("Authorization"):
            self.json({"error": "no token"}, 401)
        elif repo_id in self.hub.repos:
            self.json({"error": "exists", "url": url}, 409)
        else:
            private = asked.get("private") or asked.get("visibility") == "private"
            self.hub.repos[repo_id] = repo = Repo(private=bool(private))
            repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
            self.json({"url": url})

    def whoami(self) -> None:
        self.json({"type": "user", "name": "tester", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def validate(self) -> None:
        self.json({"errors": [], "warnings": []})

    def info(self, repo: str, revision: str | None = None) -> None:
        if known := self.found(repo, revision):
            held = self.hub.repos[repo]
            self.json(
                {
                    "id": repo.removeprefix("datasets/"),
                    "sha": known[0],
                    "private": held.private,
                    "gated": "manual" if held.gated else False,
                    "tags": [],
                    "cardData": _front(known[1].get("README.md", b"")),
                    "siblings": [
                        {"rfilename": name, "size": _entry(name, data)["size"]} for name, data in known[1].items()
                    ],
                }
            )

    def branch(self, repo: str, branch: str) -> None:
        heads = self.hub.repos[repo].heads
        if branch in heads:
            self.json({"error": "exists"}, 409)
        else:
            heads[branch] = heads["main"]
            self.json({})

    def tree(self, repo: str, revision: str, folder: str | None = None) -> None:
        if known := self.found(repo, revision):
            inside = f"{folder}/" if folder else ""
            names = [name for name in known[1] if name.startswith(inside)]
            if inside and not names:
                self.missing("EntryNotFound")
                return
            below = {name.removeprefix(inside).partition("/")[0] for name in names if "/" in name.removeprefix(inside)}
            if "recursive=false" in self.path:
                names = [name for name in names if "/" not in name.removeprefix(inside)]
                self.json([_entry(name, known[1][name]) for name in names] + [_folder(inside + name) for name in below])
            else:
                self.json([_entry(name, known[1][name]) for name in names])

    def paths(self, repo: str, revision: str) -> None:
        """What stands at paths, each a file or a folder; a form or JSON asks for them."""
        if known := self.found(repo, revision):
            if self.headers.get("Content-Type", "").startswith("application/json"):
                wanted = json.loads(self.body)["paths"]
            else:
                wanted = parse_qs(self.body.decode()).get("paths", [])
            found = [_entry(name, known[1][name]) for name in wanted if name in known[1]]
            for name in wanted:
                if any(other.startswith(f"{name}/") for other in known[1]):
                    found.append(_folder(name))
            self.json(found)

    def set_info(self, repo: str, revision: str | None = None) -> None:
        self.info(f"datasets/{repo}", revision)

    def set_tree(self, repo: str, revision: str, folder: str | None = None) -> None:
        self.tree(f"datasets/{repo}", revision, unquote(folder) if folder else None)

    def set_paths(self, repo: str, revision: str) -> None:
        self.paths(f"datasets/{repo}", revision)

    def set_file(self, repo: str, revision: str, name: str) -> None:
        held = self.hub.repos.get(f"datasets/{repo}")
        if held and held.gated:
            known = bool(self.headers.get("Authorization"))
            # The client reads the reason from the headers.
            self.answer(403 if known else 401, b"{}", **{"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
        else:
            self.resolve(f"datasets/{repo}", unquote(revision), unquote(name))

    def preupload(self, repo: str, revision: str) -> None:
        if known := self.found(repo, revision):
            self.json(
                {
                    "files": [
                        {
                            "path": asked["path"],
                            "uploadMode": "lfs" if asked["size"] >= LARGE else "regular",
                            "shouldIgnore": False,
                            **(
                                {"oid": _entry(asked["path"], known[1][asked["path"]])["oid"]}
                                if asked["path"] in known[1]
                                else {}
                            ),
                        }
                        for asked in json.loads(self.body)["files"]
                    ]
                }
            )

    def batch(self, repo: str) -> None:
        objects = [
            {"oid": asked["oid"], "size": asked["size"]}
            | (
                {}
                if asked["oid"] in self.hub.blobs
                else {"actions": {"upload": {"href": f"{self.hub.cdn}/blob/{asked['oid']}"}}}
            )
            for asked in json.loads(self.body)["objects"]
        ]
        self.json({"objects": objects, "transfer": "basic"})

    def store(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            self.answer(400)
        else:
            self.hub.blobs[oid] = self.body
            self.answer(200)

    def commit(self, repo: str, revision: str) -> None:
        known = self.found(repo, revision)
        if known is None:
            return
        lines = [json.loads(line) for line in self.body.splitlines()]
        with self.hub.lock:
            parent = next((line["value"].get("parentCommit") for line in lines if line["key"] == "header"), None)
            proposed = "create_pr=1" in self.path
            if parent and parent != self.hub.repos[repo].heads.get(revision, parent) and not proposed:
                self.json({"error": "stale parent"}, 412)
                return
            files = dict(self.hub.repos[repo].commits[parent] if proposed and parent else known[1])
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    stored = self.hub.blobs.get(value["oid"])
                    if stored is None and (xet := self.hub.xet_hash(value["oid"])):
                        stored = Stored(value["oid"], value["size"], xet)
                    if stored is None:
                        self.json({"error": "the object was not uploaded"}, 400)
                        return
                    files[value["path"]] = stored
                elif line["key"] == "deletedFile":
                    files.pop(value["path"], None)
            branch = "refs/pr/1" if proposed else revision
            identity = self.hub.repos[repo].commit(branch, files)
        url = f"{self.hub.endpoint}/{repo}/commit/{identity}"
        extra = {"pullRequestUrl": f"{self.hub.endpoint}/{repo}/discussions/1"} if branch != revision else {}
        self.json({"success": True, "commitOid": identity, "commitUrl": url, **extra})

    def resolve(self, repo: str, revision: str, name: str) -> None:
        known = self.found(repo, revision)
        if known is None:
            return
        if name not in known[1]:
            self.missing("EntryNotFound")
            return
        data, headers = known[1][name], {"X-Repo-Commit": known[0]}
        if isinstance(data, Stored):
            route = f"{self.hub.endpoint}/api/models/{repo}/xet-read-token/{known[0]}"
            self.answer(
                302,
                b"",
                Location=f"{self.hub.cdn}/blob/{data.oid}",
                **headers,
                **{
                    "X-Linked-Etag": f'"{data.oid}"',
                    "X-Linked-Size": str(data.size),
                    "ETag": f'"{data.oid}"',
                    "X-Xet-Hash": data.xet,
                    "X-Xet-Refresh-Route": route,
                    "Link": f'<{route}>; rel="xet-auth"',
                },
            )
            return
        if len(data) < LARGE:
            self.answer(200, data, ETag=f'"{_git(data)}"', **headers)
            return
        oid = hashlib.sha256(data).hexdigest()
        self.hub.blobs[oid] = data
        self.answer(
            302,
            b"",
            Location=f"{self.hub.cdn}/blob/{oid}",
            **headers,
            **{
                "X-Linked-Etag": f'"{oid}"',
                "X-Linked-Size": str(len(data)),
                "ETag": f'"{_git(data)}"',
            },
        )

    def xet_token(self, repo: str, kind: str, revision: str) -> None:
        if self.found(repo, revision):
            url, expires = f"local://{self.hub.store}", int(time.time()) + 3600
            self.json(
                {"casUrl": url, "accessToken": "t", "exp": expires},
                **{
                    "X-Xet-Cas-Url": url,
                    "X-Xet-Access-Token": "t",
                    "X-Xet-Token-Expiration": str(expires),
                },
            )

    def blob(self, oid: str) -> None:
        data = self.hub.blobs.get(oid)
        if data is None:
            self.answer(404)
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not asked:
            self.answer(200, data, ETag=f'"{oid}"')
            return
        start, stop = int(asked[1]), int(asked[2] or len(data) - 1)
        self.answer(206, data[start : stop + 1], **{"Content-Range": f"bytes {start}-{stop}/{len(data)}"})

    def log_message(self, *_: object) -> None:
        pass


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
ROUTES = [
    (rf"GET /api/datasets/{_REPO}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", Handler.set_tree),
    (rf"POST /api/datasets/{_REPO}/paths-info/(?P<revision>[^/]+)", Handler.set_paths),
    (rf"GET /api/datasets/{_REPO}(?:/revision/(?P<revision>[^/]+))?", Handler.set_info),
    (rf"(?:GET|HEAD) /datasets/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", Handler.set_file),
    (r"POST /api/repos/create", Handler.create),
    (r"GET /api/whoami-v2", Handler.whoami),
    (r"POST /api/validate-yaml", Handler.validate),
    (rf"GET /api/models/{_REPO}/tree/(?P<revision>[^/]+)", Handler.tree),
    (rf"GET /api/models/{_REPO}(?:/revision/(?P<revision>[^/]+))?", Handler.info),
    (rf"POST /api/models/{_REPO}/branch/(?P<branch>[^/]+)", Handler.branch),
    (rf"POST /api/models/{_REPO}/preupload/(?P<revision>[^/]+)", Handler.preupload),
    (rf"GET /api/models/{_REPO}/xet-(?P<kind>read|write)-token/(?P<revision>[^/]+)", Handler.xet_token),
    (rf"POST /api/models/{_REPO}/commit/(?P<revision>[^/]+)", Handler.commit),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /blob/(?P<oid>\w+)", Handler.store),
    (r"(?:GET|HEAD) /blob/(?P<oid>\w+)", Handler.blob),
    (rf"(?:GET|HEAD) /{_REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", Handler.resolve),
]


_PLACES: dict[int, int] = {}
"""Ports by a number, of which each is one Hub's at a time."""
_TAKEN: set[int] = set()


@contextmanager
def _place() -> Iterator[int]:
    place = next(number for number in itertools.count() if number not in _TAKEN)
    _TAKEN.add(place)
    try:
        yield place
    finally:
        _TAKEN.discard(place)


@contextmanager
def hub() -> Iterator[Hub]:
    """A running Hub with nothing in it, at the address of the one before: clients that differ in nothing that is read
    while they are imported are answered by one server (see ``warm.py``)."""
    with _place() as place:
        yield from _running(place)


def _running(place: int) -> Iterator[Hub]:
    known = Hub()
    known.home = Path(os.environ[SESSION]) / f"hub-{os.getpid()}-{place}"
    known.home.unlink(missing_ok=True)
    handler = type("Own", (Handler,), {"hub": known})
    server = ThreadingHTTPServer(("127.0.0.1", _PLACES.get(place, 0)), handler)
    _PLACES[place] = server.server_port
    known.endpoint = f"http://127.0.0.1:{server.server_port}"
    known.cdn = f"http://localhost:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield known
    finally:
        server.shutdown()
        server.server_close()


def client(known: Hub, home: Path, *, xet: bool = False) -> dict[str, str]:
    """Environment in which the real client talks to this Hub and keeps its caches apart."""
    if xet:
        known.store = home.parent / "cas"
        known.store.mkdir()
    if not known.home.is_symlink():
        home.mkdir(parents=True, exist_ok=True)
        known.home.symlink_to(home)
        home = known.home
    return {
        "HF_ENDPOINT": known.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "0" if xet else "1",
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    }


def folder_files(folder: Path) -> dict[str, bytes]:
    """A folder's files by name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def shard_files(data: bytes) -> dict[str, str]:
    """Xet hashes by SHA-256 of the files that a shard describes (format: xet-core, metadata shard)."""

    def text(raw: bytes) -> str:
        # Hashes are four little-endian words.
        return "".join(f"{int.from_bytes(raw[i : i + 8], 'little'):016x}" for i in range(0, 32, 8))

    found, place = {}, 48
    while place + 48 <= len(data) and (identity := data[place : place + 32]) != b"\xff" * 32:
        flags, entries = (int.from_bytes(data[place + at : place + at + 4], "little") for at in (32, 36))
        place += 48 * (1 + entries * (2 if flags >> 31 & 1 else 1))
        if flags >> 30 & 1:
            found[text(data[place : place + 32])] = text(identity)
            place += 48
    return found


def _front(readme: bytes) -> Any:
    """The YAML at the start of a card."""
    parts = readme.decode().split("---\n")
    return yaml.safe_load(parts[1]) if len(parts) > 2 else None


def _folder(name: str) -> dict[str, Any]:
    return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}


def _entry(name: str, data: bytes | Stored) -> dict[str, Any]:
    if isinstance(data, Stored):
        about = {"oid": data.oid, "size": data.size, "pointerSize": 130}
        return {"type": "file", "path": name, "size": data.size, "oid": data.oid, "lfs": about, "xetHash": data.xet}
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": _git(data)}
    if len(data) >= LARGE:
        oid = hashlib.sha256(data).hexdigest()
        entry |= {"oid": oid, "lfs": {"oid": oid, "size": len(data), "pointerSize": 130}}
    return entry


def _git(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
