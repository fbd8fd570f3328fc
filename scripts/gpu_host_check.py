"""The real ComfyUI host with this pack under every memory mode, and the pipeline's own streaming, in one run of about five minutes on a GPU.

    python scripts/gpu_host_check.py --host COMFYUI [--out DIR] [--work DIR] [--only SECTION …] [--tiny]

Writes a 22B Q4_0 model of random bytes (8.3 GB with its connector), two small ones and a VAE into --work, then starts one process per section
(benchmarks/host_memory.py), with the host's own flags. Video memory is limited by holding the rest of it here. While a section runs, this process
reads the device's memory every few milliseconds: peaks below count everything a section has on the device, CUDA's context included, as
nvidia-smi shows it. Results: DIR/host_memory.json and a table against the limits this pack promises (docs/memory.md). --tiny: small models on the CPU, to
check this script.
"""

import argparse
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

# section: (task, host flags, GB of video memory to leave, further options, seconds it may take)
SECTIONS = {
    "static": ("modes", STATIC, None, [], 110),
    "headless": ("headless", [], None, [], 80),
    "dynamic": ("modes", [], None, [], 90),
    "dynamic 8 GB": ("modes", [], 8, [], 90),
    "static 8 GB": ("modes", STATIC, 8, [], 90),
    "vae": ("vae", [], None, ["--whole"], 80),
    "novram": ("modes", ["--novram"], None, [], 90),
    "prompts dynamic": ("prompts", [], None, [], 80),
    "prompts static": ("prompts", STATIC, None, [], 80),
    "lora": ("lora", STATIC, None, [], 60),
    "vae 4 GB": ("vae", [], 4, [], 60),
    "oom": ("oom", [], 5, [], 60),
    "dynamic 6 GB": ("modes", [], 6, ["--steps", "3"], 90),
    "highvram": ("modes", ["--highvram"], None, ["--steps", "3"], 60),
    "dynamic fast disk 8 GB": ("modes", ["--fast-disk"], 8, ["--steps", "3"], 90),
    "dynamic, LoRA, no pinned memory 8 GB": ("modes", ["--disable-pinned-memory"], 8, ["--steps", "3"], 90),
}
REFERENCE = "static"
LOG_LINES, LOG_WIDTH = 200, 300  # lines of a section's output kept from its beginning and from its end, characters of a line


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


def run_section(name, o, torch):
    """Start one section's process; returns its results with the peaks per phase. Raises RuntimeError when it fails or takes too long."""
    task, flags, limit, options, seconds = SECTIONS[name]
    slug = name.replace(" ", "_").replace(",", "")
    result = o.work / f"{slug}.json"
    result.unlink(missing_ok=True)
    flags = (["--cpu"] if o.tiny else flags) if task != "headless" else []
    command = [sys.executable, str(ROOT / "benchmarks" / "host_memory.py"), task, "--files", str(o.work), "--result", str(result), *options]
    command += (["--host", str(o.host)] if o.host else []) + (["--tiny"] if o.tiny else []) + ["--", *flags]
    ballast, watch = None, None
    if torch.cuda.is_available():
        if limit is not None:
            free, _ = torch.cuda.mem_get_info()
            ballast = torch.empty(max(0, free - int(limit * GIB)), dtype=torch.uint8, device="cuda")
        watch = Watch(torch)
        watch.start()
    started = time.perf_counter()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment)
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    lines = deque(maxlen=LOG_LINES)  # the end of what it says; the host can say a great deal
    try:
        with open(o.out / "host_memory.log", "a") as file:
            file.write(f"=== {name}: {' '.join(command)}\n")
            for number, line in enumerate(process.stdout):
                line = line if len(line) <= LOG_WIDTH else line[:LOG_WIDTH] + " …\n"
                if number < LOG_LINES:
                    file.write(line)
                else:
                    lines.append(line)
                if line.startswith("@phase ") and watch is not None:
                    watch.phase = line[7:].strip()
            if lines:
                file.write(f"… {number + 1 - LOG_LINES - len(lines)} lines left out …\n" + "".join(lines))
        code = process.wait()
    finally:
        timer.cancel()
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
    return {**data, "limit_gb": limit, "seconds": time.perf_counter() - started, "peaks_gb": watch.peaks if watch else {}}


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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", type=Path, default=Path(os.environ["COMFYUI_PATH"]) if os.environ.get("COMFYUI_PATH") else None)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--work", type=Path, default=Path("/tmp/ltx2-gguf-memory"))
    parser.add_argument("--only", nargs="*", default=list(SECTIONS), choices=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--seconds", type=float, default=450, help="start no further section after this many seconds")
    parser.add_argument("--tiny", action="store_true")
    o = parser.parse_args()
    o.out.mkdir(parents=True, exist_ok=True)
    import host_memory_files
    import torch
    from common import environment

    device = "cuda" if torch.cuda.is_available() and not o.tiny else "cpu"
    began = time.perf_counter()
    sizes = host_memory_files.write_all(o.work, device, o.tiny)
    if device == "cuda":
        torch.cuda.empty_cache()
    print(f"wrote {', '.join(f'{name} {size / 1e9:.2f} GB' for name, size in sizes.items())} in {time.perf_counter() - began:.0f} s", flush=True)
    report = {"environment": environment(device), "files": sizes, "sections": {}, "tiny": o.tiny}
    failed = []
    for name in (name for name in SECTIONS if name in o.only and not (o.tiny and name == "oom")):
        if time.perf_counter() - began > o.seconds:
            print(f"=== {name}: left out, time is up", flush=True)
            failed.append(name)
            continue
        try:
            data = report["sections"][name] = run_section(name, o, torch)
            if data["task"] == "modes":
                data["errors"] = compare_latents(name, o, torch)
            print(f"=== {name}: {data['seconds']:.0f} s", flush=True)
        except Exception:  # a section that fails must not keep the others from running
            print(f"=== {name}: FAILED\n{traceback.format_exc(limit=1)}", flush=True)
            failed.append(name)
        (o.out / "host_memory.json").write_text(json.dumps({**report, "failed": failed}, indent=1))
    import host_memory_report

    text, missed = host_memory_report.render(report)
    (o.out / "host_memory.txt").write_text(text)
    print(text)
    print(f"failed sections: {', '.join(failed) or 'none'}; limits missed: {', '.join(missed) or 'none'}; {time.perf_counter() - began:.0f} s")
    return 1 if failed or missed else 0


if __name__ == "__main__":
    sys.exit(main())
