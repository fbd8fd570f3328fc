"""Captions for scenes, in varied wording; one set of templates for training and another, disjoint one for evaluation.

A caption is text plus what it says: ``things`` (shape, colour, motion per thing) and the background's name or None when the text is
silent about it. Both sets speak of the same classes, partly with the same words; the sentence frames, most verb phrases and the
forms of negation differ. One in twelve combinations of (colour, shape, motion) is kept out of training altogether.
"""

from dataclasses import dataclass

import numpy as np

from .scenes import (
    BACKGROUND_NAMES,
    COLOUR_NAMES,
    HORIZONTAL,
    IN_PLACE,
    MOTIONS,
    SHAPES,
    VERTICAL,
    is_drawable,
)  # fmt: skip


@dataclass(frozen=True)
class Caption:
    text: str
    things: tuple[tuple[str, str, str], ...]  # (shape, colour, motion)
    background: str | None = None


def is_held_out(colour: str, shape: str, motion: str) -> bool:
    """Combinations never trained as a scene of one thing."""
    index = COLOUR_NAMES.index(colour) + 3 * SHAPES.index(shape) + 5 * MOTIONS.index(motion)
    return index % 12 == 0


# Verbs in three forms: finite, participle, base.
_GO = {
    "train": [
        ("moves", "moving", "move"), ("slides", "sliding", "slide"), ("drifts", "drifting", "drift"),
        ("travels", "travelling", "travel"), ("glides", "gliding", "glide"), ("goes", "going", "go"),
        ("heads", "heading", "head"), ("floats", "floating", "float"), ("is moving", "moving", "move"), ("rolls", "rolling", "roll"),
        ("passes", "passing", "pass"), ("wanders", "wandering", "wander"), ("is going", "going", "go"), ("is sliding", "sliding", "slide"),
        ("makes its way", "making its way", "make their way"), ("swims", "swimming", "swim"), ("keeps moving", "that keeps moving", "keep moving"),
    ],
    "test": [
        ("moves", "moving", "move"), ("shifts", "shifting", "shift"), ("slides", "sliding", "slide"),
        ("is travelling", "travelling", "travel"), ("flies", "flying", "fly"),
    ],
}  # fmt: skip
_WHERE = {
    "train": {
        "right": [
            "right",
            "to the right",
            "towards the right",
            "from left to right",
            "rightwards",
            "toward the right side",
            "rightward",
            "across to the right",
            "along to the right",
            "to the right side",
            "out to the right edge",
            "slowly to the right",
        ],
        "left": [
            "left",
            "to the left",
            "towards the left",
            "from right to left",
            "leftwards",
            "toward the left side",
            "leftward",
            "across to the left",
            "along to the left",
            "to the left side",
            "out to the left edge",
            "slowly to the left",
        ],
        "up": [
            "up",
            "upwards",
            "to the top",
            "from the bottom to the top",
            "towards the top",
            "upward",
            "higher and higher",
            "up to the top edge",
            "slowly up",
            "toward the upper edge",
            "up and up",
        ],
        "down": [
            "down",
            "downwards",
            "to the bottom",
            "from the top to the bottom",
            "towards the bottom",
            "downward",
            "lower and lower",
            "down to the bottom edge",
            "slowly down",
            "toward the lower edge",
            "down and down",
        ],
    },
    "test": {
        "right": [
            "to the right-hand side",
            "over to the right",
            "in the rightward direction",
            "off to the right",
            "right",
        ],
        "left": ["to the left-hand side", "over to the left", "in the leftward direction", "off to the left", "left"],
        "up": ["straight up", "in the upward direction", "up towards the top edge", "steadily upwards"],
        "down": ["straight down", "in the downward direction", "down towards the bottom edge", "steadily downwards"],
    },
}
for _v, _V, _w in (("up", "top", "bottom"), ("down", "bottom", "top")):
    for _h, _o in (("right", "left"), ("left", "right")):
        _adj = "upper" if _v == "up" else "lower"
        _WHERE["train"][f"{_v} {_h}"] = [
            f"diagonally {_v} and to the {_h}", f"{_v} and to the {_h}", f"to the {_V} {_h}", f"towards the {_adj} {_h}",
            f"from the {_w} {_o} to the {_V} {_h}", f"diagonally to the {_adj} {_h} corner", f"{_v} and {_h}", f"{_v}-{_h}",
            f"diagonally {_v}wards to the {_h}", f"on a diagonal {_v} and {_h}", f"toward the {_V} {_h} corner", f"slanting {_v} to the {_h}",
        ]  # fmt: skip
        _WHERE["test"][f"{_v} {_h}"] = [
            f"diagonally towards the {_V} {_h}", f"in the direction of the {_adj} {_h} corner", f"{_v} and over to the {_h}",
            f"diagonally, {_v} and {_h}",
        ]  # fmt: skip
