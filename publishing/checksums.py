"""`SHA256SUMS`: what a repository's weights and code were when they were published; `sha256sum --check` reads it."""

import hashlib
from pathlib import Path

FILE_NAME = "SHA256SUMS"


def sha256(content: Path | bytes) -> str:
    """The SHA-256 of a file or of bytes, in hexadecimal digits."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    digest = hashlib.sha256()
    with content.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def checksum_lines(files: dict[str, Path | bytes]) -> str:
    """The text of `SHA256SUMS` for files by their path in the repository."""
    return "".join(f"{sha256(content)}  {path}\n" for path, content in sorted(files.items()))


def verify_checksums(folder: str | Path) -> None:
    """Compares a downloaded repository with its `SHA256SUMS`.

    Raises:
        FileNotFoundError: where there is no `SHA256SUMS`.
        ValueError: naming every file that is missing or differs.
    """
    folder = Path(folder)
    wrong = []
    for line in (folder / FILE_NAME).read_text(encoding="utf-8").splitlines():
        digest, _, path = line.partition("  ")
        if not (folder / path).is_file():
            wrong.append(f"{path} is missing")
        elif sha256(folder / path) != digest:
            wrong.append(f"{path} differs")
    if wrong:
        raise ValueError(f"{folder} is not what {FILE_NAME} lists: {'; '.join(wrong)}. Download it again.")
