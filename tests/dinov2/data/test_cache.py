"""Remote tars, from a real server: copied once, bounded, and noticed when they change."""

import io
import multiprocessing
import os
import tarfile
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dinov2.data.cache import Cache
from dinov2.data.decode import Unreadable
from dinov2.data.sources import open_source
from dinov2.exits import UserError


class Server(ThreadingHTTPServer):
    """Serves a folder; remembers what was asked; `cuts` answers break off half way."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.asked, self.cuts = folder, [], 0
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(SimpleHTTPRequestHandler):
    @property
    def served(self) -> Server:
        assert isinstance(self.server, Server)
        return self.server

    def translate_path(self, path: str) -> str:
        return str(self.served.folder) + path

    def do_GET(self) -> None:
        self.served.asked.append(self.path)
        if not self.served.cuts:
            return super().do_GET()
        self.served.cuts -= 1
        data = Path(self.translate_path(self.path)).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        changed = Path(self.translate_path(self.path)).stat().st_mtime
        self.send_header("Last-Modified", self.date_time_string(int(changed)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2])
        return None

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "served").mkdir()
    for number in range(4):
        write(tmp_path / "served" / f"s-{number}.tar", number)
    with Server(tmp_path / "served") as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def write(tar: Path, number: int) -> None:
    """Two pictures of 10,000 bytes."""
    with tarfile.open(tar, "w") as file:
        for name in ("a/1.jpg", "b/2.jpg"):
            member = tarfile.TarInfo(name)
            member.size = 10_000
            file.addfile(member, io.BytesIO(f"{number}{name}".encode().ljust(10_000, b".")))


def test_a_remote_tar_is_the_local_one(server: Server, tmp_path: Path) -> None:
    there = open_source(f"x={server.url}/s-{{0..3}}.tar", cache=tmp_path / "cache")
    here = open_source(f"x={server.folder}/s-{{0..3}}.tar", cache=tmp_path / "cache")
    piped = open_source(f"x=pipe:gzip -c {server.folder}/s-0.tar | gunzip", cache=tmp_path / "cache")
    for name in ("id", "uri", "label", "offset", "size"):
        assert there.table[name] == here.table[name]
    rows = range(len(here))
    assert [there.read(row) for row in rows] == [here.read(row) for row in rows]
    assert sorted(server.asked) == [f"/s-{number}.tar" for number in range(4)]
    assert open_source(f"x={server.url}/s-{{0..3}}.tar", cache=tmp_path / "cache").ids == here.ids
    assert len(server.asked) == 4
    assert [piped.read(row) for row in range(2)] == [here.read(row) for row in range(2)]


def test_copies_stay_within_the_limit_and_come_back_when_needed(server: Server, tmp_path: Path) -> None:
    cache, limit = tmp_path / "cache", 65_000  # a tar has 30,720 bytes
    source = open_source(f"{server.url}/s-{{0..3}}.tar", cache=cache, cache_limit=limit)
    for row in [0, 2, 4, 6, 1, 1, 7, 3]:
        data = source.read(row)
        assert data.startswith(f"{row // 2}{'ab'[row % 2]}".encode())
        assert sum(copy.stat().st_size for copy in (cache / "copies").iterdir()) <= limit
    assert len(server.asked) > 4
    with pytest.raises(UserError, match=r"has 30,720 bytes, more than the cache's limit of 20,000"):
        open_source(f"{server.url}/s-0.tar", cache=tmp_path / "other", cache_limit=20_000)


def test_processes_share_one_copy(server: Server, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    with multiprocessing.get_context("fork").Pool(4) as pool:
        read = pool.starmap(_size_of, [(cache, f"{server.url}/s-{number % 2}.tar") for number in range(16)])
    assert read == [30_720] * 16
    assert sorted(server.asked) == ["/s-0.tar", "/s-1.tar"]
    assert sorted(copy.stat().st_size for copy in (cache.folder / "copies").iterdir()) == [30_720] * 2


def test_a_changed_tar_is_indexed_anew_and_never_read_by_an_old_index(server: Server, tmp_path: Path) -> None:
    spec = f"{server.url}/s-0.tar"
    before = open_source(spec, cache=tmp_path / "cache")
    path = server.folder / "s-0.tar"
    write(path, 5)
    os.utime(path, (1e9, 1e9))
    assert before.read(0).startswith(b"0a")  # from its copy
    after = open_source(spec, cache=tmp_path / "cache")
    assert after.read(0).startswith(b"5a")
    for copy in (tmp_path / "cache" / "copies").iterdir():
        copy.unlink()
    with pytest.raises(Unreadable, match="has changed since it was indexed"):
        before.read(0)


def test_a_broken_connection_is_tried_again_and_then_named(server: Server, tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.pauses = (0.01, 0.01)
    server.cuts = 2
    assert _size_of(cache, f"{server.url}/s-0.tar") == 30_720
    server.cuts = 3
    with pytest.raises(OSError, match=r"s-1\.tar cannot be fetched: .* after 15,360 of 30,720 bytes"):
        cache.open(f"{server.url}/s-1.tar")
    with pytest.raises(UserError, match=r"none\.tar cannot be fetched: 404"):
        open_source(f"{server.url}/none.tar", cache=tmp_path)
    assert not list((tmp_path / "copies").glob("*.part"))


def test_listed_urls_are_read_through_the_cache(server: Server, tmp_path: Path) -> None:
    (server.folder / "p.jpg").write_bytes(b"a picture")
    (tmp_path / "l.txt").write_text(f"{server.url}/p.jpg\n{server.url}/none.jpg\n")
    source = open_source(f"{tmp_path}/l.txt", cache=tmp_path / "cache")
    row = source.table["uri"].to_pylist().index(f"{server.url}/p.jpg")
    assert [source.read(row) for _ in range(3)] == [b"a picture"] * 3
    assert server.asked == ["/p.jpg"]
    with pytest.raises(Unreadable, match="cannot be fetched: File not found"):
        source.read(1 - row)


def _size_of(cache: Cache, address: str) -> int:
    with cache.open(address) as file:
        return len(file.readall())
