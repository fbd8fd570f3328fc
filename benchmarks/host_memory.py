"""One process of the real ComfyUI host with this pack's models: what scripts/gpu_host_check.py starts once per memory mode.

    python benchmarks/host_memory.py TASK --host COMFYUI --files FOLDER --result FILE.json [--tiny] [-- host flags …]

Tasks: ``modes`` (load, steps, LoRA, reload), ``prompts`` (twenty in a row), ``vae``, ``oom``, ``lora`` (both ways of applying one, over sizes) and
``headless`` (no host: the pipeline's streaming). Lines ``@phase NAME`` on stdout tell the parent, which watches the device's memory, what is going on.
The host is set up as its main.py does, without the server. Needs the files that ``gpu_host_check.py`` writes.
"""

import argparse
import gc
import importlib
import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
FPS = 24.0
GRIDS = {
    1024: (4, 16, 16),
    1536: (6, 16, 16),
    6144: (16, 16, 24),
    14080: (16, 22, 40),
    163840: (64, 40, 64),
    96: (2, 6, 8),
}  # latent frames, rows, columns
TASKS = {}


def task(fn):
    TASKS[fn.__name__] = fn
    return fn


def prepare_host(path, flags):
    """The first half of ComfyUI's own start: arguments, allocator settings and comfy-aimdo, all before torch."""
    sys.path.insert(0, str(path))
    argv, sys.argv = sys.argv, ["main.py", *flags]
    import comfy.options

    comfy.options.enable_args_parsing()
    from comfy.cli_args import args, enables_dynamic_vram

    sys.argv = argv
    import cuda_malloc  # noqa: F401  (sets the allocator's environment)

    if enables_dynamic_vram():
        import comfy_aimdo.control

        reserve = None if args.reserve_vram is None else int(args.reserve_vram * GIB)
        comfy_aimdo.control.init(simple_vram_headroom=reserve, nvml_pressure=not args.disable_nvml_pressure)


def import_libraries():
    """What takes long to import and does not touch the device."""
    for name in (
        "torch",
        "torch._dynamo",
        "scipy.ndimage",
        "transformers",
        "torchvision",
        "torchsde",
        "einops",
        "safetensors.torch",
        "av",
        "triton",
    ):
        try:
            importlib.import_module(name)
        except Exception as error:  # whoever needs it will say so
            print(f"{name}: {error}", flush=True)


def start_host():
    """The second half: the host's modules, then dynamic VRAM where it is enabled; returns whether it is."""
    import comfy.memory_management
    import comfy.model_management as mm
    import comfy.model_patcher
    import comfy.sd
    from comfy.cli_args import args, enables_dynamic_vram

    if enables_dynamic_vram() and mm.is_nvidia():
        import comfy_aimdo.control

        if comfy_aimdo.control.init_devices(
            (d.index, int(args.vram_headroom * GIB)) for d in mm.get_all_torch_devices()
        ):
            comfy_aimdo.control.set_log_info()  # as main.py does: until somebody sets a level, every allocation is printed
            comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
            comfy.memory_management.aimdo_enabled = True
    return comfy.memory_management.aimdo_enabled


def load_pack():
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    import packloader  # noqa: F401  (registers ltx2_gguf)


def phase(name):
    print(f"@phase {name}", flush=True)


