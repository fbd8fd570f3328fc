"""Text features for training: the lower layers of the real Gemma-3 270M, packed small enough to travel to a training machine.

The projection of LTX-2.3 reads every hidden state of Gemma. The toy's projection is trained on the first ``STATES`` of the 19 (the
embedding and 10 layers) and is exactly zero for the rest, so training needs 10 of 18 layers and, of the embedding table,
only the rows of the captions' tokens. ``pack_gemma`` writes those quantised bytes unchanged, with captions and their token ids.

Features of captions live in a few hundred directions. Training uses whitened principal components z = (x - mean) P / s of the
per-state RMS-normed features x and learns a small matrix A; ``fold`` multiplies everything into the one projection weight that
ships. What a new sentence has outside these directions is dropped, by construction.

    python tools/toy/text.py gemma-3-270m.gguf FOLDER
"""

import argparse
import gzip
import json
import math
import sys
from pathlib import Path

import torch

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    __package__ = "toy"

from ltx2_gguf.ltx2_core.files.gemma import hf_name
from ltx2_gguf.ltx2_core.text.config import GemmaConfig
from ltx2_gguf.ltx2_core.text.gemma import GemmaModel, rope_table

from . import captions as captions_module
from . import pack  # noqa: F401
from .captions import Caption

LAYERS = 10
STATES = LAYERS + 1
COMPONENTS = 512
GEMMA_WIDTH = 640  # of the 270M text encoder
MAX_TOKENS = 40  # of a training caption
PER_COMBINATION, PAIRS = 56, 14000  # training captions


def pack_gemma(gguf_path, folder: Path, per_combination: int = PER_COMBINATION, pairs: int = PAIRS) -> None:
    """Write gemma.safetensors (raw blocks of the lower layers, rows of the embedding) and captions.json.gz into ``folder``."""
    from safetensors.torch import save_file

    from ltx2_gguf.ltx2_core.text.tokenizer import GemmaTokenizer
    from ltx2_gguf.quant.gguf.reader import GGUFFile

    folder.mkdir(parents=True, exist_ok=True)
    gguf = GGUFFile(gguf_path)
    tokenizer = GemmaTokenizer.from_gguf(gguf)
    sets = {
        "train": captions_module.training_set(0, per_combination, pairs) + [Caption("", ())],
        "test": captions_module.evaluation_set(
            2
        ),  # a training run's own examination is not the one that counts (evaluate.EXAM)
    }
    sets["train"] = [c for c in sets["train"] if len(tokenizer.encode(c.text)) <= MAX_TOKENS]
    ids = {split: [tokenizer.encode(c.text) for c in found] for split, found in sets.items()}
    used = sorted({i for split in ids.values() for row in split for i in row})
    compact = {i: row for row, i in enumerate(used)}

    tensors, formats = {}, {}
    for name, info in gguf.tensors.items():
        layer = int(name.split(".")[1]) if name.startswith("blk.") else -1
        if layer >= LAYERS or name == "output_norm.weight":
            continue
        raw = gguf.raw(name)
        if name == "token_embd.weight":
            raw, shape = raw[used], (len(used), info.shape[1])
        else:
            shape = tuple(info.shape)
        tensors[name] = raw.clone().contiguous()
        formats[name] = [info.format if isinstance(info.format, str) else info.format.name, list(shape)]
    config = GemmaConfig.from_gguf(gguf)
    meta = {"formats": formats, "config": {f: getattr(config, f) for f in config.__dataclass_fields__}}
    save_file(tensors, folder / "gemma.safetensors", metadata={"toy": json.dumps(meta)})
    rows = {
        split: [[c.text, c.things, c.background, [compact[i] for i in row]] for c, row in zip(sets[split], ids[split])]
        for split in sets
    }
    with gzip.open(folder / "captions.json.gz", "wt") as file:
        json.dump(rows, file)


def read_captions(folder: Path) -> dict[str, tuple[list[Caption], list[list[int]]]]:
    """{"train": (captions, token ids), "test": ...}; the last training caption is the empty one."""
    with gzip.open(Path(folder) / "captions.json.gz", "rt") as file:
        rows = json.load(file)
    return {
        split: (
            [Caption(t, tuple(tuple(x) for x in things), b) for t, things, b, _ in found],
            [ids for *_, ids in found],
        )
        for split, found in rows.items()
    }


class LowerGemma:
    """The packed layers, run in float32 on any device."""

    def __init__(self, folder: Path, device):
        from dataclasses import replace

        from safetensors import safe_open

        from ltx2_gguf.quant.decode import dequantize
        from ltx2_gguf.quant.formats import format_by_name

        with safe_open(Path(folder) / "gemma.safetensors", "pt") as file:
            meta = json.loads(file.metadata()["toy"])
            raw = {name: file.get_tensor(name) for name in file.keys()}
        config = dict(meta["config"])
        config["sliding_layers"] = tuple(config["sliding_layers"])
        vocabulary = meta["formats"]["token_embd.weight"][1][0]
        self.config = replace(
            GemmaConfig(**config),
            num_layers=LAYERS,
            vocab_size=vocabulary,
            sliding_layers=config["sliding_layers"][:LAYERS],
        )
        self.model = GemmaModel(self.config, device="meta")
        state = {}
        for name, (form, shape) in meta["formats"].items():
            tensor = raw[name]
            if tensor.dtype == torch.uint8:
                tensor = dequantize(tensor, format_by_name(form))
            state[hf_name(name)] = tensor.reshape(shape).float().to(device)
        state["model.norm.weight"] = torch.ones(
            self.config.width, device=device
        )  # not used: the last state is not the last layer's
        self.model.load_state_dict(state, assign=True)
        self.model.requires_grad_(False)
        self.device = device

    def normed_states(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [B, n], padded at the end with anything -> [B, n, STATES * D] float32, each state RMS-normed, state slow."""
        stack, c, n = self.model.model, self.config, ids.shape[1]
        x = stack.embed_tokens(ids).float() * math.sqrt(c.width)
        ropes = {
            True: rope_table(torch.arange(n, device=x.device), c.head_dim, c.rope_local_theta),
            False: rope_table(torch.arange(n, device=x.device), c.head_dim, c.rope_theta, c.rope_factor),
        }
        states = [x]
        for sliding, layer in zip(c.sliding_layers, stack.layers):  # captions are far shorter than the window
            x = layer(x, ropes[sliding], None, torch.float32)
            states.append(x)
        x = torch.stack(states, dim=2)  # (B, n, STATES, D)
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)).flatten(2)


def padded(rows: list[list[int]], width: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids [N, width], real [N, width] bool)."""
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    real = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        real[i, : len(row)] = True
    return ids.to(device), real.to(device)


@torch.no_grad()
def principal_components(
    gemma: LowerGemma, rows, components: int, batch: int = 192, seed: int = 0, keep=None
) -> dict[str, torch.Tensor]:
    """Basis of the features of ``rows``: mean [K], directions [r, K] (orthonormal), scale [r]. Randomised, three power iterations.

    keep: [k, K] or None, vectors whose span is in the basis whatever the captions say (the rows of a projection trained before).
    """
    width = max(map(len, rows))
    tokens = []
    for start in range(0, len(rows), batch):
        ids, real = padded(rows[start : start + batch], width, gemma.device)
        x = gemma.normed_states(ids)
        bos = x[0, 0]  # the same in every caption, and far from every other token
        real[:, 0] = False
        tokens.append(x[real])
    x = torch.cat(tokens)  # (N, K)
    mean = x.mean(0)
    x -= mean
    energy = x.square().sum(1).mean()
    bos = bos - mean
    kept, kept_variance = x[:0], x.new_zeros(0)
    if keep is not None:
        kept = torch.linalg.qr(keep.to(x.device, torch.float32).T)[0].T  # (k, K)
        covariance = torch.zeros(len(kept), len(kept), dtype=torch.float64)
        for part in x.split(1 << 14):
            inside = part @ kept.T
            covariance += (inside.T @ inside).double().cpu()
            part -= inside @ kept
        kept_variance, vectors = torch.linalg.eigh(covariance / len(x))
        kept, kept_variance = vectors.T.float().to(x.device) @ kept, kept_variance.clamp(min=0).float().to(x.device)
        inside = (kept @ bos) @ kept
        mean, bos = mean + inside, bos - inside  # BOS is at zero within the kept span too
    bos = bos / bos.norm()
    x -= (x @ bos)[:, None] * bos  # directions that do not see BOS: its features are the bias alone
    generator = torch.Generator(device="cpu").manual_seed(seed)
    rank = max(1, min(components - len(kept), len(x) - 1))
    q = torch.linalg.qr(x @ torch.randn(x.shape[1], rank + 32, generator=generator).to(x.device))[0]
    for _ in range(3):
        q = torch.linalg.qr(x @ torch.linalg.qr(x.T @ q)[0])[0]
    small = q.T @ x  # (rank + 32, K)
    values, vectors = torch.linalg.eigh((small @ small.T).double().cpu())
    order = values.argsort(descending=True)[:rank]
    variance = (values[order] / len(x)).float().to(x.device)
    directions = vectors[:, order].T.float().to(x.device) @ small
    directions = torch.cat((kept, directions / directions.norm(dim=1, keepdim=True)))
    variance = torch.cat((kept_variance, variance))
    # Small directions are not blown up: they hold little of what tells captions apart and most of what a new wording disturbs.
    scale = (variance + 0.3 * variance.mean()).sqrt()
    return {
        "mean": mean,
        "directions": directions,
        "scale": scale,
        "kept": torch.tensor(float(variance.sum() / energy)),
    }


@torch.no_grad()
def encode_rows(
    gemma: LowerGemma, rows, basis, batch: int = 192, dtype=torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor]:
    """(z [N, n, r], real [N, n] bool) for padded captions."""
    width = -(-max(map(len, rows)) // 8) * 8
    features, masks = [], []
    for start in range(0, len(rows), batch):
        ids, real = padded(rows[start : start + batch], width, gemma.device)
        x = gemma.normed_states(ids) - basis["mean"]
        z = (x @ basis["directions"].T) / basis["scale"]
        features.append((z * real[..., None]).to(dtype))
        masks.append(real)
    return torch.cat(features), torch.cat(masks)


def fold(
    weight: torch.Tensor, bias: torch.Tensor, basis: dict[str, torch.Tensor], num_states: int = 19
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [Dv, r] and its bias -> (weight [Dv, D * num_states], bias [Dv]) of ``video_aggregate_embed``.

    The shipped projection reads index d * num_states + state and its input carries a factor sqrt(Dv / D), which is divided out.
    """
    wide = (weight.float() / basis["scale"].float()) @ basis["directions"].float()  # (Dv, STATES * D), state slow
    bias = bias.float() - wide @ basis["mean"].float()
    features, width = wide.shape[0], wide.shape[1] // STATES
    full = torch.zeros(features, width, num_states)
    full[:, :, :STATES] = wide.view(features, STATES, width).transpose(1, 2)
    return (full / math.sqrt(features / width)).flatten(1), bias


def unfold(weight: torch.Tensor) -> torch.Tensor:
    """``video_aggregate_embed`` [Dv, D * num_states] -> the matrix [Dv, STATES * D] that acts on the normed states (state slow)."""
    features, width = weight.shape[0], GEMMA_WIDTH
    full = weight.float().view(features, width, -1) * math.sqrt(features / width)
    return full[:, :, :STATES].transpose(1, 2).flatten(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--per-combination", type=int, default=PER_COMBINATION)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    args = parser.parse_args()
    pack_gemma(args.gguf, args.folder, args.per_combination, args.pairs)
    print(sum(f.stat().st_size for f in args.folder.iterdir()) / 2**20, "MiB")
