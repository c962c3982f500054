"""Getting published files: sizes are told and room is checked first, and an interrupted download goes on.

Names, log-in, revisions and the cache are huggingface_hub's: a file that another program has fetched is found, and what
is fetched here is found by others. Its download forgets the bytes of an interrupted one, so the bytes come through
`_fetch`: into `blobs/<etag>.part`, kept until complete, checked against the hub's hash.

$HF_HUB_OFFLINE, $HF_HOME and $HF_ENDPOINT mean what they mean everywhere.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.utils import WeakFileLock, build_hf_headers  # type: ignore[attr-defined]

from shotstream.checkpoints import ModelError, cache_folder
from shotstream.releases import Remote

Tell = Callable[[str], None]

# Whatever HTTP library this huggingface_hub is built on: its errors are the bases of the hub's own.
_NETWORK_ERRORS: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, OSError)


class NoSpace(ModelError):
    """The disk is too full for what is to be fetched."""

    exit_code = 1


@dataclass(frozen=True)
class Lacking:
    """A file to be fetched: its size, how much of it is here already, and what the hub calls its content."""

    remote: Remote
    size: int
    have: int
    etag: str
    commit: str
    location: str

    @property
    def to_come(self) -> int:
        return self.size - self.have


def local(remote: Remote) -> Path | None:
    """The file in the cache, or None. Never asks the network."""
    found = try_to_load_from_cache(remote.repo, remote.path, revision=remote.revision)
    return Path(found) if isinstance(found, str) else None


def lacking(remotes: Iterable[Remote]) -> list[Lacking]:
    """Those that are not in the cache, with their sizes from the hub. Raises ModelError."""
    return [_look_up(remote) for remote in dict.fromkeys(remotes) if local(remote) is None]


def _look_up(remote: Remote) -> Lacking:
    url = hf_hub_url(remote.repo, remote.path, revision=remote.revision, endpoint=constants.ENDPOINT)
    with _explained(remote):
        found = get_hf_file_metadata(url)
    if found.size is None or found.etag is None or found.commit_hash is None:
        raise ModelError(f"{remote}: {constants.ENDPOINT} does not answer like a hub; check HF_ENDPOINT")
    part = _part(remote, found.etag)
    have = min(part.stat().st_size, found.size) if part.is_file() else 0
    return Lacking(remote, found.size, have, found.etag, found.commit_hash, found.location)


def fetch(remotes: Iterable[Remote], tell: Tell = lambda text: None) -> list[Path]:
    """All of these as local files, fetching what is not in the cache. Tells sizes before the first byte.

    Raises ModelError (NoSpace before anything is fetched), KeyboardInterrupt; what has come so far is kept.
    """
    remotes = list(remotes)
    missing = lacking(remotes)
    if missing:
        check_space(missing)
        for line in describe(missing):
            tell(line)
    for one in missing:
        _fetch(one)
    return [_arrived(remote) for remote in remotes]


def describe(missing: Iterable[Lacking]) -> Iterator[str]:
    """A line per file to be fetched, and one for all."""
    missing = list(missing)
    for one in missing:
        here = f", {size(one.have)} of it here already" if one.have else ""
        yield f"{one.remote}: {size(one.size)}{here}"
    yield f"to download: {size(sum(one.to_come for one in missing))}, into {constants.HF_HUB_CACHE}"


def check_space(missing: Iterable[Lacking]) -> None:
    """Raise NoSpace unless the downloads, and the safetensors copies made of pickles, fit on their disks."""
    needed: dict[int, int] = {}
    places: dict[int, Path] = {}
    for one in missing:
        copied = one.size if one.remote.path.endswith((".pt", ".pth")) else 0
        for place, count in ((Path(constants.HF_HUB_CACHE), one.to_come), (cache_folder(), copied)):
            there = next(folder for folder in (place, *place.absolute().parents) if folder.is_dir())
            disk = there.stat().st_dev
            needed[disk] = needed.get(disk, 0) + count
            places.setdefault(disk, place)
    for disk, count in needed.items():
        place = next(folder for folder in (places[disk], *places[disk].absolute().parents) if folder.is_dir())
        if count > (free := shutil.disk_usage(place).free):
            remedy = "free some, or put the caches elsewhere with HF_HOME and SHOTSTREAM_CACHE"
            raise NoSpace(f"{places[disk]}: {size(count)} are needed and {size(free)} are free; {remedy}")


def _part(remote: Remote, etag: str) -> Path:
    """Where a download grows, beside the blob that it becomes."""
    folder = repo_folder_name(repo_id=remote.repo, repo_type="model")
    return Path(constants.HF_HUB_CACHE, folder, "blobs", f"{etag}.part")


def _fetch(one: Lacking) -> None:
    part = _part(one.remote, one.etag)
    part.parent.mkdir(parents=True, exist_ok=True)
    with _explained(one.remote, kept=part), WeakFileLock(part.with_suffix(".lock")):
        if not part.with_suffix("").exists():  # another process may have been faster
            with open(part, "ab") as file:
                http_get(
                    one.location,
                    file,
                    resume_size=file.tell(),
                    headers=_headers(one.location),
                    expected_size=one.size,
                    displayed_filename=one.remote.path,
                )
            if not _is(part, one.etag):
                part.unlink()
                raise ModelError(f"{one.remote}: damaged on the way; run the command again")
            os.replace(part, part.with_suffix(""))
        hf_hub_download(one.remote.repo, one.remote.path, revision=one.remote.revision)  # finds the blob, names it


def _headers(location: str) -> dict[str, str]:
    """The token goes to the hub alone, not to the servers it points to."""
    headers = build_hf_headers()
    if urlsplit(location).netloc != urlsplit(constants.ENDPOINT).netloc:
        headers.pop("authorization", None)
    return headers


def _arrived(remote: Remote) -> Path:
    path = local(remote)
    assert path is not None, f"{remote} was fetched and is not in the cache"
    return path


def is_whole(path: Path) -> bool:
    """Whether a file in the cache still has the hash it is kept under. Reads all of it."""
    return _is(path, path.resolve().name)


def _is(path: Path, etag: str) -> bool:
    """Whether the content has this hash: sha256 for large files, git's sha1 for small ones."""
    etag = etag.removesuffix(".part")
    known = hashlib.sha256() if len(etag) == 64 else hashlib.sha1(usedforsecurity=False)
    if len(etag) == 40:
        known.update(b"blob %d\0" % path.stat().st_size)
    elif len(etag) != 64:
        return True  # no hash: a server that is not the hub
    with open(path, "rb") as file:
        while block := file.read(2**24):
            known.update(block)
    return known.hexdigest() == etag


