"""What the pack promises on one H100, beside what was measured; a part of benchmarks/report.py. A ratio is always taken within one run."""

FORMATS = ("Q4_0", "Q4_K", "Q5_1", "Q8_0")
FLOOR = {6144: 1.15, 14080: 1.10}  # exact step / floor, by tokens
FAST = 0.62  # fast step / host in bf16
COSINE = 0.999  # of the fast and the exact velocity
VAE = 1.05  # streamed / whole
LOAD = 2.0  # seconds
CPU = 1.25  # packed / dense, from 256 rows on
GENERATE = 60.0  # tokens per second, Gemma-3 12B Q4_K


def rows(found):
    """[(what, weights, tokens, limit, measured, verdict)] from the results found (name -> JSON)."""
    out = []

    def add(what, weights, tokens, limit, value, at_least=False):
        if value is not None:
            kept = value >= limit if at_least else value <= limit
            out.append(
                (
                    what,
                    weights,
                    tokens,
                    f"{'≥' if at_least else '≤'} {limit:g}",
                    f"{value:.4g}",
                    "kept" if kept else "**missed**",
                )
            )

    steps = {(r["what"], r["format"], r["tokens"]): r for r in found.get("step", {"results": ()})["results"]}
    for weights in FORMATS:
        for tokens, limit in FLOOR.items():
            add(
                "exact step, × floor",
                weights,
                tokens,
                limit,
                steps.get(("ours exact", weights, tokens), {}).get("x floor"),
            )
    for weights in ("Q4_0", "Q8_0"):
        for tokens in FLOOR:
            row = steps.get(("ours fast mixed", weights, tokens), {})
            add("fast step, × host in bf16", weights, tokens, FAST, row.get("x host bf16"))
            add("fast, cosine with exact", weights, tokens, COSINE, row.get("cosine"), at_least=True)
    for row in found.get("gemma", {"results": ()})["results"]:
        if row["format"] == "Q4_K":
            add("Gemma-3 12B, tokens/s", row["format"], 1, GENERATE, row.get("tokens/s"), at_least=True)
    decodes = {(row["size"], row["decode"]): row["ms"] for row in found.get("vae", {"results": ()})["results"]}
    for (size, what), ms in decodes.items():
        if what == "streamed" and (size, "whole") in decodes:
            add("VAE decode, streamed / whole", "BF16", size, VAE, ms / decodes[size, "whole"])
    for row in found.get("load", {"results": ()})["results"][-1:]:
        add("load from a cached file, seconds", "Q4_0", f"{row['file GB']:.1f} GB", LOAD, row["seconds"])
    for row in found.get("cpu_linear", {"results": ()})["results"]:
        add("CPU, packed / dense", row["format"], row["rows"], CPU, row["wall_ratio"])
    return out