_SPECIAL = {
    "train": {
        "up": [("rises", "rising", "rise"), ("climbs", "climbing", "climb")],
        "down": [("falls", "falling", "fall"), ("sinks", "sinking", "sink"), ("drops", "dropping", "drop")],
        "growing": [
            ("grows", "growing", "grow"), ("gets bigger", "getting bigger", "get bigger"), ("expands", "expanding", "expand"),
            ("becomes larger", "becoming larger", "become larger"), ("grows in size", "growing in size", "grow in size"),
            ("gets larger and larger", "getting larger and larger", "get larger and larger"),
            ("is growing", "growing", "grow"), ("enlarges", "enlarging", "enlarge"), ("swells", "swelling", "swell"), ("is getting bigger", "getting bigger", "get bigger"),
            ("becomes bigger and bigger", "becoming bigger and bigger", "become bigger and bigger"), ("gains size", "gaining size", "gain size"),
            ("slowly expands", "slowly expanding", "slowly expand"), ("turns from small to large", "turning from small to large", "turn from small to large"),
        ],
        "shrinking": [
            ("shrinks", "shrinking", "shrink"), ("gets smaller", "getting smaller", "get smaller"),
            ("becomes smaller", "becoming smaller", "become smaller"), ("contracts", "contracting", "contract"),
            ("shrinks in size", "shrinking in size", "shrink in size"),
            ("gets smaller and smaller", "getting smaller and smaller", "get smaller and smaller"),
            ("is shrinking", "shrinking", "shrink"), ("diminishes", "diminishing", "diminish"), ("is getting smaller", "getting smaller", "get smaller"),
            ("becomes smaller and smaller", "becoming smaller and smaller", "become smaller and smaller"), ("loses size", "losing size", "lose size"),
            ("slowly contracts", "slowly contracting", "slowly contract"), ("turns from large to small", "turning from large to small", "turn from large to small"),
        ],
        "rotating": [
            ("rotates", "rotating", "rotate"), ("spins", "spinning", "spin"), ("turns around", "turning around", "turn around"),
            ("rotates in place", "rotating in place", "rotate in place"), ("spins around", "spinning around", "spin around"),
            ("is rotating", "rotating", "rotate"), ("is spinning", "spinning", "spin"), ("revolves", "revolving", "revolve"), ("whirls around", "whirling around", "whirl around"),
            ("keeps rotating", "that keeps rotating", "keep rotating"), ("turns about its own axis", "turning about its own axis", "turn about their own axes"),
            ("spins in place", "spinning in place", "spin in place"), ("slowly rotates", "slowly rotating", "slowly rotate"),
        ],
        "bouncing": [
            ("bounces", "bouncing", "bounce"), ("bounces up and down", "bouncing up and down", "bounce up and down"),
            ("hops up and down", "hopping up and down", "hop up and down"), ("keeps bouncing", "bouncing", "keep bouncing"),
            ("is bouncing", "bouncing", "bounce"), ("jumps up and down", "jumping up and down", "jump up and down"), ("bounces in place", "bouncing in place", "bounce in place"),
            ("hops", "hopping", "hop"), ("is hopping up and down", "hopping up and down", "hop up and down"), ("bounces like a ball", "bouncing like a ball", "bounce like balls"),
        ],
        "still": [
            ("stays still", "staying still", "stay still"), ("does not move", "not moving", "do not move"),
            ("is not moving", "without moving", "are not moving"), ("remains in place", "remaining in place", "remain in place"),
            ("stands still", "standing still", "stand still"), ("stays where it is", "staying where it is", "stay where they are"),
            ("sits there with no motion", "with no motion", "show no motion"), ("is still", "that is still", "are still"),
            ("is at rest", "at rest", "are at rest"), ("keeps still", "keeping still", "keep still"), ("holds still", "holding still", "hold still"),
            ("is standing still", "standing still", "are standing still"), ("is frozen in place", "frozen in place", "are frozen in place"),
            ("stays put", "staying put", "stay put"), ("doesn't move", "that doesn't move", "don't move"), ("is stationary", "that is stationary", "are stationary"),
        ],
    },
    "test": {
        "up": [("rises", "rising", "rise"), ("goes up", "going up", "go up")],
        "down": [("falls", "falling", "fall"), ("drops down", "dropping down", "drop down")],
        "growing": [
            ("increases in size", "increasing in size", "increase in size"), ("grows bigger", "growing bigger", "grow bigger"),
            ("slowly gets bigger", "slowly getting bigger", "slowly get bigger"), ("keeps growing", "that keeps growing", "keep growing"),
        ],
        "shrinking": [
            ("decreases in size", "decreasing in size", "decrease in size"), ("shrinks away", "shrinking away", "shrink away"),
            ("slowly gets smaller", "slowly getting smaller", "slowly get smaller"), ("keeps shrinking", "that keeps shrinking", "keep shrinking"),
        ],
        "rotating": [
            ("spins on the spot", "spinning on the spot", "spin on the spot"),
            ("is rotating around its centre", "rotating around its centre", "rotate around their centres"),
            ("keeps spinning", "that keeps spinning", "keep spinning"),
        ],
        "bouncing": [
            ("is bouncing on the spot", "bouncing on the spot", "bounce on the spot"),
            ("bounces again and again", "bouncing again and again", "bounce again and again"),
            ("hops and bounces", "hopping and bouncing", "hop and bounce"),
        ],
        "still": [
            ("never moves", "that never moves", "never move"), ("stays perfectly still", "perfectly still", "stay perfectly still"),
            ("remains motionless", "without any motion", "remain motionless"), ("is not moving at all", "not moving at all", "are not moving at all"),
        ],
    },
}  # fmt: skip
NEGATED = {
    "train": (0.15, 0.3),
    "test": (0.15, 0.15),
}  # shares of captions with a negated colour, with a negated direction
# How often training sees a shape, relative to the others: arms and corners take longer to learn than a disc.
SHAPE_SHARE = {"circle": 0.6, "square": 1.0, "triangle": 0.9, "star": 1.6, "cross": 1.8}
_OPPOSITE = {"right": "left", "left": "right", "up": "down", "down": "up"}
_NOUN = {
    "circle": ["circle"] * 4 + ["disc", "ball"],
    "square": ["square"] * 5 + ["box"],
    "triangle": ["triangle"] * 7 + ["three-sided shape"],
    "star": ["star"] * 5 + ["five-pointed star"],
    "cross": ["cross"] * 4 + ["plus sign"],
}
_THING = {
    "train": ["{a} {c} {s}"] * 5
    + [
        "{a} {s} in {c}",
        "{a} {s} that is {c}",
        "{a} {c} coloured {s}",
        "one {c} {s}",
        "the {c} {s}",
        "a single {c} {s}",
        "{a} {s} of {c} colour",
        "our {c} {s}",
        "{a} {c} {s} shape",
    ],
    "test": ["{a} {c} {s}"] * 3 + ["{a} {s} coloured {c}", "{a} {s} painted {c}", "some {c} {s}", "this {c} {s}"],
}
_THING_NOT = {
    "train": [
        "{a} {s} that is not {n} but {c}",
        "{a} {c}, not {n}, {s}",
        "{a} {s}, {c} rather than {n},",
        "{a} {s} which is {c} and not {n}",
    ],
    "test": ["{a} {s} that isn't {n} but {c}", "{a} {c} (not {n}) {s}", "{a} {s}, not a {n} one but a {c} one,"],
}
_GO_NOT = {
    "train": [
        "{go} {w}, not {o}",
        "does not go {o} but {w}",
        "{go} {w} instead of {o}",
        "doesn't go {o} but {w}",
        "is not moving {o} but {w}",
        "does not slide {o}, it slides {w}",
        "doesn't drift {o} but drifts {w}",
        "does not move {o}, it moves {w}",
        "never goes {o}, only {w}",
        "doesn't travel {o} but {w}",
        "isn't going {o} but {w}",
        "{go} not {o} but {w}",
        "doesn't slide {o} but {w}",
        "doesn't head {o}, it heads {w}",
        "isn't moving {o}, it is moving {w}",
        "does not drift {o} but {w}",
    ],
    "test": ["{go} {w} rather than {o}", "doesn't move {o} but {w}"],
}
_BACK = {
    "train": [
        "on a {b} background",
        "against a {b} background",
        "in front of a {b} background",
        "with a {b} background",
    ],
    "test": ["over a plain {b} background", "set against {b}", "on {b}"],
}
_ONE = {
    "train": [
        "{x} {v}{b}", "{x} {v}{b}", "A video of {x} {p}{b}", "An animation of {x} {p}{b}", "A short clip of {x} {p}{b}", "{x}, {p}{b}",
        "There is {x}. It {v}{b}", "{x}. The {s} {v}{b}", "{x} {p}{b}", "A clip in which {x} {v}{b}", "Animation: {x} {v}{b}", "Here {x} {v}{b}",
        "You can see {x} {p}{b}", "{x} that {v}{b}", "Look at {x}: it {v}{b}", "A scene with {x} that {v}{b}", "Clip of {x} while it {v}{b}",
        "The video shows {x}. It {v}{b}", "Picture {x}, {p}{b}", "On the screen {x} {v}{b}", "A cartoon in which {x} {v}{b}", "{x}: it {v}{b}",
    ],
    "test": [
        "Footage showing {x} {p}{b}", "In this clip {x} {v}{b}", "We see {x}, and it {v}{b}", "Watch {x} as it {v}{b}", "A simple scene: {x}, which {v}{b}",
        "{x} can be seen {p}{b}", "Cartoon of {x}; it {v}{b}",
    ],
}  # fmt: skip
_TWO = {
    "train": [
        "{x} {v} and {y} {u}{b}", "{x} {v} while {y} {u}{b}", "A video of {x} {p} and {y} {q}{b}", "{x} {p} and {y} {q}{b}", "{x} and {y}. The {cs} {v} and the {ct} {u}{b}",
        "There are two shapes: {x} {p} and {y} {q}{b}",
        "{x} {v}; {y} {u}{b}", "A scene with {x} {p} and {y} {q}{b}", "{x} {v}, and beside it {y} {u}{b}", "One shape is {x} {p}, the other {y} {q}{b}",
    ],
    "test": ["{x} {v}, {y} {u}{b}", "We see {x} {p} as {y} {u}{b}", "Two shapes: {x}, which {v}, and {y}, which {u}{b}", "In this clip {x} {v} and {y} {u}{b}"],
}  # fmt: skip
_BOTH = {
    "train": ["{x} and {y} both {w}{b}", "{x} and {y} {w}{b}", "Two shapes, {x} and {y}, {w}{b}"],
    "test": ["In this clip {x} and {y} {w} together{b}", "Both {x} and {y} {w}{b}"],
}


