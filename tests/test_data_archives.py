"""Archives that lie: paths that escape, links, bombs, damage."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import pytest

from casemate.data.archives import BadArchive, check_sha256, find, read_limited, sha256_file, unpack_tar

WANTED = r"package/.*\.bin"


def tar_with(*members: tarfile.TarInfo, content: bytes = b"x" * 100) -> io.BytesIO:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for info in members:
            if info.isreg():
                info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return io.BytesIO(out.getvalue())


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def unpack(stream: io.BytesIO, folder: Path, limit: int = 1000) -> list[Path]:
    return unpack_tar(stream, folder, WANTED, limit=limit)


def test_wanted_members_are_written_flat_and_others_are_not(tmp_path: Path) -> None:
    stream = tar_with(member("package/data/a.bin"), member("./package/b.bin"), member("package/readme.md"))
    assert unpack(stream, tmp_path) == [tmp_path / "a.bin", tmp_path / "b.bin"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "b.bin"]
    assert (tmp_path / "a.bin").read_bytes() == b"x" * 100


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (member("../evil.bin"), "points outside"),
        (member("package/../../evil.bin"), "points outside"),
        (member("/package/evil.bin"), "points outside"),
        (member("package/evil.bin", tarfile.SYMTYPE, "/etc/passwd"), "not a regular file"),
        (member("package/evil.bin", tarfile.LNKTYPE, "package/a.bin"), "not a regular file"),
        (member("package/evil.bin", tarfile.FIFOTYPE), "not a regular file"),
        (member("package/other/a.bin"), "two files named 'a.bin'"),
    ],
)
def test_a_malicious_member_stops_the_unpacking(bad: tarfile.TarInfo, why: str, tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    with pytest.raises(BadArchive, match=why):
        unpack(tar_with(member("package/a.bin"), bad), inside)
    assert [p.name for p in tmp_path.iterdir()] == ["inside"]
    assert [p.name for p in inside.iterdir()] == ["a.bin"] and (inside / "a.bin").read_bytes() == b"x" * 100


def test_too_many_bytes_are_refused_before_they_are_written(tmp_path: Path) -> None:
    with pytest.raises(BadArchive, match="more than the 250 bytes"):
        unpack(tar_with(*(member(f"package/{i}.bin") for i in range(3))), tmp_path, limit=250)
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) == 200


@pytest.mark.parametrize("keep", [0, 5, 20, 60])
def test_a_torn_archive_is_bad(keep: int, tmp_path: Path) -> None:
    import random

    noise = random.Random(0).randbytes(5000)  # does not compress: a cut then falls into the data
    whole = tar_with(member("package/a.bin"), content=noise).getvalue()
    with pytest.raises(BadArchive, match="truncated or altered"):
        unpack(io.BytesIO(whole[: keep * len(whole) // 100]), tmp_path, limit=10_000)


def test_gzip_bombs_and_damage(tmp_path: Path) -> None:
    packed = tmp_path / "a.gz"
    packed.write_bytes(gzip.compress(bytes(1_000_000)))
    assert read_limited(packed, 1_000_000) == bytes(1_000_000)
    with pytest.raises(BadArchive, match="more than the 999,999 bytes"):
        read_limited(packed, 999_999)
    packed.write_bytes(packed.read_bytes()[:-10])
    with pytest.raises(BadArchive, match=r"a\.gz is not a readable \.gz"):
        read_limited(packed, 1_000_000)
    packed.write_bytes(b"not gzip")
    with pytest.raises(BadArchive, match="not a readable"):
        read_limited(packed, 10)


def test_checksums(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"abc")
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert sha256_file(file) == abc
    check_sha256(file, abc)
    file.write_bytes(b"ab")
    with pytest.raises(BadArchive, match=r"a \(2 bytes\) has the wrong checksum"):
        check_sha256(file, abc)


def test_find_looks_so_deep_and_no_deeper(tmp_path: Path) -> None:
    for place in ("a", "1/a", "1/2/a", "1/2/3/a"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).touch()
    (tmp_path / "loop").symlink_to(tmp_path)
    places = [str(p.relative_to(tmp_path)) for p in find(tmp_path, ["a", "b"], depth=2)["a"]]
    assert places == ["a", "1/a", "1/2/a"]
    assert find(tmp_path, ["b"]) == {"b": []}
