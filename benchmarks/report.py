"""Write benchmarks/results/README.md, all measured tables, from the JSON files of the benchmarks.

    python benchmarks/report.py DIR [DIR …]

DIR holds the JSON files of scripts/gpu_check.py, scripts/gpu_host_check.py or of single benchmarks; of a file found in several, the last one counts. What the
page shows now was written from ``benchmarks/results/h100``.
"""

import argparse
import json
from pathlib import Path

import goals
import host_memory_report
import plot

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "benchmarks" / "results" / "README.md"
FIGURES = {"step": "step.png"}  # results -> in docs/images
WHAT = {"floor": "floor", "ours exact": "this pack, exact",
        "ours fast mixed": "this pack, fast", "ours fast fp8": "this pack, fast (fp8 alone)",
        "ours fast int8": "this pack, fast (int8 alone)",
        "host": "host's own model", "host eager": "host, plain eager dequantisation",
        "host pack": "host, ComfyUI-GGUF's dequantisation"}  # fmt: skip

FAST_KINDS = {"fp8": "fp8 alone", "mixed": "fast mode", "int8": "int8 alone"}


def load(folders):
    """name -> {"environment", "results"} of every JSON file."""
    found = {}
    for folder in folders:
        for path in sorted(Path(folder).glob("*.json")):
            data = json.loads(path.read_text())
            if isinstance(data, dict) and ("results" in data or "sections" in data):
                found[path.stem] = data
    return found


def number(value, digits=3):
    """A number to so many significant digits, without an exponent."""
    if value is None or value == "":
        return ""
    if isinstance(value, (str, int)):
        return str(value)
    text = f"{value:.{digits}g}"
    return f"{float(text):.0f}" if "e" in text else text


def table(columns, rows):
    """Markdown. columns: heading -> function of a row; one without a value in any row is left out."""
    columns = {
        heading: cell
        for heading, cell in columns.items()
        if not rows or any(cell(row) not in (None, "") for row in rows)
    }
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(number(cell(row)) for cell in columns.values()) + " |" for row in rows]
    return "\n".join(lines)


def step(data):
    rows = sorted(data["results"], key=lambda row: row["tokens"])
    columns = {
        "tokens": lambda r: r["tokens"], "": lambda r: WHAT[r["what"]], "weights": lambda r: r["format"], "ms": lambda r: r["ms"],
        "× floor": lambda r: r.get("x floor"), "× host in bf16": lambda r: r.get("x host bf16"), "× this pack in bf16": lambda r: r.get("x ours bf16"),
        "plain eager / this": lambda r: r.get("eager / ours"), "ComfyUI-GGUF's / this": lambda r: r.get("pack / ours"),
        "activations, MB": lambda r: r.get("activations MB"),
    }  # fmt: skip
    return table(columns, rows)


def queued(data):
    rows = sorted(
        (row for row in data["results"] if row.get("queued ms") and row["tokens"] <= 1024), key=lambda row: row["what"]
    )
    return table(
        {
            "tokens": lambda r: r["tokens"],
            "weights": lambda r: r["format"],
            "": lambda r: WHAT[r["what"]],
            "step, ms": lambda r: r["ms"],
            "issued after, ms": lambda r: r["queued ms"],
        },
        rows,
    )


def fast_step(data):
    rows = [row for row in data["results"] if row["what"].startswith("ours fast")]
    exact = {(row["format"], row["tokens"]): row["ms"] for row in data["results"] if row["what"] == "ours exact"}
    rows.sort(key=lambda row: (row["format"], row["tokens"]))
    columns = {
        "weights": lambda r: r["format"], "tokens": lambda r: r["tokens"], "": lambda r: WHAT[r["what"]], "ms": lambda r: r["ms"],
        "exact / fast": lambda r: exact[r["format"], r["tokens"]] / r["ms"], "× host in bf16": lambda r: r.get("x host bf16"),
        "cosine with exact": lambda r: f"{r['cosine']:.4f}", "relative error": lambda r: r.get("relative error"),
    }  # fmt: skip
    return table(columns, rows)


def fast_kinds(data):
    return plain(
        {
            "results": [
                row | ({"cosine": f"{row['cosine']:.4f}"} if "cosine" in row else {})
                for row in data["results"]["kinds"]
            ]
        }
    )


