"""Bars of one denoise step, per token count: the floor, this pack exact and fast, and the host, by weight format. Needs matplotlib.

python benchmarks/plot.py step.json step.png
"""

import json
import sys
from pathlib import Path

SERIES = {  # what -> (label, colour)
    "host pack": ("host, ComfyUI-GGUF's dequantisation", "#c44e52"),
    "host eager": ("host, plain eager dequantisation", "#dd8452"),
    "host": ("host's own model", "#8c8c8c"),
    "ours exact": ("this pack, exact", "#4c72b0"),
    "ours fast mixed": ("this pack, fast", "#55a868"),
    "ours fast fp8": ("this pack, fast (fp8 alone)", "#8fcf9f"),
    "ours fast int8": ("this pack, fast (int8 alone)", "#937860"),
}
FORMATS = ("BF16", "Q8_0", "Q6_K", "Q5_1", "Q4_K", "Q4_0")


def step(data, path):
    """Draw ``data`` (the JSON of bench_step.py) to ``path``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = data["results"]
    counts = sorted({row["tokens"] for row in rows})
    formats = [name for name in FORMATS if any(row["format"] == name for row in rows)]
    figure, axes = pyplot.subplots(1, len(counts), figsize=(4.6 * len(counts), 4.2), squeeze=False)
    for axis, tokens in zip(axes[0], counts):
        here = {
            ("ours fast fp8" if row["what"] == "ours fast" else row["what"], row["format"]): row["ms"]
            for row in rows
            if row["tokens"] == tokens
        }
        at, ticks = 0.0, []
        for name in formats:
            bars = [what for what in SERIES if (what, name) in here]
            for i, what in enumerate(bars):
                label, colour = SERIES[what]
                axis.bar(at + i, here[what, name], 0.9, color=colour, label=label)
            ticks.append((at + (len(bars) - 1) / 2, name))
            at += len(bars) + 0.8
        if ("floor", "BF16") in here:
            axis.axhline(
                here["floor", "BF16"],
                color="black",
                linewidth=1,
                linestyle="--",
                label="floor: matrix products and attention alone",
            )
        axis.set_xticks([x for x, _ in ticks], [name for _, name in ticks])
        axis.set_title(f"{tokens} tokens")
        axis.set_ylabel("ms per step")
        axis.spines[["top", "right"]].set_visible(False)
    handles = {}
    for axis in axes[0]:
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=3, fontsize=8, frameon=False)
    environment = data["environment"]
    figure.suptitle(
        f"LTX-2.3, one denoise step (video, 48 blocks), {environment.get('gpu', environment['device'])}", fontsize=11
    )
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    step(json.loads(Path(sys.argv[1]).read_text()), sys.argv[2])
