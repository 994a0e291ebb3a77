"""Headers of tars: the same as `tarfile` and `tar` understand; hostile ones end in a line."""

import gzip
import io
import random
import struct
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from lightship.data.sources import layouts
from lightship.data.sources.tar_members import read_members
from lightship.errors import DataError
from lightship.storage.tar_headers import Member, read_headers
from tests.support.bounded_child import call_each, refusals
from tests.support.images import little_set, tarred

FILES = little_set(("train",))
PNG = FILES["train/ant/000.png"]
TAR = tarred(FILES)
MEMBERS_END = len(TAR.rstrip(b"\0")) + 511 & ~511
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
KINDS = {tarfile.DIRTYPE: "folder", tarfile.LNKTYPE: "hard link", tarfile.SYMTYPE: "link",
         tarfile.FIFOTYPE: "special", tarfile.CHRTYPE: "special"}  # fmt: skip


def headers(data: bytes) -> list[Member]:
    return list(read_headers(io.BytesIO(data)))


def by_tarfile(data: bytes) -> list[Member]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [
            Member(
                m.name, "sparse" if m.issparse() else KINDS.get(m.type, "file"),
                m.offset, m.offset_data, m.size if m.isreg() else 0, m.linkname,
            )
            for m in tar
        ]  # fmt: skip


# ---- what is honest ----------------------------------------------------------------------------


def member_at_random(rng: random.Random, form: str) -> tuple[tarfile.TarInfo, bytes]:
    depth, long = rng.randrange(1, 6), rng.random() < 0.3 and form != "ustar"
    name = "/".join(rng.choice(["a", "café", "b" * 20, "c d"]) for _ in range(depth))
    name = f"{name}{'/x' * 60 if long else ''}/{rng.randrange(10**6)}"
    member = tarfile.TarInfo(name if form != "ustar" else name[:90])
    old = [] if long else [tarfile.AREGTYPE]  # tarfile takes a cut name for a folder's
    member.type = rng.choice([tarfile.REGTYPE] * 6 + [*old, *KINDS])
    member.mtime, member.uid = rng.choice([0, 1.5, 2**33]), rng.choice([0, 2**21 + 5])
    if form == "ustar":
        member.mtime, member.uid = 0, 0
    if member.type in (tarfile.LNKTYPE, tarfile.SYMTYPE):
        member.linkname = "t" * (130 if long else 9)
    data = rng.randbytes(rng.choice([0, 1, 511, 512, 513, 5000])) if member.isreg() else b""
    member.size = len(data)
    return member, data


@pytest.mark.parametrize("form", FORMATS)
def test_the_same_members_as_tarfile(form):
    rng = random.Random(0)
    for _ in range(60):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=FORMATS[form]) as tar:
            for _ in range(rng.randrange(1, 12)):
                member, data = member_at_random(rng, form)
                tar.addfile(member, io.BytesIO(data))
        assert headers(buffer.getvalue()) == by_tarfile(buffer.getvalue())


