"""A Hugging Face Hub for tests: the standard library's HTTP server and `git`, on loopback.

Two listeners, like the real thing: the Hub (metadata, small files, collections) on --port, and the storage origin (LFS
blobs, Xet) on --cdn-port. All state is on disk below --data, so that the process can be killed and started again.

    python hub_server.py --port 8800 --cdn-port 8801 --data hub-data --user alice:hf_alice:write --xet

`POST /_test/faults` makes the next matching requests fail: a list of `{match: regex on "METHOD /path", action: kill,
drop, lost, sleep or status, after: bytes, status, times}`. The Xet formats follow huggingface/xet-core (Apache-2.0).
"""

import argparse
import base64
import hashlib
import hmac
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import tempfile
import threading
import time
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml  # a dependency of huggingface_hub

P = argparse.ArgumentParser()
P.add_argument("--port", type=int, default=8800)
P.add_argument("--cdn-port", type=int, default=8801)
P.add_argument("--data", required=True)
P.add_argument("--user", action="append", default=[], help="name:token:role  (role: write|read)")
P.add_argument("--xet", action="store_true", help="advertise Xet and serve a CAS on the CDN port")
P.add_argument("--page-size", type=int, default=1000)
A = P.parse_args()

DATA = Path(A.data)
HUB, CDN = f"http://127.0.0.1:{A.port}", f"http://127.0.0.1:{A.cdn_port}"
USERS = {t: (n, r) for n, t, r in (u.split(":") for u in A.user)}
KEY = b"test-only-signing-key"
KINDS = {"model": "", "dataset": "datasets/", "space": "spaces/"}
LFS_MIN = 10 * 1024 * 1024  # the Hub forces LFS from 10 MiB, and for binary files
LFS_ENDINGS = "safetensors bin pt npz h5 gguf parquet arrow gz zip model png jpg"
GITATTR = "".join(f"*.{ending} filter=lfs diff=lfs merge=lfs -text\n" for ending in LFS_ENDINGS.split(" "))
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"
POINTER_RE = re.compile(rb"version https://git-lfs\.github\.com/spec/v1\noid sha256:([0-9a-f]{64})\nsize (\d+)\n$")
GIT_ENV = {**os.environ, "GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": "/dev/null", "TZ": "UTC"}
ISO = "--date=format-local:%Y-%m-%dT%H:%M:%S.000Z"  # the client parses exactly this form
LOCKS, LOCKS_GUARD, TREES = {}, threading.Lock(), {}
FAULTS, LOG_LOCK = [], threading.Lock()


class Err(Exception):
    def __init__(self, status, msg, code=None, body=None, **headers):
        self.status, self.msg, self.code, self.body, self.headers = status, msg, code, body, headers


def git(repo, *args, data=None, check=True):
    r = subprocess.run(["git", "-C", str(repo.git), *args], input=data, capture_output=True, env=GIT_ENV)
    if check and r.returncode:
        raise Err(500, f"git {args[0]}: {r.stderr.decode()[-300:]}")
    return r.stdout if r.returncode == 0 else None


def sign(path, ttl=3600):
    exp = int(time.time()) + ttl
    return f"{CDN}{path}?exp={exp}&sig={hmac.new(KEY, f'{path}{exp}'.encode(), 'sha256').hexdigest()}"


def signed_ok(path, q):
    exp, sig = q.get("exp", ["0"])[0], q.get("sig", [""])[0]
    return int(exp) > time.time() and hmac.compare_digest(
        sig, hmac.new(KEY, f"{path}{exp}".encode(), "sha256").hexdigest()
    )


