"""The pictures around the demo model: its first-frame image, the README's strip of clips, the training curves.

python tools/toy/pictures.py first-frame assets/toy-first-frame.png
python tools/toy/pictures.py demo docs/images/demo.png --model assets/toy-ltx2.3-Q8_0.gguf --gemma gemma-3-270m.gguf
python tools/toy/pictures.py curves docs/images/toy-curves.png --vae RUN1/vae_curves.json --dit RUN1/dit_curves.json RUN2/dit_curves.json
python tools/toy/pictures.py curves docs/images/toy-curves-3.png --dit RUN3/dit_curves.json
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    __package__ = "toy"

from . import captions as captions_module
from . import pack, scenes  # noqa: F401
from .captions import Caption

# What the strip shows, first seeds, nothing selected afterwards.
PROMPTS = (
    "A red circle moves to the right on a black background.",
    "A yellow star grows bigger on a brown background.",
    "A blue square moves diagonally up and to the right on a beige background.",
    "A green triangle falls down on a grey background.",
    "An orange circle bounces up and down on a black background.",
    "A purple cross spins around on a beige background.",
    "A white star drifts to the left on a brown background.",
    "A cyan square shrinks on a grey background.",
)
MOMENTS = (0, 5, 10, 15, 20, 24)


def first_frame(path: Path) -> None:
    """A yellow star in the right half of a black background: ready to move to the left."""
    from PIL import Image

    scene = scenes.sample(
        np.random.default_rng(6), *captions_module.classes([Caption("", (("star", "yellow", "left"),), "black")])
    )
    Image.fromarray(scenes.render(scene)[0, 0]).save(path)


def strip(path: Path, clips: np.ndarray, captions, columns: int = 2, size: int = 84, gap: int = 3) -> None:
    """Clips uint8 [N, T, H, W, 3] as rows of frames with their prompts above, in ``columns`` columns."""
    from PIL import Image, ImageDraw, ImageFont

    font, title, margin = ImageFont.load_default(13), 22, 14
    width, height = len(MOMENTS) * (size + gap) - gap, size + title
    rows = -(-len(clips) // columns)
    sheet = Image.new("RGB", (columns * (width + margin) + margin, rows * (height + margin) + margin), (250, 250, 250))
    draw = ImageDraw.Draw(sheet)
    for i, (clip, caption) in enumerate(zip(clips, captions)):
        x, y = margin + (i // rows) * (width + margin), margin + (i % rows) * (height + margin)
        draw.text((x, y), caption, fill=(40, 40, 40), font=font)
        for k, moment in enumerate(MOMENTS):
            frame = Image.fromarray(clip[moment]).resize((size, size), Image.Resampling.LANCZOS)
            sheet.paste(frame, (x + k * (size + gap), y + title))
    sheet.save(path, optimize=True)


def curves(path: Path, vae: Path | None, dit: list[Path]) -> None:
    """Reconstruction of the VAE (if its curve is given), and loss of the DiT in all and by noise level, over its runs one after the other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = 2 if vae else 1
    figure, axes = pyplot.subplots(1, panels, figsize=(5.5 * panels + 1.5, 3.8), constrained_layout=True, squeeze=False)
    right = axes[0, -1]
    if vae:
        points = json.loads(vae.read_text())["curve"]
        axes[0, 0].plot([p["seconds"] for p in points], [p["psnr"] for p in points])
        axes[0, 0].set(
            title="VAE: reconstruction of training clips",
            xlabel="seconds on one H100",
            ylabel="PSNR in dB (latents with noise)",
        )
    start, joined = 0, []
    for run in dit:
        points = json.loads(run.read_text())["curve"]
        joined += [(start + p["step"], p["loss"], *p["by_sigma"]) for p in points]
        start = joined[-1][0]
        right.axvline(start, color="0.7", linewidth=0.8)
    steps = [row[0] for row in joined]
    right.plot(steps, [row[1] for row in joined], color="black", label="all noise levels")
    for band in range(5):
        right.plot(
            steps,
            [row[2 + band] for row in joined],
            linewidth=0.8,
            label=f"sigma {band / 5:.1f} to {band / 5 + 0.2:.1f}",
        )
    right.set(
        title="DiT: flow-matching loss (grey: end of a run)",
        xlabel="step",
        ylabel="squared error of the velocity",
        yscale="log",
    )
    right.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=90)


def demo(path: Path, model: Path, gemma: Path) -> None:
    from . import evaluate

    strip(path, evaluate.Model(model, gemma).clips(list(PROMPTS), seed=1), PROMPTS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", choices=["first-frame", "demo", "curves"])
    parser.add_argument("path", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--gemma", type=Path)
    parser.add_argument("--vae", type=Path)
    parser.add_argument("--dit", type=Path, nargs="*", default=[])
    args = parser.parse_args()
    if args.picture == "first-frame":
        first_frame(args.path)
    elif args.picture == "demo":
        demo(args.path, args.model, args.gemma)
    else:
        curves(args.path, args.vae, args.dit)
