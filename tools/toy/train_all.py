"""Both trainings in one command that ends by the clock: VAE, text features, bank of latents, DiT, scores on held-out prompts.

    python tools/toy/train_all.py OUT --text FOLDER --minutes 9.2 --vae-minutes 3.3
    python tools/toy/train_all.py OUT --text FOLDER --minutes 8 --vae-minutes 0 --resume EARLIER_OUT
    python tools/toy/train_all.py OUT --text FOLDER --minutes 8 --vae-minutes 0 --resume assets/toy-ltx2.3-Q8_0.gguf

FOLDER is what ``tools/toy/text.py`` packed. With --resume the weights are taken from EARLIER_OUT or from an exported file; without VAE
minutes the VAE stays as it is. Everything OUT needs to resume from is written as float16 in parts of at most 15 MB.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    __package__ = "toy"

from . import scenes, text, train_dit, train_vae
from .faster import Trial
from .model import dit_config
from .optim import Clock


def rehearse(out: Path, device, text_folder: Path, log, resume=None) -> None:
    """Every stage at its smallest, so that what can fail fails in the first half minute."""
    folder = out / "rehearsal"
    folder.mkdir(parents=True, exist_ok=True)
    config = None if device == "cuda" else train_vae.vae_config(8)
    vae = train_vae.train(folder, 0.02, device, batch=4, pool_size=8, log=lambda _: None, config=config)
    train_dit.train(
        folder, vae, lambda: 0.05, device, text_folder, groups=4, repeats=2, full_groups=2, full_repeats=2, singles=16, log=lambda _: None,
        limit_captions=20, basis_captions=20, components=32, config=dit_config(layers=1, connector_layers=1), reserve=0, evaluate=2, sample_steps=2,
    )  # fmt: skip
    if resume:
        assert train_vae.load(resume, device) and (resume.is_file() or train_dit.load(resume)), (
            f"{resume} does not hold a run"
        )
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    log("rehearsal done")


def step_sizes(text_folder: Path, batch: int) -> dict:
    """What a training step's tensors measure: [captions, clips per caption] with the short and the whole context, text positions, features."""
    longest = max(len(ids) for ids in text.read_captions(text_folder)["train"][1])
    return {
        "short": [batch // 2, 2],
        "whole": [batch // 4, 4],
        "tokens": 8 * math.ceil(longest / 8),
        "components": text.COMPONENTS,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=9.2)
    parser.add_argument("--vae-minutes", type=float, default=3.3)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-batch", type=int, default=64)
    parser.add_argument("--batch", type=int, default=288, help="clips in a step of the DiT")
    parser.add_argument("--singles", type=int, default=46000, help="clips of one thing that are painted for the DiT")
    parser.add_argument("--per-pair", type=int, default=1, help="clips for every caption of two things")
    parser.add_argument(
        "--pair-share", type=float, default=0.2, help="share of a step's captions that are about two things"
    )
    parser.add_argument(
        "--full-share", type=float, default=0.3, help="share of the DiT's time that sees the whole context"
    )
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument(
        "--decay", type=float, default=0.65, help="share of the DiT's time in which the learning rate falls"
    )
    parser.add_argument(
        "--compile",
        choices=("auto", "off"),
        default="auto",
        help="auto: compiled passes if a trial shows that they work",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--no-rehearsal", action="store_true", help="start at once instead of trying every stage at its smallest first"
    )
    parser.add_argument("--tiny", action="store_true", help="small pools and networks, to try the command on a CPU")
    args = parser.parse_args()
    clock = Clock(args.minutes)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("highest")

    def log(line):
        print(f"[{clock.seconds():6.1f}] {line}", flush=True)

    log(f"torch {torch.__version__}, {torch.cuda.get_device_name() if args.device == 'cuda' else 'CPU'}")
    trial = None
    if args.compile == "auto" and (args.device == "cuda" or args.tiny):
        sizes = step_sizes(args.text, 8 if args.tiny else args.batch) | ({"components": 64} if args.tiny else {})
        trial = Trial(args.device, sizes, log, tiny=args.tiny)
    if not args.no_rehearsal:
        rehearse(args.out, args.device, args.text, log, args.resume)
    left = lambda: args.minutes - clock.seconds() / 60
    vae_config = train_vae.vae_config(8) if args.tiny else None
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    if args.vae_minutes > 0:
        vae = train_vae.train(
            args.out,
            args.vae_minutes,
            args.device,
            args.vae_batch,
            args.resume,
            16 if args.tiny else 40000,
            args.seed,
            log,
            config=vae_config,
        )
    else:
        vae = train_vae.load(args.resume, args.device, dtype, None if args.resume.is_file() else vae_config)
        train_vae.save_loaded(args.out, vae)
        if args.device == "cuda":
            drawn = scenes.sample(np.random.default_rng(0), *scenes.random_things(np.random.default_rng(0), 128))
            train_vae.choose_encoding(vae, scenes.render_torch(drawn, args.device).to(dtype), log)
    whole_network = args.resume is not None and args.resume.is_file()  # an exported file has the full size
    settings = dict(
        full_share=args.full_share, singles=args.singles, per_pair=args.per_pair, pair_share=args.pair_share, decay=args.decay,
        groups=args.batch // 2, repeats=2, full_groups=args.batch // 4, full_repeats=4,
    )  # fmt: skip
    if args.tiny:
        settings |= dict(
            groups=4, full_groups=2, singles=64, limit_captions=100, basis_captions=100, components=320 if whole_network else 64, reserve=5,
            evaluate=4, sample_steps=4, config=None if whole_network else dit_config(layers=2, connector_layers=1),
        )  # fmt: skip
    train_dit.train(
        args.out,
        vae,
        left,
        args.device,
        args.text,
        args.resume,
        seed=args.seed,
        log=log,
        rate=args.rate,
        trial=trial,
        **settings,
    )
    log("done")


if __name__ == "__main__":
    main()
