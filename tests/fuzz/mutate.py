"""Mutations of a valid file, reproducible from a random generator.

A checksum or a compression would turn most of them into the same early refusal, so a mutation also
works inside: members of a zip, the content of a gzip, chunks of a PNG are changed and packed again
with the right checksum.
"""

import gzip
import io
import random
import struct
import warnings
import zipfile
import zlib

_NUMBERS = (
    0,
    1,
    -1,
    127,
    128,
    255,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**63 - 1,
)
_WORDS = (
    b"-1", b"1e308", b"NaN", b"null", b"true", b"99999999999999999999", b"../../x", b"/etc/passwd",
    b"\x00", b"\x1b[2J", b"\xff\xfe", b"\xed\xa0\x80", b"\r\n", b"[" * 2000, b"{" * 2000, b'"' * 9,
    b"&a [*a,*a]", b"!!python/object:os.system", b"cos\nsystem\n", b"A" * 4096, b"\xff" * 4096,
)  # fmt: skip
_PNG = b"\x89PNG\r\n\x1a\n"


def mutated(data: bytes, rng: random.Random, depth: int = 0) -> bytes:
    """`data` with one to eight changes, on its surface or within its packing."""
    if depth < 3 and rng.random() < 0.7:
        for is_packed, within in (
            (data[:4] == b"PK\x03\x04", _within_zip),
            (data[:2] == b"\x1f\x8b", _within_gzip),
            (data[:8] == _PNG, _within_png),
        ):
            if is_packed:
                return within(data, rng, depth + 1)
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        rng.choice(_CHANGES)(changed, rng)
    return bytes(changed)


def _within_zip(data: bytes, rng: random.Random, depth: int) -> bytes:
    packed = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(io.BytesIO(data)) as archive:
        warnings.simplefilter("ignore")  # of two members of one name
        members = archive.infolist()
        chosen = rng.randrange(len(members))
        with zipfile.ZipFile(packed, "w") as result:
            for i, member in enumerate(members):
                content = archive.read(member)
                if i == chosen:
                    content = mutated(content, rng, depth)
                    if rng.random() < 0.05:
                        continue
                if i == chosen and rng.random() < 0.1:
                    member.filename = mutated(member.filename.encode(), rng).decode("latin1")[:999]
                result.writestr(member, content)
    return packed.getvalue()


def _within_gzip(data: bytes, rng: random.Random, depth: int) -> bytes:
    return gzip.compress(mutated(gzip.decompress(data), rng, depth), compresslevel=1)


def _within_png(data: bytes, rng: random.Random, depth: int) -> bytes:
    chunks, start = [], 8
    while start + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, start)
        chunks.append((data[start + 4 : start + 8], data[start + 8 : start + 8 + length]))
        start += 12 + length
    chosen = rng.randrange(len(chunks))
    kind, content = chunks[chosen]
    if kind == b"IDAT" and rng.random() < 0.5:
        content = zlib.compress(mutated(zlib.decompress(content), rng, depth))
    else:
        content = mutated(content, rng, depth)
    kind = rng.choice((kind,) * 9 + (b"IDAT", b"PLTE", b"tRNS", b"iCCP", b"zTXt", b"eXIf", b"acTL"))
    chunks[chosen] = kind, content
    if rng.random() < 0.1:
        rng.shuffle(chunks)
    packed = [
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    ]
    return _PNG + b"".join(packed)


def _place(data: bytearray, rng: random.Random) -> int:
    """Any place; those near the start or the end, where headers and footers lie, more often."""
    near = min(len(data), 64)
    choice = rng.random()
    if choice < 0.3:
        return rng.randrange(near + 1)
    return len(data) - rng.randrange(near + 1) if choice < 0.5 else rng.randrange(len(data) + 1)


def _flip_bit(data: bytearray, rng: random.Random) -> None:
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _invert_byte(data: bytearray, rng: random.Random) -> None:
    if data:
        data[min(_place(data, rng), len(data) - 1)] ^= 255


def _write_number(data: bytearray, rng: random.Random) -> None:
    at, width = _place(data, rng), rng.choice((1, 2, 4, 8))
    number = rng.choice(_NUMBERS) % 2 ** (8 * width)
    data[at : at + width] = number.to_bytes(width, rng.choice(("little", "big")))


def _write_digits(data: bytearray, rng: random.Random) -> None:
    digits = [i for i in range(len(data)) if 48 <= data[i] <= 57] if len(data) < 2**17 else []
    if digits:
        data[rng.choice(digits)] = rng.choice(b"0123456789-e.")


def _write_word(data: bytearray, rng: random.Random) -> None:
    at, word = _place(data, rng), rng.choice(_WORDS)
    data[at : at + rng.choice((0, len(word)))] = word


def _cut(data: bytearray, rng: random.Random) -> None:
    del data[_place(data, rng) :]


def _remove(data: bytearray, rng: random.Random) -> None:
    at = _place(data, rng)
    del data[at : at + rng.choice((1, 2, 4, 16, 64, 512))]


def _repeat(data: bytearray, rng: random.Random) -> None:
    at, length = _place(data, rng), rng.choice((1, 4, 16, 512))
    data[at:at] = data[at : at + length] * rng.choice((1, 2, 16, 64))


def _move(data: bytearray, rng: random.Random) -> None:
    at, length = _place(data, rng), rng.choice((1, 4, 16, 512))
    piece = data[at : at + length]
    to = _place(data, rng)
    data[to : to + len(piece)] = piece


_CHANGES = (
    _flip_bit, _flip_bit, _invert_byte, _write_number, _write_number, _write_digits, _write_word,
    _cut, _remove, _repeat, _move,
)  # fmt: skip
