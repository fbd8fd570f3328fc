"""Run one command: errors as sentences, signals, exit codes.

Exit codes: 0 done, 1 an error (one sentence on stderr), 2 wrong usage, 130 interrupted, 143 ended by SIGTERM. Tables and JSON go to stdout,
everything else to stderr.
"""

import contextlib
import logging
import signal
import sys
import threading
from collections.abc import Iterator

from .parser import COMMANDS, build_parser
from .printing import PROG, sentence

PACKAGE = __package__.rpartition(".ltx2_core")[0]
ISSUES = "https://github.com/ltx2-gguf/ComfyUI-LTX2-GGUF/issues"
INSTALL = "Install what a run needs with: pip install torch numpy safetensors comfy-kitchen packaging sentencepiece av tqdm pillow"


class Terminated(BaseException):
    """SIGTERM or SIGHUP arrived: everything is cleaned up on the way out."""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code (usage errors leave through argparse with 2)."""
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    if not argv or (len(argv) == 1 and argv[0] in {module.NAME for module in COMMANDS}):
        bare = parser if not argv else parser._subparsers._group_actions[0].choices[argv[0]]
        print(bare.format_help(), file=sys.stderr)
        raise SystemExit(2)
    args = parser.parse_args(argv)
    args.arguments = list(argv)
    level = logging.INFO if args.verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    try:
        with _signals():
            return args.run(args) or 0
    except Terminated:
        print(f"{PROG}: terminated", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
    except Exception as error:
        if args.verbose:
            logging.exception("details")
        print(f"{PROG}: {_told(error, args)}", file=sys.stderr)
        return 1


def _told(error: Exception, args) -> str:
    """One sentence for an error: what the pack says itself, or how to report what nobody expected."""
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith(PACKAGE):
        return f"'{args.command}' needs the Python package '{error.name}', which is not installed. {INSTALL}"
    if type(error).__name__ == "OutOfMemoryError" and not _raised_here(error):
        return "The device ran out of memory. Close other programs that use it, or pass --memory-budget with less than it has."
    if isinstance(error, MemoryError):
        return f"There is not enough memory ({sentence(error)}). Close other programs, or use a smaller file or video."
    if isinstance(error, OSError) or type(error).__module__.startswith(PACKAGE):
        return sentence(error)
    if isinstance(error, (ValueError, RuntimeError)) and _raised_here(error):
        return sentence(error)
    more = "" if args.verbose else " Run the same command with -v and"
    return f"Unexpected error ({type(error).__name__}: {sentence(error)[:300]}).{more or ' Please'} report it with the output at {ISSUES}."


def _raised_here(error: BaseException) -> bool:
    """Whether the pack's own code raised it, rather than a library that it called."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and str(frame.tb_frame.f_globals.get("__name__", "")).startswith(PACKAGE)


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """While a command runs, SIGTERM and SIGHUP unwind it like an exception, so that nothing half-written stays."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals belong to the main thread
        return

    def terminate(*_):
        raise Terminated

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {
        number: signal.signal(number, terminate) for number in numbers if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
