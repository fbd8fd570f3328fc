"""Generate clips for held-out prompts, measure what they show, and print the scores: the demo model's exam.

    python tools/toy/evaluate.py assets/toy-ltx2.3-Q8_0.gguf --gemma gemma-3-270m.gguf --out OUT
    python tools/toy/evaluate.py assets/toy-ltx2.3-Q8_0.gguf --gemma gemma-3-270m.gguf --out OUT --also q5_1 q4_0

Prompts come from ``captions.evaluation_set``: wordings that training never saw, a tenth of the single things in combinations of colour,
shape and motion that it never saw either. Every clip has its own noise. ``--also`` converts the model to further formats with the pack's
converter (or takes files of the same model) and puts them to the text-to-video part of the same test. OUT receives scores.json and one contact sheet per format.

Everything runs through the pack's own loaders; only the loop over steps is batched (``sample.py``).
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    __package__ = "toy"

from ltx2_gguf.ltx2_core.convert import convert
from ltx2_gguf.ltx2_core.loading.text_encoder import load_text_encoder
from ltx2_gguf.ltx2_core.loading.transformer import load_dit
from ltx2_gguf.ltx2_core.loading.vae import load_vae

from . import captions as captions_module
from . import files, pack, scenes, vision  # noqa: F401
from .sample import noise_for, sample

STEPS, CFG, RESCALE = 20, 2.0, 0.7  # the demo's settings; STG is off
SEED = 1000  # of the first clip's noise
EXAM, TRIAL = 1, 2  # seeds of the prompt sets: the one reported, and the one that settings are chosen on
KEYS = ("colour", "shape", "motion")


class Model:
    """One file with everything but Gemma, ready to generate many clips at once on the CPU."""

    @torch.inference_mode()
    def __init__(self, path: Path, gemma: Path):
        self.dit = load_dit([path], dtype=torch.float32)
        self.vae = load_vae([path], dtype=torch.float32)
        self.text = load_text_encoder([gemma, path], dtype=torch.float32)

    @torch.inference_mode()
    def contexts(self, prompts) -> torch.Tensor:
        """Contexts [B, 1024, D] of the prompts."""
        features = [self.text.encode(prompt) for prompt in prompts]
        return torch.cat([self.dit.preprocess_text_embeds(f, unprocessed=True) for f in features])

    @torch.inference_mode()
    def clips(self, prompts, images=None, steps=STEPS, cfg=CFG, rescale=RESCALE, seed=SEED, batch=4) -> np.ndarray:
        """uint8 [N, T, H, W, 3]; clip i starts from the noise of seed + i. images: uint8 [N, H, W, 3], first frames to keep."""
        empty, result = self.contexts([""]), []
        for start in range(0, len(prompts), batch):
            rows = slice(start, min(start + batch, len(prompts)))
            context = self.contexts(prompts[rows])
            first = None
            if images is not None:
                pixels = (
                    torch.from_numpy(images[rows]).permute(0, 3, 1, 2)[:, :, None].float() / 127.5 - 1
                )  # (B, 3, 1, H, W)
                first = self.vae.encode(pixels)
            noise = noise_for(len(context), seed + start)
            latent = sample(self.dit, context, empty, noise, steps=steps, cfg=cfg, rescale=rescale, first=first)
            result.append(files.to_uint8(self.vae.decode(latent)))
        return np.concatenate(result)


@dataclass
class Exam:
    """Held-out captions, and for each a scene it describes (for first frames and for the measurement's own errors)."""

    captions: list
    truth: np.ndarray  # uint8 [N, T, H, W, 3]

    @property
    def prompts(self) -> list[str]:
        return [c.text for c in self.captions]

    @property
    def wanted(self) -> list:
        return [c.things for c in self.captions]

    def __getitem__(self, rows) -> "Exam":
        return Exam(self.captions[rows], self.truth[rows])


def exam(seed: int = EXAM, singles: int = 80, pairs: int = 16) -> tuple[Exam, Exam]:
    """(prompts with one thing, prompts with two)."""
    captions = captions_module.evaluation_set(seed, singles, pairs)
    truth = scenes.render(scenes.sample(np.random.default_rng(5), *captions_module.classes(captions)))
    return Exam(captions[:singles], truth[:singles]), Exam(captions[singles:], truth[singles:])


def shuffled(wanted, by: int = 7):
    """Other prompts' things: what chance gives."""
    return wanted[by:] + wanted[:by]


def examine(model: Model, one: Exam, two: Exam, log=print, images: int = 48, **settings) -> tuple[dict, dict]:
    """(report, {"text to video": clips, "two things": clips, "image to video": clips}) of one model."""
    clips, seconds = {}, time.monotonic()
    clips["text to video"] = model.clips(one.prompts, **settings)
    report = {"text to video": vision.score(clips["text to video"], one.wanted)}
    report["seconds per clip"] = round((time.monotonic() - seconds) / len(one.captions), 2)
    report["against other prompts"] = vision.score(clips["text to video"], shuffled(one.wanted))
    if two.captions:
        removed = model.clips([""] * len(one.prompts), cfg=1.0)  # guidance between two empty prompts changes nothing
        report["without the prompt"] = vision.score(removed, one.wanted)
        clips["two things"] = model.clips(two.prompts, seed=SEED + 500, **settings)
        report["two things"] = vision.score(clips["two things"], two.wanted)
    if images:
        asked = one[:images]
        clips["image to video"] = model.clips(asked.prompts, images=asked.truth[:, 0], **settings)
        report["image to video"] = vision.score(clips["image to video"], asked.wanted)
        values = [vision.psnr(c[0], t[0]) for c, t in zip(clips["image to video"], asked.truth)]
        report["first frame, PSNR in dB"] = {"mean": float(np.mean(values)), "worst": float(np.min(values))}
    for title, row in report.items():
        log(
            f"  {title:24} "
            + (", ".join(f"{k} {v:.3f}" for k, v in row.items()) if isinstance(row, dict) else f"{row}")
        )
    return report, clips


def sheet(path: Path, clips: np.ndarray, columns: int = 4) -> None:
    files.contact_sheet(path, [[*clip[[0, 8, 16, 24]]] for clip in clips], columns=columns, scale=2, colours=256)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", type=Path, help=".gguf or .safetensors with transformer, connector, projection and VAE"
    )
    parser.add_argument("--gemma", type=Path, required=True, help="Gemma-3 270M as GGUF")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--also", nargs="*", default=[], help="formats to convert to, or files of the same model: q5_1 q4_0"
    )
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--cfg", type=float, default=CFG)
    parser.add_argument("--rescale", type=float, default=RESCALE)
    parser.add_argument("--singles", type=int, default=80, help="prompts with one thing")
    parser.add_argument("--pairs", type=int, default=16, help="prompts with two things")
    parser.add_argument("--images", type=int, default=48, help="image-to-video clips")
    parser.add_argument("--trial", action="store_true", help="use the other prompt set, on which settings are chosen")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    one, two = exam(TRIAL if args.trial else EXAM, args.singles, args.pairs)
    settings = {"steps": args.steps, "cfg": args.cfg, "rescale": args.rescale}
    result = {"settings": settings, "prompts": one.prompts + two.prompts, "reports": {}}
    print(f"measurement's own errors on true clips: {vision.error_rates()}")
    paths = {args.model.stem: args.model}
    for kind in args.also:
        if Path(kind).is_file():
            paths[Path(kind).stem] = Path(kind)
            continue
        paths[kind.upper()] = path = args.out / f"toy-{kind.upper()}.gguf"
        convert.convert([args.model], path, kind, overwrite=True)
    for name, path in paths.items():
        print(f"{name}, {settings}", flush=True)
        first = path == args.model
        report, clips = examine(
            Model(path, args.gemma), one, two if first else two[:0], images=args.images if first else 0, **settings
        )
        result["reports"][name] = report
        for title, found in clips.items():
            sheet(args.out / f"{name}-{title.replace(' ', '-')}.png", found)
        files.save_json(args.out / "scores.json", result)


if __name__ == "__main__":
    main()
