"""The real ComfyUI host with this pack under the memory modes people use, in one run of less than eight minutes on a GPU.

    python scripts/gpu_host_check.py --host COMFYUI [--out DIR] [--work DIR] [--only SECTION …] [--all] [--tiny]

Runs on ComfyUI 0.30.0 and 0.33.0. Writes a 22B Q4_0 model of random bytes (8.3 GB with its connector) and a small one into --work, then
starts one process per section (benchmarks/host_memory.py), with the host's own flags. Video memory is limited by holding the rest of it
here. While a section runs, this process (the next one imports its libraries meanwhile) reads the device's memory every few milliseconds:
peaks below count everything a section has on the device, CUDA's context included, as nvidia-smi shows it. A section that fails or takes
too long does not stop the others. Results: DIR/host_memory.json and a table against the limits this pack promises (docs/memory.md).
--all: the rarer modes as well, the VAE, twenty prompts, the pipeline without a host. --tiny: small models on the CPU, to check this script.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
GIB = 2**30
STATIC = ["--disable-dynamic-vram"]

# section: (task, host flags, GB of video memory to leave, further options, seconds it may take from the moment it may use the device)
SECTIONS = {
    "static": ("modes", STATIC, None, [], 80),  # the first to run compiles the kernels
    "dynamic 8 GB": ("modes", [], 8, [], 70),
    "few tokens": ("small", [], None, [], 60),
    "dynamic 6 GB": ("modes", [], 6, ["--again"], 80),
    "static 8 GB": ("modes", STATIC, 8, [], 75),
    "dynamic": ("modes", [], None, ["--again"], 70),
    "oom": ("oom", [], 5, [], 35),
    "headless": ("headless", [], None, [], 90),
    "vae": ("vae", [], None, ["--whole"], 70),
    "vae 4 GB": ("vae", [], 4, [], 60),
    "novram": ("modes", ["--novram"], None, [], 75),
    "prompts static": ("prompts", STATIC, None, [], 50),
    "prompts dynamic": ("prompts", [], None, [], 50),
    "lora": ("lora", STATIC, None, [], 35),
    "highvram": ("modes", ["--highvram"], None, [], 60),
    "dynamic fast disk 8 GB": ("modes", ["--fast-disk"], 8, [], 90),
    "dynamic, LoRA, no pinned memory 8 GB": ("modes", ["--disable-pinned-memory"], 8, [], 90),
}
USUAL = list(SECTIONS)[:7]
REFERENCE = "static"
PHASES_BEFORE_NEXT = 8  # of a section, until the next one's process is started: start, warm-up, load, steps, unload, reload, lora, without lora
LOG_LINES, LOG_WIDTH = (
    200,
    300,
)  # lines of a section's output kept from its beginning and from its end, characters of a line


class Watch(threading.Thread):
    """The device's memory in use above what this process holds, as a peak per phase of a section."""

    def __init__(self, torch):
        super().__init__(daemon=True)
        self.torch, self.phase, self.peaks, self.running = torch, "start", {}, True
        self.base = self.used()

    def used(self):
        free, total = self.torch.cuda.mem_get_info()
        return total - free

    def run(self):
        while self.running:
            used = (self.used() - self.base) / GIB
            self.peaks[self.phase] = max(self.peaks.get(self.phase, 0.0), used)
            time.sleep(0.004)


def start(name, o):
    """(process, its command, file of its results) of a section that imports its libraries and then waits for a line."""
    task, flags, _, options, _ = SECTIONS[name]
    result = o.work / f"{name.replace(' ', '_').replace(',', '')}.json"
    result.unlink(missing_ok=True)
    flags = (["--cpu"] if o.tiny else flags) if task != "headless" else []
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "host_memory.py"),
        task,
        "--wait",
        "--files",
        str(o.work),
        "--result",
        str(result),
        *options,
    ]
    command += (["--host", str(o.host)] if o.host else []) + (["--tiny"] if o.tiny else []) + ["--", *flags]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    pipe = subprocess.PIPE
    return (
        subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
        ),
        command,
        result,
    )


