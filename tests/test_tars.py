"""Tars as input: what lies in them is embedded by its bytes, and nothing hostile does harm or is lost."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import logging
import os
import shutil
import tarfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
from made_tables import images_of
from made_tars import (
    OLD,
    add,
    aged,
    another_process,
    counts,
    embedded,
    make_tar,
    picture,
    reasons,
    samples,
    special,
)  # fmt: skip
from mirip_fast_cli.main import run

from mirip_fast.config import Config, DataConfig
from mirip_fast.data import sources
from mirip_fast.data.decode_pool import DecodeJob, DecodePool
from mirip_fast.data.manifest import as_one, read_manifest, write_manifest_csv
from mirip_fast.data.sources import index_tar, read_image
from mirip_fast.errors import DataError
from mirip_fast.features.datasets import newest_graded
from mirip_fast.ranking.graded import graded_of_dataset


@pytest.fixture(autouse=True)
def _nothing_learned() -> None:
    another_process()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_tar_has_the_rows_of_its_folder(tmp_path: Path, workers: int) -> None:
    for i in range(6):
        file = tmp_path / "data" / "images" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(i))
    table = "image_id,filename,tier\n" + "".join(
        f"w{i},{i}.png,{'SABC'[i % 4]}\n" for i in range(6)
    )
    (tmp_path / "data" / "metadata.csv").write_text(table)
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        tar.add(tmp_path / "data", "data")
    aged(tmp_path / "all.tar")
    first = embedded(tmp_path / "all.tar", tmp_path, workers=workers)
    assert counts(first) == (6, 0, 0, 0)
    again = embedded(tmp_path / "data", tmp_path)
    assert counts(again) == (0, 6, 0, 0)
    ours, theirs = (
        [(e.image_id, e.tier, e.sha256) for e in images_of(done.dataset.images())]
        for done in (first, again)
        if done.dataset
    )
    assert ours == theirs
    assert [sha for _, _, sha in ours] == [hashlib.sha256(picture(i)).digest() for i in range(6)]


def test_a_table_with_capital_letters_and_pictures_that_it_does_not_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = "filename,tier\na.png,S\n"
    tar = make_tar(
        tmp_path / "x.tar", {"METADATA.csv": table, "a.png": picture(0), "sub/b": picture(1)}
    )
    assert [record.tier for record in images_of(read_manifest(tar))] == [0]
    assert "x.tar/METADATA.csv is read as metadata.csv" in caplog.text
    assert "1 picture in " in caplog.text and "METADATA.csv: b\n" in caplog.text


def test_shards_and_their_labels(tmp_path: Path) -> None:
    for number in range(3):
        make_tar(tmp_path / "d" / f"{number:03d}.tar", samples(4 * number))
    manifest = read_manifest(tmp_path / "d" / "000.tar,001.tar,002.tar")
    assert [r.image_id for r in images_of(manifest)][3:5] == [
        "000.tar/0003.png",
        "001.tar/0004.png",
    ]
    assert [r.tier for r in images_of(manifest)] == [0, 1, 2, 3] * 3
    assert [r.tier_score for r in images_of(manifest)] == [i / 2 for i in range(12)]
    assert images_of(manifest)[0].own == {"dept": "oil"}
    same = [images_of(read_manifest(s)) for s in (tmp_path / "d", tmp_path / "d" / "*.tar")]
    assert same == [images_of(manifest)] * 2
    assert not manifest.missing()


def test_class_files_and_folders_as_tiers(tmp_path: Path) -> None:
    by_class = make_tar(
        tmp_path / "c.tar",
        {"a.b.png": picture(0), "a.cls": "B\n", "z.png": picture(1), "z.cls": "S"},
    )
    assert [r.tier for r in images_of(read_manifest(by_class))] == [2, 0]
    folders = make_tar(tmp_path / "f.tar", {"S/a.png": picture(0), "C/b.png": picture(1)})
    assert [r.tier for r in images_of(read_manifest(folders))] == [0, 3]
    numbers = make_tar(tmp_path / "n.tar", {"a.png": picture(0), "a.cls": "0"})
    with pytest.raises(DataError, match=r"n.tar/a.png: unknown tier '0'.*(\n.*)*order: 0 1\."):
        read_manifest(numbers)
    assert images_of(read_manifest(numbers, DataConfig(tiers="0,1")))[0].tier == 0
    broken = make_tar(tmp_path / "b.tar", {"a.png": picture(0), "a.json": "{"})
    with pytest.raises(DataError, match=r"b.tar/a.png: a.json: not readable"):
        read_manifest(broken)
    assert len(read_manifest(broken, with_grades=False)) == 1


def test_what_a_tar_has_beside_pictures_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nfd = unicodedata.normalize("NFD", "그림")
    tar = make_tar(tmp_path / "data" / "x.tar", {
        "S/a.jfif": picture(0), "S/b": picture(1), f"C/{nfd}.png": picture(2), "C/그림.json": '{"group": "g"}',
        "__MACOSX/S/._a.png": b"", "S/._b.png": b"", "@eaDir/a.png": picture(3), "S/.c.png": picture(4),
        "__MACOSX/metadata.csv": "filename\n", "d.psd": b"8BPS", "e.PSD": b"8BPS", "f.ai": b"%!PS",
    })  # fmt: skip
    for name in ("._x.tar", "@Recycle/x.tar"):
        (tmp_path / "data" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "data" / name).write_bytes(b"no tar")
    for source in (tar, tmp_path / "data", tmp_path / "data" / "*.tar"):
        caplog.clear()
        with caplog.at_level(logging.INFO, "mirip_fast"):
            manifest = read_manifest(source)
        assert [(r.named, r.tier, r.group) for r in images_of(manifest)] == [
            ("x.tar/S/a.jfif", 0, None), ("x.tar/S/b", 0, None), (f"x.tar/C/{nfd}.png", 3, "g")
        ]  # fmt: skip
        assert "3 files passed over: 2 .psd, 1 .ai; 4 pictures left out as hidden" in caplog.text
    assert [read_image(r.path)[0] for r in images_of(manifest)] == [picture(i) for i in range(3)]
    table = tmp_path / "list.csv"
    table.write_text("filename,tier\ndata/x.tar/C/그림.png,S\ndata/x.tar/S/.c.png,A\n")
    assert not read_manifest(table).missing()  # by its other form, and hidden but asked for


def test_a_table_beside_the_tars_names_members(tmp_path: Path) -> None:
    make_tar(tmp_path / "x.tar", {"sub/a.png": picture(0), "한글.png": picture(1)})
    (tmp_path / "metadata.csv").write_text("filename,tier\nx.tar/sub/a.png,S\nx.tar/한글.png,A\n")
    manifest = read_manifest(tmp_path)
    assert not manifest.missing()
    assert read_image(images_of(manifest)[1].path)[0] == picture(1)
    assert counts(embedded(tmp_path, tmp_path)) == (2, 0, 0, 0)


def test_a_table_in_a_tar_can_not_name_files_outside(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(picture(7))
    names = ["a.png", str(tmp_path / "secret.png"), "../secret.png", "x/../../secret.png"]
    table = "filename,tier\n" + "".join(f"{name},S\n" for name in names)
    make_tar(tmp_path / "x.tar", {"metadata.csv": table, "a.png": picture(0)})
    done = embedded(tmp_path / "x.tar", tmp_path)
    assert counts(done) == (1, 0, 0, 3)
    inside = os.fspath(tmp_path / "x.tar")
    assert all(str(e.path).startswith(inside) for e in images_of(done.dataset.images()))


@pytest.mark.parametrize("workers", [0, 1])
def test_hostile_members_are_refused_one_by_one(tmp_path: Path, workers: int) -> None:
    (tmp_path / "evil.png").write_bytes(picture(9))  # what ../evil.png would name
    path = tmp_path / "d" / "h.tar"
    path.parent.mkdir()
    long = "n" * 180 + "/" + "m" * 180 + ".png"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        add(tar, "./good.png", picture(0))
        add(tar, "../evil.png", picture(1))
        add(tar, str(tmp_path / "evil.png"), picture(2))
        special(tar, "sym.png", tarfile.SYMTYPE, "/etc/passwd")
        special(tar, "hard.png", tarfile.LNKTYPE, "good.png")
        special(tar, "device.png", tarfile.CHRTYPE)
        special(tar, "pipe.png", tarfile.FIFOTYPE)
        special(tar, "folder.png", tarfile.DIRTYPE)
        add(tar, long, picture(3))
        add(tar, "twice.png", picture(4))
        add(tar, "twice.png", picture(5))
        add(tar, "empty.png", b"")
        add(tar, "noise.png", b"no picture")
        add(tar, "notes.txt", b"no image")
    aged(path)
    done = embedded(path, tmp_path, workers=workers)
    told = reasons(done)
    assert counts(done) == (3, 0, 0, 9), told
    outside = "%2F" + str(tmp_path)[1:] + "/evil.png"
    assert {name.removeprefix("h.tar/"): reason.split(";")[0] for name, reason in told.items()} == {
        "%2E%2E/evil.png": "its name has .. in it",
        outside: "its name is absolute",
        "sym.png": "a link to /etc/passwd",
        "hard.png": "a link to good.png",
        "device.png": "not a regular file but a device",
        "pipe.png": "not a regular file but a named pipe",
        "twice#1.png": "a later member of the same tar has the same name and counts",
        "empty.png": "the file is empty",
        "noise.png": told["h.tar/noise.png"],
    }
    kept = {e.image_id: e.sha256 for e in images_of(done.dataset.images())}
    assert kept["h.tar/" + long] == hashlib.sha256(picture(3)).digest()
    assert kept["h.tar/twice.png"] == hashlib.sha256(picture(5)).digest()
    with done.dataset.failures_csv.open(encoding="utf-8-sig", newline="") as stream:
        assert len(list(csv.DictReader(stream))) == 9


def test_a_cut_tar_tells_what_is_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = make_tar(tmp_path / "w.tar", {f"{i}.png": picture(i) for i in range(4)}).read_bytes()
    with tarfile.open(tmp_path / "w.tar") as tar:
        third = tar.getmember("2.png")
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole[: third.offset_data + 20])
    aged(cut)
    done = embedded(cut, tmp_path)
    assert counts(done) == (2, 0, 0, 1)
    assert reasons(done) == {"cut.tar/2.png": "the tar is cut off inside it"}
    assert "images are missing" in caplog.text
    noisy = tmp_path / "noisy.tar"
    noisy.write_bytes(whole[: third.offset] + b"\xff" * 512 + whole[third.offset + 512 :])
    aged(noisy)
    told = reasons(embedded(noisy, tmp_path))
    assert (
        list(told) == ["noisy.tar/(damaged)"]
        and f"byte {third.offset}" in told["noisy.tar/(damaged)"]
    )
    caplog.clear()
    tail = tmp_path / "tail.tar"
    tail.write_bytes(whole[: third.offset])
    aged(tail)
    assert counts(embedded(tail, tmp_path)) == (0, 2, 0, 0)
    assert "without its end mark" in caplog.text


class Modest(io.BytesIO):
    """Stands for a file: reading as much as a hostile size says would allocate it first."""

    def read(self, size: int | None = -1) -> bytes:
        assert size is not None and 0 <= size <= 16 << 20
        return super().read(size)


@pytest.mark.parametrize(
    "size", [b"77777777777\0", b"\x80" + b"\0" * 3 + b"\x7f" + b"\xff" * 7, b"\xff" * 12]
)
def test_sizes_that_lie(tmp_path: Path, size: bytes) -> None:
    """8 GiB, petabytes, and below zero: for a picture, and for the name of one (where it would be read)."""
    for kind in (tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
        path = tmp_path / f"{kind.decode()}.tar"
        with tarfile.open(path, "w") as tar:
            add(tar, "a.png", picture(0))
            special(tar, "b.png", kind)
        data = bytearray(path.read_bytes())
        at = 512 + (len(picture(0)) + 511) // 512 * 512
        data[at + 124 : at + 136] = size
        data[at + 148 : at + 156] = b" " * 8
        data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
        path.write_bytes(data)
        index = index_tar(Modest(data), len(data), "x.tar")
        assert index.members["a.png"].reason is None
        assert [m.reason is None for m in index.members.values()].count(True) == 1
        assert len(index.members) == 2


def test_sparse_members_are_refused(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        info = tarfile.TarInfo("s.png")
        info.size = 4
        info.pax_headers = {
            "GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,4", "GNU.sparse.size": "99",
        }  # fmt: skip
        tar.addfile(info, io.BytesIO(b"abcd"))
    index = index_tar(stream, len(stream.getvalue()), "x.tar")
    assert index.members["s.png"].reason == "a sparse file"


def test_compressed_and_foreign_tars(tmp_path: Path) -> None:
    plain = make_tar(tmp_path / "a.tar", {"a.png": picture(0)})
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(plain.read_bytes()))
    with pytest.raises(DataError, match=r"b.tar.gz: compressed \(gzip\).*plain \.tar"):
        read_manifest(tmp_path / "b.tar.gz")
    (tmp_path / "c.tar").write_bytes(b"hello" * 300)
    with pytest.raises(DataError, match="c.tar: no tar file"):
        read_manifest(tmp_path / "c.tar")
    (tmp_path / "d.tar").write_bytes(b"")
    with pytest.raises(DataError, match="d.tar: no tar file"):
        read_manifest(tmp_path / "d.tar")
    with pytest.raises(DataError, match=r"none of 1 files in it is an image .*: 1 \.txt"):
        read_manifest(make_tar(tmp_path / "e.tar", {"a.txt": "x"}))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is read of tars: indexes made, and members."""
    log: list[str] = []
    look, read = sources._look_through, sources.Piece.read
    monkeypatch.setattr(
        sources, "_look_through", lambda path, size: log.append("index") or look(path, size)
    )
    monkeypatch.setattr(sources.Piece, "read", lambda piece: log.append("member") or read(piece))
    yield log


