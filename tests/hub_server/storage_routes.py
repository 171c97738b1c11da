"""The storage origin: LFS blobs at signed addresses, and the store of Xet."""

import xet
from common import OPTIONS, Err, save, signed_ok
from http_handler import HttpHandler
from repositories import Repo


class StorageHandler(HttpHandler):
    """Answers on --cdn-port."""

    listener = "cdn"

    def route(self, path):
        parts = path.strip("/").split("/")
        if parts[0] == "lfs" and len(parts) == 5:
            return self.blob(path, *parts[1:])
        if OPTIONS.xet and self.command == "POST" and parts[:2] == ["v1", "xorbs"]:
            target = xet.STORE / "xorbs" / parts[3]
            was_there = target.is_file()
            save(target, self.body_chunks())
            return self.reply(200, {"was_inserted": not was_there})
        if OPTIONS.xet and self.command == "POST" and path == "/v1/shards":
            xet.save_shard(self.body())
            return self.reply(200, {"result": 1})
        if OPTIONS.xet and parts[:2] == ["v1", "reconstructions"]:
            return self.reply(200, xet.reconstruction(parts[2], self.headers.get("Range")))
        if OPTIONS.xet and parts[0] == "xorb" and signed_ok(path, self.q):
            return self.send_file(xet.STORE / "xorbs" / parts[1], parts[1])
        raise Err(404, f"no such route: {self.command} {path}")

    def blob(self, path, kind, namespace, name, oid):
        """`PUT` and `GET` of a blob."""
        if self.headers.get("Authorization"):  # the Hub token must never reach the storage origin
            raise Err(400, "Only one auth mechanism allowed")
        if not signed_ok(path, self.q):
            raise Err(403, "SignatureDoesNotMatch")
        blob = Repo(kind, f"{namespace}/{name}").blob(oid)
        if self.command == "PUT":
            save(blob, self.body_chunks(), oid)
            return self.reply(200, ETag=f'"{oid}"')
        if not blob.is_file():
            raise Err(404, "NoSuchKey")
        return self.send_file(blob, oid)
