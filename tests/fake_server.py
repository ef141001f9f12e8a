"""A local HTTP server that answers from a script, with whatever faults."""

import contextlib
import http.server
import json
import threading
import time


class Fault:
  """What the server does instead of answering."""

  def __init__(self, status=200, text='', headers=(), delay=0.0, drop=False):
    self.status, self.text, self.headers = status, text, headers
    self.delay, self.drop = delay, drop


@contextlib.contextmanager
def serve(answer):
  """Yields (url, requests); `answer(body, number)` gives a value or a Fault.

  `requests` collects (headers, body) of every request that came.
  """
  requests = []
  lock = threading.Lock()

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
      content = self.rfile.read(int(self.headers['Content-Length']))
      with lock:
        requests.append((dict(self.headers), json.loads(content)))
        number = len(requests)
      found = answer(json.loads(content), number)
      if not isinstance(found, Fault):
        found = Fault(text=json.dumps(found))
      time.sleep(found.delay)
      if found.drop:
        self.connection.close()
        return
      with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        self.send_response(found.status)
        for name, value in found.headers:
          self.send_header(name, value)
        self.send_header('Content-Length', str(len(found.text.encode())))
        self.end_headers()
        self.wfile.write(found.text.encode())

    def log_message(self, *arguments):
      pass

  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  thread = threading.Thread(
    target=server.serve_forever, args=(0.02,), daemon=True
  )
  thread.start()
  try:
    yield f'http://127.0.0.1:{server.server_port}/v1', requests
  finally:
    server.shutdown()
    server.server_close()