def test_a_second_run_reads_nothing(
    tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tar = make_tar(tmp_path / "x.tar", samples(0))
    assert counts(embedded(tar, tmp_path)) == (4, 0, 0, 0)
    assert reads == ["index"] + ["member"] * 4
    reads.clear()
    another_process()
    assert counts(embedded(tar, tmp_path)) == (0, 4, 0, 0)
    assert reads == []
    aged(tar, OLD + 5)
    assert counts(embedded(tar, tmp_path)) == (0, 4, 0, 0)
    assert reads == ["index"] + ["member"] * 4
    reads.clear()
    assert counts(embedded(tar, tmp_path, rehash=True)) == (0, 4, 0, 0)
    assert reads == ["member"] * 4


def test_a_young_tar_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar = make_tar(tmp_path / "x.tar", {"a.png": picture(0)})
    os.utime(tar)
    now, size = tar.stat().st_mtime_ns, tar.stat().st_size
    embedded(tar, tmp_path)
    make_tar(tar, {"a.png": picture(1)})
    os.utime(tar, ns=(now, now))  # written again within the clock's step
    assert tar.stat().st_size == size  # nothing but its content tells
    another_process()
    done = embedded(tar, tmp_path)
    assert images_of(done.dataset.images())[0].sha256 == hashlib.sha256(picture(1)).digest()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_tar_that_changes_gives_no_wrong_name(tmp_path: Path, workers: int) -> None:
    """Between the look through it and the reading, another tar takes the place."""
    tar = make_tar(tmp_path / "x.tar", {"a.png": picture(0), "b.png": picture(1)})
    jobs = [DecodeJob(i, tar / f"{n}.png", (8,), "squash", False) for i, n in enumerate("ab")]
    with DecodePool(workers) as pool:
        honest = list(pool.decode(jobs))
        assert [d.sha256 for d in honest] == [hashlib.sha256(picture(i)).digest() for i in (0, 1)]
        size = tar.stat().st_size
        make_tar(tar, {"c.png": picture(2), "d.png": picture(3)})
        assert tar.stat().st_size == size  # and its time is the old one
        changed = list(pool.decode(jobs))
    assert all(d.sha256 == b"" and "the tar changed" in (d.reason or "") for d in changed)


def test_patterns_and_lists(tmp_path: Path) -> None:
    for i in (0, 1, 3):
        make_tar(tmp_path / f"{i:03d}.tar", {"a.png": picture(i)})

    def names(source: str) -> list[str]:
        return [name.partition("/")[0] for name in read_manifest(tmp_path / source).ids]

    assert names("00?.tar") == ["000.tar", "001.tar", "003.tar"]
    assert names("003.tar,000.tar") == ["003.tar", "000.tar"]
    for source, told in {
        "000.tar,002.tar,003.tar": r"002.tar of 3 tars is not there",
        "*.TAR": "nothing has such a name",
        "*": "only tars go by a pattern",
        "{000..127}.tar": r"written out by a shell alone.*in quotes, use .*/\*\.tar",
        "{a,b}/000.tar": r"in quotes, use .*/\*/000\.tar",
    }.items():
        (tmp_path / "a.csv").write_text("x")
        with pytest.raises(DataError, match=told):
            read_manifest(tmp_path / source)
    long = ",".join(f"가나다{i}.tar" for i in range(90))  # no file system takes such a name
    with pytest.raises(DataError, match="가나다4.tar and 85 more of 90 tars are not there"):
        read_manifest(tmp_path / long)
    for name in ("{0..1}", "a.tar,b.tar", "x.tar"):  # a folder that is called so is a folder
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(picture(0))
        (path,) = read_manifest(tmp_path / name).paths
        assert read_image(path)[0] == picture(0)
    make_tar(tmp_path / "{0..1}" / "0.tar", {"a.png": picture(0)})
    assert names("{0..1}/*.tar") == ["0.tar"]


def test_what_the_shell_spelled_out_is_one_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert as_one(["d/001.tar", "d/000.tar"]) == "d/000.tar,001.tar"
    assert as_one(["s3://b/0.tar", "s3://b/1.tar"]) == "s3://b/0.tar,1.tar"
    assert as_one(["folder"]) == "folder"
    monkeypatch.chdir(tmp_path)
    for name in ("d/0.tar", "d/1.tar"):
        make_tar(tmp_path / name, samples(0))
    assert as_one(["d/0.tar", "d/1.tar"]) == "d/*.tar"  # all that are there
    for several in (["a", "b"], ["x/a.tar", "y/b.tar"]):
        with pytest.raises(DataError, match="2 sources"):
            as_one(several)


def test_tars_are_trained_on_by_what_embed_wrote(tmp_path: Path) -> None:
    for number in range(4):
        make_tar(tmp_path / "d" / f"{number}.tar", samples(8 * number, 8))
    embedded(tmp_path / "d" / "0.tar,1.tar,2.tar,3.tar", tmp_path)
    cache = tmp_path / "cache"
    for name in ("0.tar,1.tar,2.tar,3.tar", ""):
        images = graded_of_dataset(newest_graded(cache, tmp_path / "d" / name), Config().split)
        assert len(images) == 32 and set(images.tier_codes.tolist()) == {0, 1, 2, 3}
    # A grade that was corrected counts; without the tars, those of the cache do.
    wrong = {**samples(0, 8), "0000.json": {"tier": "C"}}
    aged(make_tar(tmp_path / "d" / "0.tar", wrong), OLD + 5)
    corrected = graded_of_dataset(newest_graded(cache), Config().split)
    assert corrected.tier_codes[0] == 3
    shutil.rmtree(tmp_path / "d")
    assert graded_of_dataset(newest_graded(cache), Config().split).tier_codes[0] == 0


def test_a_manifest_of_tars_can_be_written_and_read(tmp_path: Path) -> None:
    make_tar(tmp_path / "x.tar", samples(0))
    manifest = read_manifest(tmp_path / "x.tar")
    write_manifest_csv(tmp_path / "list.csv", manifest)
    again = read_manifest(tmp_path / "list.csv")
    assert [(r.image_id, r.path, r.tier) for r in images_of(again)] == [
        (r.image_id, r.path, r.tier) for r in images_of(manifest)
    ]


def test_images_beside_tars_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_tar(tmp_path / "x.tar", {"a.png": picture(0)})
    (tmp_path / "b.png").write_bytes(picture(1))
    assert [r.image_id for r in images_of(read_manifest(tmp_path))] == ["b.png"]
    assert "1 tar is not looked into" in caplog.text


def test_the_commands_take_tars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(4):
        make_tar(tmp_path / "d" / f"{number}.tar", samples(12 * number, 12))
    usual = ["--backbone", "tiny-random", "--image-size", "28", "--workers", "1", "--device", "cpu"]
    assert run(["embed", *[f"d/{i}.tar" for i in range(4)], *usual]) == 0
    assert "48 images = 48 embedded" in capfd.readouterr().out
    assert run(["train", "--head-only", "--data", "d/*.tar", "--epochs", "2"]) == 0
    (tmp_path / "out").mkdir()
    page = tmp_path / "out" / "page.html"
    assert run(["rank", "d/*.tar", "--out", "out", "--html", str(page)]) == 0
    with (tmp_path / "out" / "ranking.csv").open(encoding="utf-8-sig", newline="") as stream:
        ranked = list(csv.DictReader(stream))
    assert sorted(row["file"] for row in ranked)[0] == "0.tar/0000.png"
    assert len(ranked) == 48 and page.stat().st_size > 48 * 200
    assert '"original":null' in page.read_text().replace(" ", "")
    capfd.readouterr()
    assert run(["embed", "d/{0..4}.tar", *usual]) == 1
    assert "in quotes, use d/*.tar" in capfd.readouterr().err
