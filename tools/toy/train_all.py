"""Both trainings in one command that ends by the clock: VAE, text features, bank of latents, DiT, scores on held-out prompts.

    python tools/toy/train_all.py OUT --text FOLDER --minutes 9.2 --vae-minutes 3.3
    python tools/toy/train_all.py OUT --text FOLDER --minutes 6 --vae-minutes 0 --resume EARLIER_OUT

FOLDER is what ``tools/toy/text.py`` packed. With --resume the weights are taken from EARLIER_OUT; without VAE minutes the VAE stays as
it is. Everything OUT needs to resume from is written as float16 in parts of at most 15 MB.
"""

import argparse
import sys
from pathlib import Path

import torch

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    __package__ = "toy"

from . import train_dit, train_vae  # noqa: E402
from .model import dit_config  # noqa: E402
from .optim import Clock  # noqa: E402


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
        assert train_vae.load(resume, device) and train_dit.load(resume), f"{resume} does not hold a run"
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    log("rehearsal done")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=9.2)
    parser.add_argument("--vae-minutes", type=float, default=3.3)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-batch", type=int, default=64)
    parser.add_argument("--singles", type=int, default=46000)
    parser.add_argument("--full-share", type=float, default=0.3, help="share of the DiT's time that sees the whole context")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-rehearsal", action="store_true", help="start at once instead of trying every stage at its smallest first")
    parser.add_argument("--tiny", action="store_true", help="small pools and networks, to try the command on a CPU")
    args = parser.parse_args()
    clock = Clock(args.minutes)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("highest")

    def log(line):
        print(f"[{clock.seconds():6.1f}] {line}", flush=True)

    log(f"torch {torch.__version__}, {torch.cuda.get_device_name() if args.device == 'cuda' else 'CPU'}")
    if not args.no_rehearsal:
        rehearse(args.out, args.device, args.text, log, args.resume)
    left = lambda: args.minutes - clock.seconds() / 60  # noqa: E731
    vae_config = train_vae.vae_config(8) if args.tiny else None
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    if args.vae_minutes > 0:
        vae = train_vae.train(
            args.out, args.vae_minutes, args.device, args.vae_batch, args.resume, 16 if args.tiny else 40000, args.seed, log, config=vae_config
        )
    else:
        vae = train_vae.load(args.resume, args.device, dtype, vae_config)
        train_vae.save_loaded(args.out, vae)
    small = dict(groups=4, repeats=2, full_groups=4, full_repeats=2, singles=64, limit_captions=100, basis_captions=100, components=64, reserve=5,
                 evaluate=4, sample_steps=4, config=dit_config(layers=2, connector_layers=1)) if args.tiny else {}  # fmt: skip
    settings = dict(full_share=args.full_share, singles=args.singles) | small
    train_dit.train(args.out, vae, left, args.device, args.text, args.resume, seed=args.seed, log=log, rate=args.rate, **settings)
    log("done")


if __name__ == "__main__":
    main()