def save(path, chunks, sha256=None):
    """Write atomically; refuse content that does not hash to sha256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, tmp = tempfile.mkstemp(dir=path.parent, prefix=".up-")
    h = hashlib.sha256()
    try:
        with os.fdopen(fd, "wb") as f:
            for c in chunks:
                h.update(c)
                f.write(c)
        if sha256 and h.hexdigest() != sha256:
            raise Err(400, f"content hash {h.hexdigest()} is not {sha256}")
        os.replace(tmp, path)
    finally:
        Path(tmp).unlink(missing_ok=True)


# ------------------------------------------------------------------ repositories
class Repo:
    def __init__(self, kind, rid):
        self.kind, self.id = kind, rid
        self.dir = DATA / f"{kind}s" / rid
        self.git, self.lfs = self.dir / "git", self.dir / "lfs"

    @property
    def meta(self):
        return json.loads((self.dir / "meta.json").read_text())

    def set_meta(self, **kw):
        m = {**(self.meta if self.exists() else {}), **kw}
        save(self.dir / "meta.json", [json.dumps(m).encode()])

    def exists(self):
        return (self.dir / "meta.json").is_file()

    def url(self):
        return f"{HUB}/{KINDS[self.kind]}{self.id}"

    def lock(self):
        with LOCKS_GUARD:
            return LOCKS.setdefault(str(self.dir), threading.RLock())

    def blob(self, sha):
        return self.lfs / sha[:2] / sha

    def refs(self):
        out = git(self, "for-each-ref", "--format=%(refname) %(objectname) %(*objectname)").decode()
        return {line.split()[0]: line.split()[-1] for line in out.splitlines()}

    def rev(self, rev):
        rev = rev or "main"
        if (
            re.fullmatch(r"[0-9a-f]{40}", rev)
            and git(self, "cat-file", "-e", rev + "^{commit}", check=False) is not None
        ):
            return rev
        refs = self.refs()
        for full in (f"refs/heads/{rev}", f"refs/tags/{rev}", rev if rev.startswith("refs/") else ""):
            if full in refs:
                return refs[full]
        if re.fullmatch(r"[0-9a-f]{7,39}", rev):
            out = git(self, "rev-parse", "-q", "--verify", rev + "^{commit}", check=False)
            if out:
                return out.decode().strip()
        raise Err(404, f"Invalid rev id: {rev}", "RevisionNotFound")

    def tree(self, commit):
        """path -> entry (files and folders) of a commit; commits are immutable, so cached."""
        key = (str(self.dir), commit)
        if key not in TREES:
            entries, small = {}, []
            for rec in git(self, "ls-tree", "-r", "-t", "-l", "-z", commit).split(b"\0")[:-1]:
                info, path = rec.split(b"\t", 1)
                _, typ, oid, size = info.decode().split()
                e = {
                    "type": "file" if typ == "blob" else "directory",
                    "oid": oid,
                    "size": int(size) if size != "-" else 0,
                    "path": path.decode(),
                }
                entries[e["path"]] = e
                if typ == "blob" and 120 <= e["size"] <= 160:
                    small.append(e)
            if small:
                out = git(self, "cat-file", "--batch", data="".join(e["oid"] + "\n" for e in small).encode())
                for e in small:
                    _head, out = out.split(b"\n", 1)
                    body, out = out[: e["size"]], out[e["size"] + 1 :]
                    m = POINTER_RE.match(body)
                    if m:
                        sha, n = m[1].decode(), int(m[2])
                        e.update(size=n, lfs={"oid": sha, "size": n, "pointerSize": len(body)})
                        xet = self.blob(sha).with_suffix(".xet")
                        if xet.is_file():
                            e["xetHash"] = xet.read_text()
            TREES[key] = entries
        return TREES[key]

    def read(self, e):
        return self.blob(e["lfs"]["oid"]).read_bytes() if "lfs" in e else git(self, "cat-file", "blob", e["oid"])

    def commit(self, ref, parent, ops, title, desc, user):
        """ops: (path, bytes) to write, (path, None) to delete. One git fast-import run = one atomic commit."""
        msg = (title + ("\n\n" + desc if desc else "")).encode()
        who = f"{user} <{user}@users.noreply.localhost> {int(time.time())} +0000"
        s = [f"commit {ref}\ncommitter {who}\ndata {len(msg)}\n".encode(), msg, b"\n"]
        if parent:
            s.append(f"from {parent}\n".encode())
        for path, body in ops:
            p = '"' + path.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
            s.append(
                f"D {p}\n".encode()
                if body is None
                else f"M 100644 inline {p}\ndata {len(body)}\n".encode() + body + b"\n"
            )
        git(self, "fast-import", "--quiet", "--force", "--date-format=raw", data=b"".join(s) + b"\ndone\n")
        return git(self, "rev-parse", ref).decode().strip()

    def card(self, commit):
        e = self.tree(commit).get("README.md")
        m = re.match(r"---\r?\n(.*?)\r?\n---", self.read(e).decode("utf-8", "replace"), re.S) if e else None
        try:
            return (yaml.safe_load(m[1]) if m else None) or {}
        except yaml.YAMLError:
            return {}

    def info(self, commit, blobs=False):
        tree, meta, card = self.tree(commit), self.meta, self.card(commit)
        files = [e for e in tree.values() if e["type"] == "file"]
        when = git(self, "log", "-1", ISO, "--format=%cd", commit).decode().strip()
        sib = []
        for e in files:
            s = {"rfilename": e["path"]}
            if blobs:
                s.update(size=e["size"], blobId=e["oid"])
                if "lfs" in e:
                    s["lfs"] = {"sha256": e["lfs"]["oid"], "size": e["size"], "pointerSize": e["lfs"]["pointerSize"]}
            sib.append(s)
        tags = [t for t in (card.get("library_name"), card.get("pipeline_tag")) if t] + list(card.get("tags") or [])
        if card.get("license"):
            tags.append(f"license:{card['license']}")
        d = {
            "_id": hashlib.md5(self.id.encode()).hexdigest()[:24],
            "id": self.id,
            "author": self.id.split("/")[0],
            "sha": commit,
            "lastModified": when,
            "createdAt": meta["createdAt"],
            "private": meta["private"],
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": tags,
            "siblings": sib,
            "cardData": card,
            "usedStorage": sum(e["size"] for e in files),
        }
        if self.kind == "model":
            cfg = json.loads(self.read(tree["config.json"])) if "config.json" in tree else {}
            d.update(
                modelId=self.id,
                library_name=card.get("library_name"),
                pipeline_tag=card.get("pipeline_tag"),
                config={k: cfg[k] for k in ("architectures", "model_type", "auto_map") if k in cfg},
            )
            if "auto_map" in cfg:
                d["tags"].append("custom_code")
            if any(e["path"].endswith(".safetensors") for e in files):
                d["tags"].append("safetensors")
        if self.kind == "space":
            d.update(sdk=meta.get("sdk"), subdomain=self.id.replace("/", "-"))
        return json.loads(json.dumps(d, default=str))


def create(kind, rid, private, sdk, user):
    r = Repo(kind, rid)
    with r.lock():
        if r.exists():
            raise Err(409, f"You already created this {kind} repo", body={"url": r.url(), "name": rid})
        r.git.mkdir(parents=True, exist_ok=True)
        git(r, "init", "-q", "--bare", "-b", "main", ".")
        ops = [(".gitattributes", GITATTR.encode())]
        if kind == "space":
            ops.append(
                (
                    "README.md",
                    f"---\ntitle: {rid.split('/')[1]}\nemoji: 🚀\ncolorFrom: blue\ncolorTo: green\n"
                    f"sdk: {sdk}\napp_file: app.py\npinned: false\n---\n".encode(),
                )
            )
        r.commit("refs/heads/main", None, ops, "initial commit", "", user)
        r.set_meta(private=private, sdk=sdk, createdAt=time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime()))
    return r


LICENSES = {"apache-2.0", "mit", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "gpl-3.0", "llama3.1", "gemma", "other"}
COLORS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}


def validate_card(content, kind):
    """A documented subset of the Hub's card schema -> (errors, warnings)."""
    m = re.match(r"---\r?\n(.*?)\r?\n?---\s*(\n|$)", content.lstrip("\ufeff"), re.S)
    if not m or not m[1].strip():
        if kind == "space":
            return ["Missing configuration in README"], []
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        card = yaml.safe_load(m[1])
    except yaml.YAMLError as e:
        return [f"invalid YAML in metadata: {e}".replace("\n", " ")], []
    if not isinstance(card, dict):
        return ["metadata must be a YAML mapping"], []
    bad = []
    for lic in [card["license"]] if isinstance(card.get("license"), str) else card.get("license") or []:
        if lic not in LICENSES:
            bad.append(f'"license" must be one of the known license ids, got {lic!r}')
    for key in ("tags", "datasets", "task_categories", "size_categories"):
        if key in card and not isinstance(card[key], (list, str)):
            bad.append(f'"{key}" must be an array')
    for lang in [card["language"]] if isinstance(card.get("language"), str) else card.get("language") or []:
        if not isinstance(lang, str) or not re.fullmatch(r"[a-z]{2,8}(-[A-Za-z0-9]+)*|code", lang):
            bad.append(f'"language" holds {lang!r}: it must be a lowercase language code')
    if kind == "space":
        if card.get("sdk") not in ("gradio", "streamlit", "docker", "static"):
            bad.append('"sdk" must be one of [gradio, streamlit, docker, static]')
        for key in ("colorFrom", "colorTo"):
            if key in card and card[key] not in COLORS:
                bad.append(f'"{key}" must be one of {sorted(COLORS)}')
        if len(str(card.get("short_description") or "")) > 60:
            bad.append('"short_description" length must be less than or equal to 60 characters long')
    return bad, []


