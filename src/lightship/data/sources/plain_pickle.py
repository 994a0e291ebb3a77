"""Pickles of plain data, read without `pickle`: a closed list of opcodes, nothing is imported.

`pickle.Unpickler` is not made for untrusted bytes: even where `find_class` allows NumPy alone, a
forged state of a dtype makes bytes of the file a pointer, and a 9-byte file makes it allocate 16
GiB. Here an array is a place in the file, and memory is bounded by the file's size.
"""

import codecs
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightship.errors import DataError

MAX_OPCODES = 5_000_000
"""CIFAR-100's largest file has 250,000."""
_MAX_LINE_BYTES = 2**16
_MAX_INT_BYTES = 16
_MAX_SIDES = 4

_ALLOWED = {
    **{(f"numpy.{core}.multiarray", "_reconstruct"): "array" for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): "buffer" for core in ("core", "_core")},
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    ("_codecs", "encode"): "encode",
}
"""What a pickle may name -> what it stands for here."""
_UINT8 = ("u1", "|u1", "uint8", "B")
_LATIN1 = ("latin1", "latin-1")


@dataclass
class Table:
    """A uint8 array in C order."""

    shape: tuple[int, ...] = ()
    start: int | None = None
    """Where its first byte lies in the file; None: its bytes are escaped, or not set."""


class _Stored(bytes):
    """Bytes that lie in the file as they are, from `start` on."""

    start: int


@dataclass(frozen=True)
class _Named:
    """Something that the pickle names: a callable, a class or (once called) a dtype."""

    role: str


def load(data: bytes) -> Any:
    """The value of a pickle of any protocol: containers, numbers, text, bytes and `Table`.

    Text of Python 2 becomes bytes.

    Raises:
        DataError: It is damaged, too large, or asks for anything else.
    """
    try:
        return _Machine(data).run()
    except (IndexError, KeyError, ValueError, TypeError, OverflowError, struct.error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"a damaged pickle ({type(error).__name__}: {error})") from error


