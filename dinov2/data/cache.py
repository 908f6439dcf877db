"""A bounded folder for what comes from a URL or a pipe, for tar indexes, and for tables sent to workers."""

import hashlib
import io
import os
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections import OrderedDict
from contextlib import suppress
from email.message import Message
from pathlib import Path

from dinov2.files import lock

URLS = ("http://", "https://")
REMOTE = (*URLS, "pipe:")
LIMIT = 64 << 30  # bytes of copies
PATIENCE = 60  # seconds of silence before a connection is given up
PAUSES = (1.0, 5.0)  # seconds before the second and third try
OPEN_FILES = 64
TABLE_AGE = 7 * 86400  # seconds after which a table that was sent to workers is deleted
HEADERS = {"User-Agent": "dinov2-pipeline"}


def is_remote(address: str) -> bool:
    return address.startswith(REMOTE)


def is_url(address: str) -> bool:
    return address.startswith(URLS)


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def default_folder() -> Path:
    """$XDG_CACHE_HOME/dinov2, or ~/.cache/dinov2."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dinov2"


class Cache:
    """Copies of remote files, at most `limit` bytes of them: those used longest ago make room.

    Safe for many processes: one copies, the others wait for it; a copy that somebody has open stays readable
    when it is deleted. Each process looks at the whole folder once in `limit`/64 copied bytes, so that the
    limit may be passed by that much a process.

    An *address* is a URL or `pipe:COMMAND` (run by the shell, its output is the file). `address#version` asks
    for the version with that ETag.
    """

    def __init__(self, folder: Path | str | None = None, limit: int = LIMIT) -> None:
        self.folder = Path(folder).expanduser() if folder is not None else default_folder()
        self.limit = limit
        self.pauses = PAUSES
        self.unswept: int | None = None  # bytes copied since this process last looked; None: never looked

    def index_path(self, address: str) -> Path:
        return self.folder / "index" / f"{short_hash(address)}.parquet"

    def table_path(self, fingerprint: str) -> Path:
        """Where a table on its way to worker processes lies. Old ones are cleared away."""
        folder = self.folder / "tables"
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            with suppress(FileNotFoundError):
                if time.time() - old.stat().st_mtime > TABLE_AGE:
                    old.unlink()
        return folder / f"{fingerprint}.arrow"

    def open(self, address: str) -> io.FileIO:
        """Open the local copy of a remote file, copying it first where need be.

        Raises:
            OSError: it cannot be fetched, is larger than the limit, or is no longer the version asked for.
        """
        path = self.folder / "copies" / short_hash(address)
        with suppress(FileNotFoundError):
            return _used(path)
        with lock(self.folder / "locks" / path.name[:2]):
            with suppress(FileNotFoundError):
                return _used(path)
            return self._copy(address, path)

    def _copy(self, address: str, path: Path) -> io.FileIO:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")  # one writer at a time: the lock is held
        try:
            if address.startswith("pipe:"):
                _run(address.partition("#version=")[0].removeprefix("pipe:"), part)
            else:
                self._download(address, part)
            with lock(self.folder / "locks" / "room"):  # or two copies would each fit, and not both
                self._make_room(part.stat().st_size, address)
                file = io.FileIO(part)  # before it has its name: others who make room may delete it at once
                os.replace(part, path)
            return file
        finally:
            part.unlink(missing_ok=True)

    def _download(self, address: str, part: Path) -> None:
        url, _, wanted = address.partition("#version=")
        for pause in (*self.pauses, None):
            try:
                request = urllib.request.Request(url, headers=HEADERS)
                with urllib.request.urlopen(request, timeout=PATIENCE) as answer, open(part, "wb") as file:
                    if wanted and _version(answer.headers) != wanted:
                        raise OSError(f"{url} has changed since it was indexed; open the source again")
                    expected = int(answer.headers.get("Content-Length") or -1)
                    self._make_room(max(expected, 0), url)
                    shutil.copyfileobj(answer, file, 1 << 20)
                    if expected not in (-1, file.tell()):
                        raise ConnectionError(f"{url} broke off after {file.tell():,} of {expected:,} bytes")
                    return
            except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
                refused = isinstance(error, urllib.error.HTTPError) and error.code < 500
                if refused or pause is None:
                    raise OSError(f"{url} cannot be fetched: {getattr(error, 'reason', error)}") from error
                time.sleep(pause)

    def _make_room(self, size: int, address: str) -> None:
        """Delete the copies used longest ago until `size` more bytes fit."""
        if size > self.limit:
            raise OSError(f"{address} has {size:,} bytes, more than the cache's limit of {self.limit:,}")
        if self.unswept is not None and self.unswept + size <= self.limit // 64:
            self.unswept += size
            return
        self.unswept = 0
        copies = []
        for entry in os.scandir(self.folder / "copies"):
            with suppress(FileNotFoundError):
                copies.append((entry.stat().st_mtime, entry.stat().st_size, entry.path))
        total = sum(size for _, size, path in copies if not path.endswith(".part"))
        for used, held, path in sorted(copies):
            abandoned = path.endswith(".part") and time.time() - used > 86400
            if abandoned or (total + size > self.limit and not path.endswith(".part")):
                total -= 0 if abandoned else held
                Path(path).unlink(missing_ok=True)


class OpenFiles:
    """Local files opened on first use and kept open, a bounded number, in each process for itself.

    Remote copies are opened anew each time: one that is kept open would hold disk space beyond the limit.
    """

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self._files: OrderedDict[str, io.FileIO] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, address: str) -> io.FileIO:
        """An open file. It stays open as long as the caller holds it, even if it leaves the collection."""
        if is_remote(address):
            return self.cache.open(address)
        with self._lock:
            file = self._files.get(address)
            if file is not None:
                self._files.move_to_end(address)
                return file
        file = io.FileIO(address)
        with self._lock:
            self._files[address] = file
            if len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)
        return file

    def forget(self, address: str) -> None:
        """Open it anew next time."""
        with self._lock:
            self._files.pop(address, None)

    def __reduce__(self) -> tuple[type["OpenFiles"], tuple[Cache]]:
        return OpenFiles, (self.cache,)


def remote_version(address: str) -> str:
    """What tells one version of a URL from the next: its ETag, else its date; "" if unknown.

    Raises:
        OSError: the server refuses, or cannot be reached.
    """
    request = urllib.request.Request(address, headers=HEADERS, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return _version(answer.headers)
    except urllib.error.HTTPError as error:
        if error.code in (405, 501):  # the server does not do HEAD
            return ""
        raise OSError(f"{address} cannot be fetched: {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise OSError(f"{address} cannot be fetched: {error.reason}") from error


def _version(headers: Message) -> str:
    stamp = headers.get("ETag") or headers.get("Last-Modified")
    return short_hash(stamp) if stamp else ""


def _run(command: str, part: Path) -> None:
    with open(part, "wb") as file:
        done = subprocess.run(command, shell=True, stdout=file, stderr=subprocess.PIPE, check=False)
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        raise OSError(
            f"pipe:{command} failed with status {done.returncode}" + "".join(f": {s}" for s in said)
        )


def _used(path: Path) -> io.FileIO:
    file = io.FileIO(path)
    with suppress(OSError):
        os.utime(path)
    return file