# ------------------------------------------------------------------ Xet CAS (xorbs, shards)
def hx(b):  # 32 bytes -> the Xet hex form: four little-endian u64
    return "".join(f"{x:016x}" for x in struct.unpack("<4Q", b))


def parse_shard(b):
    """-> [(file hash, sha256 or None, [(xorb, unpacked bytes, first chunk, end chunk)])]"""
    files, at = [], 48  # 48-byte shard header, then 48-byte records
    while b[at : at + 32] != b"\xff" * 32:
        fh, flags, n = hx(b[at : at + 32]), *struct.unpack_from("<II", b, at + 32)
        at += 48
        terms, sha = [], None
        for _ in range(n):
            _, size, lo, hi = struct.unpack_from("<IIII", b, at + 32)
            terms.append((hx(b[at : at + 32]), size, lo, hi))
            at += 48
        at += 48 * n if flags >> 31 & 1 else 0  # verification entries
        if flags >> 30 & 1:
            sha = hx(b[at : at + 32])
            at += 48
        files.append((fh, sha, terms))
    return files


def xorb_offsets(path):
    """Byte offset of every chunk of a serialized xorb, plus the end of the last one."""
    b, at, offs = path.read_bytes(), 0, [0]
    while at + 8 <= len(b) and b[at] == 0:  # chunk header: version 0, u24 packed, scheme, u24 unpacked
        at += 8 + int.from_bytes(b[at + 1 : at + 4], "little")
        offs.append(at)
    return offs


def xet_materialize(sha, xet, size, dest):
    """Rebuild a file from the CAS with the real client, check its sha256, and keep it as an LFS blob."""
    import hf_xet

    tmp = dest.parent / f".xet-{sha}-{threading.get_ident()}"
    dest.parent.mkdir(parents=True, exist_ok=True)
    with hf_xet.XetSession().new_file_download_group(
        endpoint=CDN, token="t", token_expiry_unix_secs=int(time.time()) + 3600
    ) as g:
        g.start_download_file(hf_xet.XetFileInfo(xet, size), str(tmp))
    with open(tmp, "rb") as f:
        save(dest, iter(lambda: f.read(1 << 20), b""), sha)
    tmp.unlink()
    dest.with_suffix(".xet").write_text(xet)


