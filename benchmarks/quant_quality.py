"""Write docs/quantisation.md and its plot: what each block format costs in weights, in one block, and in the whole model.

    python benchmarks/quant_quality.py                              (synthetic weights)
    python benchmarks/quant_quality.py --checkpoint model.safetensors   (any LTX-2 checkpoint that fits into memory as float32)

The large matrices of a float32 model are quantised with the converter's own rules and encoders, everything else stays. Then, against
float32: the error of the weights; the error of what each block adds to the stream when it gets the float32 model's input; the error of
the stream after each block of the quantised model; and the error of the velocity, averaged over noise levels.
"""

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from common import load_pack

load_pack()

from ltx2_gguf.ltx2_core.convert import plan, synthetic
from ltx2_gguf.ltx2_core.files import structure
from ltx2_gguf.ltx2_core.loading.assign import assign
from ltx2_gguf.ltx2_core.loading.transformer import load_dit
from ltx2_gguf.ltx2_core.transformer.config import config_from_shapes
from ltx2_gguf.ltx2_core.transformer.model import LTX2Model
from ltx2_gguf.quant import decode, tensor
from ltx2_gguf.quant.formats import FORMATS

COMPARED = (
    "BF16", "Q8_0", "Q6_K", "Q5_1", "Q5_K_M", "Q5_K", "Q5_0", "Q4_K_M", "Q4_K", "Q4_1", "Q4_0", "Q3_K_M", "Q3_K", "Q2_K",
)  # fmt: skip
SIGMAS = (1.0, 0.9, 0.7, 0.4)
FPS = 24.0


def synthetic_model(version, layers, heads):
    """A float32 model of ``heads`` x 128 with weights as make-synthetic draws them."""
    geometry = structure.Geometry.small(version, num_layers=layers, heads=heads, head_dim=128, gemma_width=128 * heads)
    shapes = {**structure.dit_shapes(geometry), **structure.connector_shapes(geometry)}
    model = LTX2Model(config_from_shapes(shapes, synthetic.metadata(geometry)), dtype=torch.float32, device="meta")
    assign(model, {name: synthetic.tensor(name, shape) for name, shape in shapes.items()})
    return model.eval()


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def quantised(model, fmt):
    """(a copy of the model with its large matrices in ``fmt``, weight error over these, bits per weight over these)."""
    tensors, squares, errors, bits, count = {}, 0.0, 0.0, 0, 0
    for name, p in model.state_dict().items():
        chosen, rule = plan.format_for(name, tuple(p.shape), fmt.lower(), len(model.transformer_blocks))
        if rule is None or rule.target != "asked":
            tensors[name] = p
            continue
        raw = decode.quantize(p, FORMATS[chosen])
        decoded = decode.dequantize(raw, FORMATS[chosen]).view(p.shape)
        squares += p.double().square().sum().item()
        errors += (decoded.double() - p.double()).square().sum().item()
        bits += FORMATS[chosen].nbytes(tuple(p.shape)) * 8
        count += p.numel()
        tensors[name] = (
            tensor.pack(raw, chosen, tuple(p.shape), torch.float32) if FORMATS[chosen].is_quantized else decoded
        )
    copy = LTX2Model(model.config, dtype=torch.float32, device="meta")
    assign(copy, tensors)
    return copy.eval(), (errors / squares) ** 0.5, bits / count


def record(model, run):
    """(output of ``run``, [(arguments, stream before, stream after)] of every block)."""
    seen = []

    def before(block, args, kwargs):
        seen.append([kwargs, args[0][0].clone(), None])

    def after(block, args, kwargs, out):
        seen[-1][2] = out[0].clone()

    handles = []
    for block in model.transformer_blocks:
        handles += [
            block.register_forward_pre_hook(before, with_kwargs=True),
            block.register_forward_hook(after, with_kwargs=True),
        ]
    out = run(model)
    for handle in handles:
        handle.remove()
    return out, seen


def measure(model, fmt, inputs, exact):
    """All figures of one format as a dict."""
    other, weights, bits = quantised(model, fmt)
    velocity, block_errors, stream = [], [], torch.zeros(len(model.transformer_blocks))
    for run, (v, blocks) in zip(inputs, exact):
        got, own = record(other, run)
        velocity.append(relative(got, v))
        for number, (kwargs, x, y) in enumerate(blocks):
            out, _ = other.transformer_blocks[number]((x.clone(), x[:, :0, :0]), **kwargs)
            block_errors.append(relative(out - x, y - x))
            stream[number] += relative(own[number][2], y) / len(inputs)
    return {
        "format": fmt, "bits": bits, "weights": weights, "block_median": sorted(block_errors)[len(block_errors) // 2], "block_worst": max(block_errors),
        "velocity": sum(velocity) / len(velocity), "velocity_by_sigma": velocity, "stream": stream.tolist(),
    }  # fmt: skip


def make_inputs(model, frames, height, width):
    """One function model -> velocity per noise level, on the same latent and context."""
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(1, model.config.in_channels, frames, height, width, generator=generator)
    features = torch.randn(1, 24, model.config.connector.inner_dim, generator=generator)
    context = model.preprocess_text_embeds(features, unprocessed=True)[:, :256]
    return [lambda m, sigma=sigma: m.velocity(latent, sigma, context, FPS) for sigma in SIGMAS]


def plot(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2))
    ordered = sorted(rows, key=lambda row: -row["weights"])
    for key, label, marker in (
        ("weights", "weights", "o"),
        ("block_median", "one block (median)", "s"),
        ("velocity", "velocity of the whole model", "^"),
    ):
        left.plot(range(len(ordered)), [row[key] for row in ordered], marker=marker, label=label)
    left.set_xticks(range(len(ordered)), [f"{row['format']}\n{row['bits']:.2f}" for row in ordered], fontsize=8)
    left.set(
        yscale="log",
        xlabel="format and bits per weight",
        ylabel="relative error against float32",
        title="Error by format",
    )
    left.legend(fontsize=8)
    left.grid(alpha=0.3, which="both")
    for row in rows:
        right.plot(range(1, len(row["stream"]) + 1), row["stream"], marker=".", label=row["format"])
    right.set(
        yscale="log",
        xlabel="after block",
        ylabel="relative error of the stream",
        title="How the error grows through the model",
    )
    right.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    right.grid(alpha=0.3, which="both")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