@pytest.mark.parametrize("form", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_the_same_members_as_gnu_tar_wrote(tmp_path, form):
    deep = "d" * 60 if form in ("v7",) else "/".join(["d" * 70] * 2)
    for path in ("a/0.png", "a/café.png", f"{deep}/1.png"):
        (tmp_path / "set" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / path).write_bytes(PNG)
    (tmp_path / "set/a/link").symlink_to("0.png")
    (tmp_path / "set/a/hard").hardlink_to(tmp_path / "set/a/0.png")
    with (tmp_path / "set/a/hole").open("wb") as file:
        file.truncate(2**20)
        file.seek(2**19)
        file.write(b"x" * 9000)
    sparse = ["--sparse"] if form in ("oldgnu", "gnu", "posix") else []
    command = ["tar", f"--format={form}", *sparse, "-cf", "x.tar", "-C", "set", "."]
    subprocess.run(command, cwd=tmp_path, check=True)
    data = (tmp_path / "x.tar").read_bytes()
    # tarfile says how large a sparse file is when unpacked; here it is how much is stored.
    ours, theirs = headers(data), by_tarfile(data)
    assert [m for m in ours if m.kind != "sparse"] == [m for m in theirs if m.kind != "sparse"]
    assert [m.path for m in ours] == [m.path for m in theirs]
    assert any(m.kind == "sparse" for m in ours) == bool(sparse)


def test_sizes_in_base_256():
    """GNU writes sizes above 8 GiB so."""
    member = tarfile.TarInfo("a.png")
    member.size = 2**40
    header = member.tobuf(tarfile.GNU_FORMAT)
    assert header[124] == 0o200
    found = read_headers(io.BytesIO(header))
    assert next(found)[1:5] == ("file", 0, 512, 2**40)
    with pytest.raises(DataError, match=rf"stops at byte {2**40 + 512}"):
        next(found)


# ---- attacks -----------------------------------------------------------------------------------


def header(name: str = "a.png", size: bytes = b"%011o\0" % 9, kind: bytes = b"0", **at: bytes):
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    block[124:136], block[156:157] = size, kind
    for place, value in at.items():
        start = int(place.removeprefix("at"))
        block[start : start + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def octal(size: int) -> bytes:
    return b"%011o\0" % size


def with_pax(kind: bytes = b"x", **records: bytes) -> bytes:
    return TAR[:MEMBERS_END] + pax(kind, **records) + header() + padded(b"x" * 9) + bytes(1024)


def pax(kind: bytes = b"x", **records: bytes) -> bytes:
    data = b""
    for key, value in records.items():
        record = b" " + key.replace("_", ".").encode() + b"=" + value + b"\n"
        length = len(record) + len(str(len(record) + 3))
        data += str(length).encode() + record
    return header("pax", octal(len(data)), kind) + padded(data)


def base_256(number: int) -> bytes:
    return (b"\xff" if number < 0 else b"\x80") + (number % 256**11).to_bytes(11, "big")


TAIL = bytes(1024)
ATTACKS: dict[str, bytes] = {
    "size -512": TAR[:MEMBERS_END] + header(size=base_256(-512)) + TAIL,
    "size -1 in octal": TAR[:MEMBERS_END] + header(size=b"-0000000001\0") + TAIL,
    "size -512 of a first member": header(size=base_256(-512)) + TAR,
    "size -2^80": header(size=base_256(-(2**80))) + TAIL,
    "size 2^87": header(size=base_256(2**87)) + TAIL,
    "size no number": header(size=b"hello world\0") + TAIL,
    "size -1024 of a long name": header("././@LongLink", base_256(-1024), b"L") + TAR,
    "pax size -512": with_pax(size=b"-512"),
    "pax size of 10^6 digits": with_pax(size=b"9" * 10**6),
    "pax size no number": with_pax(size=b"many"),
    "pax size fraction": with_pax(size=b"512.0"),
    "pax size empty": with_pax(size=b""),
    "pax size 2^62": with_pax(size=b"%d" % 2**62),
    "pax size beyond the end": with_pax(size=b"%d" % 2**40),
    "pax size of all members": with_pax(b"g", size=b"-512"),
    "pax record of length 0": header("pax", octal(9), b"x") + padded(b"0 path=a\n") + TAR,
    "pax record beyond its block": header("pax", octal(9), b"x") + padded(b"99 path=a") + TAR,
    "pax without a key": header("pax", octal(9), b"x") + padded(b"9 =aaaaa\n") + TAR,
    "pax of digits": header("pax", octal(2**20), b"x") + b"1" * 2**20 + TAR,
    "pax of spaces": header("pax", octal(2**20), b"x") + b" " * 2**20 + TAR,
    "pax path of 9,000": with_pax(path=b"a/" * 4500),
    "link to a name of 9,000": with_pax(linkpath=b"a/" * 4500),
    "long name of 9,000": header("././@LongLink", octal(9000), b"L") + padded(b"a" * 9000) + TAR,
    "in 2,000 folders": with_pax(path=b"a/" * 2000 + b"a.png"),
    "metadata alone": pax(comment=b"x") * 1000,
    "old sparse map without end": header(kind=b"S", at482=b"\1") + (bytes(504) + b"\1" * 8) * 99,
    "old sparse map cut": header(kind=b"S", at482=b"\1"),
    "new sparse map without end": pax(GNU_sparse_major=b"1", GNU_sparse_minor=b"0") + header(),
    "new sparse map of 10^18": pax(GNU_sparse_major=b"1", GNU_sparse_minor=b"0")
    + header(size=octal(512)) + padded(b"9" * 18 + b"\n"),
    "sparse map of words": pax(GNU_sparse_map=b"a,b", GNU_sparse_size=b"1") + header(),
}  # fmt: skip
SPARSE_FILES: dict[str, tuple[bytes, int]] = {
    "pax block of 8 GiB": (header("pax", octal(8 * 2**30 - 1), b"x"), 9 * 2**30),
    "long name of 8 GiB": (header("././@LongLink", octal(8 * 2**30 - 1), b"L"), 9 * 2**30),
    "long target of 8 GiB": (header("././@LongLink", octal(8 * 2**30 - 1), b"K"), 9 * 2**30),
    "global block of 8 GiB": (header("pax", octal(8 * 2**30 - 1), b"g"), 9 * 2**30),
    "label of 40 GiB": (TAR[:MEMBERS_END] + header("a.cls", base_256(40 * 2**30)), 41 * 2**30),
    "cifar batch of 40 GiB": (header("data_batch_1", base_256(40 * 2**30)), 41 * 2**30),
    "40 cifar batches of 1 GiB": (header("x/train", octal(2**30)), 41 * 2**30),
    "40 GiB of zeros after the end": (TAR[:MEMBERS_END], 40 * 2**30),
}


def scan(path: str) -> None:
    layouts.scan(path)


def test_attacks_end_in_a_line(tmp_path):
    paths = {}
    for name, data in ATTACKS.items():
        for packed in (False, True):
            path = tmp_path / f"{name}-{packed}.tar"
            path.write_bytes(gzip.compress(data, 1) if packed else data)
            paths[path.name] = (str(path),)
    said = refusals(scan, paths, max_mib=200, max_s=60)
    assert all(name in text for name, text in said.items())


def test_sparse_files_of_gib_end_in_a_line(tmp_path):
    for name, (data, size) in SPARSE_FILES.items():
        with (tmp_path / f"{name}.tar").open("wb") as file:
            file.write(data)
            file.truncate(size)
    paths = {name: (f"{tmp_path}/{name}.tar",) for name in SPARSE_FILES}
    refusals(scan, paths, max_mib=200, max_s=60)


def test_a_global_block_of_a_comment_is_honest(tmp_path):
    """`git archive` writes one."""
    (tmp_path / "x.tar").write_bytes(pax(b"g", comment=b"52" * 20) + TAR)
    assert len(layouts.scan(str(tmp_path / "x.tar"))["train"]) == len(FILES)


# ---- gzip --------------------------------------------------------------------------------------


def gzip_bomb(path: Path, head: bytes, block: bytes = bytes(2**20), mib: int = 1024) -> str:
    """`head` and then `mib` MiB of `block`; a gzip file may have many parts."""
    packed = gzip.compress(block, 9)
    path.write_bytes(gzip.compress(head) + packed * (mib * 2**20 // len(block)))
    return str(path)


def test_gzip_bombs_end_in_a_line(tmp_path):
    paths = {}
    for name in ("a.png", "a.cls", "train", "notes.bin"):
        head = TAR[:MEMBERS_END] + header(name, octal(2**30))
        paths[name] = (gzip_bomb(tmp_path / f"{name}.tar.gz", head),)
        assert Path(paths[name][0]).stat().st_size < 2**21
    paths["after the end"] = (gzip_bomb(tmp_path / "end.tar.gz", TAR + b"x" * 512),)
    folders = header("dir/", octal(0), b"5") * 2048
    paths["headers"] = (gzip_bomb(tmp_path / "headers.tar.gz", b"", folders, 512),)
    said = refusals(scan, paths, max_mib=300)
    for name in ("a.png", "train", "notes.bin", "after the end"):
        assert "at most" in said[name]


# ---- links -------------------------------------------------------------------------------------


def links(pairs: dict[str, str], kind: bytes = b"2") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for path, data in FILES.items():
            member = tarfile.TarInfo(path)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for path, target in pairs.items():
            member = tarfile.TarInfo(path)
            member.type, member.linkname = kind, target
            tar.addfile(member)
    return buffer.getvalue()


LINKS: dict[str, Callable[[], bytes]] = {
    "2^40 ways": lambda: links(
        {f"d{i}/{side}": f"../d{i + 1}" for i in range(40) for side in "ab"}
        | {"d40/x.png": "../train/ant/000.png"}
    ),
    "2^40 ways to nothing": lambda: links(
        {f"d{i}/{side}": f"../d{i + 1}" for i in range(40) for side in "ab"}
    ),
    "12 folders that lead to each other": lambda: links(
        {f"d{i}/{j}": f"../d{j}" for i in range(12) for j in range(12)}
    ),
    "a chain of 3,000": lambda: links({f"d{i}/n": f"../d{i + 1}" for i in range(3000)}),
    "a chain of 30,000 files": lambda: links({f"{i}.png": f"{i + 1}.png" for i in range(30_000)}),
    "5,000 links to one folder": lambda: links({f"l/{i}": "../train" for i in range(5000)}),
    "20,000 links to themselves": lambda: links({f"l/{i}": "." for i in range(20_000)}),
    "longer at each step": lambda: links({"a": "a/" + "b/" * 40, "c": "d/c/x", "d": "c/d/y"}),
}


def scan_links(path: str) -> int | None:
    return sum(map(len, layouts.scan(path).values()))


def test_links_never_hang_or_multiply(tmp_path):
    for name, data in LINKS.items():
        (tmp_path / f"{name}.tar").write_bytes(data())
    paths = {name: (f"{tmp_path}/{name}.tar",) for name in LINKS}
    for name, outcome in call_each(scan_links, paths, max_mib=200, max_s=60).items():
        assert outcome.exit_code == 65 or outcome.result < 40_000, name


# ---- names -------------------------------------------------------------------------------------


def test_names_are_never_paths_of_this_machine(tmp_path):
    victim = tmp_path / "train/ant/victim.png"
    victim.parent.mkdir(parents=True)
    victim.write_bytes(b"secret")
    names = [str(victim), "train/bee/../../../../etc/x.png", "//etc/ant/y.png"]
    (tmp_path / "x.tar").write_bytes(tarred(dict.fromkeys(names, PNG)))
    members = read_members(str(tmp_path / "x.tar"), False, "x")
    assert len(members.places) == len(names)
    assert not any(path.startswith("/") or ".." in path.split("/") for path in members.places)
    assert victim.read_bytes() == b"secret"


def test_numbers_are_what_the_format_says():
    (first,) = headers(header(size=struct.pack("12s", b" 0000000011\0")) + bytes(512) + TAIL)
    assert first.size == 9
