"""What the command line prints: results on stdout, progress on stderr. Standard library only until a bar appears."""

import sys

# The command as people type it; ``python -m`` would otherwise show the module's path.
PROG = "ltx2-gguf"


def print_out(text: str) -> None:
    """A result, on stdout."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def note(text: str) -> None:
    """Something worth knowing beside the result, on stderr."""
    print(f"Note: {text}", file=sys.stderr)


def sentence(error: BaseException) -> str:
    """An error as one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    return " ".join(str(error).split()) or type(error).__name__


class Bar:
    """Progress on stderr, one bar after the other for the stages of the work. ``unit``: "B" for bytes, else counts.

    A bar appears with the first progress, so that a refused command prints its one sentence alone.
    """

    def __init__(self, quiet: bool, unit: str = "it"):
        self.quiet, self.unit, self.stage, self.bar = quiet, unit, None, None

    def at(self, stage: str, done: int, total: int | None) -> None:
        if self.quiet:
            return
        if stage != self.stage:
            self.close()
            from tqdm import tqdm

            scale = self.unit == "B"
            self.bar = tqdm(
                total=total, desc=stage, unit=self.unit, unit_scale=scale, file=sys.stderr, dynamic_ncols=True
            )
            self.stage = stage
        self.bar.update(done - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_) -> None:
        self.close()