DOCUMENT = """# What quantisation costs

Relative errors ‖quantised − float32‖ / ‖float32‖, measured by `python benchmarks/quant_quality.py` on {what}, {tokens} tokens, on the
CPU (torch {torch}). The converter's rules decide which matrices are quantised (attention, feed-forward and time step modulation: nearly all
weights; [convert.md](convert.md) lists the rest, which stays in float32), and its own encoders do it. Activations are float32, so only the
weights' error is seen.

{table}

![Errors by format, and through the depth of the model](images/quantisation.png)

- **weights**: over all quantised matrices.
- **one block**: what a block adds to the stream, given exactly the float32 model's input; median and worst over blocks and noise levels.
- **velocity**: output of the whole model, mean over the noise levels {sigmas}.

How to read it. Each bit about halves the weights' error. A block's error is about {block_gain:.1f} times the weights' error here and
the whole model's {model_gain:.1f} times, in every format alike, so the order of the formats is that of their weights' errors: {order}. Storing
the matrices as BF16, as the released files do, is not free either: Q8_0 costs {q8_over_bf16:.1f} times that error, Q4_0 {q4_over_bf16:.0f} times.

What this does not show: {caveat}
"""
SYNTHETIC_CAVEAT = (
    "how much a block and the whole model multiply the weights' error depends on the model, so with random weights\n"
    "the columns for block and velocity rank the formats and are no forecast for a released model. Trained weights also have outliers, which the K\n"
    "formats' fitted scales and minimums are made for and random weights lack. Run the script with `--checkpoint` on the model in question, and judge a format by the videos it makes."
)


def document(rows, what, tokens, caveat):
    head = "| format | bits per weight | weights | one block, median | one block, worst | velocity |\n|---|---|---|---|---|---|"
    lines = [
        f"| {r['format']} | {r['bits']:.2f} | {r['weights']:.2e} | {r['block_median']:.2e} | {r['block_worst']:.2e} | {r['velocity']:.2e} |"
        for r in rows
    ]
    by_format = {row["format"]: row for row in rows}
    gain = {key: sum(row[key] / row["weights"] for row in rows) / len(rows) for key in ("block_median", "velocity")}
    over = {fmt: by_format[fmt]["velocity"] / by_format["BF16"]["velocity"] for fmt in ("Q8_0", "Q4_0")}
    return DOCUMENT.format(
        what=what, tokens=tokens, torch=torch.__version__, table="\n".join([head, *lines]), sigmas=", ".join(map(str, SIGMAS)), caveat=caveat,
        block_gain=gain["block_median"], model_gain=gain["velocity"], q8_over_bf16=over["Q8_0"], q4_over_bf16=over["Q4_0"],
        order=", ".join(row["format"] for row in sorted(rows, key=lambda row: row["weights"])),
    )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description="Measure what each block format costs and write docs/quantisation.md.")
    parser.add_argument(
        "--checkpoint", nargs="*", type=Path, help="files of a float model to quantise instead of a synthetic one"
    )
    parser.add_argument("--version", default="2.3", choices=("2.0", "2.3"), help="of the synthetic model")
    parser.add_argument("--layers", type=int, default=8, help="of the synthetic model")
    parser.add_argument("--heads", type=int, default=2, help="of 128 each, of the synthetic model")
    parser.add_argument("--grid", type=int, nargs=3, default=(3, 6, 8), help="latent frames, rows and columns")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "quantisation.md")
    args = parser.parse_args()
    with torch.inference_mode():
        if args.checkpoint:
            model = load_dit(args.checkpoint, dtype=torch.float32)
            what, caveat = (
                f"{', '.join(path.name for path in args.checkpoint)}",
                "pictures. Judge a format by the videos it makes.",
            )
        else:
            model = synthetic_model(args.version, args.layers, args.heads)
            what, caveat = (
                f"a synthetic LTX-{args.version} model of {args.layers} blocks, {args.heads * 128} wide",
                SYNTHETIC_CAVEAT,
            )
        inputs = make_inputs(model, *args.grid)
        exact = [record(model, run) for run in inputs]
        rows = []
        for fmt in COMPARED:
            rows.append(measure(model, fmt, inputs, exact))
            print(
                f"{fmt:5} "
                + "  ".join(
                    f"{key} {rows[-1][key]:.2e}"
                    for key in ("bits", "weights", "block_median", "block_worst", "velocity")
                ),
                flush=True,
            )
    frames, height, width = args.grid
    args.out.write_text(document(rows, what, frames * height * width, caveat), "utf-8")
    plot(rows, args.out.parent / "images" / "quantisation.png")


if __name__ == "__main__":
    main()