# ------------------------------------------------------------------ HTTP
class Handler(BaseHTTPRequestHandler):
    protocol_version, server_version = "HTTP/1.1", "hubprobe"

    def log_message(self, *a):
        pass

    def body_chunks(self, limit=None):
        """Request body, Content-Length or chunked; applies the kill/drop fault after N bytes."""
        seen = 0
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while n := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(n)
                self.rfile.readline()
            self.rfile.readline()
        left = int(self.headers.get("Content-Length") or 0)
        while left:
            c = self.rfile.read(min(left, 65536))
            if not c:
                raise ConnectionError("client went away")
            left, seen = left - len(c), seen + len(c)
            f = self.fault
            if f and seen >= f.get("after", 0) and f["action"] in ("kill", "drop"):
                self.note(f["action"])
                if f["action"] == "kill":
                    os._exit(137)
                self.connection.shutdown(socket.SHUT_RDWR)
                raise ConnectionError("fault: drop")
            yield c

    def body(self):
        if self._body is None:
            self._body = b"".join(self.body_chunks())
        return self._body

    def json(self):
        try:
            return json.loads(self.body() or b"{}")
        except ValueError as error:
            raise Err(400, "Invalid JSON") from error

    def note(self, status):
        with LOG_LOCK, open(DATA / "requests.jsonl", "a") as f:
            f.write(
                json.dumps(
                    {
                        "t": round(time.time(), 3),
                        "on": self.server.role,
                        "m": self.command,
                        "p": self.path,
                        "s": status,
                        "auth": self.headers.get("Authorization", "")[:40],
                        "range": self.headers.get("Range"),
                        "len": self.headers.get("Content-Length"),
                        "te": self.headers.get("Transfer-Encoding"),
                        "ua": (self.headers.get("User-Agent") or "")[:160],
                    }
                )
                + "\n"
            )

    def reply(self, status, body=b"", ctype="application/json", **headers):
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
        for k, v in headers.items():
            self.send_header(k.replace("_", "-"), str(v))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.note(status)

    def send_file(self, path, etag, **headers):
        """200/206 with Range support; the drop fault cuts the response after N bytes."""
        size = path.stat().st_size
        lo, hi, status = 0, size - 1, 200
        m = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if m and (m[1] or m[2]):
            lo = int(m[1]) if m[1] else max(0, size - int(m[2]))
            hi = min(int(m[2]), size - 1) if m[1] and m[2] else size - 1
            if lo > hi:
                return self.reply(416, Content_Range=f"bytes */{size}")
            status, headers["Content_Range"] = 206, f"bytes {lo}-{hi}/{size}"
        self.reply(
            status,
            b"",
            "application/octet-stream",
            ETag=f'"{etag}"',
            Accept_Ranges="bytes",
            Content_Length=hi - lo + 1,
            **headers,
        )
        if self.command == "HEAD":
            return
        f = self.fault if self.fault and self.fault["action"] == "cut" else None
        with open(path, "rb") as fh:
            fh.seek(lo)
            left, sent = hi - lo + 1, 0
            while left:
                c = fh.read(min(left, 65536))
                self.wfile.write(c)
                left, sent = left - len(c), sent + len(c)
                if f and sent >= f.get("after", 0):
                    self.wfile.flush()
                    self.connection.shutdown(socket.SHUT_RDWR)
                    raise ConnectionError("fault: cut")

    def handle_any(self):
        self._body, self.fault = None, None
        u = urlsplit(self.path)
        self.q = parse_qs(u.query)
        for f in FAULTS:
            if f["times"] > 0 and re.search(f["match"], f"{self.command} {self.path}"):
                f["times"] -= 1
                self.fault = f
                break
        try:
            if self.fault and self.fault["action"] == "sleep":
                time.sleep(self.fault["seconds"])
            if self.fault and self.fault["action"] == "status":
                self.body()
                raise Err(self.fault["status"], "injected fault", **self.fault.get("headers", {}))
            (self.cdn if self.server.role == "cdn" else self.hub)(u.path)
        except Err as e:
            if self.command in ("POST", "PUT", "DELETE"):
                try:
                    self.body()  # drain, so that keep-alive stays in step
                except Exception:
                    self.close_connection = True
            h = dict(e.headers)
            if e.code:
                h["X_Error_Code"] = e.code
            h["X_Error_Message"] = e.msg.encode("ascii", "replace").decode().replace("\n", " ")
            self.reply(e.status, {"error": e.msg, **(e.body or {})}, **h)
        except (ConnectionError, BrokenPipeError) as e:
            self.note(f"conn:{e}")
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    # ---- auth
    def user(self, need=None):
        h = self.headers.get("Authorization")
        if h is None:
            if need:
                raise Err(401, "Invalid username or password.")
            return None, None
        name, role = USERS.get(h.removeprefix("Bearer ").strip(), (None, None))
        if name is None:  # a bad token is refused even for public repos, as on the Hub
            raise Err(401, "Invalid credentials in Authorization header")
        return name, role

    def writer(self, ns):
        name, role = self.user(need=True)
        if role != "write" or ns != name:
            raise Err(403, f"Forbidden: you don't have write access to {ns}")
        return name

    def repo(self, kind, rid, write=False):
        name, _ = self.user()
        r = Repo(kind, rid)
        if not r.exists() or (r.meta["private"] and name != rid.split("/")[0]):
            # http:// endpoints need the explicit code: the client's 401 heuristic matches https:// only
            raise Err(
                404 if name else 401,
                "Repository not found" if name else "Invalid username or password.",
                "RepoNotFound",
            )
        if write:
            self.writer(rid.split("/")[0])
        return r

    # ---- the Hub
    def hub(self, path):
        seg = [unquote(s) for s in path.strip("/").split("/")]  # %2F in a revision stays inside its segment
        if path == "/_test/faults":
            FAULTS[:] = self.json()
            return self.reply(200, {"ok": True})
        if path == "/api/whoami-v2":
            name, role = self.user(need=True)
            return self.reply(
                200,
                {
                    "type": "user",
                    "id": hashlib.md5(name.encode()).hexdigest()[:24],
                    "name": name,
                    "fullname": name,
                    "email": f"{name}@localhost",
                    "emailVerified": True,
                    "isPro": False,
                    "canPay": False,
                    "orgs": [],
                    "auth": {
                        "type": "access_token",
                        "accessToken": {"displayName": "test", "role": role, "createdAt": "2026-01-01T00:00:00.000Z"},
                    },
                },
            )
        if path == "/api/validate-yaml":
            d = self.json()
            errors, warns = validate_card(d["content"], d["repoType"])
            return self.reply(
                400 if errors else 200,
                {"errors": [{"message": m} for m in errors], "warnings": [{"message": m} for m in warns]},
            )
        if seg[:2] == ["api", "repos"] and len(seg) == 3:
            d = self.json()
            kind, ns = d.get("type") or "model", d.get("organization") or self.user(need=True)[0]
            if seg[2] == "create":
                name, role = self.user(need=True)
                if role != "write" or ns != name:
                    raise Err(403, f'You don\'t have the rights to create a {kind} under the namespace "{ns}"')
                private = d.get("visibility", "private" if d.get("private") else "public") == "private"
                r = create(kind, f"{ns}/{d['name']}", private, d.get("sdk"), name)
                return self.reply(200, {"url": r.url(), "name": r.id, "id": r.id})
            if seg[2] == "delete":
                r = self.repo(kind, f"{ns}/{d['name']}", write=True)
                shutil.rmtree(r.dir)
                return self.reply(200, {"ok": True})
        if seg[:2] == ["api", "collections"]:
            return self.collections(seg[2:])
        if seg[0] == "api" and len(seg) >= 2 and seg[1] in ("models", "datasets", "spaces"):
            return self.api(seg[1][:-1], seg[2:])
        kind = {"datasets": "dataset", "spaces": "space"}.get(seg[0])
        rest = seg[1:] if kind else seg
        if len(rest) >= 4 and rest[1].endswith(".git") and rest[2:4] == ["info", "lfs"]:
            return self.lfs(kind or "model", f"{rest[0]}/{rest[1][:-4]}", rest[4:])
        if len(rest) >= 5 and rest[2] in ("resolve", "raw") and self.command in ("GET", "HEAD"):
            return self.resolve(kind or "model", f"{rest[0]}/{rest[1]}", rest[3], "/".join(rest[4:]), rest[2] == "raw")
        raise Err(404, f"no such route: {self.command} {path}")

    def collections(self, seg):
        name, role = self.user(need=self.command == "POST")
        known = {p.stem: json.loads(p.read_text()) for p in (DATA / "collections").glob("*.json")}
        if not seg:
            d = self.json()
            if role != "write" or d["namespace"] != name:
                raise Err(403, "Forbidden")
            short = re.sub(r"[^a-z0-9]+", "-", d["title"].lower()).strip("-")
            key = f"{short}-{hashlib.md5(d['title'].encode()).hexdigest()[:24]}"
            slug = f"{name}/{key}"
            if key in known:
                raise Err(409, "This collection exists already", body={"slug": slug})
            found = {
                "slug": slug,
                "title": d["title"],
                "owner": {"name": name},
                "items": [],
                "position": 0,
                "lastUpdated": "2026-01-01T00:00:00.000Z",
                "private": d["private"],
                "theme": "blue",
                "upvotes": 0,
            }
        else:
            key = seg[1]
            if key not in known:
                raise Err(404, "Collection not found")
            found = known[key]
            if self.command == "POST":
                item = self.json()["item"]
                if item["id"] in [i["id"] for i in found["items"] if i["type"] == item["type"]]:
                    raise Err(409, "Item already in the collection")
                found["items"].append({**item, "_id": f"{len(found['items']):024}", "position": len(found["items"])})
        save(DATA / "collections" / f"{key}.json", [json.dumps(found).encode()])
        self.reply(200, found)

    def resolve(self, kind, rid, rev, path, raw):
        r = self.repo(kind, rid)
        commit = r.rev(rev)
        e = r.tree(commit).get(path)
        h = {"X_Repo_Commit": commit, "Access_Control_Expose_Headers": "X-Repo-Commit,X-Linked-Size,X-Linked-ETag"}
        if not e or e["type"] != "file":
            raise Err(404, "Entry not found", "EntryNotFound", **h)
        if raw or "lfs" not in e:
            tmp = DATA / "tmp" / e["oid"]
            if not tmp.is_file():
                save(tmp, [git(r, "cat-file", "blob", e["oid"])])
            return self.send_file(tmp, e["oid"], **h)
        sha = e["lfs"]["oid"]
        h.update(X_Linked_Size=e["size"], X_Linked_ETag=f'"{sha}"')
        if A.xet and "xetHash" in e:
            route = f"{HUB}/api/{kind}s/{rid}/xet-read-token/{commit}"
            h.update(X_Xet_Hash=e["xetHash"], X_Xet_Refresh_Route=route, Link=f'<{route}>; rel="xet-auth"')
        self.reply(302, b"Found", "text/plain", Location=sign(f"/lfs/{kind}/{rid}/{sha}"), ETag=f'"{sha}"', **h)

    def api(self, kind, seg):
        m = self.command
        if len(seg) < 2:
            out = []
            for d in sorted((DATA / f"{kind}s").glob("*/*/meta.json")):
                r = Repo(kind, "/".join(d.parts[-3:-1]))
                if not r.meta["private"] or self.user()[0] == r.id.split("/")[0]:
                    out.append(r.info(r.rev("main")))
            who, text = self.q.get("author", [None])[0], self.q.get("search", [""])[0]
            return self.reply(200, [i for i in out if (not who or i["author"] == who) and text in i["id"]])
        rid, act = "/".join(seg[:2]), seg[2] if len(seg) > 2 else None
        rest = seg[3:]
        write = (
            (m in ("POST", "PUT", "DELETE") and act in ("commit", "branch", "tag", "settings", "preupload"))
            or act == "xet-write-token"
            or (act == "auth-check" and rest == ["write"])
        )
        r = self.repo(kind, rid, write=write)
        if act in (None, "revision"):
            info = r.info(r.rev(rest[0] if rest else None), blobs=self.q.get("blobs") in (["true"], ["True"]))
            keep = self.q.get("expand") or self.q.get("expand[]")
            return self.reply(200, {k: v for k, v in info.items() if not keep or k in ("_id", "id", *keep)})
        if act == "tree":
            commit, sub = r.rev(rest[0]), "/".join(rest[1:])
            tree = r.tree(commit)
            if sub and tree.get(sub, {}).get("type") != "directory":
                raise Err(404, f'{sub} does not exist on "{rest[0]}"', "EntryNotFound")
            deep = self.q.get("recursive", ["false"])[0].lower() in ("true", "1")
            es = [
                e
                for p, e in sorted(tree.items())
                if (not sub or p.startswith(sub + "/")) and (deep or "/" not in p[len(sub) + 1 if sub else 0 :])
            ]
            at = int(self.q.get("cursor", ["0"])[0])
            h = {}
            if len(es) > at + A.page_size:
                base = re.sub(r"[?&]cursor=\d+", "", self.path)
                h["Link"] = f'<{HUB}{base}{"&" if "?" in base else "?"}cursor={at + A.page_size}>; rel="next"'
            page = [self.expanded(r, commit, e) for e in es[at : at + A.page_size]]
            return self.reply(200, page, X_Repo_Commit=commit, **h)
        if act == "paths-info":
            f = parse_qs(self.body().decode()) if "json" not in self.headers.get("Content-Type", "") else self.json()
            self.q = (
                {"expand": f.get("expand", ["false"])}
                if isinstance(f.get("expand"), list)
                else {"expand": [str(f.get("expand"))]}
            )
            commit = r.rev(rest[0])
            tree = r.tree(commit)
            return self.reply(
                200, [self.expanded(r, commit, tree[p.strip("/")]) for p in f.get("paths", []) if p.strip("/") in tree]
            )
        if act == "refs":
            out = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
            for ref, c in r.refs().items():
                k, p = next(
                    (k, p)
                    for k, p in (
                        ("branches", "refs/heads/"),
                        ("tags", "refs/tags/"),
                        ("pullRequests", "refs/pr/"),
                        ("converts", "refs/"),
                    )
                    if ref.startswith(p)
                )
                out[k].append({"name": ref[len(p) :], "ref": ref, "targetCommit": c})
            return self.reply(200, out)
        if act == "commits":
            log = git(r, "log", ISO, "--format=%H%x00%an%x00%cd%x00%s%x00%b%x01", r.rev(rest[0])).decode()
            rows = [x.strip("\n").split("\0") for x in log.split("\x01")[:-1]]
            return self.reply(
                200,
                [
                    {"id": h, "authors": [{"user": a}], "date": d, "title": s, "message": b.strip()}
                    for h, a, d, s, b in rows
                ],
            )
        if act == "branch":
            ref = f"refs/heads/{rest[0]}"
            if m == "POST":
                if ref in r.refs():
                    raise Err(409, f"Reference already exists: {ref}")
                git(r, "update-ref", ref, r.rev(self.json().get("startingPoint")))
            elif rest[0] == "main":
                raise Err(403, "Cannot delete the default branch")
            else:
                git(r, "update-ref", "-d", ref)
            return self.reply(200, b"OK", "text/plain")
        if act == "tag":
            if m == "POST":
                d = self.json()
                ref = f"refs/tags/{d['tag']}"
                if ref in r.refs():
                    raise Err(409, f"Tag reference exists already: {ref}")
                git(r, "update-ref", ref, r.rev(rest[0]))
            else:
                ref = f"refs/tags/{rest[0]}"
                if ref not in r.refs():
                    raise Err(404, f"Invalid rev id: {ref}", "RevisionNotFound")
                git(r, "update-ref", "-d", ref)
            return self.reply(200, b"OK", "text/plain")
        if act == "settings":
            d = self.json()
            r.set_meta(private=d["visibility"] == "private")
            return self.reply(200, d)
        if act == "auth-check":
            return self.reply(200, b"OK", "text/plain")
        if act == "preupload":
            return self.preupload(r, rest[0])
        if act == "commit":
            return self.commit(r, rest[0])
        if act in ("xet-read-token", "xet-write-token") and A.xet:
            exp = int(time.time()) + 3600
            return self.reply(
                200,
                {"casUrl": CDN, "accessToken": f"xet-{act[4:-6]}", "exp": exp},
                X_Xet_Cas_Url=CDN,
                X_Xet_Access_Token=f"xet-{act[4:-6]}",
                X_Xet_Token_Expiration=exp,
            )
        raise Err(404, f"no such route: {m} {self.path}")

    def expanded(self, r, commit, e):
        if self.q.get("expand", ["false"])[0].lower() in ("true", "1"):
            h, d, s = (
                git(r, "log", "-1", ISO, "--format=%H%x00%cd%x00%s", commit, "--", e["path"])
                .decode()
                .strip()
                .split("\0")
            )
            return {**e, "lastCommit": {"id": h, "date": d, "title": s}}
        return e

    def preupload(self, r, rev):
        tree = r.tree(r.rev(rev))
        attrs = r.read(tree[".gitattributes"]).decode() if ".gitattributes" in tree else ""
        pats = [line.split()[0] for line in attrs.splitlines() if "filter=lfs" in line]
        d = self.json()
        ignore = d.get("gitIgnore") or (r.read(tree[".gitignore"]).decode() if ".gitignore" in tree else "")
        ignore = [line.strip() for line in ignore.splitlines() if line.strip() and not line.startswith("#")]
        out = []
        for f in d["files"]:
            sample = base64.b64decode(f["sample"])
            try:
                binary = b"\0" in sample
                sample.decode() if len(sample) < 512 else sample[:509].decode("utf-8", "strict")
            except UnicodeDecodeError as x:
                binary = x.start < 500
            name = f["path"].split("/")[-1]
            lfs = any(fnmatch(name, p) or fnmatch(f["path"], p) for p in pats) or f["size"] >= LFS_MIN or binary
            e = tree.get(f["path"])
            oid = e and (e["lfs"]["oid"] if "lfs" in e else e["oid"])
            out.append(
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if lfs else "regular",
                    **({"oid": oid} if oid else {}),
                    "shouldIgnore": any(
                        fnmatch(name, p.strip("/")) or f["path"].startswith(p.strip("/") + "/") for p in ignore
                    ),
                }
            )
        self.reply(200, {"files": out, "commitOid": r.rev(rev)})

    def commit(self, r, rev):
        name, _ = self.user(need=True)
        head, ops = None, []
        with r.lock():
            parent = r.rev(rev)
            tree = r.tree(parent)
            for line in self.body().splitlines():
                d = json.loads(line)
                v = d["value"]
                if d["key"] == "header":
                    head = v
                elif d["key"] == "file":
                    ops.append(
                        (
                            v["path"],
                            base64.b64decode(v["content"]) if v.get("encoding") == "base64" else v["content"].encode(),
                        )
                    )
                elif d["key"] == "lfsFile":
                    blob, size = r.blob(v["oid"]), v.get("size")
                    if not blob.is_file() and A.xet and (DATA / "cas" / "sha" / v["oid"]).is_file():
                        xet, n = (DATA / "cas" / "sha" / v["oid"]).read_text().split()
                        xet_materialize(v["oid"], xet, int(n), blob)
                    if not blob.is_file():
                        raise Err(400, f"LFS pointer pointed to a file that does not exist: {v['path']} ({v['oid']})")
                    if size not in (None, blob.stat().st_size):
                        raise Err(400, f"wrong size for {v['path']}")
                    ops.append((v["path"], POINTER.format(v["oid"], blob.stat().st_size).encode()))
                elif d["key"] in ("deletedFile", "deletedFolder"):
                    p = v["path"].strip("/")
                    if p not in tree:
                        raise Err(404, f"A file with this name doesn't exist: {p}", "EntryNotFound")
                    ops.append((p, None))
                else:
                    raise Err(400, f"unknown operation {d['key']}")
            if not head or not head.get("summary"):
                raise Err(400, "commit summary is missing")
            if any(".." in p.split("/") or ".git" in p.split("/") for p, _ in ops):
                raise Err(400, "bad path")
            want = head.get("parentCommit")
            pr = self.q.get("create_pr") == ["1"]
            if want and not parent.startswith(want) and not pr:
                raise Err(412, "A commit has happened since. Please refresh and try again.")
            refs = r.refs()
            ref, num = f"refs/heads/{rev}" if not rev.startswith("refs/") else rev, None
            if pr:
                num = 1 + sum(x.startswith("refs/pr/") for x in refs)
                ref = f"refs/pr/{num}"
            elif ref not in refs:
                raise Err(400, f"{rev} is not a branch")
            readme = dict(ops).get("README.md")
            if readme:
                errors, _ = validate_card(readme.decode("utf-8", "replace"), r.kind)
                if errors:
                    raise Err(400, "Invalid metadata in README.md: " + "; ".join(errors))
            oid = r.commit(ref, parent, ops, head["summary"], head.get("description"), name)
        self.reply(
            200,
            {
                "success": True,
                "commitOid": oid,
                "commitUrl": f"{r.url()}/commit/{oid}",
                "hookOutput": "",
                "pullRequestUrl": f"{r.url()}/discussions/{num}" if num else None,
            },
        )

    def lfs(self, kind, rid, seg):
        r = self.repo(kind, rid, write=True)
        d = self.json()
        if seg == ["objects", "batch"]:
            objs = []
            for o in d["objects"]:
                oid, size = o["oid"], o["size"]
                obj = {"oid": oid, "size": size}
                if not re.fullmatch(r"[0-9a-f]{64}", oid):
                    obj["error"] = {"code": 422, "message": "bad oid"}
                elif not r.blob(oid).is_file():  # an object already stored gets no actions: the client skips it
                    base = f"/lfs/{kind}/{rid}/{oid}"
                    up = {"href": sign(base)}
                    obj["actions"] = {"upload": up, "verify": {"href": f"{r.url()}.git/info/lfs/objects/verify"}}
                    obj["authenticated"] = True
                objs.append(obj)
            return self.reply(200, {"transfer": "basic", "objects": objs}, "application/vnd.git-lfs+json")
        if seg == ["objects", "verify"]:
            p = r.blob(d["oid"])
            if not p.is_file() or p.stat().st_size != d["size"]:
                raise Err(404, "object is not there")
            return self.reply(200, {})
        raise Err(404, "no such LFS route")

    # ---- the storage origin
    def cdn(self, path):
        seg = path.strip("/").split("/")
        if seg[0] == "lfs" and len(seg) == 5:
            if self.headers.get("Authorization"):  # the Hub token must never reach the storage origin
                raise Err(400, "Only one auth mechanism allowed")
            if not signed_ok(path, self.q):
                raise Err(403, "SignatureDoesNotMatch")
            r, oid = Repo(seg[1], f"{seg[2]}/{seg[3]}"), seg[4]
            if self.command == "PUT":
                save(r.blob(oid), self.body_chunks(), oid)
                return self.reply(200, ETag=f'"{oid}"')
            if not r.blob(oid).is_file():
                raise Err(404, "NoSuchKey")
            return self.send_file(r.blob(oid), oid)
        cas = DATA / "cas"
        if A.xet and seg[0] in ("v1", "v2"):
            if self.command == "POST" and seg[1] == "xorbs":
                p = cas / "xorbs" / seg[3]
                was = not p.is_file()
                save(p, self.body_chunks())
                return self.reply(200, {"was_inserted": was})
            if self.command == "POST" and path == "/v1/shards":
                raw = self.body()
                for fh, sha, terms in parse_shard(raw):
                    for x, *_ in terms:
                        if not (cas / "xorbs" / x).is_file():
                            raise Err(400, f"xorb {x} is missing")
                    size = sum(t[1] for t in terms)
                    save(cas / "files" / fh, [json.dumps(terms).encode()])
                    if sha:
                        save(cas / "sha" / sha, [f"{fh} {size}".encode()])
                return self.reply(200, {"result": 1})
            if seg[1] == "reconstructions" and seg[0] == "v1":
                f = cas / "files" / seg[2]
                if not f.is_file():
                    raise Err(404, "file not found")
                terms, skip, total = json.loads(f.read_text()), 0, 0
                size = sum(t[1] for t in terms)
                m = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
                if m:
                    lo, hi = int(m[1]), min(int(m[2]), size - 1)
                    if lo >= size:
                        raise Err(416, "range")
                    keep = []
                    for t in terms:
                        if total + t[1] > lo and total <= hi:
                            skip = lo - total if not keep else skip
                            keep.append(t)
                        total += t[1]
                    terms = keep
                info = {}
                for x, _, a, b in terms:
                    o = xorb_offsets(cas / "xorbs" / x)
                    info.setdefault(x, []).append(
                        {
                            "range": {"start": a, "end": b},
                            "url": sign(f"/xorb/{x}"),
                            "url_range": {"start": o[a], "end": o[b] - 1},
                        }
                    )
                return self.reply(
                    200,
                    {
                        "offset_into_first_range": skip,
                        "fetch_info": info,
                        "terms": [
                            {"hash": x, "unpacked_length": n, "range": {"start": a, "end": b}} for x, n, a, b in terms
                        ],
                    },
                )
        if A.xet and seg[0] == "xorb" and signed_ok(path, self.q):
            return self.send_file(cas / "xorbs" / seg[1], seg[1])
        raise Err(404, f"no such route: {self.command} {path}")


def main():
    DATA.mkdir(parents=True, exist_ok=True)
    ThreadingHTTPServer.daemon_threads = True
    servers = []
    for port, role in ((A.port, "hub"), (A.cdn_port, "cdn")):
        s = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        s.role = role
        servers.append(s)
    threading.Thread(target=servers[1].serve_forever, daemon=True).start()
    print(f"hub {HUB}  storage {CDN}  data {DATA}  pid {os.getpid()}", flush=True)
    servers[0].serve_forever()


if __name__ == "__main__":
    main()
