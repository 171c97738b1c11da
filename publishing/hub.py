"""Sends repositories to the Hub so that each is there whole or not at all, and so that the same call finishes a call
that was cut off.

- A new repository stays **private** until all that belongs together is complete.
- The branch that people see (`main`, or the one asked for) gets **one commit** with everything.
- A card names the commit that holds weights and code, which can't be the card's own. So the same files first go into a
  commit without a card, on a branch that is removed at the end. A tag named after their content keeps that commit, and
  lets an unchanged publication find it again. The client sends each blob once.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2  # the Hub client's HTTP library, whose connection errors it lets through
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from clsgen.publishing.checksums import FILE_NAME, sha256
from clsgen.publishing.repositories import UNKNOWN_REVISION, Repository

logger = logging.getLogger(__name__)
FIRST_BRANCH, NEXT_BRANCH = "clsgen-first-publication", "clsgen-publication"
INITIAL_FILES = {".gitattributes", "README.md"}
MARKERS = {"model": "metrics.json", "dataset": "task.yaml", "space": "space.json"}


class PublicationError(RuntimeError):
    """Publishing failed; says why, and what to do."""


@dataclass(frozen=True)
class Published:
    """Where a repository is: `commit` on the branch that people see, `url` in words."""

    repository: Repository
    commit: str
    url: str


@dataclass
class Publisher:
    """Publishes repositories that belong together.

    Args:
        api (`HfApi`): With the token.
        private (`bool`): Whether new repositories stay private.
        branch (`str`): The branch that gets the commits; made where there is none.
        create_pr (`bool`): Whether to open a pull request on `main` instead.
    """

    api: HfApi
    private: bool = False
    branch: str = "main"
    create_pr: bool = False
    _open: list[tuple[Repository, str]] = field(default_factory=list)

    def check(self, repositories: list[Repository]) -> None:
        """Everything that can be known before a byte is sent.

        Raises:
            PublicationError: for a token that may not write there, a name that is invalid or taken by something else,
                or a card that the Hub won't take.
        """
        for repository in repositories:
            check_repository(repository)
        me = identity(self.api)
        namespaces = {me["name"], *(org["name"] for org in me.get("orgs", []))}
        for repository in repositories:
            namespace = repository.repo_id.partition("/")[0]
            if namespace not in namespaces and not self.create_pr:
                raise PublicationError(
                    f"{me['name']} has no write access to {repository.repo_id}: publish under one of "
                    f"{sorted(namespaces)}, or use a token of {namespace}."
                )
            with _explained(f"{repository.url} can't be published"):
                self._check_place(repository)
                repository.card(UNKNOWN_REVISION).validate(repo_type=repository.repo_type)

    def _check_place(self, repository: Repository) -> None:
        info = self._info(repository)
        if info is None:
            if self.create_pr:
                raise PublicationError(
                    f"{repository.url} does not exist, so there is nothing to open a pull request on."
                )
            return
        files = {sibling.rfilename for sibling in info.siblings}
        if files - INITIAL_FILES and MARKERS[repository.repo_type] not in files:
            raise PublicationError(
                f"The name {repository.url} is taken: that repository holds other things ({sorted(files)[:5]}). "
                "Choose another name."
            )
        if self.private and not info.private:
            raise PublicationError(f"{repository.url} is public already; make it private on its page first.")

    def _info(self, repository: Repository):
        try:
            return self.api.repo_info(**_where(repository))
        except RepositoryNotFoundError:
            return None

    def published_model(self, repo_id: str) -> str:
        """The commit of a model that is published already: what a Space pins that is published without it.

        Raises:
            PublicationError: where there is none on the branch, or not yet.
        """
        with _explained(f"The model {repo_id} can't be looked up"):
            try:
                info = self.api.model_info(repo_id, revision=self.branch)
            except (RepositoryNotFoundError, RevisionNotFoundError):
                info = None
            if info is None or MARKERS["model"] not in {sibling.rfilename for sibling in info.siblings}:
                raise PublicationError(
                    f"The Space is to load {repo_id}, which is not published on {self.branch!r}: publish the two "
                    "together (--parts model space)."
                )
            return info.sha

    def publish(self, repository: Repository) -> Published:
        """Publishes one repository; a new one stays private until [`finish`].

        Raises:
            PublicationError: what failed. Nothing of it is on the branch then, unless all of it is.
        """
        with _explained(f"{repository.url} could not be published"):
            return self._pull_request(repository) if self.create_pr else self._publish(repository)

    def _publish(self, repository: Repository) -> Published:
        where = _where(repository)
        staging = self._make_place(repository)
        head = self.api.repo_info(**where, revision=self.branch).sha
        files_commit = self._stage(repository, staging, head) if repository.pins_itself else head
        commit = self._commit(repository, self.branch, head, card=str(repository.card(files_commit))).oid
        self._open.append((repository, staging))
        return Published(repository, commit, f"{self.api.endpoint}/{repository.url}")

    def _make_place(self, repository: Repository) -> str:
        """Makes the repository and its branch where need be; returns the name of the branch to stage files on.

        The branch of a first publication stays until its end, and so tells the next call that this repository is
        private only because it is unfinished.
        """
        where = _where(repository)
        info = self._info(repository)
        if info is None:
            sdk = "gradio" if repository.repo_type == "space" else None
            try:
                self.api.create_repo(**where, private=True, exist_ok=True, space_sdk=sdk)
            except (HfHubHTTPError, httpx2.HTTPError, OSError):
                made = self._info(repository)
                if made is None or {sibling.rfilename for sibling in made.siblings} - INITIAL_FILES:
                    raise
                logger.info("%s was made, though the Hub's answer was lost.", repository.url)
            try:
                self.api.create_branch(**where, branch=FIRST_BRANCH)
            except BaseException:
                self.api.delete_repo(**where, missing_ok=True)  # empty, and without the branch nobody knew whose it is
                raise
        branches = {ref.name for ref in self.api.list_repo_refs(**where).branches}
        if self.branch not in branches:
            self.api.create_branch(**where, branch=self.branch)
        if FIRST_BRANCH in branches:
            return FIRST_BRANCH
        if info.private and not self.private:
            logger.warning("%s was private before, and stays so.", repository.url)
        return NEXT_BRANCH

    def _stage(self, repository: Repository, staging: str, head: str) -> str:
        """Commits the files without a card on a branch of their own; returns that commit, which a tag keeps."""
        where = _where(repository)
        refs = self.api.list_repo_refs(**where)
        tag = f"files-{sha256(repository.files[FILE_NAME])[:12]}"
        for ref in refs.tags:
            if ref.name == tag:
                return ref.target_commit
        if staging in {ref.name for ref in refs.branches}:
            self.api.delete_branch(**where, branch=staging)
        self.api.create_branch(**where, branch=staging, revision=head)
        commit = self._commit(repository, staging, head).oid
        self.api.create_tag(**where, tag=tag, revision=commit)
        return commit

    def _commit(
        self, repository: Repository, branch: str, parent: str, card: str | None = None, create_pr: bool = False
    ) -> CommitInfo:
        """One commit of all files; those that an earlier publication had and this one has not are deleted in it."""
        where = _where(repository)
        contents = {**repository.files, **({} if card is None else {"README.md": card.encode()})}
        operations = [CommitOperationAdd(path, content) for path, content in sorted(contents.items())]
        stale = self._published_before(repository, parent) - set(contents)
        operations += [CommitOperationDelete(path) for path in sorted(stale)]
        return self.api.create_commit(
            **where,
            operations=operations,
            revision=branch,
            parent_commit=None if create_pr else parent,
            commit_message="Files of a publication by CLSGen" if card is None else "Publish with CLSGen",
            create_pr=create_pr,
        )

    def _published_before(self, repository: Repository, commit: str) -> set[str]:
        where = {**_where(repository), "revision": commit}
        there = set(self.api.list_repo_files(**where))
        if FILE_NAME not in there:
            return set()
        lines = Path(self.api.hf_hub_download(**where, filename=FILE_NAME)).read_text(encoding="utf-8").splitlines()
        return there & {line.partition("  ")[2] for line in lines}

    def _pull_request(self, repository: Repository) -> Published:
        """Files first, then the card that names their commit: two commits of one pull request, `main` untouched."""
        where = _where(repository)
        head = self.api.repo_info(**where).sha
        files = self._commit(repository, "main", head, create_pr=True)
        card = CommitOperationAdd("README.md", str(repository.card(files.oid)).encode())
        last = self.api.create_commit(
            **where, operations=[card], revision=files.pr_revision, commit_message="Publish with CLSGen: the card"
        )
        return Published(repository, last.oid, files.pr_url)

    def finish(self) -> None:
        """Makes new repositories public, unless they are to stay private, and removes the branches of this class."""
        for repository, staging in self._open:
            where = _where(repository)
            with _explained(f"{repository.url} is complete, but could not be made public"):
                if staging == FIRST_BRANCH and not self.private:
                    self.api.update_repo_settings(**where, private=False)
                if staging in {ref.name for ref in self.api.list_repo_refs(**where).branches}:
                    self.api.delete_branch(**where, branch=staging)

    def collect(self, title: str, repositories: list[Repository]) -> str:
        """Puts them into one collection of their owner; returns its address."""
        namespace = repositories[0].repo_id.partition("/")[0]
        with _explained(f"All is published, but not the collection {title!r}"):
            slug = self.api.create_collection(title, namespace=namespace, private=self.private, exists_ok=True).slug
            for repository in repositories:
                self.api.add_collection_item(slug, repository.repo_id, repository.repo_type, exists_ok=True)
        return f"{self.api.endpoint}/collections/{slug}"


def identity(api: HfApi) -> dict[str, Any]:
    """Whose token it is, as `whoami` tells; raises [`PublicationError`] where it is nobody's."""
    with _explained("The Hub doesn't say who you are"):
        return api.whoami()