def fast_error(data):
    """Emulated errors: random models and the demo model, one line per kind."""
    lines = []
    for row in data["results"]["random"]:
        for kind in FAST_KINDS:
            if f"{kind} cosine" in row:
                cosine = f"{row[f'{kind} cosine']:.4f}"
                lines.append({"weights": row["weights"], "kind": kind, "cosine": cosine, "error": row[f"{kind} error"]})
    for row in data["results"].get("trained", ()):
        cosine = f"{row['cosine, median']:.4f} (median; lowest {row['cosine, lowest']:.3f})"
        found = {"cosine": cosine, "error": row["error, median"], "psnr": row["PSNR of the clips, dB"]}
        lines.append({"weights": "demo model, Q8_0", "kind": row["kind"], **found})
    columns = {
        "weights": lambda r: r["weights"], "": lambda r: FAST_KINDS[r["kind"]], "cosine with exact": lambda r: r["cosine"],
        "relative error": lambda r: r["error"], "clips of a whole run, PSNR, dB": lambda r: r.get("psnr"),
    }  # fmt: skip
    return table(columns, lines)


def fast_products(data):
    lines = []
    for row in data["results"]:
        int8 = [
            value
            for key, value in row.items()
            if key.startswith("int8 ") and key not in ("int8 weight ms", "int8 tokens ms", "int8 gelu tokens ms")
        ]
        lines.append({**row, "int8": min(int8) if int8 else None})
    columns = {
        "shape": lambda r: r["shape"],
        "rows": lambda r: r["rows"],
        "dense bf16, ms": lambda r: r["dense bf16 ms"],
    }
    for kind in ("fp8", "int8"):
        columns |= {
            f"{kind}: weight": lambda r, kind=kind: r[f"{kind} weight ms"], f"{kind}: tokens": lambda r, kind=kind: r[f"{kind} tokens ms"],
            f"{kind}: product": lambda r, kind=kind: r["int8"] if kind == "int8" else r["fp8 product ms"],
        }  # fmt: skip
    return table(columns, lines)


def dequantize(data):
    columns = {"format": lambda r: r["format"], "shape": lambda r: r["shape"], "µs": lambda r: r["ms"] * 1e3, "GB/s": lambda r: r["GB/s"], "of copy speed": lambda r: r["of copy"],
               "plain eager / this": lambda r: r.get("eager / ours")}  # fmt: skip
    return f"Copy speed of the card: {data['results']['copy_gb_s']:.0f} GB/s.\n\n" + table(
        columns, data["results"]["dequantize"]
    )


def linear(data, few):
    rows = [row for row in data["results"]["linear"] if (row["rows"] <= 32) == few]
    columns = {
        "format": lambda r: r["format"],
        "shape": lambda r: r["shape"],
        "rows": lambda r: r["rows"],
        "µs": lambda r: r["ms"] * 1e3,
    }
    columns |= {"GB/s of bytes": lambda r: r["GB/s of bytes"]} if few else {"TFLOP/s": lambda r: r["TFLOP/s"]}
    columns |= {"dense bf16 / this": lambda r: r["dense / ours"]}
    if not few:
        columns |= {"plain eager / this": lambda r: r.get("eager / ours")}
    return table(columns, rows)


def passes(data):
    columns = {
        "pass": lambda r: f"`{r['pass']}`",
        "µs": lambda r: r["us"],
        "GB/s": lambda r: r["GB/s"],
        "of copy speed": lambda r: r["of copy"],
    }
    return table(columns, data["results"]["passes"])


def plain(data):
    """The rows as they are."""
    rows = data["results"]
    return table(
        {key: lambda r, key=key: r.get(key) for key in dict.fromkeys(key for row in rows for key in row)}, rows
    )


def cpu(data):
    machine = data["machine"]
    columns = {
        "weights": lambda r: r["format"], "rows": lambda r: r["rows"], "dense float32, ms": lambda r: r["dense_ms"], "packed, ms": lambda r: r["packed_ms"],
        "decode whole, then multiply, ms": lambda r: r["eager_ms"], "packed / dense": lambda r: f"{r['wall_ratio']:.2f}", "packed / dense, processor time": lambda r: f"{r['cpu_ratio']:.2f}",
    }  # fmt: skip
    heading = f"{machine['cpu']}, {machine['threads']} threads, {machine['capability']}; torch {machine['torch']}, Python {machine['python']}; weights 4096 × 4096, float32 activations."
    return heading + "\n\n" + table(columns, data["results"])


