"""Model folders to and from the Hugging Face Hub: whole, of one commit, and verified.

A thin layer over ``huggingface_hub``, imported when first needed. What the client leaves open is
closed here: content is compared with the hash it was published under (the client checks sizes
alone), all files are of one commit, and errors say what to do.
"""

import contextlib
import dataclasses
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from equizoo.hub import CARD, REFUSED, REQUIRED, WEIGHTS, sha256_of

_LIBRARY = "equizoo"  # how it names itself to the Hub
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclasses.dataclass(frozen=True)
class HubAccess:
    """How the Hub is reached; the names are those of ``huggingface_hub``.

    Raises ``ValueError`` when both fetching anew and staying offline are asked for.
    """

    token: str | bool | None = None  # None: HF_TOKEN, or that of `hf auth login`; False: none
    cache_dir: str | Path | None = None  # None: HF_HUB_CACHE
    force_download: bool = False  # even what is cached
    local_files_only: bool = False  # only what is cached

    def __post_init__(self):
        if self.force_download and self.local_files_only:
            raise ValueError(
                "force_download and local_files_only contradict each other; expected one at most."
            )


class Upload(NamedTuple):
    """What an upload has come to."""

    repo: str
    commit: str  # full hash; of the branch as it was when nothing had changed
    url: str
    changed: bool
    pull_request: str | None = None  # its address


def download_folder(
    repo: str,
    revision: str | None = None,
    access: HubAccess = HubAccess(),
    expected_sha256: str | None = None,
) -> Path:
    """A model folder in the Hugging Face cache, all of one commit; its name is the commit hash.

    ``revision`` is a branch, tag or commit (default: the main branch). A cached commit needs no
    network. Every file is compared with the hash under which the Hub stores it, the weights with
    ``expected_sha256`` as well; what differs, whether cached or just fetched, is fetched once more.

    Raises ``ValueError`` when the Hub has no such repository, revision or file, or not for this
    user, and when the content stays wrong; ``ConnectionError`` when the Hub cannot be reached and
    the model is not cached.
    """
    import huggingface_hub as hf

    what = f"hf-hub:{repo}" + (f"@{revision}" if revision else "")
    place: dict[str, Any] = dict(cache_dir=access.cache_dir, token=access.token)
    place |= dict(local_files_only=access.local_files_only)

    def fetch(name: str, again: bool = False) -> Path:
        force = again or access.force_download
        options: dict[str, Any] = place | dict(library_name=_LIBRARY, force_download=force)
        with _explained(what, name, offline=True):
            return Path(hf.hf_hub_download(repo, name, revision=commit, **options))

    def verified(name: str) -> Path:
        expected = expected_sha256 if name == WEIGHTS else None
        file = fetch(name)
        if (damage := _damage(file, expected)) is None:
            return file
        try:
            file = fetch(name, again=True)
        except (ConnectionError, ValueError) as error:
            raise ValueError(
                f"{what}: {name} {damage}, and could not be fetched again ({error})."
            ) from error
        if (damage := _damage(file, expected)) is None:
            return file
        _forget(file)
        raise ValueError(
            f"{what}: {name} {damage}, also when fetched again. Nothing of it was kept; the "
            "repository may have been tampered with, or its card or the registry be out of date."
        )

    with _explained(what, offline=True):
        # One resolution for all files: a push in between must not mix two commits.
        commit = hf.HfApi().resolve_revision(repo, revision=revision, **place)
    files = [verified(name) for name in REQUIRED]
    # the one optional file; not in an offline cache either
    with contextlib.suppress(ConnectionError, MissingFile):
        verified(CARD)
    return files[0].parent


def upload_files(
    repo: str,
    files: Mapping[str, Path | bytes],  # by path in the repository
    *,
    message: str,
    private: bool | None = None,
    token: str | bool | None = None,
    branch: str | None = None,
    create_pr: bool = False,
    parent_commit: str | None = None,
    tag: str | None = None,
) -> Upload:
    """Where the files are on the Hub afterwards: one commit of ``repo``, made if it is not there.

    Files that the branch already holds are not sent; when all are there, no commit is made.
    With ``parent_commit`` nothing is written unless the branch is still there. ``tag`` names the
    commit. Raises ``ValueError`` for files that may run code, a missing or insufficient token, a
    branch that has moved on and a tag that names another commit; ``ConnectionError`` when the Hub
    cannot be reached.
    """
    import huggingface_hub as hf

    if refused := sorted(name for name in files if Path(name).suffix in REFUSED):
        raise ValueError(
            f"{', '.join(refused)} may run code when opened (pickle and kin); expected the files "
            f"of a model folder, {', '.join(REQUIRED)}. Nothing was uploaded."
        )
    if parent_commit is not None and not _COMMIT.fullmatch(parent_commit):
        raise ValueError(f"parent_commit is {parent_commit!r}, expected a full hash (40 digits).")
    what = f"hf-hub:{repo}" + (f"@{branch}" if branch else "")
    api = hf.HfApi(token=token, library_name=_LIBRARY)
    with _explained(what):
        api.create_repo(repo, private=private, exist_ok=True)
        if branch is not None:
            api.create_branch(repo, branch=branch, exist_ok=True)
        before = api.repo_info(repo, revision=branch).sha
        operations = [
            hf.CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in sorted(files.items())
        ]
        # Not upload_folder, which may split a folder into several commits.
        done = api.create_commit(
            repo,
            operations,
            commit_message=message,
            revision=branch,
            create_pr=create_pr,
            parent_commit=parent_commit,
        )
    if tag is not None:
        _tag(api, repo, tag, done.oid)
    return Upload(repo, done.oid, done.commit_url, done.oid != before, done.pr_url)


