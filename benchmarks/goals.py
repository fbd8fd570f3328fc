"""What the pack set out to reach on one H100, beside what was measured; a part of benchmarks/report.py.

A ratio is always taken within one run. A run of bench_step.py without the host's rows can have an older one beside it (``step-host``), from
which the ratios to the host come then.
"""

#: format -> limits: x floor, x host's bf16, x this pack's bf16, each at 6144 and 14080 tokens. K-quants decode to more operations.
SIMPLE = {"x floor": (1.18, 1.12), "x host bf16": (0.78, 0.73), "x ours bf16": (1.05, 1.05)}
K_QUANT = {"x floor": (1.21, 1.15), "x host bf16": (0.80, 0.75), "x ours bf16": (1.08, 1.08)}
EXACT = {"Q4_0": SIMPLE, "Q5_1": SIMPLE, "Q8_0": SIMPLE, "Q4_K": K_QUANT, "Q6_K": K_QUANT}
EAGER = {"Q4_0": 2.0, "Q5_1": 2.8, "Q8_0": 1.55, "Q4_K": 2.2}
FAST = 0.60
COSINE = 0.999
DEQUANTIZE = 0.80  # of copy speed, 16384 x 4096
SKINNY = 2.5  # dense bf16 / this, Q4_0, 36864 x 4096 with up to 16 rows
SKINNY_ROWS = (1, 2, 4, 8, 16)
GEMMA = 1.15  # x dense bf16
VAE = 1.05  # streamed / whole
LOAD = 2.0  # seconds
KINDS = {"mixed": "fast", "fp8": "fast (fp8 alone)", "int8": "fast (int8 alone)"}
TOKENS = (6144, 14080)
WHAT = {"x floor": "× floor", "x host bf16": "× host in bf16", "x ours bf16": "× this pack in bf16"}


def rows(found):
    """[(what, weights, tokens, limit, measured, verdict)] from the results found (name -> JSON)."""
    out = []

    def add(what, weights, tokens, limit, value, at_least=False):
        if value is not None and limit is None:
            out.append((what, weights, tokens, "none set", f"{value:.3f}", ""))
        elif value is not None:
            kept = value >= limit if at_least else value <= limit
            sign = "≥" if at_least else "≤"
            near = abs(value - limit) < 0.005 * limit
            out.append((what, weights, tokens, f"{sign} {limit:g}", f"{value:.4f}" if near else f"{value:.3f}", "reached" if kept else "**missed**"))

    own, host = (_rows(found, name) for name in ("step", "step-host"))
    for kind in WHAT:
        for weights, limits in EXACT.items():
            for tokens, limit in zip(TOKENS, limits[kind]):
                add(f"exact, {WHAT[kind]}", weights, tokens, limit, _first(kind, ("ours exact", weights, tokens), own, host))
    for column, what in (("eager / ours", "plain eager"), ("pack / ours", "ComfyUI-GGUF's")):
        for weights, limit in EAGER.items():
            add(f"exact, {what} / this", weights, 6144, limit, _first(column, ("ours exact", weights, 6144), own, host), at_least=True)
    measured = {what for run in (own, host) for what, _, _ in run}
    for kind in ("mixed",) if "ours fast mixed" in measured else ("fp8", "int8"):
        for weights in ("Q4_0", "Q8_0"):
            for tokens in TOKENS:
                ratio = _first("x host bf16", (f"ours fast {kind}", weights, tokens), own, host)
                add(f"{KINDS[kind]}, × host in bf16", weights, tokens, FAST, ratio)
        for weights in ("Q4_0", "Q8_0"):
            for tokens in TOKENS:
                cosine = _first("cosine", (f"ours fast {kind}", weights, tokens), own, host)
                add(f"{KINDS[kind]}, cosine with exact", weights, tokens, COSINE, cosine, at_least=True)
    kernels = found.get("kernels", {"results": {"dequantize": ()}})["results"]
    for row in kernels["dequantize"]:
        if row["format"] in EXACT and row["shape"] == "16384x4096":
            add("dequantisation, of copy speed", row["format"], 16384, DEQUANTIZE, row["of copy"], at_least=True)
    for row in found.get("sweep_skinny", {"results": {"best": ()}})["results"]["best"]:  # the best there is what quant/kernels/skinny_choice.py takes
        if row["format"] == "Q4_0" and row["rows"] in SKINNY_ROWS and row["shape"] == "36864x4096":
            add("few rows, dense bf16 / this", row["format"], row["rows"], SKINNY, row["dense / best"], at_least=True)
    for row in found.get("gemma", {"results": ()})["results"]:
        if row["format"] != "BF16":
            add("Gemma-3 12B, × dense bf16", row["format"], row["tokens"], GEMMA, row["x bf16"])
    decodes = {(row["size"], row["decode"]): row["ms"] for row in found.get("vae", {"results": ()})["results"] if row.get("convolutions") != "cuDNN"}
    for (size, what), ms in decodes.items():
        if what == "streamed" and (size, "whole") in decodes:
            add("VAE decode, streamed / whole", "BF16", size, VAE, ms / decodes[size, "whole"])
    for row in found.get("load", {"results": ()})["results"][-1:]:
        add("load from a cached file, seconds", "Q4_0", f"{row['file GB']:.1f} GB", LOAD, row["seconds"])
    for row in found.get("cpu_linear", {"results": ()})["results"]:
        if row["format"] in ("Q4_0", "Q5_1", "Q8_0"):
            add("CPU, packed / dense", row["format"], row["rows"], 1.10, row["wall_ratio"])
    return out


def _rows(found, name):
    """(what, format, tokens) -> row of a run; the first run called its only fast kind just fast."""
    data = found.get(name, {"results": ()})
    return {("ours fast fp8" if r["what"] == "ours fast" else r["what"], r["format"], r["tokens"]): r for r in data["results"]}


def _first(column, key, *runs):
    """The column of the first run that has it, or None."""
    return next((run[key][column] for run in runs if run.get(key, {}).get(column) is not None), None)