@contextmanager
def _explained(remote: Remote, kept: Path | None = None) -> Iterator[None]:
    """Errors of the hub and the network as one line: what, where, what to do."""
    page = f"{constants.ENDPOINT}/{remote.repo}"
    try:
        yield
    except RevisionNotFoundError:
        raise ModelError(f"{remote.repo}: no revision {remote.revision!r}; see {page}/commits/main") from None
    except GatedRepoError:
        raise ModelError(f"{remote.repo}: asks for consent; agree at {page}, then `hf auth login`") from None
    except RepositoryNotFoundError:
        raise ModelError(f"{remote.repo}: no such repository, or a private one; `hf auth login` if it is") from None
    except EntryNotFoundError:
        raise ModelError(f"{remote}: no such file; see {page}/tree/{remote.revision}") from None
    except OfflineModeIsEnabled:
        where = f"not in the cache ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE is set"
        raise ModelError(f"{remote}: {where}; unset it, or copy the cache from another machine") from None
    except HfHubHTTPError as error:
        reason = f"{constants.ENDPOINT} answers {error.response.status_code}"
        raise ModelError(f"{remote}: {reason}; {_to_go_on(kept, 'try again later')}") from None
    except _NETWORK_ERRORS as error:
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        raise (NoSpace if full else ModelError)(f"{remote}: {_reason(error)}; {_to_go_on(kept)}") from None
    except KeyboardInterrupt as interrupt:
        if kept:
            interrupt.add_note(_to_go_on(kept))
        raise


def _reason(error: Exception) -> str:
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _to_go_on(kept: Path | None, otherwise: str = "check the connection and try again") -> str:
    if kept and kept.is_file() and kept.stat().st_size:
        return f"{size(kept.stat().st_size)} are kept; the same command goes on from there"
    return otherwise


def size(count: int) -> str:
    """ "5.7 GB", "16.8 MB", "812 B"."""
    for unit, worth in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= worth:
            return f"{count / worth:.1f} {unit}"
    return f"{count} B"
