"""The DiT's element-wise passes compiled for training, when a trial run in a process of its own shows that this works and is faster.

A training step spends most of its time between the matrix products: norms, modulation, gates, rotation, each of them several kernels
in the plain path that records gradients. ``torch.compile`` makes one kernel of each pass of ``ltx2_core/transformer/fused.py``. Compiling may fail or
hang on a machine nobody tried, so ``Trial`` runs the very same steps in a child process first, beside the stages that come before
training, and its compiled kernels are found in the cache afterwards. No result in time means: train without.

    python tools/toy/faster.py RESULT.json --device cuda        the trial alone
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    __package__ = "toy"

from ltx2_gguf.ltx2_core.transformer import fused

from . import pack  # noqa: F401
from .model import GRID, Toy, dit_config, initialise
from .steps import Draws, Kind, Step

PASSES = (
    "rms_modulate",
    "layer_norm_modulate",
    "gate_residual_",
    "gate_residual_rms_modulate_",
    "head_gate",
    "qk_norm_rope",
)


def _with_plain_tables(compiled):
    """``qk_norm_rope`` that unwraps rotary tables before the compiled function sees them."""

    def call(q, k, q_weight, k_weight, pe, heads, eps, k_pe=None):
        pe, k_pe = (None if table is None else tuple(fused.full_tables(table)) for table in (pe, k_pe))
        return compiled(q, k, q_weight, k_weight, pe, heads, eps, k_pe)

    return call


@contextlib.contextmanager
def compiled_passes(on: bool = True):
    """While active, the passes of ``fused`` are compiled functions (one kernel per pass and shape)."""
    if not on:
        yield
        return
    import torch._dynamo

    torch._dynamo.config.recompile_limit = 64
    plain = {name: getattr(fused, name) for name in PASSES}
    try:
        for name, function in plain.items():
            compiled = torch.compile(function, dynamic=False)
            setattr(fused, name, _with_plain_tables(compiled) if name == "qk_norm_rope" else compiled)
        yield
    finally:
        for name, function in plain.items():
            setattr(fused, name, function)


class _Clips:
    """Stands for a bank of latents."""

    def __init__(self, captions: int, device, dtype):
        self.latents = torch.randn(64, 128, *GRID, device=device, dtype=dtype)
        self.table = torch.randint(0, 64, (captions, 4), device=device)


def _milliseconds(step: Step, count: int) -> float:
    synchronise = torch.cuda.synchronize if step.fixed["latent"].is_cuda else lambda: None
    step()
    synchronise()
    start = time.monotonic()
    for _ in range(count):
        step()
    synchronise()
    return 1e3 * (time.monotonic() - start) / count


def trial(kinds: dict[str, Kind], tokens: int, components: int, device: str, config=None, count: int = 10) -> dict:
    """{kind's name: [plain, compiled] milliseconds per step, "gap": relative difference of all gradients together}."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    toy = initialise(Toy(config or dit_config(), components)).to(device).set_dtype(dtype)
    with torch.no_grad():  # gates and outputs that start at zero would hide what is wrong behind them
        for p in toy.parameters():
            p.add_(0.02 * torch.randn_like(p))
    params = [p for p in toy.parameters() if p.requires_grad]
    z, real = (
        torch.randn(16, tokens, components, device=device, dtype=dtype),
        torch.ones(16, tokens, dtype=torch.bool, device=device),
    )
    every = torch.arange(16, device=device)
    draws = Draws(_Clips(16, device, dtype), z, real, every, every[:0], 0, 0.0)
    result, gap = {}, 0.0
    for name, kind in kinds.items():
        times, gradients = [], []
        drawn = draws(kind)
        for on in (False, True):
            with compiled_passes(on):
                step = Step(toy, params, lambda _, drawn=drawn: drawn, kind, log=print)
                gradients.append(torch.cat([g.float().flatten() for g in step()[0] if g is not None]))
                times.append(_milliseconds(step, count))
                del step
            if device == "cuda":
                torch.cuda.empty_cache()
        gap = max(gap, float((gradients[0] - gradients[1]).norm() / gradients[0].norm()))
        result[name] = times
    return result | {"gap": gap}


class Trial:
    """The trial as a child process, started at once; ``over`` tells when ``wins`` can say whether to compile."""

    def __init__(self, device, sizes: dict, log=print, seconds: float = 150, tiny: bool = False):
        self.log, self.end = log, time.monotonic() + seconds
        self.folder = Path(tempfile.mkdtemp(prefix="toy-trial-"))
        command = [
            sys.executable,
            str(Path(__file__).resolve()),
            str(self.folder / "result.json"),
            "--device",
            str(device),
        ]
        command += ["--sizes", json.dumps(sizes)] + ["--tiny"] * tiny
        with open(
            self.folder / "said.txt", "wb"
        ) as said:  # a file: a pipe stays open as long as the compiler's own workers hold it
            self.child = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)

    def over(self) -> bool:
        """Whether the child has ended or its time is up."""
        return self.child.poll() is not None or time.monotonic() > self.end

    def wins(self) -> bool:
        """Whether compiled steps are right and faster; waits for the child, and ends it when its time is up."""
        try:
            self.child.wait(max(0.1, self.end - time.monotonic()))
            times = json.loads((self.folder / "result.json").read_text())
        except subprocess.TimeoutExpired:
            os.killpg(self.child.pid, signal.SIGKILL)  # its compiler's workers too
            self.child.wait()
            self.log("compiling: no answer in time, training without")
            return False
        except (OSError, ValueError):
            said = (self.folder / "said.txt").read_text(errors="replace")
            self.log(f"compiling: failed, training without\n{said[-1500:]}")
            return False
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
        faster = all(
            after < 0.95 * before for before, after in (pair for pair in times.values() if isinstance(pair, list))
        )
        good = faster and times["gap"] < 0.1
        self.log(f"compiling: ms per step plain and compiled {times}: {'compiled' if good else 'plain'}")
        return good


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--sizes", type=json.loads, default={"short": [144, 2], "whole": [72, 4], "tokens": 40, "components": 512}
    )
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    kinds = {name: Kind(*args.sizes[name], name == "short") for name in ("short", "whole")}
    config = dit_config(layers=2, connector_layers=1) if args.tiny else None
    times = trial(kinds, args.sizes["tokens"], args.sizes["components"], args.device, config, 1 if args.tiny else 10)
    partial = args.result.with_name(args.result.name + ".partial")
    partial.write_text(json.dumps(times))
    partial.replace(args.result)
