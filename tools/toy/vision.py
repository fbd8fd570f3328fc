"""What a clip shows, measured with numpy: how many things, their colour, shape, path and motion.

Nothing here knows a prompt. The background is read from the frame's edges row by row, things are told apart by colour, and every
thing's mask gives its area, centre and angular harmonics per frame. The shape classifier is fitted on ground-truth clips (``fit``);
its and the other measures' error rates on ground truth are reported by ``error_rates``.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from . import scenes
from .scenes import COLOUR_NAMES, MOTIONS, SHAPES

FOREGROUND = 36  # RGB distance from the background that starts a thing
MIN_SHARE = 0.12  # a second thing covers at least this share of the foreground
MIN_AREA = 45  # pixels per frame, on average
TRAVEL = 13  # pixels from the first to the last frames that count as moving
GROWTH = 1.7  # area ratio that counts as growing
HOP = 45  # pixels of up and down, summed, that count as bouncing
TURN = 0.6  # radians that count as rotating
HARMONIC = {"square": 4, "triangle": 3, "star": 5, "cross": 4}

_PALETTE = np.array(list(scenes.COLOURS.values()), dtype=np.float32)


@dataclass
class Thing:
    """One thing in a clip. ``path`` [T, 2] centres in pixels, ``area`` [T] pixels; NaN where it is not visible."""

    colour: str
    shape: str
    motion: str
    path: np.ndarray
    area: np.ndarray


def _background(frames):
    """[H, 3]: median colour of the outer columns, per row, over the clip."""
    edge = np.concatenate([frames[:, :, :5], frames[:, :, -5:]], axis=2)
    return np.median(edge.transpose(1, 0, 2, 3).reshape(frames.shape[1], -1, 3), axis=1)


def _core(mask):
    """Mask without its outermost two pixels."""
    for _ in range(2):
        inner = mask.copy()
        inner[:, 1:] &= mask[:, :-1]
        inner[:, :-1] &= mask[:, 1:]
        inner[:, :, 1:] &= mask[:, :, :-1]
        inner[:, :, :-1] &= mask[:, :, 1:]
        mask = inner
    return mask


def _present_colours(frames, mask):
    """[(palette index, median RGB)] of one or two things, the larger first."""
    core = _core(mask)
    pixels = frames[core]
    if len(pixels) < len(frames) * 4:
        pixels = frames[mask]
    if len(pixels) < len(frames) * 4:
        return []
    nearest = ((pixels[:, None] - _PALETTE) ** 2).sum(-1).argmin(1)
    counts = np.bincount(nearest, minlength=len(_PALETTE))
    found = [c for c in np.argsort(-counts)[:2] if counts[c] >= MIN_SHARE * len(pixels)]
    return [(c, np.median(pixels[nearest == c], axis=0)) for c in found]


def _masks(frames, back, distance, colours):
    """One boolean mask [T, H, W] per colour: pixels past half of the contrast, each given to the thing whose colour its pixel is on the way to."""
    contrasts = [max(np.linalg.norm(rgb - back.mean(0)), 2 * FOREGROUND) for _, rgb in colours]
    if len(colours) == 1:
        return [distance > 0.5 * contrasts[0]]
    # A pixel on a soft edge is background plus a fraction of (thing - background): compare how far it is from either line.
    offset = frames - back[None, :, None, :]
    residual, fraction = [], []
    for _, rgb in colours:
        direction = rgb - back  # (H, 3)
        length = (direction**2).sum(-1)[None, :, None]
        amount = (offset * direction[None, :, None, :]).sum(-1) / length
        residual.append(((offset - np.clip(amount, 0, 1.2)[..., None] * direction[None, :, None, :]) ** 2).sum(-1))
        fraction.append(amount)
    first = residual[0] <= residual[1]
    return [first & (fraction[0] > 0.5), ~first & (fraction[1] > 0.5)]


def _largest_blob(mask):
    """Keep, per frame, the pixels near the mask's densest place (stray specks elsewhere are dropped)."""
    kept = np.zeros_like(mask)
    for t, frame in enumerate(mask):
        ys, xs = np.nonzero(frame)
        if len(ys) == 0:
            continue
        cy, cx = np.median(ys), np.median(xs)
        reach = max(8.0, 1.9 * np.sqrt(len(ys) / np.pi))
        near = (ys - cy) ** 2 + (xs - cx) ** 2 < reach**2
        kept[t, ys[near], xs[near]] = True
    return kept


