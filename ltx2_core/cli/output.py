"""What the command line prints: results on stdout, progress on stderr. Standard library only until a bar appears."""

import sys

# The command as people type it; ``python -m`` would otherwise show the module's path.
PROG = "ltx2-gguf"


def print_out(text: str) -> None:
    """A result, on stdout."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class Bar:
    """A progress bar of bytes on stderr. It appears with the first progress, so that a refused command prints its one sentence alone."""

    def __init__(self, total: int | None, title: str, quiet: bool):
        self.total, self.title, self.quiet, self.bar = total, title, quiet, None

    def at(self, done: int, _what: str) -> None:
        if self.quiet:
            return
        if self.bar is None:
            from tqdm import tqdm

            self.bar = tqdm(total=self.total, desc=self.title, unit="B", unit_scale=True, file=sys.stderr, dynamic_ncols=True)
        self.bar.update(done - self.bar.n)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()


class Stages:
    """One bar after the other for the stages of a generation."""

    def __init__(self, quiet: bool):
        self.quiet, self.stage, self.bar = quiet, None, None

    def at(self, stage: str, done: int, total: int) -> None:
        if self.quiet:
            return
        if stage != self.stage:
            self.close()
            from tqdm import tqdm

            self.stage, self.bar = stage, tqdm(total=total, desc=stage, file=sys.stderr, dynamic_ncols=True)
        self.bar.update(done - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def __enter__(self) -> "Stages":
        return self

    def __exit__(self, *_) -> None:
        self.close()
