"""Ctrl-C, which comes to every process of a terminal at once."""

import signal


def end_at_ctrl_c() -> None:
    """In a worker: end by it without a word, as the process that started the workers tells of it.

    Where it is ignored, as in what a script starts with `&`, it stays so: that process goes on and needs its workers.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
