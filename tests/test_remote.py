"""Folders and tars behind an address: memory://, file://, and a local web server."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote

import fsspec
import pytest
from made_tables import images_of
from made_tars import (
    another_process,
    config_of,
    counts,
    embedded,
    make_tar,
    picture,
    reasons,
    samples,
)

from mirip_fast.data import remote
from mirip_fast.data.decode_pool import DecodeJob, DecodePool
from mirip_fast.data.manifest import read_manifest
from mirip_fast.data.remote import located
from mirip_fast.errors import DataError, MiripError
from mirip_fast.features.datasets import find_datasets, newest_graded
from mirip_fast.ranking.graded import graded_of_dataset
from mirip_fast.text import address, path_of


@pytest.fixture(autouse=True)
def _nothing_learned() -> None:
    another_process()


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield fs
    fs.store.clear()


def put(fs: Any, name: str, content: bytes, age_s: int = 3600) -> None:
    fs.pipe_file(name, content)
    fs.store[name].modified = fs.store[name].created = datetime.now(timezone.utc) - timedelta(
        seconds=age_s
    )


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses that content was fetched from."""
    log: list[str] = []
    read, look = remote.read_bytes, remote.open_remote
    monkeypatch.setattr(remote, "read_bytes", lambda p, *a: log.append(address(p)) or read(p, *a))
    monkeypatch.setattr(
        remote, "open_remote", lambda p: log.append("index " + address(p)) or look(p)
    )
    return log


