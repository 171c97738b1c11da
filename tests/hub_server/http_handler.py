"""HTTP: bodies, answers, ranges, the log of requests, and the faults that tests ask for."""

import hashlib
import json
import os
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, urlsplit

from common import DATA, Err

FAULTS, LOG_LOCK = [], threading.Lock()


class HttpHandler(BaseHTTPRequestHandler):
    """What both listeners do alike; they answer in `route`."""

    protocol_version, server_version = "HTTP/1.1", "hubprobe"

    def log_message(self, *a):
        """Nothing: [`note`] keeps the log."""

    def handle_any(self):
        """One request: a fault where a test asks for one, else an answer."""
        self._body, self.fault = None, None
        url = urlsplit(self.path)
        self.q = parse_qs(url.query)
        for fault in FAULTS:
            if fault["times"] > 0 and re.search(fault["match"], f"{self.command} {self.path}"):
                fault["times"] -= 1
                self.fault = fault
                break
        try:
            if self.fault and self.fault["action"] == "status":
                raise Err(self.fault["status"], "injected fault")
            self.route(url.path)
        except Err as error:
            self.reply_error(error)
        except (ConnectionError, BrokenPipeError) as error:
            self.note(f"conn:{error}")
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def route(self, path):
        raise NotImplementedError

    def body_chunks(self):
        """The request's body, piece by piece; a kill or drop fault comes after so many bytes."""
        seen, left = 0, int(self.headers.get("Content-Length") or 0)
        while left:
            chunk = self.rfile.read(min(left, 65536))
            if not chunk:
                raise ConnectionError("client went away")
            left, seen = left - len(chunk), seen + len(chunk)
            if self.fault and self.fault["action"] in ("kill", "drop") and seen >= self.fault.get("after", 0):
                self.note(self.fault["action"])
                if self.fault["action"] == "kill":
                    os._exit(137)
                self.connection.shutdown(socket.SHUT_RDWR)
                raise ConnectionError("fault: drop")
            yield chunk

    def body(self):
        """The request's body."""
        if self._body is None:
            self._body = b"".join(self.body_chunks())
        return self._body

    def json(self):
        """The request's body, read as JSON."""
        return json.loads(self.body() or b"{}")

    def reply(self, status, body=b"", ctype="application/json", **headers):
        """Answers; underscores in the names of headers stand for dashes."""
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        if self.fault and self.fault["action"] == "lost":  # the work is done, but the answer never arrives
            self.note(f"lost:{status}")
            self.connection.shutdown(socket.SHUT_RDWR)
            raise ConnectionError("fault: lost")
        self.send_response(status)
        self.send_header("Content-Type", ctype)
        self.send_header("X-Request-Id", hashlib.md5(os.urandom(8)).hexdigest())
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.note(status)

    def reply_error(self, error):
        """Answers as the Hub tells errors: in headers, for the client, and in JSON."""
        if self.command in ("POST", "PUT", "DELETE"):
            try:
                self.body()  # drain, so that keep-alive stays in step
            except Exception:
                self.close_connection = True
        headers = dict(error.headers)
        if error.code:
            headers["X_Error_Code"] = error.code
        headers["X_Error_Message"] = error.msg.encode("ascii", "replace").decode().replace("\n", " ")
        self.reply(error.status, {"error": error.msg, **(error.body or {})}, **headers)

    def send_file(self, path, etag, **headers):
        """A file, or the range of it that is asked for."""
        size = path.stat().st_size
        low, high, status = 0, size - 1, 200
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if match and (match[1] or match[2]):
            low = int(match[1]) if match[1] else max(0, size - int(match[2]))
            high = min(int(match[2]), size - 1) if match[1] and match[2] else size - 1
            if low > high:
                return self.reply(416, Content_Range=f"bytes */{size}")
            status, headers["Content_Range"] = 206, f"bytes {low}-{high}/{size}"
        headers.update(ETag=f'"{etag}"', Accept_Ranges="bytes", Content_Length=high - low + 1)
        self.reply(status, b"", "application/octet-stream", **headers)
        if self.command == "HEAD":
            return
        with path.open("rb") as file:
            file.seek(low)
            left = high - low + 1
            while left:
                chunk = file.read(min(left, 65536))
                self.wfile.write(chunk)
                left -= len(chunk)

    def note(self, status):
        """Writes the request to the log, which tests read."""
        line = {
            "t": round(time.time(), 3),
            "on": self.listener,
            "m": self.command,
            "p": self.path,
            "s": status,
            "len": self.headers.get("Content-Length"),
            "ua": (self.headers.get("User-Agent") or "")[:160],
        }
        with LOG_LOCK, (DATA / "requests.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
