"""A local stand-in for the HTTP interface of the Hugging Face Hub."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *args):
        pass

    def answer(self, content=b'', status=200, **headers):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace('_', '-'), value)
        self.send_header('Content-Length', str(len(content)))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(content)

    def body(self):
        return self.rfile.read(int(self.headers.get('Content-Length', 0)))

    def missing(self, code):
        self.answer(dict(error=code), 404, X_Error_Code=code)

    def do_POST(self):
        hub, body = self.server.hub, self.body()
        path = self.path.partition('?')[0]
        hub.requests.append(f'POST {path}')
        if self.headers.get('Authorization') != f'Bearer {hub.token}':
            return self.answer(dict(error='Invalid username or password.'), 401)
        if path == '/api/repos/create':
            data = json.loads(body)
            name = f'{data["organization"]}/{data["name"]}'
            url = f'{hub.url}/{name}'
            if name in hub.repos:
                return self.answer(dict(error='exists', url=url), 409)
            hub.repos[name] = {}
            # huggingface_hub before version 2 uses the first one
            private = data.get('private') or data.get('visibility') == 'private'
            hub.private[name] = private
            return self.answer(dict(url=url, name=name))
        if path == '/api/validate-yaml':
            return self.answer(dict(errors=[], warnings=[]))
        parts = path.strip('/').split('/')
        name = '/'.join(parts[2:4])
        if parts[:2] != ['api', 'models'] or name not in hub.repos:
            return self.missing('RepoNotFound')
        if parts[4] == 'preupload':
            files = [
                dict(path=f['path'], uploadMode='regular', shouldIgnore=False)
                for f in json.loads(body)['files']
            ]
            return self.answer(dict(files=files))
        if parts[4] == 'commit':
            for line in body.splitlines():
                entry = json.loads(line)
                if entry['key'] == 'file':
                    value = entry['value']
                    content = base64.b64decode(value['content'])
                    hub.repos[name][value['path']] = content
            url = f'{hub.url}/{name}/commit/{hub.commit}'
            return self.answer(dict(commitUrl=url, commitOid=hub.commit, success=True))
        return self.missing('EntryNotFound')

    def do_GET(self):
        hub = self.server.hub
        path = self.path.partition('?')[0]
        hub.requests.append(f'{self.command} {path}')
        parts = path.strip('/').split('/')
        if parts[0] == 'api':
            name = '/'.join(parts[2:4])
            if name not in hub.repos:
                return self.missing('RepoNotFound')
            files = [dict(rfilename=f) for f in hub.repos[name]]
            return self.answer(dict(id=name, sha=hub.commit, siblings=files))
        name, revision = '/'.join(parts[:2]), parts[3] if len(parts) > 4 else ''
        if name not in hub.repos:
            return self.missing('RepoNotFound')
        if revision not in ('main', 'v1', hub.commit):
            return self.missing('RevisionNotFound')
        content = hub.repos[name].get('/'.join(parts[4:]))
        if content is None:
            return self.missing('EntryNotFound')
        etag = hashlib.sha256(content).hexdigest()
        self.answer(
            content, ETag=f'"{etag}"', X_Repo_Commit=hub.commit, Accept_Ranges='bytes'
        )

    do_HEAD = do_GET


class StandInHub:
    """Repositories by name, each a dict of contents by path.

    Files are committed whole, like small files on the Hub. Large files are not
    supported.
    """

    commit = 'c0ffee' + '0' * 34
    token = 'hf_abc'

    def __init__(self):
        self.repos, self.private, self.requests = {}, {}, []
        self._server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self._server.hub = self
        self.url = f'http://127.0.0.1:{self._server.server_port}'
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()
