"""The memory of the images that the threads of this process decode at a time."""

import contextlib
import threading
from collections import deque

FREE_BYTES = 8 * 2**20
"""An image that takes less is not counted: a megapixel or so."""

_turn = threading.Condition()
_queue: deque[object] = deque()
_held_bytes = 0


class _Thread(threading.local):
    depth = 0
    held_bytes = 0


_this_thread = _Thread()


class held(contextlib.ContextDecorator):
    """What `take` takes within is given back at the end of the outermost such block or function."""

    def __enter__(self) -> None:
        _this_thread.depth += 1

    def __exit__(self, *_: object) -> None:
        global _held_bytes
        _this_thread.depth -= 1
        if not _this_thread.depth and _this_thread.held_bytes:
            with _turn:
                _held_bytes -= _this_thread.held_bytes
                _turn.notify_all()
            _this_thread.held_bytes = 0


def take(size_bytes: int, bound_bytes: int) -> None:
    """Wait until an image of so many bytes may be decoded beside the others, in turn.

    At most `bound_bytes` are held at a time; an image of more is decoded alone. Call it once within
    `held`: a thread that waits holds nothing, so the wait ends.
    """
    global _held_bytes
    if size_bytes <= FREE_BYTES:
        return
    assert _this_thread.depth
    assert not _this_thread.held_bytes
    ticket = object()
    with _turn:
        _queue.append(ticket)
        try:
            _turn.wait_for(
                lambda: (
                    _queue[0] is ticket
                    and (not _held_bytes or _held_bytes + size_bytes <= bound_bytes)
                )
            )
            _held_bytes += size_bytes
        finally:
            _queue.remove(ticket)
            _turn.notify_all()
    _this_thread.held_bytes = size_bytes