def rss():
    """GB of this process: resident, and what of it is its own (anonymous memory, not file pages)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {"rss": int(status["VmRSS"].split()[0]) / 2**20, "own": int(status["RssAnon"].split()[0]) / 2**20}


def settle(context):
    """What the host does between nodes and between prompts."""
    import comfy.memory_management
    import comfy.model_management as mm

    if comfy.memory_management.aimdo_enabled:
        import comfy.model_prefetch
        import comfy_aimdo.model_vbar

        mm.reset_cast_buffers()
        comfy.model_prefetch.cleanup_prefetch_queues()
        comfy_aimdo.model_vbar.vbars_reset_watermark_limits()
    mm.cleanup_models_gc()
    gc.collect()
    mm.soft_empty_cache()


def device_used():
    """GB in use on the device, by everybody."""
    import torch

    if not torch.cuda.is_available():
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return (total - free) / GIB


def reset_peak():
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def torch_peak():
    import torch

    return torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else 0.0


def sync():
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Waits:
    """Where a pass spends its time, by events before and behind what the compute stream waits for at each block. Costs a few microseconds per block."""

    def __init__(self, network):
        self.network, self.passes = network, []

    def __enter__(self):
        import torch

        made = self.network.block_runner

        def event():
            made = torch.cuda.Event(enable_timing=True)
            made.record()
            return made

        def timed(device, options):
            run, marks, start = made(device, options), [], time.perf_counter()

            def mark(number, call):
                if call is None:
                    self.passes.append((marks, event(), time.perf_counter() - start))
                    return run(None, None) if run is not None else None
                before, asked = event(), time.perf_counter()

                def called():
                    marks.append((before, event(), time.perf_counter() - asked))
                    return call()

                return called() if run is None else run(number, called)

            return mark

        if torch.cuda.is_available():
            self.network.block_runner = timed
        return self

    def __exit__(self, *error):
        self.network.__dict__.pop("block_runner", None)

    def rows(self):
        """Of each pass, milliseconds: on the device from its first block to its last, waited there at the blocks' beginnings (together and each), and
        of this thread, for all blocks and for what is given out at their beginnings."""
        sync()
        rows = []
        for marks, end, issued in self.passes:
            waits = [before.elapsed_time(behind) for before, behind, _ in marks]
            rows.append({"device": marks[0][0].elapsed_time(end), "waited": sum(waits), "issued": issued * 1e3, "issued at beginnings": sum(m[2] for m in marks) * 1e3,
                         "waits": [round(w, 3) for w in waits]})  # fmt: skip
        return rows


def latent_of(tokens):
    import torch

    return torch.zeros(1, 128, *GRIDS[tokens])


def sample(patcher, tokens, steps, seed=3, watch=None):
    """(latent, seconds of each step) through the host's own sampling: CFG guider, Euler. watch: called after each step."""
    import comfy.sample
    import comfy.samplers
    import torch

    width = patcher.model.diffusion_model.config.connector.inner_dim
    features = torch.randn(1, 128, width, generator=torch.Generator().manual_seed(5))
    positive = [[features, {"pooled_output": None, "unprocessed_ltxav_embeds": True, "frame_rate": FPS}]]
    latent = latent_of(tokens)
    noise = comfy.sample.prepare_noise(latent, seed)
    times = [time.perf_counter()]

    def callback(step, x0, x, total):
        sync()
        times.append(time.perf_counter())
        if watch is not None:
            watch()

    result = comfy.sample.sample_custom(
        patcher,
        noise,
        1.0,
        comfy.samplers.sampler_object("euler"),
        torch.linspace(1, 0, steps + 1),
        positive,
        positive,
        latent,
        callback=callback,
        disable_pbar=True,
        seed=seed,
    )
    return result, [b - a for a, b in zip(times, times[1:])]


def lora_tensors(layers, rank, seed=7):
    """A LoRA over all products of the blocks; layers of one shape share their matrices here, but not on the device."""
    import torch

    from ltx2_gguf.ltx2_core.convert import synthetic
    from ltx2_gguf.ltx2_core.files import structure

    shapes = {
        synthetic.bare_name(n): s for n, s in structure.checkpoint_shapes(layers, vae=False, projection=False).items()
    }
    generator, made, tensors = torch.Generator().manual_seed(seed), {}, {}

    def matrix(*shape, std):
        key = (shape, std)
        if key not in made:
            made[key] = (torch.randn(shape, generator=generator) * std).bfloat16()
        return made[key]

    for name, shape in shapes.items():
        if (
            name.startswith("transformer_blocks.")
            and name.endswith(".weight")
            and len(shape) == 2
            and min(shape) > rank // 4
            and "norm" not in name
            and "gate_logits" not in name
        ):
            path = "diffusion_model." + name.removesuffix(".weight")
            tensors[path + ".lora_A.weight"] = matrix(rank, shape[1], std=0.02)
            tensors[path + ".lora_B.weight"] = matrix(shape[0], rank, std=0.01)
    return tensors


