"""Seeded clips of simple scenes: one or two flat shapes that move over a plain background.

A scene is drawn in two steps. ``sample`` turns classes (shape, colour, motion, background) into per-frame geometry with a numpy
generator; ``render`` paints the geometry from signed distances, anti-aliased over one pixel. Both the numpy and the torch renderer
run the same lines (``_signed_distance``, ``_paint``) on their own arrays, so training on a GPU sees the clips the tests see.

Units: pixels and frames; the image's y axis points down; colours are 0..255.
"""

import math
from dataclasses import dataclass, fields

import numpy as np

SIZE = 128
FRAMES = 25

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = {
    "red": (226, 38, 38),
    "green": (40, 168, 60),
    "blue": (44, 84, 228),
    "yellow": (246, 224, 44),
    "orange": (246, 130, 20),
    "purple": (140, 46, 190),
    "cyan": (60, 210, 224),
    "white": (246, 246, 246),
}
COLOUR_NAMES = tuple(COLOURS)
BACKGROUNDS = {"black": (14, 14, 18), "grey": (112, 112, 118), "brown": (92, 62, 46), "beige": (222, 204, 168)}
BACKGROUND_NAMES = tuple(BACKGROUNDS)
MOTIONS = (
    "still", "right", "left", "up", "down", "up right", "up left", "down right", "down left",
    "growing", "shrinking", "rotating", "bouncing",
)  # fmt: skip
VELOCITY = {
    "right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1),
    "up right": (1, -1), "up left": (-1, -1), "down right": (1, 1), "down left": (-1, 1),
}  # fmt: skip
HORIZONTAL = ("right", "left")
VERTICAL = ("up", "down", "bouncing")
IN_PLACE = ("still", "growing", "shrinking", "rotating")

_RGB = np.array(list(COLOURS.values()), dtype=np.float32)
_BACK = np.array(list(BACKGROUNDS.values()), dtype=np.float32)


def is_drawable(colour: str, shape: str, motion: str, background: str | None = None) -> bool:
    """Whether the combination can be told from its pixels (a turning circle or white on beige cannot)."""
    if motion == "rotating" and shape == "circle":
        return False
    return not (background == "beige" and colour in ("white", "yellow"))


@dataclass
class Scenes:
    """N scenes. ``shape`` -1 marks an absent second thing.

    shape, colour, motion [N, 2] int; background [N] int; centre [N, 2, T, 2] (x, y); radius, angle [N, 2, T]; rgb [N, 2, 3];
    back [N, 2, 3] (top and bottom colour of the background).
    """

    shape: np.ndarray
    colour: np.ndarray
    motion: np.ndarray
    background: np.ndarray
    centre: np.ndarray
    radius: np.ndarray
    angle: np.ndarray
    rgb: np.ndarray
    back: np.ndarray

    def __len__(self) -> int:
        return len(self.background)

    def __getitem__(self, rows) -> "Scenes":
        """Scenes at ``rows`` (a slice or an index array)."""
        return Scenes(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    @staticmethod
    def concatenate(parts: "list[Scenes]") -> "Scenes":
        return Scenes(**{f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Scenes)})


def sample(rng: np.random.Generator, things: np.ndarray, background: np.ndarray, frames: int = FRAMES) -> Scenes:
    """Draw the free parameters (place, size, tilt, speed, tint) of scenes with given classes.

    things [N, 2, 3] int: (shape, colour, motion) indices of both things, -1 in the second for a scene of one.
    background [N] int: index, or -1 for any that is compatible with the colours.
    """
    things = np.asarray(things)
    n = len(things)
    two = things[:, 1, 0] >= 0
    shape, colour, motion = (things[..., i].copy() for i in range(3))

    background = _free_backgrounds(rng, colour, np.asarray(background))
    back = _BACK[background][:, None, :] + rng.normal(0, 3, (n, 1, 3))
    tilt = rng.uniform(-14, 14, (n, 1, 1)) * (
        rng.random((n, 1, 1)) < 0.5
    )  # half the backgrounds are vertical gradients
    back = np.clip(np.concatenate([back - tilt, back + tilt], axis=1), 0, 255)
    rgb = np.clip(_RGB[np.maximum(colour, 0)] + rng.normal(0, 4, (n, 2, 3)), 0, 255)

    home, size = _places(rng, motion, two)
    centre, radius, angle = _trajectories(rng, motion, home, size, two, frames)
    return Scenes(
        shape, colour, motion, background, *(a.astype(np.float32) for a in (centre, radius, angle, rgb, back))
    )


