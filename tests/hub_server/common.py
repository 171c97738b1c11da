"""What every part of the server needs: its options, errors with a status, signed addresses, files written at once."""

import argparse
import hashlib
import hmac
import os
import tempfile
import time
from pathlib import Path

PARSER = argparse.ArgumentParser()
PARSER.add_argument("--port", type=int, default=8800)
PARSER.add_argument("--cdn-port", type=int, default=8801)
PARSER.add_argument("--data", required=True)
PARSER.add_argument("--user", action="append", default=[], help="name:token:role  (role: write|read)")
PARSER.add_argument("--xet", action="store_true", help="advertise Xet and serve a CAS on the CDN port")
OPTIONS = PARSER.parse_args()

DATA = Path(OPTIONS.data)
HUB, CDN = f"http://127.0.0.1:{OPTIONS.port}", f"http://127.0.0.1:{OPTIONS.cdn_port}"
USERS = {token: (name, role) for name, token, role in (user.split(":") for user in OPTIONS.user)}
KEY = b"test-only-signing-key"


class Err(Exception):
    """An answer with an error's status; `code` is what the client tells errors apart by."""

    def __init__(self, status, msg, code=None, body=None, **headers):
        self.status, self.msg, self.code, self.body, self.headers = status, msg, code, body, headers


def _signature(path, expires):
    return hmac.new(KEY, f"{path}{expires}".encode(), "sha256").hexdigest()


def sign(path, ttl=3600):
    """An address at the storage origin that works without a token, for a while."""
    expires = int(time.time()) + ttl
    return f"{CDN}{path}?exp={expires}&sig={_signature(path, expires)}"


def signed_ok(path, query):
    """Whether [`sign`] gave this address, and not too long ago."""
    expires, signature = query.get("exp", ["0"])[0], query.get("sig", [""])[0]
    return int(expires) > time.time() and hmac.compare_digest(signature, _signature(path, expires))


def save(path, chunks, sha256=None):
    """Writes atomically; refuses content that does not hash to `sha256`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, tmp = tempfile.mkstemp(dir=path.parent, prefix=".up-")
    digest = hashlib.sha256()
    try:
        with os.fdopen(fd, "wb") as file:
            for chunk in chunks:
                digest.update(chunk)
                file.write(chunk)
        if sha256 and digest.hexdigest() != sha256:
            raise Err(400, f"content hash {digest.hexdigest()} is not {sha256}")
        os.replace(tmp, path)
    finally:
        Path(tmp).unlink(missing_ok=True)
