"""A Hugging Face Hub for tests: the standard library's HTTP server and `git`, on loopback.

Two listeners, like the real thing: the Hub (metadata, small files, collections) on --port, and the storage origin (LFS
blobs, Xet) on --cdn-port. All state is on disk below --data, so that the process can be killed and started again.

    python tests/hub_server --port 8800 --cdn-port 8801 --data hub-data --user alice:hf_alice:write --xet

`POST /_test/faults` makes the next matching requests fail: a list of `{match: regex on "METHOD /path", action: kill,
drop, lost or status, after: bytes, status, times}`. What no test of this project needs is left out.
"""

import os
import threading
from http.server import ThreadingHTTPServer

from common import CDN, DATA, HUB, OPTIONS
from hub_routes import HubHandler
from storage_routes import StorageHandler


def main():
    """Serves until it is killed."""
    DATA.mkdir(parents=True, exist_ok=True)
    ThreadingHTTPServer.daemon_threads = True
    hub = ThreadingHTTPServer(("127.0.0.1", OPTIONS.port), HubHandler)
    storage = ThreadingHTTPServer(("127.0.0.1", OPTIONS.cdn_port), StorageHandler)
    threading.Thread(target=storage.serve_forever, daemon=True).start()
    print(f"hub {HUB}  storage {CDN}  data {DATA}  pid {os.getpid()}", flush=True)
    hub.serve_forever()


if __name__ == "__main__":
    main()