def _shape_features(mask):
    """(features [T, 6], harmonics complex [T, 3] for n = 3, 4, 5, area [T], centre [T, 2]) of a mask [T, H, W]; NaN where empty."""
    T = len(mask)
    features, harmonics = np.full((T, 6), np.nan), np.full((T, 3), np.nan, dtype=np.complex128)
    area, centre = np.zeros(T), np.full((T, 2), np.nan)
    for t in range(T):
        ys, xs = np.nonzero(mask[t])
        area[t] = len(ys)
        if len(ys) < 12:
            continue
        centre[t] = xs.mean() + 0.5, ys.mean() + 0.5
        z = (xs - xs.mean()) + 1j * (ys - ys.mean())
        z /= np.sqrt(len(ys) / np.pi)  # a disc has radius 1
        rho = np.abs(z)
        unit = z / np.maximum(rho, 1e-6)
        harmonics[t] = [(rho**2 * unit**n).mean() for n in (3, 4, 5)]
        features[t] = [(rho**2).mean(), (rho**4).mean(), *np.abs(harmonics[t]), np.quantile(rho, 0.97)]
    return features, harmonics, area, centre


@lru_cache(maxsize=1)
def fit(per_shape: int = 60, seed: int = 11):
    """Class means [5, 6] and inverse common covariance [6, 6] of the shape features on ground-truth frames."""
    rng = np.random.default_rng(seed)
    values, labels = [], []
    for shape in range(len(SHAPES)):
        things = np.full((per_shape, 2, 3), -1)
        things[:, 0] = [(shape, i % 8, MOTIONS.index("growing")) for i in range(per_shape)]
        clips = scenes.render(scenes.sample(rng, things, np.zeros(per_shape, dtype=int), frames=4))
        for clip in clips:
            frames = clip.astype(np.float32)
            back = _background(frames)
            distance = np.linalg.norm(frames - back[None, :, None], axis=-1)
            colours = _present_colours(frames, distance > FOREGROUND)
            features = _shape_features(_masks(frames, back, distance, colours[:1])[0])[0]
            values.append(np.nanmean(features[1:], axis=0))
            labels.append(shape)
    values, labels = np.array(values), np.array(labels)
    means = np.array([values[labels == s].mean(0) for s in range(len(SHAPES))])
    within = values - means[labels]
    covariance = within.T @ within / len(values) + np.diag((0.08 * values.std(0)) ** 2)
    return means, np.linalg.inv(covariance)


def _classify_shape(features, area):
    means, precision = fit()
    good = area >= max(60, 0.4 * np.max(area, initial=0))
    good &= ~np.isnan(features[:, 0])
    if not good.any():
        return "none"
    value = np.median(features[good], axis=0)
    gap = value - means
    return SHAPES[int(np.einsum("si,ij,sj->s", gap, precision, gap).argmin())]


def _direction(dx, dy):
    names = ("right", "down right", "down", "down left", "left", "up left", "up", "up right")
    return names[int(np.round(np.arctan2(dy, dx) / (np.pi / 4))) % 8]


