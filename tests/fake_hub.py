"""A local stand-in for the Hugging Face Hub's HTTP interface, for pushing."""

import base64
import contextlib
import http.server
import json
import re
import threading

TOKEN = 'hf_good'
USER, TEAM, GUESTS = 'ann', 'lab', 'guests'


class Hub:
  """What the server holds, and what it was asked.

  Attributes:
    url: for HF_ENDPOINT.
    repos: name -> {'private': bool, 'files': path -> bytes}.
    requests: (method, path) in order.
    cards: contents that were sent to be checked.
    tokens: token -> what the Hub says of it.
    fail: path's ending -> status with which such a request is refused.
    page: what is answered to everything, unless it is empty.
  """

  def __init__(self):
    self.url, self.repos, self.requests, self.cards = '', {}, [], []
    self.fail, self.page = {}, b''
    self.tokens = {TOKEN: {'role': 'write'}}

  def answer(self, method, path, token, body):
    """(status, JSON value, error code) of a request."""
    for ending, status in self.fail.items():
      if path.endswith(ending):
        return status, {'error': 'refused'}, ''
    if token not in self.tokens and path != '/api/validate-yaml':
      return 401, {'error': 'Invalid credentials'}, ''
    if path == '/api/whoami-v2':
      teams = [
        {'name': TEAM, 'roleInOrg': 'contributor'},
        {'name': GUESTS, 'roleInOrg': 'read'},
      ]
      about = {'type': 'access_token', 'accessToken': self.tokens[token]}
      return 200, {'name': USER, 'orgs': teams, 'auth': about}, ''
    if path == '/api/repos/create':
      return self._create(json.loads(body))
    if path == '/api/validate-yaml':
      content = json.loads(body)['content']
      if 'license: Apache' in content:
        errors = [{'message': '"license" must be one of [apache-2.0, mit]'}]
        return 400, {'errors': errors}, ''
      self.cards.append(content)
      return 200, {}, ''
    match = re.fullmatch(r'/api/models/([\w.-]+/[\w.-]+)(/.*)?', path)
    if match is None or match[1] not in self.repos:
      return 404, {'error': 'Repository not found'}, 'RepoNotFound'
    name, rest = match[1], match[2] or ''
    repo = self.repos[name]
    if method == 'GET' and not rest:
      siblings = [{'rfilename': path} for path in sorted(repo['files'])]
      found = {'id': name, 'private': repo['private'], 'siblings': siblings}
      return 200, found, ''
    if rest == '/preupload/main':
      # Every file small enough for the commit itself.
      files = [
        {'path': x['path'], 'uploadMode': 'regular', 'shouldIgnore': False}
        for x in json.loads(body)['files']
      ]
      return 200, {'files': files}, ''
    if rest == '/commit/main':
      for line in body.decode().splitlines():
        part = json.loads(line)
        if part['key'] == 'file':
          content = base64.b64decode(part['value']['content'])
          repo['files'][part['value']['path']] = content
      url = f'{self.url}/{name}/commit/{"a" * 40}'
      return 200, {'success': True, 'commitOid': 'a' * 40, 'commitUrl': url}, ''
    return 404, {'error': f'{method} {path} is not known'}, ''

  def _create(self, asked):
    name = f'{asked["organization"] or USER}/{asked["name"]}'
    if name in self.repos:
      told = {'error': 'You already created this model repo'}
      return 409, {**told, 'url': f'{self.url}/{name}'}, ''
    self.add(name, asked.get('visibility') == 'private')
    return 200, {'url': f'{self.url}/{name}'}, ''

  def add(self, name, private=True, **files):
    """A repository, with what the Hub itself puts there."""
    self.repos[name] = {
      'private': private,
      'files': {'.gitattributes': b'', **files},
    }

  def pushed(self, name):
    """path -> content, without what the Hub itself puts there."""
    files = self.repos[name]['files']
    return {k: v for k, v in files.items() if k != '.gitattributes'}


@contextlib.contextmanager
def serve():
  """Yields a `Hub` that answers at its `url`."""
  hub, lock = Hub(), threading.Lock()

  class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self):
      body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
      token = self.headers.get('Authorization', '').removeprefix('Bearer ')
      path = self.path.partition('?')[0]
      with lock:
        hub.requests.append((self.command, path))
        status, value, code = hub.answer(self.command, path, token, body)
      content = json.dumps(value).encode()
      if hub.page:
        status, content = 200, hub.page
      self.send_response(status)
      self.send_header('Content-Type', 'application/json')
      self.send_header('Content-Length', str(len(content)))
      if code:
        self.send_header('X-Error-Code', code)
      self.end_headers()
      self.wfile.write(content)

    do_GET = do_POST = answer  # noqa: N815

    def log_message(self, *arguments):
      pass

  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  hub.url = f'http://127.0.0.1:{server.server_port}'
  thread = threading.Thread(
    target=server.serve_forever, args=(0.02,), daemon=True
  )
  thread.start()
  try:
    yield hub
  finally:
    server.shutdown()
    server.server_close()
