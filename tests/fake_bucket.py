"""A bucket of an object store on this machine, with whatever faults.

It speaks as much of the JSON API of Google Cloud Storage as gcsfs and
TensorStore use; what it does not know is an error, and is kept. Listings and
objects are consistent, as the store's are. Some of the requests can be refused
for now, and objects that are replaced too often are, as the store does.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import random
import re
import sys
import threading
import time
import urllib.parse

import google_crc32c

BUCKET = 'bucket'


class FakeBucket:
  """Objects in memory; `environment` leads processes to them.

  Attributes:
    objects: name -> bytes.
    writes: (seconds, name) of each object written, in order.
    unknown: requests that no one answers.
    refused: how many were refused for now.
    refuse: the share of requests that are, with 503; of writes and reads alike.
    most_often: seconds between two writes of one object; 429 before.
  """

  def __init__(self):
    self.objects, self._meta, self.writes = {}, {}, []
    self.unknown, self.refused = [], 0
    self.refuse, self.most_often = 0.0, 0.0
    self._uploads, self._generation = {}, 10**15
    self._random = random.Random(0)
    self._lock = threading.Lock()
    self._server = _Server(
      ('127.0.0.1', 0), type('Handler', (_Handler,), {'bucket': self})
    )
    self.url = f'http://127.0.0.1:{self._server.server_port}'
    self._thread = threading.Thread(
      target=self._server.serve_forever, args=(0.05,), daemon=True
    )

  @property
  def environment(self):
    """Variables that lead gcsfs and TensorStore here, without a key."""
    return {
      'STORAGE_EMULATOR_HOST': self.url,
      'TENSORSTORE_GCS_HTTP_URL': self.url,
      'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'none',
    }

  def __enter__(self):
    self._thread.start()
    return self

  def __exit__(self, *exception):
    self._server.shutdown()
    self._server.server_close()

  def names(self, prefix=''):
    with self._lock:
      return sorted(name for name in self.objects if name.startswith(prefix))

  # --- Of the API -------------------------------------------------------------

  def answer(self, method, target, headers, body):
    """(status, headers, body) of one request."""
    address = urllib.parse.urlsplit(target)
    query = {
      name: values[-1]
      for name, values in urllib.parse.parse_qs(address.query).items()
    }
    parts = address.path.strip('/').split('/')
    with self._lock:
      if self.refuse and self._random.random() < self.refuse:
        self.refused += 1
        return _error(503, 'backendError')
      try:
        return self._route(method, parts, query, headers, body)
      except KeyError:
        return _error(404, 'notFound')

  def _route(self, method, parts, query, headers, body):
    names = [urllib.parse.unquote(part) for part in parts]
    match method, names:
      case 'GET', ['storage', 'v1', 'b', bucket]:
        return _json({'name': self._check(bucket), 'kind': 'storage#bucket'})
      case 'GET', ['storage', 'v1', 'b', bucket, 'o']:
        self._check(bucket)
        return _json(self._list(query))
      case 'GET', [*_, 'storage', 'v1', 'b', bucket, 'o', name]:
        self._check(bucket)
        if query.get('alt') == 'media' or names[0] == 'download':
          return self._read(name, query, headers)
        return _json(self._meta[name])
      case 'DELETE', ['storage', 'v1', 'b', bucket, 'o', name]:
        self._check(bucket)
        if not self._may_write(name, query):
          return _error(412, 'conditionNotMet')
        del self.objects[name], self._meta[name]
        return 204, {}, b''
      case (
        'POST',
        ['storage', 'v1', 'b', bucket, 'o', name, 'rewriteTo', 'b', _, 'o', to],
      ):
        self._check(bucket)
        found = self._write(to, self.objects[name], {})
        return _json({'done': True, 'resource': found})
      case 'POST', ['storage', 'v1', 'b', bucket, 'o', name, 'moveTo', 'o', to]:
        self._check(bucket)
        found = self._write(to, self.objects[name], {})
        del self.objects[name], self._meta[name]
        return _json(found)
      case 'POST' | 'PUT', ['upload', 'storage', 'v1', 'b', bucket, 'o']:
        self._check(bucket)
        return self._upload(query, headers, body)
      case 'POST', ['batch', 'storage', 'v1']:
        return self._batch(headers, body)
    self.unknown.append(f'{method} {"/".join(parts)} {query}')
    return _error(501, 'notImplemented')

  def _check(self, bucket):
    if bucket != BUCKET:
      raise KeyError(bucket)
    return bucket

  def _may_write(self, name, query):
    wanted = query.get('ifGenerationMatch')
    found = self._meta.get(name, {'generation': '0'})['generation']
    return wanted is None or wanted == found

  def _write(self, name, content, query):
    now = time.monotonic()
    self._generation += 1
    self.objects[name] = content
    self.writes.append((now, name))
    crc = google_crc32c.value(content).to_bytes(4, 'big')
    when = time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime())
    self._meta[name] = {
      'kind': 'storage#object',
      'bucket': BUCKET,
      'name': name,
      'size': str(len(content)),
      'generation': str(self._generation),
      'metageneration': '1',
      'md5Hash': base64.b64encode(hashlib.md5(content).digest()).decode(),
      'crc32c': base64.b64encode(crc).decode(),
      'timeCreated': f'{when}.{self._generation % 1000:03}Z',
      'updated': f'{when}.{self._generation % 1000:03}Z',
    }
    return self._meta[name]

  def _upload(self, query, headers, body):
    if (number := query.get('upload_id')) is not None:
      return self._resume(number, headers, body)
    name, content = query.get('name'), body
    if query['uploadType'] == 'multipart':
      boundary = re.search('boundary="?([^";]+)', headers['Content-Type'])[1]
      _, about, rest = body.split(b'--' + boundary.encode(), 2)
      about = json.loads(about[re.search(rb'\r?\n\r?\n', about).end() :])
      start = re.search(rb'\r?\n\r?\n', rest).end()
      end = rest.rindex(b'\n--' + boundary.encode() + b'--')
      name, content = about['name'], rest[start:end].removesuffix(b'\r')
    if query['uploadType'] == 'resumable':
      name = name or json.loads(body)['name']
      number = str(len(self._uploads))
      self._uploads[number] = (name, query, bytearray())
      place = f'{self.url}/upload/storage/v1/b/{BUCKET}/o?upload_id={number}'
      return 200, {'Location': place}, b''
    return self._store(name, content, query)

  def _store(self, name, content, query):
    last = [when for when, other in self.writes if other == name][-1:]
    if last and time.monotonic() - last[0] < self.most_often:
      self.refused += 1
      return _error(429, 'rateLimitExceeded')
    if not self._may_write(name, query):
      return _error(412, 'conditionNotMet')
    return _json(self._write(name, content, query))

  def _resume(self, number, headers, body):
    name, query, so_far = self._uploads[number]
    so_far += body
    if not headers['Content-Range'].endswith(f'/{len(so_far)}'):
      return 308, {'Range': f'bytes=0-{len(so_far) - 1}'}, b''
    return self._store(name, bytes(so_far), query)

  def _read(self, name, query, headers):
    content, about = self.objects[name], self._meta[name]
    told = {
      'x-goog-generation': about['generation'],
      'x-goog-stored-content-length': str(len(content)),
      'x-goog-stored-content-encoding': 'identity',
      'x-goog-hash': f'crc32c={about["crc32c"]},md5={about["md5Hash"]}',
      'Content-Type': 'application/octet-stream',
    }
    if query.get('ifGenerationNotMatch') == about['generation']:
      return 304, told, b''
    wanted = re.fullmatch(r'bytes=(\d*)-(\d*)', headers.get('Range', ''))
    if wanted is None:
      return 200, told, content
    first, last = wanted.groups()
    if not first:
      first, last = max(0, len(content) - int(last)), len(content) - 1
    first = int(first)
    last = min(int(last or len(content) - 1), len(content) - 1)
    if first > last:
      return _error(416, 'requestedRangeNotSatisfiable')
    told['Content-Range'] = f'bytes {first}-{last}/{len(content)}'
    return 206, told, content[first : last + 1]

  def _list(self, query):
    prefix, delimiter = query.get('prefix', ''), query.get('delimiter')
    low, high = query.get('startOffset', ''), query.get('endOffset')
    entries = {}
    for name in sorted(self.objects):
      if not name.startswith(prefix) or name < low or (high and name >= high):
        continue
      before, found, _ = name[len(prefix) :].partition(delimiter or '\0')
      entries[prefix + before + delimiter if found else name] = bool(found)
    names = [n for n in entries if n > query.get('pageToken', '')]
    size = int(query.get('maxResults', 1000))
    page = names[:size]
    result = {
      'kind': 'storage#objects',
      'items': [self._meta[name] for name in page if not entries[name]],
      'prefixes': [name for name in page if entries[name]],
    }
    if len(names) > size:
      result['nextPageToken'] = page[-1]
    return result

  def _batch(self, headers, body):
    answers = []
    for line in re.findall(rb'\n(DELETE \S+) HTTP/1.1', body):
      method, target = line.decode().split(' ')
      address = urllib.parse.urlsplit(target)
      query = dict(urllib.parse.parse_qsl(address.query))
      try:
        status, _, content = self._route(
          method, address.path.strip('/').split('/'), query, {}, b''
        )
      except KeyError:
        status, _, content = _error(404, 'notFound')
      answers.append(
        f'Content-Type: application/http\r\n\r\nHTTP/1.1 {status} .\r\n\r\n'
        f'{content.decode()}\r\n'
      )
    text = ''.join(f'--batch\r\n{answer}' for answer in answers) + '--batch--'
    return (
      200,
      {'Content-Type': 'multipart/mixed; boundary=batch'},
      text.encode(),
    )


def _json(value):
  return 200, {'Content-Type': 'application/json'}, json.dumps(value).encode()


def _error(status, reason):
  about = {'code': status, 'message': reason, 'errors': [{'reason': reason}]}
  content = json.dumps({'error': about}).encode()
  return status, {'Content-Type': 'application/json'}, content


class _Server(http.server.ThreadingHTTPServer):
  daemon_threads = True
  request_queue_size = 128

  def handle_error(self, request, address):
    if not isinstance(sys.exception(), ConnectionError):  # Killed clients.
      super().handle_error(request, address)


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'

  def _serve(self):
    body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
    if self.headers.get('Transfer-Encoding') == 'chunked':
      while size := int(self.rfile.readline(), 16):
        body += self.rfile.read(size)
        self.rfile.readline()
      self.rfile.readline()
    status, headers, content = self.bucket.answer(
      self.command, self.path, self.headers, body
    )
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
      self.send_response(status)
      for name, value in headers.items():
        self.send_header(name, value)
      self.send_header('Content-Length', str(len(content)))
      self.end_headers()
      self.wfile.write(content)

  do_GET = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815

  def log_message(self, *arguments):
    pass