def _pick(rng, options):
    return options[rng.integers(len(options))]


def _noun_phrase(rng, split, shape, colour, negate):
    noun = _pick(rng, _NOUN[shape])
    other = _pick(rng, [c for c in COLOUR_NAMES if c != colour])
    template = _pick(rng, (_THING_NOT if negate else _THING)[split])
    first = template[4:5] if template.startswith("{a} ") else ""
    word = noun if template.startswith("{a} {s}") else colour
    article = "an" if first and word[0] in "aeiou" else "a"
    return template.format(a=article, c=colour, s=noun, n=other), noun


def _verb_phrase(rng, split, motion, negate):
    """(finite, participle, base) wording of a motion."""
    special = _SPECIAL[split].get(motion)
    where = _WHERE[split].get(motion)
    if where is None or (special and not negate and rng.random() < 0.35):
        return _pick(rng, special)
    go, place = _pick(rng, _GO[split]), _pick(rng, where)
    if negate and motion in _OPPOSITE:
        go = _pick(rng, _GO["train"][:2])
        text = _pick(rng, _GO_NOT[split]).format(go=go[0], w=motion, o=_OPPOSITE[motion])
        return text, f"{go[1]} {motion} and not {_OPPOSITE[motion]}", f"{go[2]} {motion} and not {_OPPOSITE[motion]}"
    return tuple(f"{form} {place}" for form in go)