def _free_backgrounds(rng, colour, background):
    pale = np.isin(colour, [COLOUR_NAMES.index("white"), COLOUR_NAMES.index("yellow")]).any(axis=1)
    beige = BACKGROUND_NAMES.index("beige")
    drawn = rng.integers(0, len(BACKGROUND_NAMES), len(background))
    drawn = np.where(pale & (drawn == beige), rng.integers(0, beige, len(background)), drawn)
    return np.where(background < 0, drawn, background)


def _places(rng, motion, two):
    """Mean position [N, 2, 2] and base radius [N, 2]: one thing near the middle, two things in lanes of their own."""
    n = len(motion)
    name = np.array(MOTIONS)[motion]
    size = np.where(two[:, None], rng.uniform(13, 17, (n, 2)), rng.uniform(19, 26, (n, 2)))
    home = SIZE / 2 + rng.uniform(-14, 14, (n, 2, 2))
    vertical = np.isin(name, VERTICAL).any(axis=1)
    free = ~vertical & ~np.isin(name, HORIZONTAL).any(axis=1)
    vertical = np.where(free, rng.random(n) < 0.5, vertical)
    first = np.where(rng.random(n) < 0.5, 0, 1)
    lane = np.stack([first, 1 - first], axis=1)
    across = 36 + 56 * lane + rng.uniform(-4, 4, (n, 2))
    along = SIZE / 2 + rng.uniform(-10, 10, (n, 2))
    lanes = np.where(vertical[:, None, None], np.stack([across, along], -1), np.stack([along, across], -1))
    home = np.where(two[:, None, None], lanes, home)
    return home, size


def _trajectories(rng, motion, home, size, two, frames):
    n = len(motion)
    name = np.array(MOTIONS)[motion]
    u = np.linspace(-0.5, 0.5, frames)  # time, centred
    velocity = np.array([VELOCITY.get(m, (0, 0)) for m in MOTIONS], dtype=np.float64)[motion]  # [N, 2, 2]
    diagonal = np.abs(velocity).sum(-1) == 2
    travel = np.where(diagonal, rng.uniform(38, 50, (n, 2)), rng.uniform(46, 62, (n, 2)))
    travel = np.where(two[:, None], np.minimum(travel, 54), travel)
    # Along the way a mover starts on one side and ends on the other: its mean is near the middle.
    moving = velocity != 0
    home = np.where(moving, SIZE / 2 + (home - SIZE / 2) * 0.4, home)
    centre = home[:, :, None] + velocity[:, :, None] * travel[:, :, None, None] * u[None, None, :, None]

    bounce = name == "bouncing"
    height = rng.uniform(36, 48, (n, 2)) * np.where(two[:, None], 0.9, 1)
    hops = np.abs(np.sin(math.pi * 2 * np.linspace(0, 1, frames)))  # two hops
    floor = np.where(two[:, None], 92, 88) + rng.uniform(-3, 3, (n, 2))
    hopping = floor[..., None] - height[..., None] * hops
    centre[..., 1] = np.where(bounce[..., None], hopping, centre[..., 1])

    scale = np.ones((n, 2, frames))
    scale = np.where((name == "growing")[..., None], 0.9 + 0.8 * u, scale)
    scale = np.where((name == "shrinking")[..., None], 0.9 - 0.8 * u, scale)
    radius = size[..., None] * scale

    tilt = rng.uniform(-0.2, 0.2, (n, 2))
    turn = np.where(name == "rotating", rng.uniform(1.8, 3.0, (n, 2)) * np.sign(rng.random((n, 2)) - 0.5), 0)
    angle = tilt[..., None] + turn[..., None] * u
    return centre, radius, angle


def _signed_distance(ops, shape: int, x, y, r):
    """Distance in pixels to the outline (negative inside) for points in the shape's own frame; r is the base radius."""
    if shape == 0:  # circle
        return ops.sqrt(x * x + y * y) - 0.95 * r
    if shape == 1:  # square
        return ops.maximum(abs(x), abs(y)) - 0.86 * r
    if shape == 2:  # triangle, tip up, moved so that its centroid is the origin
        side = 0.866025 * abs(x) - 0.5 * y
        return ops.maximum(side, y) - 0.62 * r
    if shape == 3:  # star with five points, tip up: fold into half a point
        outer, inner = 1.3 * r, 0.56 * r
        step = 2 * math.pi / 5
        theta = ops.arctan2(x, -y) / step
        theta = abs(theta - ops.round(theta)) * step
        rho = ops.sqrt(x * x + y * y)
        px, py = rho * ops.cos(theta), rho * ops.sin(theta)
        ex, ey = inner * math.cos(step / 2) - outer, inner * math.sin(step / 2)
        return ((px - outer) * ey - py * ex) / ops.sqrt(ex * ex + ey * ey)
    arm, width = 1.1 * r, 0.38 * r  # cross
    ax, ay = abs(x), abs(y)
    return ops.minimum(ops.maximum(ax - arm, ay - width), ops.maximum(ay - arm, ax - width))


