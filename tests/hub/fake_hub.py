"""A Hugging Face Hub on loopback for the real client: repos in memory, a second origin for large files, and faults.

It speaks what `huggingface_hub` 2.4 asks for when it creates a repo, commits, looks and downloads, without Xet storage.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Dict, List, Optional, Tuple
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants
from huggingface_hub.utils import _http

TOKEN = 'hf_test'
LARGE = ('.safetensors', '.bin')  # goes to LFS


@dataclass
class Repo:
    """Commits, the newest last, each all its files; and names of commits."""

    private: bool = False
    commits: List[Tuple[str, Dict[str, bytes]]] = field(default_factory=list)
    refs: Dict[str, str] = field(default_factory=dict)

    def commit(self, files: Dict[str, bytes]) -> str:
        sha = hashlib.sha1(f'{len(self.commits)}{sorted(files)}{id(self)}'.encode()).hexdigest()
        self.commits.append((sha, files))
        self.refs['main'] = sha
        return sha

    def at(self, revision: str) -> Optional[Tuple[str, Dict[str, bytes]]]:
        sha = self.refs.get(revision, revision)
        return next((commit for commit in self.commits if commit[0] == sha), None)


@dataclass
class Fault:
    """What happens to the next `times` requests whose 'METHOD path' matches."""

    pattern: str
    kind: object
    times: int


class _Broken(Exception):
    """The connection is reset and nothing more is sent."""


def describe(path: str, data: bytes) -> dict:
    blob_id = hashlib.sha1(f'blob {len(data)}\0'.encode() + data).hexdigest()
    info = dict(type='file', path=path, size=len(data), oid=blob_id)
    if path.endswith(LARGE):
        info['lfs'] = dict(oid=hashlib.sha256(data).hexdigest(), size=len(data), pointerSize=134)
    return info


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    hub: 'FakeHub'

    def log_message(self, *_):
        pass

    def do(self):
        path = urlsplit(self.path).path
        self.body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        if self.headers.get('Transfer-Encoding') == 'chunked':
            self.body = self._chunks()
        with self.hub.lock:
            if path != '/api/agent-harnesses':  # asked for once a process, for the user agent
                self.hub.requests.append((self.command, path))
            self.fault = self.hub.take_fault(f'{self.command} {path}')
        try:
            if self.fault == 'reset':
                raise _Broken
            if isinstance(self.fault, int):
                return self.answer(self.fault, b'{"error": "a fault"}')
            with self.hub.lock:
                route = self.route(unquote(path))
            if self.fault == 'lost-answer':
                raise _Broken
            self.answer(*route)
        except _Broken:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
            self.close_connection = True
            self.connection.close()

    do_GET = do_HEAD = do_POST = do_PUT = do

    def finish(self):
        try:
            super().finish()
        except (OSError, ValueError):
            pass  # closed by a fault

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b''.join(parts)

    def answer(self, status: int, data=b'', headers: Optional[Dict[str, str]] = None):
        data = data if isinstance(data, bytes) else json.dumps(data).encode()
        if self.fault == 'flip' and data:
            data = flipped(data)
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key.replace('_', '-'), value)
        self.send_header('Content-Length', str(len(data)))
        self.end_headers()
        if self.command == 'HEAD':
            return
        if self.fault in ('reset-body', 'close-body'):
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            if self.fault == 'reset-body':
                raise _Broken
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.wfile.write(data)

    def route(self, path: str) -> tuple:
        """Status, body and headers of an answer."""
        authorised = self.headers.get('Authorization') == f'Bearer {TOKEN}'
        body = json.loads(self.body) if self.body[:1] == b'{' and b'\n{' not in self.body else {}
        if path.startswith('/large/'):
            return self.large(path.split('/')[2])
        if path.startswith('/api/') and not self.hub.has_api:
            return 404, b'<html>nothing here</html>'
        if path == '/api/validate-yaml':
            return 200, dict(errors=[], warnings=[])
        if path == '/api/whoami-v2':
            return (200, {'type': 'user', 'name': 'me', 'orgs': []}) if authorised else (401, {'error': 'no token'})
        if self.command in ('POST', 'PUT') and not authorised and 'paths-info' not in path:
            return 401, {'error': 'no token'}
        if path == '/api/repos/create':
            name = f'{body.get("organization") or "me"}/{body["name"]}'
            if body.get('type') == 'space':
                assert body['sdk'] == 'gradio'
                name = f'spaces/{name}'
            url = {'url': f'{self.hub.endpoint}/{name}', 'id': name, 'name': name}
            if name in self.hub.repos:
                return 409, url
            self.hub.repos[name] = Repo(private=body.get('private') or body.get('visibility') == 'private')
            self.hub.repos[name].commit({'.gitattributes': b''})
            return 200, url
        if m := re.fullmatch(
            r'/(?:api/models/|api/(?=spaces/))?((?:spaces/)?[^/]+/[^/]+?)(?:\.git/info/lfs/objects/(batch))?(?:/(.*))?',
            path,
        ):
            name, batch, rest = m.groups()
            repo = self.hub.repos.get(name)
            if repo is None or (repo.private and not authorised):
                return 401 if not authorised else 404, {'error': 'no repo'}, dict(X_Error_Code='RepoNotFound')
            return self.lfs_batch(body) if batch else self.repo_route(name, repo, rest or '', body)
        return 404, {'error': path}

    def lfs_batch(self, body: dict) -> tuple:
        objects = []
        for item in body['objects']:
            href = f'{self.hub.large_endpoint}/large/{item["oid"]}'
            known = item['oid'] in self.hub.large
            objects.append(dict(item, **({} if known else dict(actions=dict(upload=dict(href=href))))))
        return 200, dict(transfer='basic', objects=objects), dict(Content_Type='application/vnd.git-lfs+json')

    def large(self, oid: str) -> tuple:
        if self.command == 'PUT':
            self.hub.large[oid] = flipped(self.body) if self.fault == 'flip-request' else self.body
            return (200,)
        data = self.hub.large[oid]
        if m := re.match(r'bytes=(\d+)-(\d*)', self.headers.get('Range') or ''):
            start, end = int(m[1]), int(m[2] or len(data) - 1)
            return 206, data[start : end + 1], dict(Content_Range=f'bytes {start}-{end}/{len(data)}')
        return 200, data

    def repo_route(self, name: str, repo: Repo, rest: str, body: dict) -> tuple:
        what, _, rest = rest.partition('/')
        revision, _, file = rest.partition('/')
        if what in ('', 'revision'):
            found = repo.at(revision or 'main')
            if found is None:
                return 404, {}, dict(X_Error_Code='RevisionNotFound')
            siblings = [dict(rfilename=path) for path in found[1]]
            return 200, dict(id=name, modelId=name, sha=found[0], private=repo.private, siblings=siblings, tags=[])
        if what == 'preupload':
            mode = {True: 'lfs', False: 'regular'}
            files = [dict(path=f['path'], uploadMode=mode[f['path'].endswith(LARGE)]) for f in body['files']]
            return 200, dict(files=[dict(f, shouldIgnore=False) for f in files])
        if what == 'commit':
            return self.commit(name, repo)
        found = repo.at(revision)
        if found is None:
            return 404, {}, dict(X_Error_Code='RevisionNotFound')
        sha, files = found
        if what == 'paths-info':
            wanted = body.get('paths') or re.findall(r'paths=([^&]+)', unquote(self.body.decode()))
            return 200, json.dumps([describe(path, files[path]) for path in wanted if path in files]).encode()
        if what == 'tree':
            return 200, json.dumps([describe(path, data) for path, data in files.items()]).encode()
        if what == 'resolve':
            return self.resolve(sha, files, file)
        return 404, {'error': what}

    def resolve(self, sha: str, files: Dict[str, bytes], file: str) -> tuple:
        if file not in files:
            return 404, {}, dict(X_Error_Code='EntryNotFound', X_Repo_Commit=sha)
        info = describe(file, files[file])
        headers = dict(X_Repo_Commit=sha, ETag=f'"{self.hub.etag or info["oid"]}"')
        if 'lfs' not in info:
            return 200, files[file], headers
        oid = info['lfs']['oid']
        self.hub.large[oid] = files[file]
        headers.update(X_Linked_ETag=f'"{self.hub.etag or oid}"', X_Linked_Size=str(info['size']))
        return 302, b'', dict(headers, Location=f'{self.hub.large_endpoint}/large/{oid}')

    def commit(self, name: str, repo: Repo) -> tuple:
        files = dict(repo.commits[-1][1])
        for line in self.body.decode().splitlines():
            entry = json.loads(line)
            value = entry['value']
            if entry['key'] == 'file':
                data = base64.b64decode(value['content'])
                files[value['path']] = flipped(data) if self.fault == 'flip-request' else data
            elif entry['key'] == 'lfsFile':
                if value['oid'] not in self.hub.large:
                    return 400, {'error': f'{value["path"]} was not uploaded'}
                files[value['path']] = self.hub.large[value['oid']]
            elif entry['key'] == 'deletedFile':
                del files[value['path']]
        sha = repo.commit(files)
        return 200, dict(success=True, commitOid=sha, commitUrl=f'{self.hub.endpoint}/{name}/commit/{sha}')


class FakeHub:
    """The server; `endpoint` is what HF_ENDPOINT would name.

    A mirror may have ETags of its own (`etag`, of every file) and no API beside the files (`has_api`).
    """

    etag: Optional[str] = None
    has_api = True

    def __init__(self):
        self.repos: Dict[str, Repo] = {}
        self.large: Dict[str, bytes] = {}
        self.requests: List[Tuple[str, str]] = []
        self.faults: List[Fault] = []
        self.lock = threading.Lock()
        handler = type('BoundHandler', (Handler,), dict(hub=self))
        self.servers = [ThreadingHTTPServer(('127.0.0.1', 0), handler) for _ in range(2)]
        self.endpoint, self.large_endpoint = (f'http://127.0.0.1:{s.server_address[1]}' for s in self.servers)
        for server in self.servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, daemon=True).start()

    def close(self):
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def add_repo(self, name: str, files: Dict[str, bytes], private: bool = False) -> Repo:
        self.repos[name] = repo = Repo(private=private)
        repo.commit(files)
        return repo

    def fault(self, pattern: str, kind, times: int = 1):
        """Make the next `times` requests whose 'METHOD path' matches fail.

        Args:
            pattern: Regular expression.
            kind: HTTP status; 'reset' before the answer, 'reset-body' or 'close-body' in its middle; 'flip' a byte of
                the answer, 'flip-request' one of what is stored; 'lost-answer', the work is done, then a reset.
            times: Number of requests.
        """
        self.faults.append(Fault(pattern, kind, times))

    def take_fault(self, request: str):
        for fault in self.faults:
            if fault.times and re.search(fault.pattern, request):
                fault.times -= 1
                return fault.kind
        return None

    def count(self, pattern: str) -> int:
        """Requests so far whose 'METHOD path' matches."""
        return sum(bool(re.search(pattern, f'{method} {path}')) for method, path in self.requests)


@contextmanager
def fake_hub(monkeypatch, cache_dir):
    """A hub that `huggingface_hub`, in this process, takes for the Hub."""
    hub = FakeHub()
    monkeypatch.setattr(constants, 'ENDPOINT', hub.endpoint)
    monkeypatch.setattr(
        constants, 'HUGGINGFACE_CO_URL_TEMPLATE', hub.endpoint + '/{repo_id}/resolve/{revision}/{filename}'
    )
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(cache_dir))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
    monkeypatch.setattr(constants, 'HF_TOKEN_PATH', str(cache_dir / 'token'))
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    monkeypatch.setattr(_http.time, 'sleep', lambda seconds: None)
    try:
        yield hub
    finally:
        hub.close()
