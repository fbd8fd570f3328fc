"""What the pack set out to reach on one H100, beside what was measured; a part of benchmarks/report.py.

A ratio is always taken within one run. Two runs may be there: ``step`` (this pack and the floor) and ``step-host`` (with the host's own
model as well); a ratio to the host can only come from a run that has it.
"""

#: format -> limits: x floor, x host's bf16, x this pack's bf16, each at 6144 and 14080 tokens. K-quants decode to more operations.
SIMPLE = {"x floor": (1.18, 1.12), "x host bf16": (0.78, 0.73), "x ours bf16": (1.05, 1.05)}
K_QUANT = {"x floor": (1.21, 1.15), "x host bf16": (0.80, 0.75), "x ours bf16": (1.08, 1.08)}
EXACT = {"Q4_0": SIMPLE, "Q5_1": SIMPLE, "Q8_0": SIMPLE, "Q4_K": K_QUANT, "Q6_K": K_QUANT}
EAGER = {"Q4_0": 2.0, "Q5_1": 2.8, "Q8_0": 1.55, "Q4_K": 2.2}
FAST = 0.60
COSINE = 0.999
TOKENS = (6144, 14080)
WHAT = {"x floor": "× floor", "x host bf16": "× host in bf16", "x ours bf16": "× this pack in bf16"}


def rows(found):
    """[(what, weights, tokens, limit, measured, verdict)] from the results found (name -> JSON)."""
    out = []

    def add(what, weights, tokens, limit, value, at_least=False):
        if value is not None:
            kept = value >= limit if at_least else value <= limit
            sign = "≥" if at_least else "≤"
            near = abs(value - limit) < 0.005 * limit
            out.append((what, weights, tokens, f"{sign} {limit:g}", f"{value:.4f}" if near else f"{value:.3f}", "reached" if kept else "**missed**"))

    own, host = (_rows(found, name) for name in ("step", "step-host"))
    for kind in WHAT:
        for weights, limits in EXACT.items():
            for tokens, limit in zip(TOKENS, limits[kind]):
                add(f"exact, {WHAT[kind]}", weights, tokens, limit, _first(kind, ("ours exact", weights, tokens), own, host))
    for weights, limit in EAGER.items():
        add("exact, plain eager / this", weights, 6144, limit, _first("eager / ours", ("ours exact", weights, 6144), own, host), at_least=True)
    for weights in ("Q4_0", "Q8_0"):
        for tokens in TOKENS:
            add("fast (fp8), × host in bf16", weights, tokens, FAST, _first("x host bf16", ("ours fast fp8", weights, tokens), own, host))
    for kind in ("fp8", "int8"):
        for weights in ("Q4_0", "Q8_0"):
            add(f"fast ({kind}), cosine with exact", weights, 6144, COSINE, _first("cosine", (f"ours fast {kind}", weights, 6144), own, host), at_least=True)
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
