"""`python -m router.tokenizer_process FD MODEL_DIR`: tokenises long texts for one router.

It reads the tokenizer once. For each socket that comes over FD it forks a child, which serves that
socket; the first byte says how nice to be to other processes.

    router ──socket──▶ this process ──fork──▶ child ◀── texts, tokens ──▶ router

A child ends when the other end of its socket is closed, also in the middle of a text. So a text
that nobody waits for costs nothing more, and nothing remains of a router that was killed. This
process ends when FD is closed.
"""

import os
import select
import signal
import socket
import struct
import sys
from array import array
from pathlib import Path
from threading import Thread
from typing import NoReturn

from pdserve.engine.tokenizer import Tokenizer

REQUEST = struct.Struct("<?Q")
"""Whether to add special tokens, and the bytes of UTF-8 that follow."""
REPLY = struct.Struct("<?Q")
"""Whether the text could be encoded, and the number of tokens that follow, 4 bytes each."""
TOKEN_BYTES = 4
MAX_NICE = 19
_MAX_OOM_SCORE = 1000


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    # The router drains on these signals, also where a terminal sends them to all its processes.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel forgets children that ended
    tokenizer = Tokenizer.load(Path(sys.argv[2]))
    while True:
        niceness, fds, _, _ = socket.recv_fds(control, 1, 1)
        if not niceness:
            return
        for fd in fds:
            if os.fork() == 0:
                control.close()
                _serve(tokenizer, fd, niceness[0])
            os.close(fd)


def _serve(tokenizer: Tokenizer, fd: int, niceness: int) -> NoReturn:
    """Encode text after text, until the other end is closed."""
    try:
        os.nice(niceness)
        _die_first_for_memory()
        Thread(target=_end_when_closed, args=(fd,), daemon=True).start()
        with socket.socket(fileno=fd) as peer, peer.makefile("rwb") as stream:
            while header := stream.read(REQUEST.size):
                add_special_tokens, num_bytes = REQUEST.unpack(header)
                text = stream.read(num_bytes).decode()
                stream.write(_encode(tokenizer, text, add_special_tokens=add_special_tokens))
                stream.flush()
    finally:
        os._exit(0)  # the other end learns it from the socket; nothing of the parent is ours


def _encode(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> bytes:
    try:
        token_ids = array("I", tokenizer.encode(text, add_special_tokens=add_special_tokens))
    except Exception:  # noqa: BLE001  the library raises bare Exception
        return REPLY.pack(False, 0)
    return REPLY.pack(True, len(token_ids)) + token_ids.tobytes()


def _end_when_closed(fd: int) -> None:
    """End this process when the router has closed its end, whatever is being computed."""
    poll = select.poll()
    poll.register(fd, 0)  # a hang-up is told unasked
    poll.poll()
    os._exit(0)


def _die_first_for_memory() -> None:
    """If memory runs out, this process goes and not the router."""
    try:
        Path("/proc/self/oom_score_adj").write_text(str(_MAX_OOM_SCORE), encoding="ascii")
    except OSError:
        return  # not Linux, or not allowed: the kernel chooses


if __name__ == "__main__":
    main()
