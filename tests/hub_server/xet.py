"""Xet: the content-addressed store that the client's `hf_xet` talks to.

Formats follow huggingface/xet-core (Apache-2.0): files are terms, a term a range of chunks of a xorb.
"""

import json
import re
import struct
import threading
import time

import hf_xet
from common import CDN, DATA, Err, save, sign

STORE = DATA / "cas"


def hex_of(hashed):
    """The Xet hex form of 32 bytes: four little-endian u64."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", hashed))


def parse_shard(shard):
    """Files of an uploaded shard: (file hash, sha256 or None, [(xorb, unpacked bytes, first chunk, end chunk)])."""
    files, at = [], 48  # 48-byte shard header, then 48-byte records
    while shard[at : at + 32] != b"\xff" * 32:
        file_hash, flags, count = hex_of(shard[at : at + 32]), *struct.unpack_from("<II", shard, at + 32)
        at += 48
        terms, sha = [], None
        for _ in range(count):
            _, size, first, end = struct.unpack_from("<IIII", shard, at + 32)
            terms.append((hex_of(shard[at : at + 32]), size, first, end))
            at += 48
        at += 48 * count if flags >> 31 & 1 else 0  # verification entries
        if flags >> 30 & 1:
            sha = hex_of(shard[at : at + 32])
            at += 48
        files.append((file_hash, sha, terms))
    return files


def xorb_offsets(path):
    """Byte offset of every chunk of a serialized xorb, plus the end of the last one."""
    xorb, at, offsets = path.read_bytes(), 0, [0]
    while at + 8 <= len(xorb) and xorb[at] == 0:  # chunk header: version 0, u24 packed, scheme, u24 unpacked
        at += 8 + int.from_bytes(xorb[at + 1 : at + 4], "little")
        offsets.append(at)
    return offsets


def save_shard(shard):
    """Registers the files of a shard whose xorbs are all there."""
    for file_hash, sha, terms in parse_shard(shard):
        for xorb, *_ in terms:
            if not (STORE / "xorbs" / xorb).is_file():
                raise Err(400, f"xorb {xorb} is missing")
        save(STORE / "files" / file_hash, [json.dumps(terms).encode()])
        if sha:
            save(STORE / "sha" / sha, [f"{file_hash} {sum(term[1] for term in terms)}".encode()])


def reconstruction(file_hash, wanted):
    """Where the bytes of a file are: the answer to `GET /v1/reconstructions/...` with this Range header."""
    path = STORE / "files" / file_hash
    if not path.is_file():
        raise Err(404, "file not found")
    terms, skip = json.loads(path.read_text()), 0
    if match := re.fullmatch(r"bytes=(\d+)-(\d+)", wanted or ""):
        terms, skip = _terms_within(terms, int(match[1]), int(match[2]))
    fetch_info = {}
    for xorb, _, first, end in terms:
        offsets = xorb_offsets(STORE / "xorbs" / xorb)
        fetch_info.setdefault(xorb, []).append(
            {
                "range": {"start": first, "end": end},
                "url": sign(f"/xorb/{xorb}"),
                "url_range": {"start": offsets[first], "end": offsets[end] - 1},
            }
        )
    return {
        "offset_into_first_range": skip,
        "fetch_info": fetch_info,
        "terms": [
            {"hash": xorb, "unpacked_length": size, "range": {"start": first, "end": end}}
            for xorb, size, first, end in terms
        ],
    }


def _terms_within(terms, low, high):
    """The terms that hold the bytes `low` to `high`, and how many bytes of the first come before `low`."""
    if low >= sum(term[1] for term in terms):
        raise Err(416, "range")
    kept, skip, at = [], 0, 0
    for term in terms:
        if at + term[1] > low and at <= high:
            skip = skip if kept else low - at
            kept.append(term)
        at += term[1]
    return kept, skip


def materialize(sha, blob):
    """Rebuilds an uploaded file with the real client, checks its sha256, and keeps it where LFS would have put it."""
    if blob.is_file() or not (STORE / "sha" / sha).is_file():
        return
    xet, size = (STORE / "sha" / sha).read_text().split()
    blob.parent.mkdir(parents=True, exist_ok=True)
    rebuilt = blob.parent / f".xet-{sha}-{threading.get_ident()}"
    with hf_xet.XetSession().new_file_download_group(
        endpoint=CDN, token="t", token_expiry_unix_secs=int(time.time()) + 3600
    ) as group:
        group.start_download_file(hf_xet.XetFileInfo(xet, int(size)), str(rebuilt))
    with rebuilt.open("rb") as file:
        save(blob, iter(lambda: file.read(1 << 20), b""), sha)
    rebuilt.unlink()
    blob.with_suffix(".xet").write_text(xet)