def write(rng: np.random.Generator, split: str, things, background: str | None) -> Caption:
    """One caption of ``split`` ("train" or "test") for things ((shape, colour, motion), ...) on a background or None (not mentioned)."""
    back = "" if background is None else _pick(rng, [" " + t for t in _BACK[split]]).format(b=background)
    negate = [rng.random() < share for share in NEGATED[split]]
    nouns = [_noun_phrase(rng, split, s, c, negate[0] and len(things) == 1) for s, c, _ in things]
    verbs = [_verb_phrase(rng, split, m, negate[1] and len(things) == 1) for _, _, m in things]
    if len(things) == 1:
        (x, s), (v, p, _) = nouns[0], verbs[0]
        text = _pick(rng, _ONE[split]).format(x=x, s=s, v=v, p=p, b=back)
    else:
        (x, s), (y, t) = nouns
        if things[0][2] == things[1][2] and rng.random() < 0.6:
            text = _pick(rng, _BOTH[split]).format(x=x, y=y, w=verbs[0][2], b=back)
        else:
            (v, p, _), (u, q, _) = verbs
            cs, ct = f"{things[0][1]} {s}", f"{things[1][1]} {t}"
            text = _pick(rng, _TWO[split]).format(x=x, y=y, v=v, u=u, p=p, q=q, cs=cs, ct=ct, b=back)
    text = text.replace(",,", ",").replace(",.", ".").replace(",;", ";")
    if split == "test" or rng.random() < 0.75:
        text = text[0].upper() + text[1:] + "."
    else:
        text = text.lower()
    return Caption(text, tuple(things), background)