def _paint(ops, image, shape: int, centre, radius, angle, rgb, pixel):
    """image [n, T, H, W, 3] with one shape blended over it. centre [n, T, 2], radius/angle [n, T], rgb [n, 3]."""
    dx = pixel[None, None, None, :] - centre[:, :, None, None, 0]
    dy = pixel[None, None, :, None] - centre[:, :, None, None, 1]
    cos, sin = ops.cos(angle)[:, :, None, None], ops.sin(angle)[:, :, None, None]
    distance = _signed_distance(ops, shape, dx * cos + dy * sin, dy * cos - dx * sin, radius[:, :, None, None])
    cover = ops.clip(0.5 - distance, 0, 1)[..., None]
    return image + cover * (rgb[:, None, None, None, :] - image)


def render(scenes: Scenes) -> np.ndarray:
    """Clips uint8 [N, T, 128, 128, 3]."""
    n, frames = len(scenes), scenes.radius.shape[2]
    ramp = np.linspace(0, 1, SIZE, dtype=np.float32)[None, None, :, None, None]
    top, bottom = (scenes.back[:, i][:, None, None, None, :] for i in range(2))
    image = np.broadcast_to(top + (bottom - top) * ramp, (n, frames, SIZE, SIZE, 3)).copy()
    pixel = np.arange(SIZE, dtype=np.float32) + 0.5
    for k in range(2):
        for shape in range(len(SHAPES)):
            rows = np.nonzero(scenes.shape[:, k] == shape)[0]
            if len(rows):
                geometry = (scenes.centre[rows, k], scenes.radius[rows, k], scenes.angle[rows, k], scenes.rgb[rows, k])
                image[rows] = _paint(np, image[rows], shape, *geometry, pixel)
    return np.rint(image).astype(np.uint8)


def render_torch(scenes: Scenes, device="cpu"):
    """The same clips as a float32 tensor [N, 3, T, 128, 128] in [-1, 1], painted on ``device`` (not rounded to 8 bits)."""
    import torch

    def move(array):
        return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)

    n, frames = len(scenes), scenes.radius.shape[2]
    ramp = torch.linspace(0, 1, SIZE, device=device)[None, None, :, None, None]
    back = move(scenes.back)
    top, bottom = (back[:, i][:, None, None, None, :] for i in range(2))
    image = (top + (bottom - top) * ramp).expand(n, frames, SIZE, SIZE, 3).contiguous()
    pixel = torch.arange(SIZE, device=device, dtype=torch.float32) + 0.5
    for k in range(2):
        for shape in range(len(SHAPES)):
            rows = np.nonzero(scenes.shape[:, k] == shape)[0]  # on the CPU: no synchronisation
            if len(rows):
                geometry = [move(a[rows, k]) for a in (scenes.centre, scenes.radius, scenes.angle, scenes.rgb)]
                index = move(rows)
                image[index] = _paint(torch, image[index], shape, *geometry, pixel)
    return (image / 127.5 - 1).permute(0, 4, 1, 2, 3)


def random_things(rng: np.random.Generator, n: int, two_share: float = 0.25) -> tuple[np.ndarray, np.ndarray]:
    """Classes of n random scenes: things [n, 2, 3], background [n] (for the VAE, which needs no captions)."""
    things = np.full((n, 2, 3), -1)
    background = np.full(n, -1)
    for i in range(n):
        two = rng.random() < two_share
        group = MOTIONS if not two else IN_PLACE + (HORIZONTAL if rng.random() < 0.5 else VERTICAL)
        for k in range(2 if two else 1):
            shape, colour = rng.integers(len(SHAPES)), rng.integers(len(COLOURS))
            motion = group[rng.integers(len(group))]
            if motion == "rotating" and SHAPES[shape] == "circle":
                motion = "still"
            things[i, k] = shape, colour, MOTIONS.index(motion)
    return things, background
