"""Repositories: git for the commits, and files named by their hash for what LFS and Xet keep."""

import hashlib
import json
import os
import re
import subprocess
import threading
import time

import yaml  # a dependency of huggingface_hub
from common import DATA, HUB, Err, save

KINDS = {"model": "", "dataset": "datasets/", "space": "spaces/"}
LFS_ENDINGS = "safetensors bin pt npz h5 gguf parquet arrow gz zip model png jpg"
GITATTR = "".join(f"*.{ending} filter=lfs diff=lfs merge=lfs -text\n" for ending in LFS_ENDINGS.split(" "))
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"
POINTER_RE = re.compile(rb"version https://git-lfs\.github\.com/spec/v1\noid sha256:([0-9a-f]{64})\nsize (\d+)\n$")
GIT_ENV = {**os.environ, "GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": "/dev/null", "TZ": "UTC"}
ISO = "--date=format-local:%Y-%m-%dT%H:%M:%S.000Z"  # the client parses exactly this form
LOCKS, LOCKS_GUARD, TREES = {}, threading.Lock(), {}


def git(repo, *args, data=None, check=True):
    """What git prints, or `None` where it fails and that is no error."""
    r = subprocess.run(["git", "-C", str(repo.git), *args], input=data, capture_output=True, env=GIT_ENV)
    if check and r.returncode:
        raise Err(500, f"git {args[0]}: {r.stderr.decode()[-300:]}")
    return r.stdout if r.returncode == 0 else None


class Repo:
    """A repository on the disk."""

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

    def info(self, commit):
        """What the API tells of a repository."""
        tree, meta, card = self.tree(commit), self.meta, self.card(commit)
        files = [e for e in tree.values() if e["type"] == "file"]
        when = git(self, "log", "-1", ISO, "--format=%cd", commit).decode().strip()
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
            "siblings": [{"rfilename": e["path"]} for e in files],
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
    """A new repository with its first commit."""
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
