"""Start one process per device on this machine, and end all of them together. Standard library only.

The processes find each other by the variables that ``torchrun`` sets, so what runs under this launcher runs under ``torchrun`` as well (several machines, a scheduler).
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time

POLL_SECONDS = 0.1
GRACE_SECONDS = 5.0  # between asking the others to end and ending them


class RankError(RuntimeError):
    """A process of the run failed; the message names its rank and the cause."""

    __module__ = "ltx2_gguf"  # shown before the name of the error


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launch(command: list[str], count: int, together: bool = True) -> None:
    """Run ``command`` in ``count`` processes with RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set, and wait for all.

    together: the ranks depend on each other, so the first that fails ends all; else each runs to its own end. Rank 0 prints, the others are quiet.
    Raises RankError for the first rank that failed.
    """
    env = {**os.environ, "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    ranks, logs = [], []
    try:
        for rank in range(count):
            logs.append(tempfile.TemporaryFile("w+", errors="replace") if rank else None)
            streams = {"stdout": subprocess.DEVNULL, "stderr": logs[-1]} if rank else {}
            ranks.append(subprocess.Popen(command, env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, **streams))
        failed = _wait(ranks, together)
    finally:
        _end(ranks)
    if failed is not None:
        raise RankError(f"Rank {failed} of {count} {_cause(ranks[failed].returncode, logs[failed])}")


def _wait(ranks, together: bool) -> int | None:
    """The first rank that failed, or None when all are done."""
    first = None
    while True:
        codes = [rank.poll() for rank in ranks]
        for number, code in enumerate(codes):
            if code and first is None:
                first = number
        if first is not None and together:
            return first
        if all(code is not None for code in codes):
            return first
        time.sleep(POLL_SECONDS)


def _end(ranks) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.terminate()
    end = time.monotonic() + GRACE_SECONDS
    for rank in ranks:
        try:
            rank.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()


def _cause(code: int, log) -> str:
    """How a process ended, with the last thing it said."""
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
        return f"was ended by {name}" + (
            " (often the system's answer to too little main memory)." if name == "SIGKILL" else "."
        )
    if log is None:
        return f"failed with exit code {code}; what it said stands above."
    log.seek(0)
    lines = [line.strip() for line in log.read()[-20_000:].splitlines() if line.strip()]
    return f"failed: {lines[-1]}" if lines else f"failed with exit code {code} and said nothing."


def own_command(module: str, arguments: list[str]) -> list[str]:
    """The command that runs ``module`` of this package with this Python, as this process was started."""
    return [sys.executable, "-m", module, *arguments]