def test_addresses_are_paths_and_back(tmp_path: Path) -> None:
    for url in (
        "s3://bucket/a/b.jpg",
        "memory://x.tar/m.png",
        "https://host:8000/a?b.jpg",
        "gs://b",
    ):
        assert address(path_of(url)) == url
        assert path_of(url).is_absolute() and str(path_of(url)) == os.path.normpath(path_of(url))
    for text in (
        "s3://bucket/a/",
        "s3:/bucket/a",
        "S3://bucket/a",
        Path("s3://bucket/a"),
        path_of("s3://bucket/a"),
    ):
        assert located(text) == path_of("s3://bucket/a")
    assert located(f"file://{tmp_path}") == tmp_path
    assert located("a.jpg") == Path.cwd() / "a.jpg"
    assert address(tmp_path) == str(tmp_path)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://host/x.tar?sig=SECRET", "signature"),
        ("ftp://me:SECRET@host/x.tar", "password"),
        ("simplecache::s3://b/x.tar", "inside addresses"),
        ("s3://bucket/../other", "write it out"),
    ],
)
def test_addresses_that_are_refused(url: str, said: str) -> None:
    with pytest.raises(DataError, match=said) as told:
        located(url)
    assert "SECRET" not in str(told.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_is_fetched_once(
    tmp_path: Path, memory: Any, fetched: list[str], workers: int
) -> None:
    for i in range(5):
        put(memory, f"/b/{'SABCS'[i]}/{i}.png", picture(i))
    put(memory, "/b/S/notes.txt", b"x")
    done = embedded("memory://b", tmp_path, workers=workers)
    assert counts(done) == (5, 0, 0, 0)
    assert len(fetched) == 5
    manifest = {e.image_id: e for e in images_of(done.dataset.images())}
    assert sorted(manifest) == ["A/1.png", "B/2.png", "C/3.png", "S/0.png", "S/4.png"]
    assert manifest["B/2.png"].sha256 == hashlib.sha256(picture(2)).digest()
    assert manifest["B/2.png"].tier == 2
    text = (done.dataset.folder / "manifest.csv").read_text()
    assert "memory://b/B/2.png" in text and "/memory:/" not in text
    fetched.clear()
    another_process()
    assert counts(embedded("memory://b/", tmp_path)) == (0, 5, 0, 0)
    assert fetched == []
    put(memory, "/b/S/0.png", picture(9))
    another_process()
    assert counts(embedded("memory://b", tmp_path)) == (1, 4, 0, 0)
    assert fetched == ["memory://b/S/0.png"]
    assert len(find_datasets(tmp_path / "cache")) == 1


def test_the_same_bytes_are_the_same_images(tmp_path: Path, memory: Any) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.png").write_bytes(picture(i))
        put(memory, f"/there/{i}.png", picture(i))
    assert counts(embedded(folder, tmp_path)) == (3, 0, 0, 0)
    assert counts(embedded("memory://there", tmp_path)) == (0, 3, 0, 0)
    assert counts(embedded(f"file://{folder}", tmp_path)) == (0, 3, 0, 0)


def test_what_can_not_be_fetched_is_told(
    tmp_path: Path, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(3):
        put(memory, f"/b/{i}.png", picture(i))
    put(memory, "/b/3.png", b"")
    put(memory, "/b/4.png", b"no picture")
    real = type(memory).cat_file

    def cat_file(self: Any, path: str, *args: Any, **options: Any) -> bytes:
        if path.endswith("1.png"):
            raise PermissionError("Access Denied")
        data = real(self, path, *args, **options)
        return data[:-1] if path.endswith("2.png") else data

    monkeypatch.setattr(type(memory), "cat_file", cat_file)
    done = embedded("memory://b", tmp_path, workers=1)
    assert counts(done) == (1, 0, 0, 4)
    told = reasons(done)
    assert "Access Denied" in told["1.png"] and "Credentials" in told["1.png"]
    assert told["2.png"] == "the file changed while it was being read"
    assert told["3.png"] == "the file is empty"
    monkeypatch.undo()
    assert counts(embedded("memory://b", tmp_path)) == (2, 1, 0, 2)


def test_what_is_fetched_leaves_nothing_behind(
    tmp_path: Path, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    for i in range(60):  # more than are fetched ahead
        put(memory, f"/b/{i:02d}.png", picture(i))
    done = embedded("memory://b", tmp_path, workers=2)
    assert counts(done) == (60, 0, 0, 0)
    assert [e.image_id for e in images_of(done.dataset.images())] == [
        f"{i:02d}.png" for i in range(60)
    ]
    assert list((tmp_path / "tmp").glob("mirip-fast-*")) == []


def test_a_pool_that_is_closed_while_it_fetches_says_so(
    memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(40):
        put(memory, f"/b/{i}.png", picture(i))
    real = type(memory).cat_file
    monkeypatch.setattr(type(memory), "cat_file", lambda *a, **o: time.sleep(0.2) or real(*a, **o))
    pool = DecodePool(1)
    threading.Timer(0.1, pool.close).start()
    paths = [path_of(f"memory://b/{i}.png") for i in range(40)]
    with pytest.raises(MiripError, match="the decoding pool is closed"):
        list(pool.decode(DecodeJob(i, p, (8,), "squash", False) for i, p in enumerate(paths)))


def test_remote_tars(tmp_path: Path, memory: Any, fetched: list[str]) -> None:
    for number in range(3):
        file = make_tar(tmp_path / f"{number}.tar", samples(4 * number))
        put(memory, f"/b/{number}.tar", file.read_bytes())
    pattern = "memory://b/0.tar,1.tar,2.tar"
    done = embedded(pattern, tmp_path, workers=1)
    assert counts(done) == (12, 0, 0, 0)
    assert images_of(done.dataset.images())[5].image_id == "1.tar/0005.png"
    assert fetched.count("index memory://b/1.tar") == 1 and len(fetched) == 3 + 12
    fetched.clear()
    for source in (pattern, "memory://b", "memory://b/*.tar"):
        another_process()
        assert counts(embedded(source, tmp_path)) == (0, 12, 0, 0)
    assert fetched == []
    images = graded_of_dataset(
        newest_graded(tmp_path / "cache", Path(pattern)), config_of(tmp_path).split
    )
    assert len(images) == 12 and fetched == []  # training needs no network
    with pytest.raises(DataError, match=r"memory://b/3.tar of 2 tars is not there"):
        read_manifest("memory://b/0.tar,3.tar")


def test_a_remote_tar_that_is_replaced_gives_no_wrong_name(tmp_path: Path, memory: Any) -> None:
    put(memory, "/b/x.tar", make_tar(tmp_path / "x.tar", {"a.png": picture(0)}).read_bytes())
    manifest = read_manifest("memory://b/x.tar")
    put(memory, "/b/x.tar", make_tar(tmp_path / "x.tar", {"z.png": picture(1)}).read_bytes())
    from mirip_fast.data.hashes import HashMemory

    (told,) = HashMemory(None).sha256_many([images_of(manifest)[0].path])
    assert "the tar changed" in str(told)


def test_a_remote_table(tmp_path: Path, memory: Any) -> None:
    put(memory, "/b/images/a.png", picture(0))
    put(memory, "/secret.png", picture(1))
    put(memory, "/b/metadata.csv", b"filename,tier\na.png,S\n../secret.png,A\ngone.png,B\n")
    manifest = read_manifest("memory://b")
    assert [address(r.path) for r in images_of(manifest)] == [
        "memory://b/images/a.png", "memory://b/images/%2E%2E/secret.png", "memory://b/images/gone.png",
    ]  # fmt: skip
    assert len(manifest.missing()) == 2
    assert counts(embedded("memory://b/metadata.csv", tmp_path)) == (1, 0, 0, 2)


def test_a_table_with_capital_letters_and_pictures_that_it_does_not_name(
    memory: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "b"):
        put(memory, f"/b/images/{name}.png", picture(0))
    put(memory, "/b/metadata.CSV", b"filename,tier\na.png,S\n")
    assert [record.tier for record in images_of(read_manifest("memory://b"))] == [0]
    assert "memory://b/metadata.CSV is read as metadata.csv" in caplog.text
    assert (
        "1 picture in memory://b/images is named by no row of memory://b/metadata.CSV: b.png\n"
        in caplog.text
    )
    put(memory, "/b/Metadata.csv", b"filename,tier\na.png,A\n")
    with pytest.raises(DataError, match="leave one"):
        read_manifest("memory://b")


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, memory: Any) -> None:
    with pytest.raises(DataError, match="memory://nothing: no such folder"):
        read_manifest("memory://nothing")
    with pytest.raises(DataError, match="foo://b/x: Protocol not known"):
        read_manifest("foo://b/x")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    fsspec.registry._registry.pop("s3", None) if hasattr(fsspec.registry, "_registry") else None
    with pytest.raises(DataError, match="s3://b/x.tar: .*pip install s3fs"):
        read_manifest("s3://b/x.tar")


class Web(BaseHTTPRequestHandler):
    """A server of ``files``; one that gives no parts of files where ``ranges`` is off."""

    files: ClassVar[dict[str, bytes]] = {}
    ranges = True
    log: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self._give(False)

    def do_GET(self) -> None:
        self._give(True)

    def _give(self, body: bool) -> None:
        data = self.files.get(self.path)
        if data is None:
            self.send_error(404)
            return
        tag = hashlib.sha256(data).hexdigest()
        wanted = self.headers.get("Range")
        if wanted and self.ranges:
            first, last = wanted.removeprefix("bytes=").split("-")
            start, end = int(first), min(int(last or len(data)), len(data) - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end}/{len(data)}")
            data = data[start : end + 1]
        else:
            self.send_response(200)
        if self.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{tag}"')
        self.end_headers()
        if body:
            type(self).log.append(self.path)
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web() -> Iterator[tuple[str, type[Web]]]:
    pytest.importorskip("aiohttp", reason="fsspec needs aiohttp for web addresses")
    Web.files, Web.ranges, Web.log = {}, True, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Web)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", Web
    server.shutdown()
    server.server_close()


def test_tars_from_a_web_server(tmp_path: Path, web: tuple[str, type[Web]]) -> None:
    url, server = web
    for number in range(2):
        server.files[f"/d/{number}.tar"] = make_tar(
            tmp_path / "x.tar", samples(4 * number)
        ).read_bytes()
    done = embedded(url + "/d/0.tar,1.tar", tmp_path, workers=1)
    assert counts(done) == (8, 0, 0, 0)
    server.log.clear()
    another_process()
    assert counts(embedded(url + "/d/0.tar,1.tar", tmp_path)) == (0, 8, 0, 0)
    assert server.log == []
    with pytest.raises(DataError, match=r"2.tar of 2 tars is not there"):
        read_manifest(url + "/d/0.tar,2.tar")
    server.ranges = False
    server.files["/d/new.tar"] = make_tar(tmp_path / "x.tar", samples(9)).read_bytes()
    told = reasons(embedded(url + "/d/new.tar", tmp_path))
    assert len(told) == 4 and all(
        "does not give parts of a file; download it" in t for t in told.values()
    )


def test_a_table_on_a_web_server_but_no_folder(tmp_path: Path, web: tuple[str, type[Web]]) -> None:
    url, server = web
    server.files |= {
        "/d": f'<a href="{quote("한 글.png")}">1</a> <a href="../up.png">2</a>'.encode(),
        f"/d/{quote('한 글.png')}": picture(0),
        "/d/metadata.csv": "filename,tier\n한 글.png,S\n".encode(),
    }
    assert not read_manifest(url + "/d/metadata.csv").missing()
    assert counts(embedded(url + "/d/metadata.csv", tmp_path)) == (1, 0, 0, 0)
    server.log.clear()
    for folder in ("/d", "/d/", ""):
        with pytest.raises(DataError, match=r"but no folders.*/001\.tar.*metadata\.csv.*wget"):
            read_manifest(url + folder)
    with pytest.raises(DataError, match=r"\* does not work there"):
        read_manifest(url + "/d/*.tar")
    assert server.log == []


@pytest.mark.parametrize("to", ["http://localhost:{port}/real.csv", "http://127.0.0.1:1/real.csv",
    "file:///etc/passwd", "//localhost/real.csv", "/real.csv"])  # fmt: skip
def test_a_web_server_can_not_send_elsewhere(
    monkeypatch: pytest.MonkeyPatch, web: tuple[str, type[Web]], to: str
) -> None:
    """What a table's address leads to would be read with the rights of this machine."""
    url, server = web
    server.files |= {"/real.csv": b"filename,tier\na.png,S\n", "/a.png": picture(0)}
    target, get = to.format(port=url.rpartition(":")[2]), server.do_GET

    def moved(self: Web) -> None:
        if self.path != "/list.csv":
            return get(self)
        self.send_response(302)
        self.send_header("Location", target)
        self.send_header("Content-Length", "0")
        return self.end_headers()

    for method in ("do_GET", "do_HEAD"):
        monkeypatch.setattr(server, method, moved)
    if to == "/real.csv":  # the same server
        assert len(read_manifest(url + "/list.csv")) == 1
        return
    with pytest.raises(
        DataError, match=f"list.csv: the server sends on to another place, {target}"
    ):
        read_manifest(url + "/list.csv")
    assert server.log == []


def test_what_a_bucket_has_beside_pictures_is_told(
    memory: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for name, content in {
        "S/a": picture(0), "A/b.jfif": picture(1), "A/note": b"text", "@eaDir/x.png": picture(2), "z.psd": b"8BPS",
        "A/._b.png": b"", ".trash/x.tar": b"", "._x.tar": b"", "A/b.txt": picture(3),
    }.items():  # fmt: skip
        put(memory, "/b/" + name, content)
    with caplog.at_level("INFO", "mirip_fast"):
        manifest = read_manifest("memory://b")
    assert [(r.image_id, r.tier) for r in images_of(manifest)] == [("A/b.jfif", 1), ("S/a", 0)]
    assert (
        "3 files passed over: 1 .psd, 1 .txt, 1 without an ending; 2 pictures left out as hidden"
        in caplog.text
    )