def run_section(name, o, torch, started_one, start_next):
    """Let a section's process run; returns its results with the peaks per phase. Raises RuntimeError when it fails or takes too long.

    started_one: what ``start`` returned; start_next(): called when the section has its important timings.
    """
    _, _, limit, _, seconds = SECTIONS[name]
    process, command, result = started_one
    ballast, watch, phases = None, None, 0
    if torch.cuda.is_available():
        if limit is not None:
            free, _ = torch.cuda.mem_get_info()
            ballast = torch.empty(max(0, free - int(limit * GIB)), dtype=torch.uint8, device="cuda")
        watch = Watch(torch)
        watch.start()
    started = time.perf_counter()
    timer = threading.Timer(seconds * (20 if o.tiny else 1), process.kill)  # a CPU may be shared with anybody
    timer.start()
    with contextlib.suppress(OSError):  # it has ended already: its output says why
        process.stdin.write("go\n")
        process.stdin.flush()
    number, lines = -1, deque(maxlen=LOG_LINES)  # the end of what it says; the host can say a great deal
    try:
        with open(o.out / "host_memory.log", "a") as file:
            file.write(f"=== {name}: {' '.join(command)}\n")
            for number, line in enumerate(process.stdout):
                line = line if len(line) <= LOG_WIDTH else line[:LOG_WIDTH] + " …\n"
                if number < LOG_LINES:
                    file.write(line)
                else:
                    lines.append(line)
                if line.startswith("@phase "):
                    phases += 1
                    if watch is not None:
                        watch.phase = line[7:].strip()
                    if phases == PHASES_BEFORE_NEXT:
                        start_next()
            if lines:
                file.write(f"… {number + 1 - LOG_LINES - len(lines)} lines left out …\n" + "".join(lines))
        code = process.wait()
    finally:
        timer.cancel()
        process.kill()
        process.wait()
        if watch is not None:
            watch.running = False
            watch.join()
        del ballast
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if code != 0 or not result.is_file():
        print("".join((o.out / "host_memory.log").read_text().splitlines(keepends=True)[-25:]), flush=True)
        raise RuntimeError(f"exit status {code} after {time.perf_counter() - started:.0f} s (limit {seconds} s)")
    data = json.loads(result.read_text())
    return {
        **data,
        "limit_gb": limit,
        "seconds": time.perf_counter() - started,
        "peaks_gb": watch.peaks if watch else {},
    }


def compare_latents(name, o, torch):
    """Errors of this section's latents, without and with LoRA, against the reference section's."""
    slug, reference = name.replace(" ", "_").replace(",", ""), REFERENCE
    errors = {}
    for kind in ("", ".lora"):
        ours, theirs = (o.work / f"{part}{kind}.pt" for part in (slug, reference))
        if ours.is_file() and theirs.is_file():
            a, b = torch.load(ours).float(), torch.load(theirs).float()
            if a.shape == b.shape:
                errors["with LoRA" if kind else "plain"] = float((a - b).norm() / b.norm())
    return errors


def version_of(host):
    """The version of a ComfyUI tree, None without one."""
    file = None if host is None else host / "comfyui_version.py"
    return file.read_text().split('"')[-2] if file is not None and file.is_file() else None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--host", type=Path, default=Path(os.environ["COMFYUI_PATH"]) if os.environ.get("COMFYUI_PATH") else None
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--work", type=Path, default=Path("/tmp/ltx2-gguf-memory"))
    parser.add_argument("--only", nargs="*", default=USUAL, choices=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--all", action="store_const", dest="only", const=list(SECTIONS))
    parser.add_argument("--seconds", type=float, default=420, help="start no further section after this many seconds")
    parser.add_argument("--tiny", action="store_true")
    o = parser.parse_args()
    o.out.mkdir(parents=True, exist_ok=True)
    import torch

    import host_memory_files
    from common import environment

    device = "cuda" if torch.cuda.is_available() and not o.tiny else "cpu"
    began = time.perf_counter()
    names = [name for name in SECTIONS if name in o.only and not (o.tiny and name == "oom")]
    waiting = {}  # name -> a process that has imported what it can

    def start_first_of(rest):
        if rest and rest[0] not in waiting:
            waiting[rest[0]] = start(rest[0], o)

    o.work.mkdir(parents=True, exist_ok=True)
    start_first_of(names)
    sizes = host_memory_files.write_all(o.work, device, o.tiny, {SECTIONS[name][0] for name in names})
    if device == "cuda":
        torch.cuda.empty_cache()
    print(
        f"wrote {', '.join(f'{name} {size / 1e9:.2f} GB' for name, size in sizes.items())} in {time.perf_counter() - began:.0f} s",
        flush=True,
    )
    report = {
        "environment": {**environment(device), "host": version_of(o.host)},
        "files": sizes,
        "sections": {},
        "tiny": o.tiny,
    }
    failed = []
    for number, name in enumerate(names):
        if time.perf_counter() - began > o.seconds:
            print(f"=== {name}: left out, time is up", flush=True)
            failed.append(name)
            continue
        try:
            start_first_of([name])
            data = run_section(name, o, torch, waiting.pop(name), lambda rest=names[number + 1 :]: start_first_of(rest))
            report["sections"][name] = data
            if data["task"] == "modes":
                data["errors"] = compare_latents(name, o, torch)
            print(f"=== {name}: {data['seconds']:.0f} s", flush=True)
        except Exception:  # a section that fails must not keep the others from running
            print(f"=== {name}: FAILED\n{traceback.format_exc(limit=1)}", flush=True)
            failed.append(name)
        (o.out / "host_memory.json").write_text(json.dumps({**report, "failed": failed}, indent=1))
    for process, *_ in waiting.values():
        process.stdin.close()  # it ends without having touched the device
        process.wait()
    import host_memory_report

    text, missed = host_memory_report.render(report)
    (o.out / "host_memory.txt").write_text(text)
    print(text)
    print(
        f"failed sections: {', '.join(failed) or 'none'}; limits missed: {', '.join(missed) or 'none'}; {time.perf_counter() - began:.0f} s"
    )
    return 1 if failed or missed else 0


if __name__ == "__main__":
    sys.exit(main())
