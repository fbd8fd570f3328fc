"""The real host as a server on this machine: started on a free loopback port with a folder of its own, driven through its HTTP API.

Used by the demo, the server and browser tests, and by hand: ``python scripts/comfy_server.py FOLDER`` serves the pack until interrupted.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

PACK = Path(__file__).resolve().parents[1]
MODEL_FOLDERS = (
    "diffusion_models",
    "text_encoders",
    "vae",
    "checkpoints",
    "loras",
    "latent_upscale_models",
    "unet",
    "clip",
)


class PromptFailed(AssertionError):
    """The host refused a prompt or a node raised; ``details`` holds what the API said."""

    def __init__(self, message, details):
        super().__init__(message)
        self.details = details


def prepare(base, files=()):
    """Make the host's folders under ``base``, link the pack into ``custom_nodes``, and link ``files`` ((folder, path) pairs) into the model folders."""
    base = Path(base)
    for folder in ("custom_nodes", "input", "output", "user", *(f"models/{name}" for name in MODEL_FOLDERS)):
        (base / folder).mkdir(parents=True, exist_ok=True)
    link_folder(base / "custom_nodes" / "ComfyUI-LTX2-GGUF", PACK)
    for folder, path in files:
        target = base / "models" / folder / Path(path).name
        if not target.exists():
            link_file(target, Path(path).resolve())
    return base


def link_folder(link, folder):
    """A link to a folder; a junction on Windows, where symbolic links need a privilege."""
    if link.exists():
        return
    if os.name == "nt":
        subprocess.run(["cmd", "/c", "mklink", "/J", str(link), str(folder)], check=True, stdout=subprocess.DEVNULL)
    else:
        link.symlink_to(folder, target_is_directory=True)


def link_file(link, path):
    """A symbolic link to a file; a hard link, or a copy across drives, where symbolic links are not allowed."""
    for make in (link.symlink_to, link.hardlink_to):
        try:
            make(path)
            return
        except OSError:
            continue
    shutil.copyfile(path, link)


class Server:
    """``with Server(base) as server:`` starts the host and stops it again. ``base`` was made by ``prepare``."""

    def __init__(self, base, host_path=None, arguments=("--cpu",), timeout=120):
        self.base = Path(base).resolve()
        self.host_path = Path(host_path or os.environ["COMFYUI_PATH"])
        self.arguments = list(arguments)
        self.timeout = timeout
        self.process = None
        self.log_path = self.base / "server.log"

    def __enter__(self):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [
            sys.executable,
            "main.py",
            *self.arguments,
            "--base-directory",
            str(self.base),
            "--database-url",
            "sqlite:///:memory:",
        ]
        command += ["--listen", "127.0.0.1", "--port", str(self.port), "--disable-api-nodes", "--disable-auto-launch"]
        log = open(self.log_path, "w", encoding="utf-8")
        self.process = subprocess.Popen(command, cwd=self.host_path, stdout=log, stderr=subprocess.STDOUT)
        log.close()
        deadline = time.monotonic() + self.timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"The server stopped while starting:\n{self.log()[-3000:]}")
            try:
                self.get("/system_stats")
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.3)
        else:
            self.__exit__()
            raise RuntimeError(f"The server was not up after {self.timeout} s:\n{self.log()[-3000:]}")
        self._settings()
        return self

    def __exit__(self, *error):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(20)

    def _settings(self):
        """Without this the page opens a dialog over the canvas on its first visit."""
        self.post("/settings/Comfy.TutorialCompleted", True)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def log(self):
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=30) as reply:
            body = reply.read()
        return json.loads(body) if body else None

    def post(self, path, value):
        request = urllib.request.Request(
            self.url + path, json.dumps(value).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as reply:
            body = reply.read()
        return json.loads(body) if body else None

    def object_info(self):
        return self.get("/object_info")

    def submit(self, prompt):
        """Queue an API prompt; returns its id. Raises PromptFailed with the host's reasons when it does not validate."""
        try:
            return self.post("/prompt", {"prompt": prompt, "client_id": uuid.uuid4().hex})["prompt_id"]
        except urllib.error.HTTPError as error:
            details = json.loads(error.read())
            raise PromptFailed(f"The prompt was refused: {json.dumps(details, indent=1)[:4000]}", details) from None

    def wait(self, prompt_id, timeout=300):
        """Poll until the prompt is done; returns its history entry. Raises PromptFailed when a node raised."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise PromptFailed(f"The server stopped during the prompt:\n{self.log()[-4000:]}", None)
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None:
                if entry["status"]["status_str"] != "success":
                    errors = [value for kind, value in entry["status"]["messages"] if kind == "execution_error"]
                    shown = errors[0] if errors else entry["status"]
                    message = f"{shown.get('node_type')}: {shown.get('exception_message')}\n{''.join(shown.get('traceback', []))}"
                    raise PromptFailed(message, shown)
                return entry
            time.sleep(0.1)
        raise PromptFailed(f"The prompt was not done after {timeout} s:\n{self.log()[-4000:]}", None)

    def run(self, prompt, timeout=300):
        return self.wait(self.submit(prompt), timeout)

    def output_files(self, entry):
        """Paths of the files a finished prompt has written."""
        paths = []
        for output in entry["outputs"].values():
            for item in output.get("images", []) + output.get("video", []):
                if item.get("type") == "output":
                    paths.append(self.base / "output" / item["subfolder"] / item["filename"])
        return paths


def copy_input(base, path):
    """Put an image into the host's input folder; returns its name there."""
    target = Path(base) / "input" / Path(path).name
    if not target.exists():
        shutil.copyfile(path, target)
    return target.name


def read_video(path):
    """(frames uint8 [F, H, W, 3], frames per second) of a video file."""
    import av
    import numpy

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        rate = float(stream.average_rate)
        frames = numpy.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    return frames, rate


if __name__ == "__main__":
    with Server(prepare(sys.argv[1]), arguments=sys.argv[2:] or ["--cpu"]) as running:
        print(running.url, flush=True)
        try:
            running.process.wait()
        except KeyboardInterrupt:
            pass
