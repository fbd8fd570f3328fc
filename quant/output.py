"""Files that are written once: whole under their name, or not at all. Standard library only.

Every writer of the pack goes through ``Output``. The data goes to a temporary file in the target's folder, which is created exclusively under a
name that nobody else has, and takes the target's name when it is complete. The temporary file is removed on every error, and when the
interpreter ends for any other reason than a kill.
"""

import atexit
import contextlib
import os
import secrets
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path

SPARE_BYTES = (
    64 * 2**20
)  # free space asked for beyond the data: header, alignment, and not filling the disk to the last byte

_unfinished: set[tuple[int, str]] = set()  # (process, temporary file)


class OutputError(ValueError):
    """The output cannot be written where it should; the message says why and what to do."""

    __module__ = "quant"  # shown before the name of the error


class Output:
    """The file ``path`` in the making: write to ``file`` (binary, seekable) or to the path ``partial``, then ``commit`` or ``abort``.

        with Output("a.gguf") as output:
            output.file.write(data)

    Leaving the block normally commits, an exception aborts; then nothing has changed. overwrite: whether a file of that name may be
    replaced. Two writers to one target never mix; without ``overwrite`` the second one to finish is refused. Raises OutputError for a target
    that is no regular file, and OSError.
    """

    def __init__(self, path: str | os.PathLike, overwrite: bool = True):
        self.path, self.overwrite, self.file = Path(path), overwrite, None
        _check_target(self.path, overwrite)
        while True:
            self.partial = self.path.with_name(f".{self.path.stem[:40]}-{secrets.token_hex(6)}.partial")
            self._entry = (os.getpid(), str(self.partial))
            _unfinished.add(self._entry)
            try:
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
                self.file = os.fdopen(os.open(self.partial, flags, 0o666), "w+b")
                return
            except FileExistsError:
                _unfinished.discard(self._entry)
            except BaseException:
                _unfinished.discard(self._entry)
                raise

    def commit(self) -> None:
        """Give the finished file its name. Raises OutputError when something else has taken it in the meantime; then it is removed."""
        if self.file.closed:
            return
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            _check_target(self.path, self.overwrite)
            if self.overwrite:
                os.replace(self.partial, self.path)
            else:
                self._place_exclusively()
        except OSError as error:
            self.abort(error)
            raise
        finally:
            self.abort()

    def _place_exclusively(self) -> None:
        try:
            os.link(self.partial, self.path)  # unlike a renaming, this fails when the name is taken
        except FileExistsError:
            _check_target(self.path, overwrite=False)
            raise
        except OSError:  # a file system without hard links
            os.replace(self.partial, self.path)

    def abort(self, error: BaseException | None = None) -> None:
        """Remove the temporary file, if it is still there. An error of the system that names no file, as of a full disk, gets the target's name."""
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(self.path)
        with contextlib.suppress(OSError):
            self.file.close()  # the buffer of a full disk cannot be flushed
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.partial)
        _unfinished.discard(self._entry)

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, kind, error, _traceback) -> None:
        if kind is None:
            self.commit()
        else:
            self.abort(error)


@atexit.register
def _remove_unfinished() -> None:
    for process, partial in list(_unfinished):
        if process == os.getpid():
            with contextlib.suppress(OSError):
                os.unlink(partial)


def check_output(
    path: str | os.PathLike,
    *,
    suffixes: Sequence[str] = (),
    overwrite: bool = False,
    sources: Sequence = (),
    nbytes: int = 0,
) -> Path:
    """Everything that can be known about an output before the work begins; returns the path.

    suffixes: the names' endings allowed. sources: files that must not be written over. nbytes: the size to come. Raises OutputError.
    """
    path = Path(path)
    if suffixes and path.suffix.lower() not in suffixes:
        raise OutputError(f"{path.name}: give the output a name ending in {' or '.join(suffixes)}.")
    for source in map(Path, sources):
        if path.exists() and source.exists() and os.path.samefile(path, source):
            raise OutputError(f"{path.name} is the source itself; choose another name for the output.")
    _check_target(path, overwrite)
    try:
        Output(path, overwrite).abort()
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror}); choose another folder.") from error
    free = shutil.disk_usage(path.parent).free
    if free < nbytes + SPARE_BYTES:
        need, room = f"{(nbytes + SPARE_BYTES) / 1e9:.1f} GB", f"{free / 1e9:.1f} GB"
        raise OutputError(
            f"The output needs {need} and {path.parent} has {room} free; make room or choose another disk."
        )
    return path


def _check_target(path: Path, overwrite: bool) -> None:
    if not path.parent.is_dir():
        raise OutputError(f"The folder {path.parent} does not exist.")
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror}); choose another name.") from error
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a symbolic link" if stat.S_ISLNK(mode) else "no regular file"
        raise OutputError(f"{path} is {what}; name a file to write.")
    if not overwrite:
        raise OutputError(f"{path} exists already; choose another name or pass --overwrite.")
