"""One rank of tests/ltx2_core/parallel: runs every case on its share of the work and writes the errors against one process.

python parallel_ranks.py MODEL.gguf GEMMA.gguf OUT.json       (RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set)
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

import packloader  # noqa: F401
from ltx2_gguf.ltx2_core.loading.transformer import load_dit
from ltx2_gguf.ltx2_core.parallel.group import Ranks
from ltx2_gguf.ltx2_core.parallel.plan import plan
from ltx2_gguf.ltx2_core.pipeline import ImageInput, LTX2Pipeline
from ltx2_gguf.ltx2_core.sampling import conditioning

FPS = 24.0
GRID = (3, 3, 5)  # 45 tokens: no multiple of 2 or 4


def error(a, b):
    return float((a - b).norm() / b.norm())


def cases(model):
    """name -> arguments of ``velocity``."""
    g = torch.Generator().manual_seed(1)
    latent = torch.randn(1, model.in_channels, *GRID, generator=g)
    context = torch.randn(1, 16, model.config.context_dim, generator=g)
    common = {"latent": latent, "sigma": 0.7, "context": context, "frame_rate": FPS}
    per_frame = torch.ones(1, 1, *GRID)
    per_frame[:, :, 0] = 0.25
    per_token = torch.rand(1, 1, *GRID, generator=g).round(decimals=1)
    state = conditioning.empty(GRID, channels=model.in_channels)
    image = torch.randn(1, model.in_channels, 1, *GRID[1:], generator=g)
    state = conditioning.combined(state, [(image, 0, 1.0), (image, 8, 0.6)])
    guided = torch.randn(state.clean.shape, generator=g)
    entry = {"pre_filter_count": GRID[1] * GRID[2], "strength": 0.5, "pixel_mask": None, "latent_shape": (1, *GRID[1:])}
    batch = {"latent": torch.randn(2, model.in_channels, *GRID, generator=g), "context": context.expand(2, -1, -1)}
    return {
        "plain": common,
        "mask per frame": common | {"denoise_mask": per_frame},
        "mask per frame, batch": common | batch | {"denoise_mask": per_frame.expand(2, -1, -1, -1, -1)},
        "mask per token": common | {"denoise_mask": per_token},
        "keyframe": common | {"latent": guided, "denoise_mask": state.mask, "keyframe_idxs": state.keyframe_idxs},
        "weak guide": common
        | {"latent": guided, "keyframe_idxs": state.keyframe_idxs, "guide_attention_entries": [entry]},
        "stg": common | {"stg_blocks": (1,)},
    }


def whole_run(path, gemma, ranks):
    """The frames of a short run with an image, guidance and an image as a guide."""
    image = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    pipeline = LTX2Pipeline.from_files(path, gemma, device="cpu", ranks=ranks)
    settings = {"width": 96, "height": 64, "frames": 17, "steps": 2, "cfg": 3.0, "stg": 1.0, "rescale": 0.7}
    return list(pipeline.stream("a red kite", images=[ImageInput(image), ImageInput(image, -1, 0.7)], **settings))


def main(path, gemma, out):
    torch.set_num_threads(1)
    found = {"errors": {}}
    with torch.inference_mode(), Ranks("cpu") as ranks:
        model = load_dit([path], dtype=torch.float32)
        made = cases(model)
        alone = {name: model.velocity(**arguments) for name, arguments in made.items()}
        for passes in (1, 3, 4):
            share = ranks.share(model, made["plain"]["latent"][0, 0].numel(), passes)
            parallel = model.sequence_parallel
            for name, arguments in made.items():
                sent = parallel.sent if parallel else 0
                got = model.velocity(**arguments)
                found["errors"][f"{name}, {share.groups} x {share.ranks}"] = error(got, alone[name])
                if name == "plain":
                    sent = (parallel.sent if parallel else 0) - sent
                    found.setdefault("sent", []).append([sent, share.work.layers * share.bytes_per_block()])
            calls = [lambda i=i: made["plain"]["latent"] * i for i in range(passes)]
            results = ranks.passes(calls)
            assert all(torch.equal(r, made["plain"]["latent"] * i) for i, r in enumerate(results))
        split = plan(share.work, 1, ranks.size)
        assert (split.groups, split.ranks) == (1, ranks.size)
        frames = whole_run(path, gemma, ranks)
        assert bool(frames) == ranks.is_first
        if ranks.is_first:
            found["errors"]["frames of a whole run"] = error(torch.cat(frames), torch.cat(whole_run(path, gemma, None)))
            Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