def with_lora(patcher, tensors, strength=1.0):
    import comfy.sd

    return comfy.sd.load_lora_for_models(patcher, None, tensors, strength, 0.0)[0]


def error(a, b):
    return float((a.float() - b.float()).norm() / b.float().norm())


@task
def modes(o):
    """Load the 22B model, steps, the same after unloading, a rank-384 LoRA, and without it again."""
    import comfy.model_management as mm
    import torch

    from ltx2_gguf.nodes.host import model as host_model

    out = {}
    phase("warm-up")
    small = host_model.load_model(str(o.files / "a.gguf"))
    sample(small, o.tokens, 1)
    del small
    mm.unload_all_models()
    settle(o)
    out["idle"] = {**rss(), "vram": device_used()}

    phase("load")
    start = time.perf_counter()
    patcher = host_model.load_model(str(o.files / "model.gguf"))
    opened = time.perf_counter() - start
    required = patcher.model.memory_required([1, 128, *GRIDS[o.tokens]])
    mm.load_models_gpu([patcher], memory_required=required)
    sync()
    out["load"] = {"seconds_open": opened, "seconds_ready": time.perf_counter() - start, **rss(), "vram": device_used()}
    out["patcher"] = type(patcher).__name__
    out["model_gb"], out["required_gb"] = patcher.model_size() / GIB, required / GIB

    def run(name, model):
        phase(name)
        reset_peak()
        with Waits(model.model.diffusion_model) as waits:
            result, times = sample(model, o.tokens, o.steps)
        out[name] = {
            "first": times[0],
            "step": statistics.median(times[1:]),
            "times": times,
            "torch_peak": torch_peak(),
            **rss(),
            "vram": device_used(),
            "finite": bool(result.isfinite().all()),
        }
        print(f"{name}: {json.dumps(out[name])}", flush=True)  # what is known when a later phase fails
        if waits.passes:
            out[name]["passes_ms"] = waits.rows()
        settle(o)
        return result

    base = run("steps", patcher)
    torch.save(base, o.result.with_suffix(".pt"))
    phase("unload")
    mm.unload_all_models()
    settle(o)
    out["unloaded"] = {**rss(), "vram": device_used()}
    again = run("reload", patcher)
    out["reload"]["equal"] = error(again, base)

    patched = with_lora(patcher, lora_tensors(o.geometry("model"), o.rank))
    out["lora_layers"] = len(patched.patches)
    result = run("lora", patched)
    torch.save(result, o.result.with_suffix(".lora.pt"))
    out["lora"]["change"] = error(result, base)
    if o.again:
        result = run("lora again", patched)
        out["lora again"]["equal"] = error(result, torch.load(o.result.with_suffix(".lora.pt")))
    del patched
    result = run("without lora", patcher)
    out["without lora"]["equal"] = error(result, base)
    return out


def floor_seconds(tokens, config, device, dtype):
    """Seconds of a step's dense matrix products and attention calls alone, on one block's random weights."""
    import torch
    import torch.nn.functional as F

    sys.path.insert(0, str(ROOT / "benchmarks"))
    from common import measure

    wide, text, heads = config.inner_dim, 1024 if device != "cpu" else 32, config.num_attention_heads

    def random(*shape):
        return torch.randn(*shape, device=device).mul_(0.02).to(dtype)

    square, up, down, gate = (
        random(wide, wide),
        random(config.ff_dim, wide),
        random(wide, config.ff_dim),
        random(heads, wide),
    )
    x, inner, context = random(1, tokens, wide), random(1, tokens, config.ff_dim), random(1, text, wide)
    q, keys = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (x, context))

    def step():
        for _ in range(config.num_layers):
            for source, k in ((x, q), (context, keys)):
                for weight, value in ((square, x), (square, source), (square, source), (gate, x), (square, x)):
                    F.linear(value, weight)
                F.scaled_dot_product_attention(q, k, k)
            F.linear(x, up)
            F.linear(inner, down)

    return measure(step, device, 5) / 1e3


