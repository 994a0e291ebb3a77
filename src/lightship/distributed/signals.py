"""Which signals ask a process to save and end."""

import signal


def stop_signals() -> tuple[int, ...]:
    """The signals that ask a process to save and end.

    SIGHUP (the terminal went away) is one of them unless it is ignored: `nohup` has asked for that.
    """
    signals = [signal.SIGTERM, signal.SIGINT]
    hangup = getattr(signal, "SIGHUP", None)  # not on Windows
    if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:
        signals.append(hangup)
    return tuple(signals)
