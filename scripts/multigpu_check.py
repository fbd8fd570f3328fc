#!/usr/bin/env python3
"""Several GPUs beside one, in one run: step time, speed-up, bytes sent, latents against one GPU, and groups of passes against sequence parallelism.

    python scripts/multigpu_check.py [--ranks 1 2 4] [--formats Q4_0 Q8_0] [--tokens 6144 14080 32640] [--out DIR]

48 blocks of width 4096 with random weights, a process per GPU. --tiny runs small models with gloo on the CPU, which checks the script. Results: DIR/multigpu.json and a table.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import torch

from common import load_pack, show

GRIDS = {6144: (16, 16, 24), 14080: (16, 22, 40), 32640: (16, 34, 60), 45: (3, 3, 5)}
FPS, TEXT_TOKENS, PASSES = 24.0, 1024, 3


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--formats", nargs="+", default=["Q4_0", "Q8_0"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[6144, 14080, 32640], choices=[*GRIDS])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--one-rank", type=Path, help=argparse.SUPPRESS)  # this process is a rank; results go there
    return parser.parse_args()


def seconds(call, repeats, device, ranks):
    """Median seconds of ``call``, all ranks starting together."""
    call()
    times = []
    for _ in range(repeats):
        if ranks is not None:
            torch.distributed.barrier()
        _synchronize(device)
        start = time.perf_counter()
        call()
        _synchronize(device)
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def _synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rank_run(args, folder):
    """What one rank does: every format and token count with this many ranks. Rank 0 writes."""
    load_pack()
    from ltx2_gguf.ltx2_core.parallel import group
    from ltx2_gguf.ltx2_core.parallel.plan import planned, single
    from models import dit_config, our_dit

    kind = "cpu" if args.tiny else "cuda"
    ranks = group.Ranks(kind) if group.started_by_torchrun() else None
    device = ranks.device if ranks else torch.device(kind)
    dtype = torch.float32 if args.tiny else torch.bfloat16
    rows = []
    with torch.inference_mode():
        for name in args.formats:
            config = dit_config(2, 4, 32) if args.tiny else dit_config()
            torch.manual_seed(0)
            model = our_dit(config, name, device, dtype)
            for tokens in args.tokens:
                g = torch.Generator().manual_seed(1)
                latent = torch.randn(1, config.in_channels, *GRIDS[tokens], generator=g).to(device, dtype)
                context = torch.randn(1, 32 if args.tiny else TEXT_TOKENS, config.context_dim, generator=g).to(
                    device, dtype
                )

                def one_pass(model=model, latent=latent, context=context):
                    return model.velocity(latent, 0.7, context, FPS)

                row = {"format": name, "tokens": tokens, "ranks": ranks.size if ranks else 1}
                if ranks:
                    share = ranks.share(model, tokens, 1)
                    before = ranks.parallel.sent
                    one_pass()
                    row |= {
                        "sent GB": (ranks.parallel.sent - before) / 2**30,
                        "planned GB": share.work.layers * share.bytes_per_block() / 2**30,
                    }
                    row["planned speed-up"] = single(share.work, 1) / share.seconds
                row["pass ms"] = 1e3 * seconds(one_pass, args.repeats, device, ranks)
                velocity = one_pass()
                if ranks:
                    share = ranks.share(model, tokens, PASSES)
                    row["groups for 3 passes"] = f"{share.groups} x {share.ranks}"
                    for groups in (g for g in (1, 2, 4) if ranks.size % g == 0 and g <= PASSES):
                        ranks.use(model, planned(share.work, PASSES, groups, ranks.size // groups))
                        row[f"3 passes on {groups} groups, ms"] = 1e3 * seconds(
                            lambda: ranks.passes([one_pass] * PASSES), 2, device, ranks
                        )
                else:
                    row["3 passes on 1 groups, ms"] = 1e3 * seconds(
                        lambda: [one_pass() for _ in range(PASSES)], 2, device, None
                    )
                if ranks is None or ranks.is_first:
                    torch.save(velocity.float().cpu(), folder / f"velocity-{name}-{tokens}-{row['ranks']}.pt")
                    rows.append(row)
                    (folder / f"rows-{row['ranks']}.json").write_text(json.dumps(rows))
                    print(row, flush=True)
            del model
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if ranks:
        ranks.close()


def main():
    args = parse()
    if args.one_rank is not None:
        rank_run(args, args.one_rank)
        return 0
    if args.tiny:
        args.tokens, args.formats = [45], args.formats[:1]
    elif torch.cuda.device_count() < max(args.ranks):
        raise SystemExit(f"This machine has {torch.cuda.device_count()} GPUs; name fewer with --ranks.")
    load_pack()
    from ltx2_gguf.ltx2_core.parallel.launch import launch

    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # NVLink multicast needs rights that shared hosts do not give
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = [
            "--formats",
            *args.formats,
            "--tokens",
            *map(str, args.tokens),
            "--repeats",
            str(args.repeats),
            *(["--tiny"] if args.tiny else []),
        ]
        for count in args.ranks:
            launch([sys.executable, __file__, "--one-rank", name, *options], count)
            rows += json.loads((folder / f"rows-{count}.json").read_text())
        alone = {(r["format"], r["tokens"]): r for r in rows if r["ranks"] == 1}
        for row in rows:
            one = alone.get((row["format"], row["tokens"]))
            if one is not None:
                got, expected = (
                    torch.load(folder / f"velocity-{row['format']}-{row['tokens']}-{n}.pt", weights_only=True)
                    for n in (row["ranks"], 1)
                )
                row |= {
                    "speed-up": one["pass ms"] / row["pass ms"],
                    "error against one": float((got - expected).norm() / expected.norm()),
                }
    show("several GPUs", rows)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "multigpu.json").write_text(json.dumps({"results": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