def _classify_motion(path, area, harmonics, shape):
    seen = np.nonzero(~np.isnan(path[:, 0]))[0]
    if len(seen) < 5:
        return "none"
    first, last = seen[:3], seen[-3:]
    dx, dy = path[last].mean(0) - path[first].mean(0)
    hop = np.abs(np.diff(path[seen, 1])).sum() - abs(dy)
    if hop > HOP and hop > abs(dx):
        return "bouncing"
    if np.hypot(dx, dy) > TRAVEL:
        return _direction(dx, dy)
    ratio = max(area[last].mean(), 1) / max(area[first].mean(), 1)
    if ratio > GROWTH:
        return "growing"
    if ratio < 1 / GROWTH:
        return "shrinking"
    if shape in HARMONIC:
        n = HARMONIC[shape]
        angle = np.unwrap(np.angle(harmonics[seen, n - 3])) / n
        if abs(angle[-1] - angle[0]) > TURN:
            return "rotating"
    return "still"


def measure(clip: np.ndarray) -> list[Thing]:
    """Things in a clip uint8 [T, H, W, 3], the larger first; empty when nothing stands out."""
    frames = clip.astype(np.float32)
    back = _background(frames)
    distance = np.linalg.norm(frames - back[None, :, None], axis=-1)
    colours = _present_colours(frames, distance > FOREGROUND)
    things = []
    for (colour, _), mask in zip(colours, _masks(frames, back, distance, colours) if colours else []):
        features, harmonics, area, path = _shape_features(_largest_blob(mask))
        if area.mean() < MIN_AREA:
            continue
        shape = _classify_shape(features, area)
        things.append(Thing(COLOUR_NAMES[colour], shape, _classify_motion(path, area, harmonics, shape), path, area))
    return things


def compare(things: list[Thing], wanted) -> dict[str, list[bool]]:
    """Per wanted thing (shape, colour, motion): was its colour, shape, motion there?

    Things are matched by colour first, then by size. A scene with too many things counts its colours as wrong.
    """
    left = list(things)
    result = {"colour": [], "shape": [], "motion": []}
    matched = []
    for _, colour, _ in wanted:
        hit = next((t for t in left if t.colour == colour), None)
        if hit is not None:
            left.remove(hit)
        matched.append(hit)
    for i, (shape, colour, motion) in enumerate(wanted):
        thing = matched[i] if matched[i] is not None else (left.pop(0) if left else None)
        result["colour"].append(thing is not None and thing.colour == colour and len(things) <= len(wanted))
        result["shape"].append(thing is not None and thing.shape == shape)
        result["motion"].append(thing is not None and thing.motion == motion)
    return result


def score(clips, wanted) -> dict[str, float]:
    """Share of right colours, shapes and motions over clips uint8 [N, T, H, W, 3] and their wanted things."""
    total = {"colour": [], "shape": [], "motion": []}
    for clip, things in zip(clips, wanted):
        for key, values in compare(measure(clip), things).items():
            total[key] += values
    return {key: float(np.mean(values)) for key, values in total.items()}


def error_rates(n: int = 200, seed: int = 3, degrade=None) -> dict[str, dict[str, float]]:
    """This module's own error rates on ground truth: {"one thing": {...}, "two things": {...}}.

    degrade: optional function on uint8 clips, for instance a round trip through a VAE.
    """
    rng = np.random.default_rng(seed)
    report = {}
    for name, share in (("one thing", 0.0), ("two things", 1.0)):
        things, background = scenes.random_things(rng, n, share)
        if share:  # the classifier tells two things apart by colour
            same = things[:, 0, 1] == things[:, 1, 1]
            things[same, 1, 1] = (things[same, 1, 1] + 1) % len(COLOUR_NAMES)
        clips = scenes.render(scenes.sample(rng, things, background))
        clips = clips if degrade is None else degrade(clips)
        wanted = [tuple((SHAPES[s], COLOUR_NAMES[c], MOTIONS[m]) for s, c, m in scene if s >= 0) for scene in things]
        report[name] = {key: round(1 - value, 4) for key, value in score(clips, wanted).items()}
    return report


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of uint8 arrays."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-10)))