class MissingFile(ValueError):
    """A repository that lacks a file of a model folder."""


def _tag(api: Any, repo: str, tag: str, commit: str) -> None:
    from huggingface_hub import errors

    with _explained(f"hf-hub:{repo}@{tag}"):
        try:
            api.create_tag(repo, tag=tag, revision=commit)
        except errors.HfHubHTTPError as error:
            if error.response.status_code != 409:
                raise
            there = api.repo_info(repo, revision=tag).sha
            if there != commit:
                raise ValueError(
                    f"hf-hub:{repo}: the files are there as commit {commit}, but the tag {tag!r} "
                    f"already names {there}. Tags stay where they are: choose another."
                ) from error


def _damage(file: Path, expected_sha256: str | None) -> str | None:
    """What is wrong with a file of the cache, if anything."""
    if expected_sha256 is not None and (found := sha256_of(file)) != expected_sha256:
        return f"has SHA-256 {found}, expected {expected_sha256}"
    # The cache names content by the hash it was published under: SHA-256 of large files, and git's
    # hash of small ones. Where the system has no links the name is lost.
    name = file.resolve().name
    if re.fullmatch(r"[0-9a-f]{64}", name) and (found := sha256_of(file)) != name:
        return f"has SHA-256 {found}, but was published with {name}"
    if _COMMIT.fullmatch(name):
        content = file.read_bytes()
        header = f"blob {len(content)}\0".encode()
        found = hashlib.sha1(header + content, usedforsecurity=False).hexdigest()
        if found != name:
            return f"has git hash {found}, but was published with {name}"
    return None


def _forget(file: Path) -> None:
    for path in {file.resolve(), file}:
        with contextlib.suppress(OSError):
            os.unlink(path)


@contextlib.contextmanager
def _explained(what: str, name: str = "", offline: bool = False) -> Iterator[None]:
    """Errors of the client as ours; ``offline``: what is cached could have done."""
    from huggingface_hub import errors

    repo = what.removeprefix("hf-hub:").partition("@")[0]
    login = "run `hf auth login` or set HF_TOKEN"
    try:
        yield
    except errors.RevisionNotFoundError as error:
        raise ValueError(
            f"{what}: the repository has no such revision {what.partition('@')[2] or 'main'!r}; "
            "expected a branch, a tag or a full commit hash."
        ) from error
    except errors.GatedRepoError as error:
        raise ValueError(
            f"{what} is gated: its owners ask you to accept their terms first. Do so on the page "
            f"{_endpoint()}/{repo}, then {login} and try again."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"{what}: no such repository, or a private one that you may not see. Check the name; "
            f"for a private repository {login}, with a token that may read it."
        ) from error
    except errors.RemoteEntryNotFoundError as error:
        raise MissingFile(
            f"{what} lacks {name}; expected a model folder with {', '.join(REQUIRED)}."
        ) from error
    except errors.HFValidationError as error:
        raise ValueError(
            f"{what}: expected hf-hub:organisation/name[@revision]. {error}"
        ) from error
    except errors.LocalTokenNotFoundError as error:
        raise ValueError(f"{what}: a token is needed; {login}.") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status == 412:
            raise ValueError(
                f"{what}: someone has pushed since parent_commit. Nothing was written; look at "
                "what is there now, and push on top of it."
            ) from error
        if status in (401, 403):
            raise ValueError(
                f"{what}: the Hub refuses ({_line(error)}). You need a token that may write there; "
                f"{login}."
            ) from error
        if not offline:
            raise ConnectionError(f"{what}: the Hub answered {status} ({_line(error)}).") from error
        raise _unreachable(what, error) from error
    except (errors.HTTPError, OSError, errors.RevisionResolutionError) as error:
        if not offline:
            raise ConnectionError(
                f"{what}: the Hub could not be reached ({_line(error)}). Check the network and "
                "HF_HUB_OFFLINE."
            ) from error
        raise _unreachable(what, error) from error


def _unreachable(what: str, error: Exception) -> ConnectionError:
    return ConnectionError(
        f"{what} is not in the cache and could not be fetched ({_line(error)}). Check the network "
        "and HF_HUB_OFFLINE, or give a folder on disk: local-dir:path."
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT
