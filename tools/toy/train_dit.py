"""Train the toy's DiT with connector and text projection: flow matching on latents of the toy's VAE.

A bank of clips is painted and encoded first; a step draws captions, and for each of them some clips of the bank that it describes.
Latents are noised to sigma (logit-normal, mostly high, as the schedule is), a third of them with a clean first frame (timestep 0 on its
tokens), a few with a clean last one. One caption in ten is replaced by the empty prompt for classifier-free guidance.

Most of the time goes to steps with a short context (``context.py``), the last part to steps with all 1024 positions.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    __package__ = "toy"

from . import captions as captions_module
from . import files, pack, resume, scenes, text, vision  # noqa: F401
from .codec import decode, encode
from .faster import compiled_passes
from .model import Toy, dit_config, initialise, is_muon
from .optim import Clock, Trainer, learning_rate
from .sample import noise_for, sample
from .steps import FRAME_RATES, Draws, Kind, Step

SIGMA_BINS = 5
CFG = 1.5  # of the examination's main part
OTHER_CFG = (2.0, 3.0)
IMAGES = 48  # image-to-video clips in the examination
SAVE_SECONDS = 75  # between checkpoints


class Bank:
    """Latents [N, C, F, H, W] of painted clips, and for every caption the clips it describes (table [captions, K]; the empty one's is not used).

    singles: clips of one thing; per_pair: clips of every caption of two. ``seconds`` bounds the painting and encoding; the clips
    of one thing that come too late are left out.
    """

    def __init__(
        self, vae, captions, singles: int, per_pair: int, device, dtype, seed: int, batch=128, entries=24, seconds=45.0
    ):
        rng = np.random.default_rng(seed)
        kinds = captions_module.combinations(held_out=False)
        share = np.array([captions_module.SHAPE_SHARE[shape] for shape, _, _ in kinds])
        things = np.full((singles, 2, 3), -1)
        kind = rng.choice(len(kinds), singles, p=share / share.sum())
        coded = np.array(
            [[scenes.SHAPES.index(s), scenes.COLOUR_NAMES.index(c), scenes.MOTIONS.index(m)] for s, c, m in kinds]
        )
        things[:, 0] = coded[kind]
        parts = []
        pairs = [i for i, c in enumerate(captions) if len(c.things) == 2]
        if pairs:
            pair_things, pair_background = captions_module.classes([captions[i] for i in pairs])
            parts.append(
                scenes.sample(rng, np.repeat(pair_things, per_pair, 0), np.repeat(pair_background, per_pair, 0))
            )
        parts.append(scenes.sample(rng, things, np.full(singles, -1)))
        drawn = scenes.Scenes.concatenate(parts)
        latents, end = [], time.monotonic() + seconds
        for i in range(0, len(drawn), batch):
            latents.append(encode(vae, scenes.render_torch(drawn[i : i + batch], device).to(dtype)).to(dtype))
            if i % (8 * batch) == 0 and latents[-1].is_cuda:
                torch.cuda.synchronize()  # the clock is to see what was done, not what was asked for
            if time.monotonic() > end and i > len(drawn) - singles // 2:
                break
        self.latents = torch.cat(latents)
        singles -= len(drawn) - len(self.latents)
        self.table = torch.from_numpy(
            self._table(rng, captions, drawn, kind[:singles], kinds, pairs, per_pair, entries)
        ).to(device)

    @staticmethod
    def _table(rng, captions, drawn, kind, kinds, pairs, per_pair, entries):
        table = np.zeros((len(captions), entries), dtype=np.int64)
        first = len(pairs) * per_pair  # clips of one thing come behind those of two
        by_kind = {k: first + np.nonzero(kind == i)[0] for i, k in enumerate(kinds)}
        for i, caption in enumerate(captions):
            if len(caption.things) != 1:
                continue
            rows = by_kind[caption.things[0]]
            if caption.background is not None:
                index = scenes.BACKGROUND_NAMES.index(caption.background)
                rows = rows[drawn.background[rows] == index] if (drawn.background[rows] == index).any() else rows
            table[i] = rows[rng.integers(0, len(rows), entries)] if len(rows) else 0
        for j, i in enumerate(pairs):
            table[i] = j * per_pair + rng.integers(0, per_pair, entries)
        return table


class Evaluation:
    """Samples held-out prompts on the training device and scores the clips by what is seen in them."""

    def __init__(self, vae, captions, features, real, empty, device, dtype, log, steps=20, seed=5):
        self.vae, self.captions, self.features, self.real, self.empty = vae, captions, features, real, empty
        self.device, self.dtype, self.log, self.steps = device, dtype, log, steps
        things, background = captions_module.classes(captions)
        truth = scenes.sample(np.random.default_rng(seed), things, background)
        clips = scenes.render_torch(truth, device)
        self.first = clips[:, :, 0]
        self.latent = encode(vae, clips[:, :, :1].to(dtype))

    def _clips(self, toy, context, empty, first=None, seed=100, **settings):
        noise = noise_for(len(context), seed).to(self.device)
        latent = sample(toy.dit, context, empty, noise, first=first, steps=self.steps, **settings)
        return files.to_uint8(torch.cat([decode(self.vae, part, self.dtype) for part in latent.split(32)]))

    def __call__(self, toy, out: Path, name: str = "dit") -> dict:
        # Gradient mode stays on while nothing requires gradients: the plain torch path of every operation, on any device.
        for p in toy.parameters():
            p.requires_grad_(False)
        wanted = [c.things for c in self.captions]
        context, empty = toy.context(self.features, self.real), toy.context(*self.empty)
        report = {}
        single = [i for i, c in enumerate(self.captions) if len(c.things) == 1]
        pairs = [i for i, c in enumerate(self.captions) if len(c.things) == 2]
        clips = self._clips(toy, context, empty, cfg=CFG)
        seen = [vision.measure(clip) for clip in clips]
        report["one thing"] = _score([seen[i] for i in single], [wanted[i] for i in single])
        if pairs:
            report["two things"] = _score([seen[i] for i in pairs], [wanted[i] for i in pairs])
        for shape in scenes.SHAPES:
            rows = [i for i in single if wanted[i][0][0] == shape]
            if rows:
                report[f"one {shape}, {len(rows)} clips"] = _score([seen[i] for i in rows], [wanted[i] for i in rows])
        for cfg in OTHER_CFG:
            more = [vision.measure(clip) for clip in self._clips(toy, context[single], empty, cfg=cfg)]
            report[f"one thing, cfg {cfg:g}"] = _score(more, [wanted[i] for i in single])
        report["against other prompts"] = _score(seen, wanted[7:] + wanted[:7])
        video = self._clips(toy, context[:IMAGES], empty, first=self.latent[:IMAGES], cfg=CFG)
        report["image to video"] = _score([vision.measure(clip) for clip in video], wanted[:IMAGES])
        still = files.to_uint8(self.first[:IMAGES, :, None])
        report["first frame psnr"] = float(np.mean([vision.psnr(v[0], s[0]) for v, s in zip(video, still)]))
        files.contact_sheet(
            out / f"{name}_i2v.png", [[s[0], *v[[0, 8, 16, 24]]] for s, v in zip(still, video)], columns=4, scale=2
        )
        files.contact_sheet(out / f"{name}_sheet.png", [[*c[[0, 8, 16, 24]]] for c in clips], columns=4, scale=2)
        for p in toy.parameters():
            p.requires_grad_(True)
        for key, value in report.items():
            self.log(f"  {key}: {value}")
        return report


def _score(seen, wanted) -> dict[str, float]:
    """``vision.score`` of clips measured before."""
    found = [vision.compare(things, asked) for things, asked in zip(seen, wanted)]
    return {
        key: round(float(np.mean([value for row in found for value in row[key]])), 4)
        for key in ("colour", "shape", "motion")
    }


def save(out: Path, toy, trainer, basis, curves) -> None:
    files.save_weights(out, "dit", trainer.averaged() | {f"basis.{name}": value for name, value in basis.items()})
    files.save_json(out / "dit_curves.json", curves)


def load(folder: Path, config=None) -> tuple[Toy, dict] | None:
    """(the averaged network in float32, the text basis) a run left in ``folder``, or None."""
    weights = resume.dit_weights(folder)
    if weights is None:
        return None
    basis = {name.removeprefix("basis."): weights.pop(name) for name in list(weights) if name.startswith("basis.")}
    toy = Toy(config or dit_config(), len(basis["scale"]))
    toy.load_state_dict(weights)
    return toy, basis


def load_exported(path: Path, basis, config=None) -> Toy:
    """The network of an exported file in float32, its text projection expressed in ``basis``."""
    toy = Toy(config or dit_config(), len(basis["scale"]))
    toy.load_state_dict(resume.exported_dit(path, basis))
    return toy


def train(
    out: Path, vae, minutes_left, device, text_folder: Path, source: Path | None = None, groups=144, repeats=2, full_groups=72, full_repeats=4,
    full_share=0.3, singles=46000, per_pair=1, pair_share=0.2, seed=0, log=print, rate=2e-3, adam_rate=None, decay=0.65,
    components=text.COMPONENTS, limit_captions=None, basis_captions=3000, config=None, reserve=30.0, evaluate=96, sample_steps=20, trial=None,
) -> Toy:  # fmt: skip
    """Train until ``minutes_left()`` (a function) says that only ``reserve`` seconds remain, save, evaluate. Returns the averaged network.

    The last ``full_share`` of the time sees the whole context; ``decay`` is the share in which the learning rates fall from ``rate``
    (matrices) and ``adam_rate`` (all else, half of it when None). source: what to resume from, see ``resume.py``; trial: a ``faster.Trial``.
    """
    adam_rate = rate / 2 if adam_rate is None else adam_rate
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    timer = Clock(1)
    sets = text.read_captions(text_folder)
    captions, rows = sets["train"]
    if limit_captions:
        keep = [*rng.choice(len(captions) - 1, limit_captions, replace=False), len(captions) - 1]
        captions, rows = [captions[i] for i in keep], [rows[i] for i in keep]
    gemma = text.LowerGemma(text_folder, device)
    exported = bool(source) and Path(source).is_file()
    found = load(source, config) if source and not exported else None
    if found:
        toy, basis = found
        basis = {k: v.to(device) for k, v in basis.items()}
    else:
        picked = [rows[i] for i in rng.permutation(len(rows))[:basis_captions]]
        keep = resume.exported_projection(source)[0] if exported else None
        basis = text.principal_components(gemma, picked, components, keep=keep)
        toy = (
            load_exported(source, basis, config)
            if exported
            else initialise(Toy(config or dit_config(), len(basis["scale"])))
        )
    z, real = text.encode_rows(gemma, rows, basis, dtype=dtype)
    z_test, real_test = text.encode_rows(gemma, sets["test"][1][:evaluate], basis, dtype=dtype)
    log(
        f"text: {len(captions)} captions, {tuple(z.shape)}, basis keeps {float(basis['kept']):.4f} of the variance, {timer.seconds():.1f} s"
    )
    del gemma

    bank = Bank(vae, captions, singles, per_pair, device, dtype, seed)
    log(f"bank: {len(bank.latents)} clips, latent std {float(bank.latents.float().std()):.3f}, {timer.seconds():.1f} s")
    toy = toy.to(device)
    trainer = Trainer(toy.named_parameters(), is_muon, average=0.998, weight_decay=0.02)
    toy.set_dtype(dtype)
    none = len(captions) - 1
    evaluation = Evaluation(
        vae, sets["test"][0][:evaluate], z_test, real_test, (z[none:], real[none:]), device, dtype, log, sample_steps
    )
    single, pair = (
        torch.tensor([i for i, c in enumerate(captions) if len(c.things) == n], device=device, dtype=torch.int64)
        for n in (1, 2)
    )
    draws = Draws(bank, z, real, single, pair, none, pair_share)

    compiled = False

    def steps_of(short: bool) -> dict[float, Step]:
        size = (groups, repeats) if short else (full_groups, full_repeats)
        try:
            with compiled_passes(compiled):
                return {
                    fps: Step(toy, trainer.params, draws, Kind(*size, short, fps), log, must_capture=compiled)
                    for fps in FRAME_RATES
                }
        except Exception as error:  # whatever compiling runs into: the plain step is always there
            if not compiled:
                raise
            log(f"compiled steps failed, going on without: {type(error).__name__}: {str(error)[:300]}")
        return {fps: Step(toy, trainer.params, draws, Kind(*size, short, fps), log) for fps in FRAME_RATES}

    step, window, curves, reports = 0, [], [], {}
    summary = lambda: {"curve": curves, "reports": reports, "steps": step, "batch": groups * repeats}
    clock = Clock(max(0.05, minutes_left() - reserve / 60))
    short = full_share < 1
    ways = steps_of(short)
    log(f"first step ready after {clock.seconds():.1f} s, {'replayed' if ways[24.0].graph is not None else 'eager'}")
    saved = clock.seconds()
    while clock.progress() < 1:
        if short and clock.progress() > 1 - full_share:
            short, ways, saved = False, None, clock.seconds()
            save(out, toy, trainer, basis, summary())
            if z.is_cuda:
                torch.cuda.empty_cache()
            before = clock.seconds()
            ways = steps_of(False)
            log(f"whole context from step {step}, ready in {clock.seconds() - before:.1f} s")
        if trial and step % 25 == 0 and trial.over():
            compiled, trial = trial.wins(), None
            if compiled:
                ways = None
                ways = steps_of(short)
                log(f"compiled steps from step {step}, {clock.seconds():.1f} s")
        share = learning_rate(clock.progress(), 1.0, decay=decay)
        grads, error, sigma = ways[FRAME_RATES[step % 3 == 0]]()
        norm = trainer.step(share * adam_rate, share * rate, grads=grads)
        step += 1
        window.append((error.clone(), sigma, norm))
        if step % 100 == 0 or clock.progress() >= 1:
            error, sigma = (torch.cat(c).float().cpu().numpy() for c in list(zip(*window))[:2])
            norm = float(torch.stack([w[2] for w in window]).mean())
            window = []
            bins = np.minimum((sigma * SIGMA_BINS).astype(int), SIGMA_BINS - 1)
            by_sigma = [float(error[bins == b].mean()) if (bins == b).any() else None for b in range(SIGMA_BINS)]
            curves.append({
                "step": step, "seconds": round(clock.seconds(), 1), "loss": float(error.mean()), "by_sigma": by_sigma, "norm": norm, "rate": share * rate,
                "whole_context": not short,
            })  # fmt: skip
            if step % 500 == 0 or step == 100 or clock.progress() >= 1:
                log(
                    f"dit {clock.seconds():6.1f} s  step {step}  loss {error.mean():.4f}  by sigma {[round(b, 3) if b else b for b in by_sigma]}  norm {norm:.2f}"
                )
        if clock.seconds() > saved + SAVE_SECONDS:
            saved = clock.seconds()
            save(out, toy, trainer, basis, summary())
    save(out, toy, trainer, basis, summary())
    log(f"trained {step} steps")
    ways = None
    if trial:
        trial.wins()  # ends it
    trainer.use_average(True)
    reports["end"] = evaluation(toy, out)
    save(out, toy, trainer, basis, summary())
    return toy
