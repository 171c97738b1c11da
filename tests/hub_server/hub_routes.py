"""The Hub's own routes: who a token is, repositories, their files, commits and branches, collections."""

import base64
import hashlib
import json
import re
import shutil
import time
from fnmatch import fnmatch
from urllib.parse import parse_qs, unquote

import xet
from card_rules import validate_card
from common import CDN, DATA, HUB, OPTIONS, USERS, Err, save, sign
from http_handler import FAULTS, HttpHandler
from repositories import ISO, POINTER, Repo, create, git

LFS_MIN = 10 * 1024 * 1024  # the Hub forces LFS from 10 MiB, and for binary files
REFS = {"refs/heads/": "branches", "refs/tags/": "tags", "refs/pr/": "pullRequests", "refs/": "converts"}
WRITING = ("commit", "branch", "tag", "settings", "preupload")


class HubHandler(HttpHandler):
    """Answers on --port."""

    listener = "hub"

    def user(self, need=None):
        """Name and role of the token's owner."""
        header = self.headers.get("Authorization")
        if header is None:
            if need:
                raise Err(401, "Invalid username or password.")
            return None, None
        name, role = USERS.get(header.removeprefix("Bearer ").strip(), (None, None))
        if name is None:  # a bad token is refused even for public repos, as on the Hub
            raise Err(401, "Invalid credentials in Authorization header")
        return name, role

    def writer(self, namespace):
        """The token's owner, who may write there."""
        name, role = self.user(need=True)
        if role != "write" or namespace != name:
            raise Err(403, f"Forbidden: you don't have write access to {namespace}")
        return name

    def repo(self, kind, rid, write=False):
        """A repository that the token's owner may see."""
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

    def route(self, path):
        seg = [unquote(s) for s in path.strip("/").split("/")]  # %2F in a revision stays inside its segment
        if path == "/_test/faults":
            FAULTS[:] = self.json()
            return self.reply(200, {"ok": True})
        if path == "/api/whoami-v2":
            return self.whoami()
        if path == "/api/validate-yaml":
            d = self.json()
            errors, warns = validate_card(d["content"], d["repoType"])
            found = {"errors": [{"message": m} for m in errors], "warnings": [{"message": m} for m in warns]}
            return self.reply(400 if errors else 200, found)
        if seg[:2] == ["api", "repos"] and len(seg) == 3:
            return self.repos(seg[2])
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

    def whoami(self):
        name, role = self.user(need=True)
        token = {"displayName": "test", "role": role, "createdAt": "2026-01-01T00:00:00.000Z"}
        me = {"type": "user", "id": hashlib.md5(name.encode()).hexdigest()[:24], "name": name, "fullname": name}
        mail = {"email": f"{name}@localhost", "emailVerified": True}
        auth = {"type": "access_token", "accessToken": token}
        self.reply(200, {**me, **mail, "isPro": False, "canPay": False, "orgs": [], "auth": auth})

    def repos(self, action):
        d = self.json()
        kind, name = d.get("type") or "model", self.user(need=True)[0]
        rid = f"{d.get('organization') or name}/{d['name']}"
        if action == "create":
            self.writer(rid.split("/")[0])
            private = d.get("visibility", "private" if d.get("private") else "public") == "private"
            r = create(kind, rid, private, d.get("sdk"), name)
            return self.reply(200, {"url": r.url(), "name": r.id, "id": r.id})
        if action == "delete":
            shutil.rmtree(self.repo(kind, rid, write=True).dir)
            return self.reply(200, {"ok": True})
        raise Err(404, f"no such route: /api/repos/{action}")

    def collections(self, seg):
        if not seg:
            return self.new_collection(self.json())
        path = DATA / "collections" / f"{seg[1]}.json"
        if not path.is_file():
            raise Err(404, "Collection not found")
        found = json.loads(path.read_text())
        if self.command == "POST":
            self.writer(seg[0])
            item = self.json()["item"]
            if item["id"] in [each["id"] for each in found["items"] if each["type"] == item["type"]]:
                raise Err(409, "Item already in the collection")
            found["items"].append({**item, "_id": f"{len(found['items']):024}", "position": len(found["items"])})
            save(path, [json.dumps(found).encode()])
        self.reply(200, found)

    def new_collection(self, d):
        name = self.writer(d["namespace"])
        short = re.sub(r"[^a-z0-9]+", "-", d["title"].lower()).strip("-")
        key = f"{short}-{hashlib.md5(d['title'].encode()).hexdigest()[:24]}"
        path = DATA / "collections" / f"{key}.json"
        if path.is_file():
            raise Err(409, "This collection exists already", body={"slug": f"{name}/{key}"})
        made = {
            "slug": f"{name}/{key}",
            "title": d["title"],
            "owner": {"name": name},
            "items": [],
            "position": 0,
            "lastUpdated": "2026-01-01T00:00:00.000Z",
            "private": d["private"],
            "theme": "blue",
            "upvotes": 0,
        }
        save(path, [json.dumps(made).encode()])
        self.reply(200, made)

    def resolve(self, kind, rid, rev, path, raw):
        """A file's bytes, or where they are; `raw`: what git holds, for a large file its pointer."""
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
        if OPTIONS.xet and "xetHash" in e:
            route = f"{HUB}/api/{kind}s/{rid}/xet-read-token/{commit}"
            h.update(X_Xet_Hash=e["xetHash"], X_Xet_Refresh_Route=route, Link=f'<{route}>; rel="xet-auth"')
        self.reply(302, b"Found", "text/plain", Location=sign(f"/lfs/{kind}/{rid}/{sha}"), ETag=f'"{sha}"', **h)

    def api(self, kind, seg):
        """`/api/models/...`, and so on; what follows a repository's id has a method of its own."""
        if len(seg) < 2:
            return self.list_repos(kind)
        rid, act, rest = "/".join(seg[:2]), seg[2] if len(seg) > 2 else None, seg[3:]
        write = act == "xet-write-token" or (self.command in ("POST", "PUT", "DELETE") and act in WRITING)
        r = self.repo(kind, rid, write=write)
        if act in (None, "revision"):
            info = r.info(r.rev(rest[0] if rest else None))
            keep = self.q.get("expand") or self.q.get("expand[]")
            return self.reply(200, {k: v for k, v in info.items() if not keep or k in ("_id", "id", *keep)})
        answer = {
            "tree": self.tree, "refs": self.refs, "commits": self.commits, "branch": self.branch, "tag": self.tag,
            "settings": self.settings, "preupload": self.preupload, "commit": self.commit,
            "paths-info": self.paths_info,
        }  # fmt: skip
        if act in answer:
            return answer[act](r, *rest)
        if act in ("xet-read-token", "xet-write-token") and OPTIONS.xet:
            return self.xet_token(act[4:-6])
        raise Err(404, f"no such route: {self.command} {self.path}")

    def list_repos(self, kind):
        out = []
        for d in sorted((DATA / f"{kind}s").glob("*/*/meta.json")):
            r = Repo(kind, "/".join(d.parts[-3:-1]))
            if not r.meta["private"] or self.user()[0] == r.id.split("/")[0]:
                out.append(r.info(r.rev("main")))
        who = self.q.get("author", [None])[0]
        self.reply(200, [each for each in out if not who or each["author"] == who])

    def tree(self, r, rev, *below):
        below, commit = "/".join(below), r.rev(rev)
        tree = r.tree(commit)
        if below and tree.get(below, {}).get("type") != "directory":
            raise Err(404, f'{below} does not exist on "{rev}"', "EntryNotFound")
        deep = self.q.get("recursive", ["false"])[0].lower() in ("true", "1")
        start = len(below) + 1 if below else 0
        found = [
            e
            for path, e in sorted(tree.items())
            if (not below or path.startswith(f"{below}/")) and (deep or "/" not in path[start:])
        ]
        self.reply(200, found, X_Repo_Commit=commit)

    def paths_info(self, r, rev):
        asked = self.json() if "json" in self.headers.get("Content-Type", "") else parse_qs(self.body().decode())
        tree = r.tree(r.rev(rev))
        self.reply(200, [tree[path] for path in asked.get("paths", []) if path in tree])

    def refs(self, r):
        out = {name: [] for name in REFS.values()}
        for ref, commit in r.refs().items():
            prefix = next(prefix for prefix in REFS if ref.startswith(prefix))
            out[REFS[prefix]].append({"name": ref[len(prefix) :], "ref": ref, "targetCommit": commit})
        self.reply(200, out)

    def commits(self, r, rev):
        log = git(r, "log", ISO, "--format=%H%x00%an%x00%cd%x00%s%x00%b%x01", r.rev(rev)).decode()
        rows = [x.strip("\n").split("\0") for x in log.split("\x01")[:-1]]
        self.reply(
            200,
            [
                {"id": h, "authors": [{"user": a}], "date": d, "title": s, "message": b.strip()}
                for h, a, d, s, b in rows
            ],
        )

    def branch(self, r, name):
        ref = f"refs/heads/{name}"
        if self.command == "POST":
            if ref in r.refs():
                raise Err(409, f"Reference already exists: {ref}")
            git(r, "update-ref", ref, r.rev(self.json().get("startingPoint")))
        elif name == "main":
            raise Err(403, "Cannot delete the default branch")
        else:
            git(r, "update-ref", "-d", ref)
        self.reply(200, b"OK", "text/plain")

    def tag(self, r, rev):
        ref = f"refs/tags/{self.json()['tag']}"
        if ref in r.refs():
            raise Err(409, f"Tag reference exists already: {ref}")
        git(r, "update-ref", ref, r.rev(rev))
        self.reply(200, b"OK", "text/plain")

    def settings(self, r):
        d = self.json()
        r.set_meta(private=d["visibility"] == "private")
        self.reply(200, d)

    def xet_token(self, role):
        expires, token = int(time.time()) + 3600, f"xet-{role}"
        self.reply(
            200,
            {"casUrl": CDN, "accessToken": token, "exp": expires},
            X_Xet_Cas_Url=CDN,
            X_Xet_Access_Token=token,
            X_Xet_Token_Expiration=expires,
        )

    def preupload(self, r, rev):
        """Tells of each file whether it goes into the commit, or to the storage origin."""
        tree = r.tree(r.rev(rev))
        attrs = r.read(tree[".gitattributes"]).decode() if ".gitattributes" in tree else ""
        patterns = [line.split()[0] for line in attrs.splitlines() if "filter=lfs" in line]
        out = []
        for f in self.json()["files"]:
            name, e = f["path"].split("/")[-1], tree.get(f["path"])
            lfs = any(fnmatch(name, p) or fnmatch(f["path"], p) for p in patterns) or f["size"] >= LFS_MIN
            lfs = lfs or _is_binary(base64.b64decode(f["sample"]))
            oid = e and (e["lfs"]["oid"] if "lfs" in e else e["oid"])
            mode = {"uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            out.append({"path": f["path"], **mode, **({"oid": oid} if oid else {})})
        self.reply(200, {"files": out, "commitOid": r.rev(rev)})

    def commit(self, r, rev):
        """One commit of all operations, or none."""
        name, _ = self.user(need=True)
        with r.lock():
            parent = r.rev(rev)
            head, ops = self.operations(r, r.tree(parent))
            pr = self.q.get("create_pr") == ["1"]
            if head.get("parentCommit") and not parent.startswith(head["parentCommit"]) and not pr:
                raise Err(412, "A commit has happened since. Please refresh and try again.")
            refs = r.refs()
            ref, num = f"refs/heads/{rev}" if not rev.startswith("refs/") else rev, None
            if pr:
                num = 1 + sum(x.startswith("refs/pr/") for x in refs)
                ref = f"refs/pr/{num}"
            elif ref not in refs:
                raise Err(400, f"{rev} is not a branch")
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

    def operations(self, r, tree):
        """A commit's header, and what it does to which path: bytes to write, or `None` to delete."""
        head, ops = None, []
        for line in self.body().splitlines():
            d = json.loads(line)
            v = d["value"]
            if d["key"] == "header":
                head = v
            elif d["key"] == "file":
                ops.append((v["path"], base64.b64decode(v["content"])))
            elif d["key"] == "lfsFile":
                ops.append((v["path"], self.pointer(r, v)))
            elif d["key"] == "deletedFile":
                if v["path"] not in tree:
                    raise Err(404, f"A file with this name doesn't exist: {v['path']}", "EntryNotFound")
                ops.append((v["path"], None))
            else:
                raise Err(400, f"unknown operation {d['key']}")
        if not head or not head.get("summary"):
            raise Err(400, "commit summary is missing")
        if any({"..", ".git"} & set(path.split("/")) for path, _ in ops):
            raise Err(400, "bad path")
        if readme := dict(ops).get("README.md"):
            errors, _ = validate_card(readme.decode("utf-8", "replace"), r.kind)
            if errors:
                raise Err(400, "Invalid metadata in README.md: " + "; ".join(errors))
        return head, ops

    def pointer(self, r, v):
        """What git holds of a file that was uploaded before."""
        blob = r.blob(v["oid"])
        xet.materialize(v["oid"], blob)
        if not blob.is_file():
            raise Err(400, f"LFS pointer pointed to a file that does not exist: {v['path']} ({v['oid']})")
        if v.get("size") not in (None, blob.stat().st_size):
            raise Err(400, f"wrong size for {v['path']}")
        return POINTER.format(v["oid"], blob.stat().st_size).encode()

    def lfs(self, kind, rid, seg):
        r = self.repo(kind, rid, write=True)
        d = self.json()
        if seg == ["objects", "batch"]:
            objects = [self.upload_address(r, each["oid"], each["size"]) for each in d["objects"]]
            return self.reply(200, {"transfer": "basic", "objects": objects}, "application/vnd.git-lfs+json")
        if seg == ["objects", "verify"]:
            blob = r.blob(d["oid"])
            if not blob.is_file() or blob.stat().st_size != d["size"]:
                raise Err(404, "object is not there")
            return self.reply(200, {})
        raise Err(404, "no such LFS route")

    def upload_address(self, r, oid, size):
        """Where an object goes; one that is there gets no address, so that the client passes it over."""
        found = {"oid": oid, "size": size}
        if not re.fullmatch(r"[0-9a-f]{64}", oid):
            return {**found, "error": {"code": 422, "message": "bad oid"}}
        if r.blob(oid).is_file():
            return found
        actions = {
            "upload": {"href": sign(f"/lfs/{r.kind}/{r.id}/{oid}")},
            "verify": {"href": f"{r.url()}.git/info/lfs/objects/verify"},
        }
        return {**found, "actions": actions, "authenticated": True}


def _is_binary(sample):
    """Whether a file that starts so is no text; a character may be cut at the sample's end."""
    try:
        sample.decode() if len(sample) < 512 else sample[:509].decode()
    except UnicodeDecodeError as error:
        return b"\0" in sample or error.start < 500
    return b"\0" in sample
