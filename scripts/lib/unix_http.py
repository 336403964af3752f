"""What the lab's own servers share: HTTP/1.1 on a Unix socket behind nginx, which counts their requests."""

import os
import socketserver
from http.server import BaseHTTPRequestHandler


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, path, handler):
        if os.path.exists(path):
            os.unlink(path)
        super().__init__(path, handler)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def address_string(self):
        # A Unix socket has no address of a client, which the log would print.
        return "nginx"