class _Machine:
    """The stack machine. Each opcode is at most linear in the bytes that it takes."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        """The stacks below each mark."""
        self.memo: dict[int, Any] = {}
        self.encoded_bytes = 0

    def run(self) -> Any:
        data, opcodes = self.data, _OPCODES
        for _ in range(MAX_OPCODES):
            code = data[self.at]
            self.at += 1
            if code == _STOP:
                return self.stack.pop()
            if (opcode := opcodes.get(code)) is None:
                raise DataError(
                    f"a pickle with the opcode 0x{code:02x} at byte {self.at - 1}, which no CIFAR "
                    "archive needs; nothing of it was run"
                )
            opcode(self)
        raise DataError(f"a pickle of more than {MAX_OPCODES} opcodes; write a smaller file")

    # ---- arguments -----------------------------------------------------------------------------

    def take(self, count: int) -> _Stored:
        start, self.at = self.at, self.at + count
        if not 0 <= count <= len(self.data) - start:
            raise DataError(f"a cut pickle: {count} bytes are to follow byte {start}")
        taken = _Stored(self.data[start : self.at])
        taken.start = start
        return taken

    def number(self, size: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(size), "little", signed=signed)

    def line(self) -> bytes:
        end = self.data.find(b"\n", self.at, self.at + _MAX_LINE_BYTES)
        if end < 0:
            raise DataError(f"no line of at most {_MAX_LINE_BYTES} bytes at byte {self.at}")
        line, self.at = self.data[self.at : end], end + 1
        return line

    # ---- containers ----------------------------------------------------------------------------

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def above_mark(self) -> list[Any]:
        values, self.stack = self.stack, self.below.pop()
        return values

    def group(self, count: int) -> None:
        values = tuple(self.stack[len(self.stack) - count :])
        if len(values) < count:
            raise IndexError("too few values on the stack")
        self.stack[len(self.stack) - count :] = [values]

    def extend(self, values: list[Any]) -> None:
        _expect(self.stack[-1], list).extend(values)

    def update(self, values: list[Any]) -> None:
        table = _expect(self.stack[-1], dict)
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not isinstance(key, str | bytes | int):
                raise TypeError(f"a key of type {type(key).__name__}")
            table[key] = value

    def new_dict(self, values: list[Any]) -> None:
        self.push({})
        self.update(values)

    # ---- what NumPy and Python 3 write as calls ------------------------------------------------

    def name(self, module: Any, name: Any) -> None:
        if (role := _ALLOWED.get((_text(module), _text(name)))) is None:
            raise DataError(
                f"a pickle that asks for {_text(module):.80}.{_text(name):.80}, which no CIFAR "
                "archive needs; nothing of it was run"
            )
        self.push(_Named(role))

    def call(self) -> None:
        args, called = _expect(self.stack.pop(), tuple), _expect(self.stack.pop(), _Named)
        if called.role == "dtype":
            if _text(args[0]) not in _UINT8:
                raise DataError(f"an array of type {_text(args[0]):.20}; expected uint8")
            self.push(_Named("uint8"))
        elif called.role == "array":
            self.push(Table())
        elif called.role == "buffer":
            buffer, kind, shape, order = args
            if order != "C":
                raise DataError("an array that is not in C order")
            self.push(Table())
            self.fill(buffer, kind, shape)
        elif called.role == "encode":
            text, codec = args
            if _text(codec) not in _LATIN1:
                raise DataError(f"a pickle that asks for the codec {_text(codec):.80}")
            self.push(_expect(text, str).encode("latin-1"))
            self.encoded_bytes += len(text)  # the memo may give one text any number of times
            if self.encoded_bytes > len(self.data):
                raise DataError("a pickle that asks for more bytes than it has")
        else:
            raise TypeError(f"{called.role} is not called")

    def build(self) -> None:
        state = _expect(self.stack.pop(), tuple)
        if self.stack[-1] == _Named("uint8"):
            if _text(state[1]) != "|" or any(part is not None for part in state[2:5]):
                raise DataError("an array with a type of several fields; expected uint8")
            return
        _, shape, kind, is_fortran, buffer = state
        if is_fortran:
            raise DataError("an array that is not in C order")
        self.fill(buffer, kind, shape)

    def fill(self, buffer: Any, kind: Any, shape: Any) -> None:
        table = _expect(self.stack[-1], Table)
        sides = _expect(shape, tuple)[:_MAX_SIDES]
        if kind != _Named("uint8"):
            raise DataError("an array of an unknown type; expected uint8")
        if not all(type(side) is int and 0 <= side <= len(self.data) for side in sides):
            raise DataError("an array of an impossible shape")
        if len(shape) > _MAX_SIDES or math.prod(sides) != len(_expect(buffer, bytes)):
            raise DataError(f"an array of shape {sides!r:.80} with {len(buffer)} bytes")
        table.shape, table.start = sides, getattr(buffer, "start", None)


def _expect(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"a {type(value).__name__} where a {kind.__name__} is expected")
    return value


def _text(value: Any) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else _expect(value, str)


def _integer(line: bytes) -> int | bool:
    if line in (b"00", b"01"):
        return line == b"01"
    if len(line) > 2 * _MAX_INT_BYTES:
        raise DataError(f"a number of {len(line)} digits")
    return int(line.removesuffix(b"L"))


def _long(machine: _Machine, count: int) -> int:
    if count > _MAX_INT_BYTES:
        raise DataError(f"a number of {count} bytes; at most {_MAX_INT_BYTES}")
    return machine.number(count, signed=True)


def _quoted(line: bytes) -> bytes:
    if len(line) < 2 or line[:1] not in b"'\"" or line[-1] != line[0]:
        raise ValueError("text without quotes")
    return codecs.escape_decode(line[1:-1])[0]


def _utf8(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


_Opcode = Callable[[_Machine], object]
_STOP = ord(".")
_NAMED_OPCODES: dict[str, _Opcode] = {
    # numbers and constants
    "K": lambda m: m.push(m.number(1)),
    "M": lambda m: m.push(m.number(2)),
    "J": lambda m: m.push(m.number(4, signed=True)),
    "I": lambda m: m.push(_integer(m.line())),
    "L": lambda m: m.push(_integer(m.line())),
    "\x8a": lambda m: m.push(_long(m, m.number(1))),
    "\x8b": lambda m: m.push(_long(m, m.number(4))),
    "F": lambda m: m.push(float(m.line())),
    "G": lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    "N": lambda m: m.push(None),
    "\x88": lambda m: m.push(True),
    "\x89": lambda m: m.push(False),
    # text and bytes
    "S": lambda m: m.push(_quoted(m.line())),
    "V": lambda m: m.push(m.line().decode("raw-unicode-escape")),
    "U": lambda m: m.push(m.take(m.number(1))),
    "T": lambda m: m.push(m.take(m.number(4))),
    "C": lambda m: m.push(m.take(m.number(1))),
    "B": lambda m: m.push(m.take(m.number(4))),
    "\x8e": lambda m: m.push(m.take(m.number(8))),
    "\x96": lambda m: m.push(m.take(m.number(8))),
    "\x8c": lambda m: m.push(_utf8(m.take(m.number(1)))),
    "X": lambda m: m.push(_utf8(m.take(m.number(4)))),
    "\x8d": lambda m: m.push(_utf8(m.take(m.number(8)))),
    # containers
    "(": _Machine.mark,
    "]": lambda m: m.push([]),
    "l": lambda m: m.push(m.above_mark()),
    "a": lambda m: m.extend([m.stack.pop()]),
    "e": lambda m: m.extend(m.above_mark()),
    "}": lambda m: m.push({}),
    "d": lambda m: m.new_dict(m.above_mark()),
    "s": lambda m: m.update([m.stack.pop(-2), m.stack.pop()]),
    "u": lambda m: m.update(m.above_mark()),
    ")": lambda m: m.push(()),
    "t": lambda m: m.push(tuple(m.above_mark())),
    "\x85": lambda m: m.group(1),
    "\x86": lambda m: m.group(2),
    "\x87": lambda m: m.group(3),
    # the memo, by number; a dict, so that a large number takes no memory
    "q": lambda m: m.memo.__setitem__(m.number(1), m.stack[-1]),
    "r": lambda m: m.memo.__setitem__(m.number(4), m.stack[-1]),
    "p": lambda m: m.memo.__setitem__(_integer(m.line()), m.stack[-1]),
    "\x94": lambda m: m.memo.__setitem__(len(m.memo), m.stack[-1]),
    "h": lambda m: m.push(m.memo[m.number(1)]),
    "j": lambda m: m.push(m.memo[m.number(4)]),
    "g": lambda m: m.push(m.memo[_integer(m.line())]),
    # names and calls
    "c": lambda m: m.name(m.line(), m.line()),
    "\x93": lambda m: m.name(m.stack.pop(-2), m.stack.pop()),
    "R": _Machine.call,
    "b": _Machine.build,
    # the version, and the size of a frame, which is only a hint for buffers
    "\x80": lambda m: m.take(1),
    "\x95": lambda m: m.take(8),
}
_OPCODES = {ord(code): opcode for code, opcode in _NAMED_OPCODES.items()}