def check_repository(repository: Repository) -> None:
    """What can be known of a repository without the Hub; raises [`PublicationError`]."""
    try:
        validate_repo_id(repository.repo_id)
    except HFValidationError as error:
        raise PublicationError(f"{repository.repo_id!r} is no name for a repository: {error}") from error
    if repository.repo_id.count("/") != 1:
        raise PublicationError(f"{repository.repo_id!r} is no name for a repository: give NAMESPACE/NAME.")


def _where(repository: Repository) -> dict[str, str]:
    return {"repo_id": repository.repo_id, "repo_type": repository.repo_type}


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turns what the Hub client raises into one message with a way on."""
    again = "Run the same command again: what has arrived is not sent again."
    try:
        yield
    except PublicationError:
        raise
    except (HfHubHTTPError, httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:
        status = _status(error)
        reason = " ".join(str(error).split()).rstrip(".")
        if isinstance(error, ValueError) and not isinstance(error, HfHubHTTPError):
            again = "Mend that, then run the same command again."
        elif status == 401 or isinstance(error, LocalTokenNotFoundError):
            again = "Log in with a valid token (`hf auth login`, or HF_TOKEN)."
        elif status == 403:
            again = "Use a token with write access to that namespace (https://huggingface.co/settings/tokens)."
        elif status == 412:
            again = "Somebody else has committed there meanwhile: look at it, then run the same command again."
        elif status == 413:
            again = "That file is larger than the Hub takes: save the checkpoint with a lower `max_shard_size`."
        raise PublicationError(f"{what}: {reason or type(error).__name__}. {again}") from error


def _status(error: BaseException | None) -> int | None:
    """The HTTP status behind an error, which the client wraps in others while it uploads."""
    while error is not None:
        response = getattr(error, "response", None)
        if response is not None:
            return response.status_code
        error = error.__cause__ or error.__context__
    return None
