"""A Hugging Face Hub of a few endpoints on loopback, for tests.

    with Hub() as hub:
        hub.add("dataset", "someone/shards", {"a.bin": b"..."})
        subprocess.run([...], env=hub.environment(tmp_path))
        hub.files("model", "me/my-model", "step-001000")["config.json"]

HF_ENDPOINT is read when huggingface_hub is imported, so what is tested runs in a process of its own with
`hub.environment`.
Any token is good, and belongs to the user "me". `fail_next = n` answers the next n requests with `fail_status`,
`broken = "text"` every request whose path contains the text ("" is all of them), `silent = "text"` leaves these without
an answer until `speak` is set, `cut_next = n` breaks off the next n downloads half way.
The client tries again for 23 seconds after 500, and not at all after 403.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[
            tuple[str, str], dict[str, dict]
        ] = {}  # (kind, id) -> branch -> {"sha", "files": {path: bytes}}
        self.requests: list[str] = []
        self.lock = threading.RLock()
        self.fail_next = self.cut_next = 0
        self.fail_status = 500
        self.broken: str | None = None
        self.silent: str | None = None
        self.speak = threading.Event()

    def __enter__(self) -> Hub:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.speak.set()
        self.shutdown()
        self.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        return {
            **os.environ,
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": "hf_planted",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def add(self, kind: str, repo: str, files: dict[str, bytes]) -> None:
        self.repos.setdefault((kind, repo), {"main": {"sha": "0" * 40, "files": {}}})
        self.change(kind, repo, "main", files)

    def files(self, kind: str, repo: str, branch: str = "main") -> dict[str, bytes]:
        return self.repos[kind, repo][branch]["files"]

    def change(self, kind: str, repo: str, branch: str, files: dict[str, bytes | None]) -> str:
        """Commits: None deletes a file. Returns the commit."""
        with self.lock:
            head = self.repos[kind, repo][branch]
            head["files"] = {
                path: content for path, content in {**head["files"], **files}.items() if content is not None
            }
            names = [f"{path} {hashlib.sha1(content).hexdigest()}" for path, content in head["files"].items()]
            head["sha"] = hashlib.sha1("\n".join([head["sha"], *names]).encode()).hexdigest()
            return head["sha"]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def answer(self, content: dict | list) -> None:
        self.send(200, json.dumps(content).encode())

    def refuse(self, status: int, code: str) -> None:
        self.send(status, json.dumps({"error": code}).encode(), {"X-Error-Code": code, "X-Error-Message": code})

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def handle_request(self) -> None:
        hub, path, body = self.server, unquote(urlsplit(self.path).path), self.body()
        with hub.lock:
            hub.requests.append(f"{self.command} {path}")
            fails = hub.fail_next > 0 or (hub.broken is not None and hub.broken in path)
            hub.fail_next = max(0, hub.fail_next - 1)
        if hub.silent is not None and hub.silent in path:
            hub.speak.wait()
        if fails:
            return self.refuse(hub.fail_status, "StandInFails")
        if path == "/api/whoami-v2":
            return self.answer({"name": "me", "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if match := re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)(?:/([^/]+)(?:/(.+))?)?", path):
            kind, repo, action, rest = match.groups()
            return self.api(kind, repo, action or "revision", rest or "main", body)
        if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve("dataset" if match[1] else "model", *match.groups()[1:])
        self.refuse(404, "NotFound")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def create(self, wanted: dict) -> None:
        kind, name = wanted.get("type") or "model", wanted["name"]
        repo = name if "/" in name else f"{wanted.get('organization') or 'me'}/{name}"
        content = {"url": f"{self.server.url}/{'datasets/' if kind == 'dataset' else ''}{repo}"}
        if (kind, repo) in self.server.repos:
            return self.send(409, json.dumps({**content, "error": "exists"}).encode())
        self.server.add(kind, repo, {})
        self.answer(content)

    def api(self, kind: str, repo: str, action: str, rest: str, body: bytes) -> None:
        branches = self.server.repos.get((kind, repo))
        if branches is None:
            return self.refuse(404, "RepoNotFound")
        if action == "preupload":
            return self.answer(
                {
                    "files": [
                        {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for file in json.loads(body)["files"]
                    ]
                }
            )
        if action == "branch":
            if rest in branches:
                return self.refuse(409, "BranchExists")
            start = self.find(branches, json.loads(body or b"{}").get("startingPoint") or "main")
            branches[rest] = {"sha": start["sha"], "files": dict(start["files"])}
            return self.answer({})
        if action == "refs":
            refs = [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": head["sha"]} for b, head in branches.items()]
            return self.answer({"branches": refs, "converts": [], "tags": []})
        revision, _, folder = rest.partition("/") if action in ("tree", "commit", "paths-info") else (rest, "", "")
        head = self.find(branches, revision)
        if head is None:
            return self.refuse(404, "RevisionNotFound")
        if action == "commit":
            operations = [json.loads(line) for line in body.decode().splitlines()]
            changes = {
                item["value"]["path"]: base64.b64decode(item["value"]["content"]) if item["key"] == "file" else None
                for item in operations
                if item["key"] in ("file", "deletedFile")
            }
            sha = self.server.change(kind, repo, revision, changes)
            return self.answer(
                {"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{repo}/commit/{sha}"}
            )
        if action == "tree":
            return self.answer(
                [entry(path, content) for path, content in head["files"].items() if path.startswith(folder)]
            )
        if action == "paths-info":
            wanted = json.loads(body)["paths"]
            return self.answer([entry(path, content) for path, content in head["files"].items() if path in wanted])
        if action == "revision":
            return self.answer(
                {
                    "id": repo,
                    "modelId": repo,
                    "sha": head["sha"],
                    "private": False,
                    "gated": False,
                    "tags": [],
                    "disabled": False,
                    "downloads": 0,
                    "likes": 0,
                    "siblings": [{"rfilename": path} for path in head["files"]],
                }
            )
        self.refuse(404, "NotFound")

    def resolve(self, kind: str, repo: str, revision: str, path: str) -> None:
        branches = self.server.repos.get((kind, repo))
        head = branches and self.find(branches, revision)
        if not head:
            return self.refuse(404, "RevisionNotFound" if branches else "RepoNotFound")
        if path not in head["files"]:
            return self.refuse(404, "EntryNotFound")
        content = head["files"][path]
        headers = {
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "X-Repo-Commit": head["sha"],
            "Accept-Ranges": "bytes",
        }
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        start, stop = (int(asked[1]), int(asked[2] or len(content) - 1) + 1) if asked else (0, len(content))
        if asked:
            headers["Content-Range"] = f"bytes {start}-{min(stop, len(content)) - 1}/{len(content)}"
        piece = content[start:stop]
        with self.server.lock:
            cut = self.command == "GET" and self.server.cut_next > 0
            self.server.cut_next -= cut
        if cut:
            self.close_connection = True
            return self.send(
                206 if asked else 200, piece[: len(piece) // 2], {**headers, "Content-Length": str(len(piece))}
            )
        self.send(206 if asked else 200, piece, headers)

    @staticmethod
    def find(branches: dict, revision: str) -> dict | None:
        return branches.get(revision) or next((head for head in branches.values() if head["sha"] == revision), None)


def entry(path: str, content: bytes) -> dict:
    return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