def combinations(held_out: bool | None = None) -> list[tuple[str, str, str]]:
    """Every drawable (shape, colour, motion); ``held_out`` selects those kept out of or used in training."""
    every = [(s, c, m) for c in COLOUR_NAMES for s in SHAPES for m in MOTIONS if is_drawable(c, s, m)]
    return [t for t in every if held_out is None or is_held_out(t[1], t[0], t[2]) == held_out]


def _background(rng, colours, mention):
    names = [b for b in BACKGROUND_NAMES if not (b == "beige" and {"white", "yellow"} & set(colours))]
    return _pick(rng, names) if rng.random() < mention else None


def random_pair(rng: np.random.Generator) -> tuple[tuple[str, str, str], ...]:
    """Two things of different colours whose motions fit side by side."""
    group = IN_PLACE + (HORIZONTAL if rng.random() < 0.5 else VERTICAL) * 2
    colours = rng.choice(len(COLOUR_NAMES), 2, replace=False)
    same = rng.random() < 0.2
    motions = [_pick(rng, group) for _ in range(2)]
    motions[1] = motions[0] if same else motions[1]
    shapes = [_pick(rng, [s for s in SHAPES if is_drawable("red", s, m)]) for m in motions]
    return tuple((s, COLOUR_NAMES[c], m) for s, c, m in zip(shapes, colours, motions))


def training_set(seed: int, per_combination: int = 14, pairs: int = 2800) -> list[Caption]:
    """Captions for training: every trained combination ``per_combination`` times its ``SHAPE_SHARE``, and ``pairs`` scenes of two things."""
    rng = np.random.default_rng(seed)
    captions = [
        write(rng, "train", (thing,), _background(rng, [thing[1]], 0.4))
        for thing in combinations(held_out=False)
        for _ in range(round(per_combination * SHAPE_SHARE[thing[0]]))
    ]
    for _ in range(pairs):
        things = random_pair(rng)
        captions.append(write(rng, "train", things, _background(rng, [t[1] for t in things], 0.3)))
    return captions


def evaluation_set(seed: int, singles: int = 80, pairs: int = 16) -> list[Caption]:
    """Held-out paraphrases: motions and colours in equal shares, and singles in combinations never trained wherever the draw allows (a tenth of them)."""
    rng = np.random.default_rng(seed)
    trained, unseen = combinations(held_out=False), combinations(held_out=True)
    captions = []
    for i in range(singles):
        motion = MOTIONS[i % len(MOTIONS)]
        pool = unseen if rng.random() < 0.25 and any(t[2] == motion for t in unseen) else trained
        thing = _pick(
            rng,
            [t for t in pool if t[2] == motion and t[1] == COLOUR_NAMES[i % len(COLOUR_NAMES)]]
            or [t for t in trained if t[2] == motion],
        )
        captions.append(write(rng, "test", (thing,), _background(rng, [thing[1]], 0.4)))
    for _ in range(pairs):
        things = random_pair(rng)
        captions.append(write(rng, "test", things, _background(rng, [t[1] for t in things], 0.3)))
    return captions


def classes(captions: list[Caption]) -> tuple[np.ndarray, np.ndarray]:
    """Indices for ``scenes.sample``: things [n, 2, 3] and background [n], -1 where absent or unsaid."""
    things = np.full((len(captions), 2, 3), -1)
    background = np.full(len(captions), -1)
    for i, caption in enumerate(captions):
        for k, (shape, colour, motion) in enumerate(caption.things):
            things[i, k] = SHAPES.index(shape), COLOUR_NAMES.index(colour), MOTIONS.index(motion)
        if caption.background is not None:
            background[i] = BACKGROUND_NAMES.index(caption.background)
    return things, background
