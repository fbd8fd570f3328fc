"""Files are whole under their name or not there: errors, symbolic links, kills, full disks, two writers."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ltx2_gguf.quant.output import Output, OutputError, check_output

SUPPORT = Path(__file__).resolve().parents[1] / "support"
posix = pytest.mark.skipif(os.name == "nt", reason="signals, symbolic links and limits of POSIX")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def child(code, *args, **kwargs):
    """A Python that has the pack and runs ``code``."""
    start = f"import sys; sys.path.insert(0, {str(SUPPORT)!r}); import packloader\nfrom ltx2_gguf.quant.output import Output\n"
    return subprocess.Popen(
        [sys.executable, "-c", start + code, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def test_the_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "a.bin"
    with Output(path) as output:
        output.file.write(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole" and names(tmp_path) == ["a.bin"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_an_error_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"before")
    with pytest.raises(KeyboardInterrupt), Output(path) as output:
        output.file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"before" and names(tmp_path) == ["a.bin"]


def test_a_file_that_came_in_the_meantime_is_not_replaced(tmp_path):
    path = tmp_path / "a.bin"
    with pytest.raises(OutputError, match="exists already"), Output(path, overwrite=False) as output:
        output.file.write(b"mine")
        path.write_bytes(b"theirs")
    assert path.read_bytes() == b"theirs" and names(tmp_path) == ["a.bin"]


def test_without_hard_links_it_is_renamed(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with Output(tmp_path / "a.bin", overwrite=False) as output:
        output.file.write(b"x")
    assert names(tmp_path) == ["a.bin"]


@posix
def test_nothing_is_written_through_a_symbolic_link(tmp_path):
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "a.bin").symlink_to(tmp_path / "precious")
    with pytest.raises(OutputError, match="a symbolic link"):
        Output(tmp_path / "a.bin")
    (tmp_path / "b.bin").symlink_to(tmp_path / "nothing")
    with pytest.raises(OutputError, match="a symbolic link"):
        Output(tmp_path / "b.bin")
    with pytest.raises(OutputError, match="a symbolic link"), Output(tmp_path / "c.bin") as output:
        (tmp_path / "c.bin").symlink_to(tmp_path / "precious")
        output.file.write(b"x")
    assert (tmp_path / "precious").read_bytes() == b"precious" and not list(tmp_path.glob("*.partial"))


@posix
def test_temporary_names_that_others_took_are_left_alone(tmp_path, monkeypatch):
    (tmp_path / "victim").write_bytes(b"victim")
    tokens = iter(["taken", "free"])
    monkeypatch.setattr("secrets.token_hex", lambda _: next(tokens))
    (tmp_path / ".a-taken.partial").symlink_to(tmp_path / "victim")
    with Output(tmp_path / "a.bin") as output:
        assert output.partial.name == ".a-free.partial"
    assert (tmp_path / "victim").read_bytes() == b"victim" and (tmp_path / ".a-taken.partial").is_symlink()


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("a.txt", {"suffixes": (".gguf",)}, "ending in .gguf"),
        ("no/a.gguf", {}, "folder .*no does not exist"),
        ("folder", {"overwrite": True}, "is a folder"),
        ("there.gguf", {}, "exists already"),
        ("there.gguf", {"overwrite": True, "sources": ["there.gguf"]}, "is the source itself"),
        ("a.gguf", {"nbytes": 10**18}, "make room"),
        ("there.gguf/a.gguf", {}, "does not exist"),
        ("x" * 300, {}, "cannot be written"),
    ],
)
def test_what_cannot_be_written_is_known_beforehand(tmp_path, monkeypatch, name, options, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "there.gguf").write_bytes(b"x")
    with pytest.raises(OutputError, match=words):
        check_output(tmp_path / name, **options)
    assert names(tmp_path) == ["folder", "there.gguf"]


@posix
@pytest.mark.parametrize("name", ["/dev/null", "fifo"])
def test_what_is_no_regular_file_is_refused(tmp_path, name):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OutputError, match="no regular file"):
        check_output(tmp_path / name, overwrite=True)


def test_a_folder_without_permission_is_refused(tmp_path, monkeypatch):
    def refuse(path, flags, mode):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)  # root may write everywhere
    with pytest.raises(OutputError, match="Permission denied.*another folder"):
        check_output(tmp_path / "a.bin")


@posix
def test_a_full_disk_leaves_nothing(tmp_path):
    """A limit on file sizes stands for the full disk: the write fails in the same place, with an error of the system."""
    code = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with Output(sys.argv[1]) as output:
        for _ in range(100):
            output.file.write(bytes(10_000))
except OSError as error:
    print("refused", error.errno)
"""
    out, err = child(code, tmp_path / "a.bin").communicate(timeout=60)
    assert out.startswith("refused"), err
    assert names(tmp_path) == []


@posix
@pytest.mark.parametrize("how", ["SIGTERM as the command line takes it", "exit inside the block"])
def test_an_end_in_the_middle_leaves_nothing(tmp_path, how):
    code = """
import signal, time
def leave(*_):
    raise SystemExit(143)
signal.signal(signal.SIGTERM, leave)
output = Output(sys.argv[1])
output.file.write(b"half")
print("writing", flush=True)
if sys.argv[2] == "exit":
    sys.exit(3)
time.sleep(60)
"""
    process = child(code, tmp_path / "a.bin", how.split()[0])
    assert process.stdout.readline() == "writing\n", process.stderr.read()
    if how.startswith("SIGTERM"):
        process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode in (143, 3) and names(tmp_path) == []


@posix
def test_a_kill_leaves_the_target_as_it_was(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"before")
    code = "import time\noutput = Output(sys.argv[1])\noutput.file.write(bytes(10**6))\nprint('writing', flush=True)\ntime.sleep(60)"
    process = child(code, tmp_path / "a.bin")
    assert process.stdout.readline() == "writing\n", process.stderr.read()
    process.kill()
    process.communicate(timeout=60)
    assert (tmp_path / "a.bin").read_bytes() == b"before"
    with Output(tmp_path / "a.bin") as output:  # what the kill left behind is in nobody's way
        output.file.write(b"after")
    assert (tmp_path / "a.bin").read_bytes() == b"after"


@pytest.mark.parametrize("overwrite", [True, False])
def test_two_writers_to_one_target_never_mix(tmp_path, overwrite):
    code = """
letter, overwrite = sys.argv[2].encode(), sys.argv[3] == "True"
try:
    with Output(sys.argv[1], overwrite) as output:
        print("open", flush=True)
        sys.stdin.readline()
        for _ in range(200):
            output.file.write(letter * 10_000)
    print("done")
except ValueError as error:
    print("refused", error)
"""
    writers = [child(code, tmp_path / "a.bin", letter, overwrite, stdin=subprocess.PIPE) for letter in "ab"]
    for writer in writers:
        assert writer.stdout.readline() == "open\n", writer.stderr.read()
    for writer in writers:
        writer.stdin.write("\n")
        writer.stdin.flush()
    said = sorted(writer.communicate(timeout=60)[0].split()[0] for writer in writers)
    assert said == (["done", "done"] if overwrite else ["done", "refused"])
    data = (tmp_path / "a.bin").read_bytes()
    assert len(data) == 2_000_000 and len(set(data)) == 1
    assert names(tmp_path) == ["a.bin"]