@task
def small(o):
    """Few tokens, which are bound by launching: steps of the 22B model in the host, with the host's recorded blocks where it has them, and the floor."""
    import torch

    from ltx2_gguf.nodes.host import graphs as host_graphs
    from ltx2_gguf.nodes.host import internals
    from ltx2_gguf.nodes.host import model as host_model

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    patcher, out = host_model.load_model(str(o.files / "model.gguf")), {"small": []}
    network = patcher.model.diffusion_model
    for tokens in (1024, 1536) if not o.tiny else (96,):
        row = {"tokens": tokens, "floor": floor_seconds(tokens, network.config, device, dtype)}
        results = {}
        most = host_graphs.MOST_TOKENS
        for name, usable in (("plain", False), ("recorded", True)):
            if usable and not internals.GRAPHS:
                continue
            host_graphs.MOST_TOKENS = most if usable else 0  # how weights are laid out stays the same
            phase(f"{tokens} {name}")
            recorded = []
            try:
                results[name], times = sample(patcher, tokens, o.steps, watch=lambda: recorded.append(
                    sum(getattr(block, "_comfy_graph", None) is not None for block in network.transformer_blocks)
                ))  # fmt: skip
            finally:
                host_graphs.MOST_TOKENS = most
            half = times[len(times) // 2 :]
            row |= {name: statistics.median(half), f"{name} times": times, f"{name} vram": torch_peak()}
            row[f"{name} x floor"] = row[name] / row["floor"]
            if usable:
                row["blocks recorded"] = max(recorded)
                row["blocks laid out"] = sum(
                    getattr(block, "_v_block", None) is not None for block in network.transformer_blocks
                )
            settle(o)
        if "recorded" in results:
            row["error"] = error(results["recorded"], results["plain"])
        print(json.dumps(row), flush=True)
        out["small"].append(row)
    return out


@task
def prompts(o):
    """Twenty prompts that alternate two models and two LoRAs, each with a decode: memory after each."""
    import torch

    from ltx2_gguf.nodes.host import model as host_model
    from ltx2_gguf.nodes.host import vae as host_vae

    patchers = [host_model.load_model(str(o.files / name)) for name in ("a.gguf", "b.gguf")]
    loras = [lora_tensors(o.geometry("a"), 32 if not o.tiny else 4, seed) for seed in (1, 2)]
    vae = host_vae.load_vae(str(o.files / "vae.safetensors"))
    rows, tokens = [], 1024 if not o.tiny else 96
    for number in range(20):
        phase(f"prompt {number + 1}")
        model = with_lora(patchers[number % 2], loras[number // 2 % 2], 0.8)
        result, _ = sample(model, tokens, 2)
        frames = vae.decode(result[:, :, :2, : 8 if not o.tiny else 2, : 8 if not o.tiny else 2])
        assert bool(torch.isfinite(frames).all())
        del model, result, frames
        settle(o)
        rows.append({"prompt": number + 1, **rss(), "vram": device_used()})
    return {"prompts": rows}


@task
def vae(o):
    """The host's VAE object: full decode (one piece), its own decode, a long clip."""
    import torch

    from ltx2_gguf.ltx2_core.vae import tiling
    from ltx2_gguf.nodes.host import vae as host_vae

    model = host_vae.load_vae(str(o.files / "vae.safetensors"))
    network, out = model.first_stage_model, {}
    sizes = ["64x64x17"] if o.tiny else ["768x512x121", "1280x704x241"]
    for size in sizes:
        width, height, frames = map(int, size.split("x"))
        shape = (1, 128, (frames - 1) // 8 + 1, height // 32, width // 32)
        latent = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        reference = None
        for name in ("one piece", "automatic") if size == sizes[0] and o.whole else ("automatic",):
            plan = tiling.VAEPlan(1 << 60, ((0, shape[3]),), ((0, shape[4]),)) if name == "one piece" else None
            times, peaks = [], []
            for _ in range(2 if size != sizes[0] else 6):  # the first run is not counted
                settle(o)
                phase(f"{size} {name}")
                reset_peak()
                start = time.perf_counter()
                frames_out = model.decode(latent, {} if plan is None else {"plan": plan})
                sync()
                times.append(time.perf_counter() - start)
                peaks.append(torch_peak())
            row = {"seconds": statistics.median(times[1:] or times), "torch_peak": max(peaks), **rss()}
            if reference is None:
                reference = frames_out
            elif size == sizes[0]:
                row["error"] = error(frames_out, reference)
            chosen = network.plan("decoder", shape, torch.bfloat16, model.device, network.free_memory(model.device))
            row["plan"] = chosen.describe()
            out[f"{size} {name}"] = row
            del frames_out
    out["weights_gb"] = sum(p.nbytes for p in network.parameters()) / GIB
    width, height, _ = map(int, sizes[0].split("x"))
    if o.whole:
        out["against float32"] = against_float32(network, model.device, o.tiny)
    return out


def against_float32(network, device, tiny):
    """How far a decode in one piece and one in short steps are from float32, and from each other."""
    import torch

    from ltx2_gguf.ltx2_core.vae import tiling

    frames, height, width = (2, 2, 2) if tiny else (7, 8, 12)
    latent = torch.randn(1, 128, frames, height, width, generator=torch.Generator().manual_seed(3)).to(device)
    plans = {"one piece": 1 << 60, "short steps": 8 * tiling.MIB}

    def decode(dtype, split):
        plan = tiling.VAEPlan(split, ((0, height),), ((0, width),))
        return torch.cat(
            [pixels.float().cpu() for pixels in network.decode_stream(latent.to(dtype), device=device, plan=plan)],
            dim=2,
        )

    exact = decode(torch.float32, plans["one piece"])
    dtype = next(network.parameters()).dtype
    results = {name: decode(dtype, split) for name, split in plans.items()}
    row = {name: error(result, exact) for name, result in results.items()}
    row |= {
        "between them": error(results["short steps"], results["one piece"]),
        "steps in float32": error(decode(torch.float32, plans["short steps"]), exact),
    }
    return row


@task
def oom(o):
    """Far too many tokens for the memory there is: the sentence the user reads, and whether the process still works."""
    import torch

    from ltx2_gguf.ltx2_core.sampling.guidance import Guidance
    from ltx2_gguf.nodes.host import model as host_model
    from ltx2_gguf.nodes.host import sampling

    patcher = host_model.load_model(str(o.files / "a.gguf"))
    before, _ = sample(patcher, 1024, 2)
    width = patcher.model.diffusion_model.config.connector.inner_dim
    positive = [[torch.randn(1, 128, width), {"unprocessed_ltxav_embeds": True, "frame_rate": FPS}]]
    out = {}
    phase("too much")
    start = time.perf_counter()
    try:
        sampling.sample(
            patcher,
            positive,
            positive,
            {"samples": latent_of(163840)},
            sigmas=torch.tensor([1.0, 0.5, 0.0]),
            guidance=Guidance(cfg=1.0),
            sampler_name="euler",
            seed=1,
        )
        out["message"] = "it fitted"
    except RuntimeError as raised:
        out["message"], out["kind"] = str(raised), type(raised).__name__
    out["seconds"] = time.perf_counter() - start
    settle(o)
    phase("after")
    after, _ = sample(patcher, 1024, 2)
    out["still_works"] = error(after, before)
    return out


@task
def lora(o):
    """Both ways of applying a LoRA, over tokens and ranks: milliseconds beyond the product without one."""
    import torch
    from comfy.model_patcher import LowVramPatch
    from comfy.weight_adapter.lora import LoRAAdapter

    sys.path.insert(0, str(ROOT / "benchmarks"))
    from common import measure, random_raw
    from ltx2_gguf.nodes.host import lora as host_lora
    from ltx2_gguf.quant import low_rank, tensor

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shapes = [(4096, 4096), (16384, 4096), (4096, 16384)] if not o.tiny else [(64, 64)]
    rows = []
    for outs, ins in shapes:
        weight = tensor.pack(random_raw("Q4_0", outs, ins, device), "Q4_0", (outs, ins), dtype)
        bias = torch.zeros(outs, device=device, dtype=dtype)
        for tokens in (1024, 2048, 3072, 4096, 6144, 14080) if not o.tiny else (8,):
            x = torch.randn(1, tokens, ins, device=device).to(dtype)

            def timed(fn):
                """Milliseconds of one of many calls given to the device at once, so that launching them does not count."""
                many = 20 if device == "cuda" else 1

                def burst():
                    for _ in range(many):
                        fn()

                return measure(burst, device, 7) / many

            plain = timed(lambda: torch.nn.functional.linear(x, weight, bias))
            for rank in (16, 64, 384) if not o.tiny else (4,):
                up, down = torch.randn(outs, rank).mul(0.01).to(dtype), torch.randn(rank, ins).mul(0.02).to(dtype)
                patch = LowVramPatch(
                    "k", {"k": [(1.0, LoRAAdapter(set(), (up, down, None, None, None, None)), 1.0, None, None)]}
                )
                ways = {}
                for way, beside in (("on the weight", False), ("beside it", True)):
                    before, low_rank.beside_is_cheaper = low_rank.beside_is_cheaper, lambda *a, b=beside: b
                    try:
                        ways[way] = timed(lambda: host_lora.linear(x, weight, bias, [patch]))
                    finally:
                        low_rank.beside_is_cheaper = before
                chosen = (
                    "beside it"
                    if low_rank.beside_is_cheaper(tokens, outs, ins, rank, dtype.itemsize)
                    else "on the weight"
                )
                rows.append({"out": outs, "in": ins, "tokens": tokens, "rank": rank, "plain ms": plain, **{k: v - plain for k, v in ways.items()}, "chosen": chosen,
                             "right": ways[chosen] <= 1.02 * min(ways.values())})  # fmt: skip
    return {"lora": rows}


def attach_lora(o, dit):
    """A LoRA file of the rank that the host's sections use, over all layers."""
    from safetensors.torch import save_file

    from ltx2_gguf.ltx2_core.loading.lora import attach_loras

    path = o.files / "lora.safetensors"
    save_file({name: value.clone() for name, value in lora_tensors(o.geometry("model"), o.rank).items()}, path)
    attach_loras(dit, [(path, 0.8)])


@task
def headless(o):
    """The pipeline without a host: all weights resident, and all streamed within a budget, each without and with a LoRA; activation memory by tokens."""
    import torch

    from ltx2_gguf.ltx2_core.loading.transformer import load_dit
    from ltx2_gguf.ltx2_core.lora import apply
    from ltx2_gguf.ltx2_core.offload import streamer
    from ltx2_gguf.ltx2_core.offload.streamer import activation_bytes
    from ltx2_gguf.ltx2_core.pipeline import LTX2Pipeline

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    out, results = {"activations": []}, {}
    phase("load")
    torch.zeros(1, device=device)
    for attempt in (1, 2):
        gc.collect()
        before, start = rss()["own"], time.perf_counter()
        dit = load_dit(str(o.files / "model.gguf"), dtype=dtype)
        out[f"open {attempt}"] = {"seconds": time.perf_counter() - start, "own_gb": rss()["own"] - before}
    generator = torch.Generator(device).manual_seed(1)
    context = torch.randn(1, 1024, dit.config.context_dim, generator=generator, device=device, dtype=dtype)

    def steps(name, budget, tokens=(o.tokens,), count=4, stream_all=False):
        chooser = streamer.choose_resident
        if stream_all:  # whatever else the budget would hold
            streamer.choose_resident = lambda sizes, available, ring=streamer.RING: ([], ring)
        try:
            return measured(name, budget, tokens, count)
        finally:
            streamer.choose_resident = chooser

    def measured(name, budget, tokens, count):
        """A row of figures and the last velocity, for each number of tokens."""
        pipeline, rows = LTX2Pipeline(dit, [], [], device, dtype, budget), []
        phase(name)
        start = time.perf_counter()
        with pipeline._transformer(max(tokens)):
            sync()
            ready = time.perf_counter() - start
            weights = torch.cuda.memory_allocated() / GIB if device == "cuda" else 0.0
            for n in tokens:
                latent = torch.randn(1, 128, *GRIDS[n], generator=torch.Generator().manual_seed(2)).to(device, dtype)
                reset_peak()
                times = []
                for _ in range(count):
                    start = time.perf_counter()
                    result = dit.velocity(latent, 0.7, context, FPS)
                    sync()
                    times.append(time.perf_counter() - start)
                row = {
                    "ready": ready,
                    "first": times[0],
                    "step": statistics.median(times[1:] or times),
                    "torch_peak": torch_peak(),
                    "weights_gb": weights,
                    "budget": budget,
                    **rss(),
                }
                print(f"{name}, {n} tokens: {json.dumps(row)}", flush=True)
                rows.append((row, result))
                del latent, result
        return rows

    scale = 1 if not o.tiny else 0.01
    budgets = {
        "resident": None if device == "cuda" else 8,
        "streamed, all blocks": 4 * scale,
        "streamed, 4 GB": 4 * scale,
    }
    for ending in ("", ", LoRA"):
        if ending:
            attach_lora(o, dit)
        for name, budget in budgets.items():
            ((out[name + ending], results[name]),) = steps(
                name + ending, budget, stream_all=name == "streamed, all blocks"
            )
            out[name + ending]["error"] = error(results[name], results["resident"])
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
    apply.detach(dit)
    c = dit.config
    counts = (1024, 6144, 14080) if not o.tiny else (96,)
    for tokens, (row, _) in zip(counts, steps("activations", None if device == "cuda" else 8, counts, 2)):
        out["activations"].append({
            "tokens": tokens, "measured_gb": row["torch_peak"] - row["weights_gb"], "planned_gb": activation_bytes(tokens, c.inner_dim, dtype, c.inner_dim * c.ff_dim) / GIB,
        })  # fmt: skip
    return out


def main():
    own, flags = sys.argv[1:], []
    if "--" in own:
        at = own.index("--")
        own, flags = own[:at], own[at + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("--host", type=Path)
    parser.add_argument("--files", type=Path, required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument(
        "--steps", type=int, default=9, help="of a run, the first of which is not in the median (default: 9)"
    )
    parser.add_argument("--rank", type=int, default=384)
    parser.add_argument("--again", action="store_true", help="modes: the LoRA a second time")
    parser.add_argument(
        "--wait", action="store_true", help="import libraries, then wait for a line on stdin before touching the device"
    )
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--whole", action="store_true", help="vae: also decode the first size in one piece")
    o = parser.parse_args(own)
    o.tokens = 96 if o.tiny else 6144
    o.rank = 8 if o.tiny else o.rank
    o.steps = min(o.steps, 3) if o.tiny else o.steps
    hosted = o.task != "headless"
    if hosted:
        prepare_host(o.host, flags)
    if o.wait:
        import_libraries()
        if not sys.stdin.readline():
            return  # nobody wants the result any more
    phase("start")
    dynamic = start_host() if hosted else False
    load_pack()
    import torch

    files = importlib.import_module("host_memory_files")
    o.geometry = lambda which: files.geometry(which, o.tiny)
    with torch.inference_mode():
        out = {"task": o.task, "flags": flags, "dynamic": dynamic, **TASKS[o.task](o)}
    o.result.write_text(json.dumps(out, indent=1))
    phase("done")


if __name__ == "__main__":
    main()