def card(data):
    r = data["results"]
    return f"Copy speed {r['copy_gb_s']:.0f} GB/s (read and written bytes), dense bf16 product of 8192³ {r['bf16_tflop_s']:.0f} TFLOP/s."


def reached(found):
    columns = ("goal", "weights", "tokens, rows or size", "limit", "measured", "")
    return table({heading: lambda r, i=i: r[i] for i, heading in enumerate(columns)}, goals.rows(found))


def environment(data):
    e = data["environment"]
    card = f"{e.get('gpu', e['device'])}, {e.get('memory_gb', '?')} GB, {e.get('multiprocessors', '?')} multiprocessors"
    return f"{card}; CUDA {e.get('cuda', 'none')}, torch {e['torch']}, Triton {e.get('triton', 'none')}, Python {e['python']}."


def memory(data):
    return host_memory_report.render(data, markdown=True)[0]


#: (heading, file, function, what the table shows)
SECTIONS = (
    ("The card", "card", card, None),
    ("Seconds per clip", "clip", plain, "The sum of its parts: prompts, steps times passes, decode (`benchmarks/bench_clip.py`). Loading is not in it."),
    ("One denoise step", "step", step,
     "Video only, 48 blocks of width 4096, weights resident, 1024 text tokens, one forward (no guidance). *Floor* is the sum of the step's dense bf16 products and "
     "attention calls on the same shapes in the same process; *plain eager* decodes in the compute type and multiplies; *ComfyUI-GGUF's* is that pack's own decoder."),
    ("How far ahead the processor is", "step", queued, "Where *issued after* comes near the step's own time, the GPU waits for the processor that launches kernels."),
    ("Fast mode: a step", "step_fast", fast_step, "Errors are of the velocity of one step against exact mode on the same random weights."),
    ("Fast mode: kinds of 8-bit products", "fast_kinds", fast_kinds, "A step of 24 blocks at 6144 tokens, Q8_0."),
    ("Fast mode: error of random models and of the demo model", "fast_error", fast_error, "`python benchmarks/fast_error.py`, the arithmetic in plain torch."),
    ("Fast mode: products", "fast", fast_products, "Re-expressing the weight, quantising the activations, and the product, milliseconds."),
    ("Dequantisation to bf16", "kernels", dequantize, None),
    ("One to four rows: GEMV on the packed bytes", "kernels", lambda data: linear(data, True), None),
    ("Many rows: decode, then a dense product", "kernels", lambda data: linear(data, False), None),
    ("Element-wise passes at 6144 × 4096", "passes", passes, "Each tensor counted once."),
    ("Gemma-3 12B", "gemma", plain, "Random weights; hidden states of all layers."),
    ("Video VAE decode", "vae", plain, None),
    ("Loading a 48-block transformer from a cached file to the GPU", "load", plain, None),
    ("CPU", "cpu_linear", cpu, "`python benchmarks/cpu_linear.py --threads 2`"),
    ("Memory modes", "host_memory", memory, "`python scripts/gpu_host_check.py --host COMFYUI`, ComfyUI 0.33"),
    ("Memory modes, ComfyUI 0.30", "host_memory_030", memory, "The same on ComfyUI 0.30."),
)  # fmt: skip


def document(found):
    """The whole page (markdown) from the results found (name -> JSON); a section without a file is left out."""
    parts = [
        "# Measured",
        "Written by `python benchmarks/report.py DIR` from the JSON files of `scripts/gpu_check.py`, `scripts/gpu_host_check.py` and the benchmarks in this "
        "folder; do not edit by hand. What the figures mean for a user is in [performance.md](../../docs/performance.md) and [memory.md](../../docs/memory.md).",
    ]
    if "step" in found:
        parts += [environment(found["step"]), "## Goals", "Ratios are taken within one run.", reached(found)]
    for heading, file, write, note in SECTIONS:
        if file in found:
            parts += [f"## {heading}", *([note] if note else []), write(found[file])]
    return "\n\n".join(parts) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    parser.add_argument("--images", type=Path, default=ROOT / "docs" / "images")
    args = parser.parse_args()
    found = load(args.folders)
    args.document.write_text(document(found), encoding="utf-8")
    for name, file in FIGURES.items():
        if name in found:
            plot.step(found[name], args.images / file)


if __name__ == "__main__":
    main()
