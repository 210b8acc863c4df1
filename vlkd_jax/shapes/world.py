"""The built-in world "shapes": procedural pictures, captions, questions and answers, each a pure function of a seed.

A scene holds one to three objects, each with a shape, a colour, a size and one quadrant of the picture. The splits
`train`, `validation` and `test_seen` never hold a (size, colour, shape) of `HELD_OUT`; every scene of `test` holds at
least one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

IMAGE_SIZE = 72
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 230),
    "yellow": (235, 215, 50),
    "purple": (150, 50, 190),
    "orange": (245, 140, 30),
    "cyan": (60, 210, 220),
    "white": (240, 240, 240),
}
RADII = {"small": (8.0, 10.0), "large": (13.5, 16.5)}
POSITIONS = ("top left", "top right", "bottom left", "bottom right")
COUNTS = ("one", "two", "three")
SPLITS = ("train", "validation", "test", "test_seen")  # the place of a name is part of its scenes' seeds
HELD_OUT = frozenset((tuple(RADII)[i % 2], color, SHAPES[i % len(SHAPES)]) for i, color in enumerate(COLORS))
QUESTION_TYPES = ("color", "shape", "size", "count", "existence", "relation", "position")


Kind = tuple[str, str, str]
"""(size, colour, shape) of an object."""


@dataclasses.dataclass(frozen=True)
class Thing:
    """One object: names of its attributes, and where it is drawn (centre and radius in pixels)."""

    shape: str
    color: str
    size: str
    position: str
    x: float
    y: float
    radius: float

    @property
    def attributes(self) -> tuple[str, str, str, str]:
        return self.size, self.color, self.shape, self.position


@dataclasses.dataclass(frozen=True)
class Scene:
    """Objects in reading order (top left to bottom right) and the seed of the picture's noise."""

    things: tuple[Thing, ...]
    noise: int


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about a scene with its one right answer; `kind` is one of `QUESTION_TYPES`."""

    kind: str
    question: str
    answer: str


def generator(seed: int, split: str, index: int, stream: int = 0) -> np.random.Generator:
    """The random numbers of one item: the same for the same (seed, split, index, stream), whoever asks and when."""
    return np.random.default_rng([seed, SPLITS.index(split), index, stream])


def sample_scene(rng: np.random.Generator, held_out: bool = False) -> Scene:
    """Draws a scene; with `held_out` at least one object is one of the held-out kinds, otherwise none is."""
    count = int(rng.integers(1, 4))
    kinds: list[Kind] = []
    if held_out:
        kinds.append(sorted(HELD_OUT)[int(rng.integers(len(HELD_OUT)))])
    while len(kinds) < count:
        kinds += _sample_kind(rng, kinds, held_out)
    quadrants = rng.permutation(len(POSITIONS))[:count]
    things = [_place(rng, kind, int(q)) for kind, q in zip(kinds, quadrants, strict=True)]
    return Scene(_in_reading_order(things), int(rng.integers(2**31)))


def _sample_kind(rng: np.random.Generator, taken: list[Kind], held_out: bool) -> list[Kind]:
    """One more kind of object, or none where the draw is not allowed: no two share colour and shape."""
    kind = tuple(options[int(rng.integers(len(options)))] for options in (tuple(RADII), tuple(COLORS), SHAPES))
    return [kind] if kind[1:] not in [k[1:] for k in taken] and (held_out or kind not in HELD_OUT) else []


def _in_reading_order(things: list[Thing]) -> tuple[Thing, ...]:
    return tuple(sorted(things, key=lambda t: POSITIONS.index(t.position)))


def _place(rng: np.random.Generator, kind: Kind, quadrant: int) -> Thing:
    size, color, shape = kind
    radius = float(rng.uniform(*RADII[size]))
    half = IMAGE_SIZE // 2
    x, y = rng.uniform(radius + 1, half - 1 - radius, size=2)
    return Thing(shape, color, size, POSITIONS[quadrant], x + half * (quadrant % 2), y + half * (quadrant // 2), radius)


def twin(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with one change, a hard negative for CLIP.

    One object differs in one attribute, or two objects change places, or there is one object more or less.
    """
    things = list(scene.things)
    k = int(rng.integers(len(things)))
    thing = things[k]
    changes = ("size", "color", "position", "position", "shape", "shape", "number", "number")  # hard ones twice
    change = changes[int(rng.integers(len(changes)))]
    kind, quadrant = thing.attributes[:3], POSITIONS.index(thing.position)
    others = [t.attributes[:3] for i, t in enumerate(things) if i != k]
    if change == "number":
        if len(things) > 1 and (len(things) == 3 or rng.integers(2)):
            del things[k]
        else:
            while not (more := _sample_kind(rng, [kind, *others], held_out=False)):
                pass
            free = [q for q, name in enumerate(POSITIONS) if name not in [t.position for t in things]]
            things.append(_place(rng, more[0], free[int(rng.integers(len(free)))]))
    elif change == "position":  # an object that is there already makes room
        other = [q for q in range(4) if q != quadrant][int(rng.integers(3))]
        things = [_place(rng, t.attributes[:3], quadrant) if t.position == POSITIONS[other] else t for t in things]
        things[k] = _place(rng, kind, other)
    else:
        field = ("size", "color", "shape").index(change)
        options = _changed(kind, field, others) or _changed(kind, 2, others)  # the only other size may be held out
        kind = options[int(rng.integers(len(options)))]
        things[k] = _place(rng, kind, quadrant)
    return Scene(_in_reading_order(things), int(rng.integers(2**31)))


def _changed(kind: Kind, field: int, others: list[Kind]) -> list[Kind]:
    """`kind` with each other value in one field, as far as the training splits and the other objects allow."""
    values = (tuple(RADII), tuple(COLORS), SHAPES)[field]
    options = [(*kind[:field], value, *kind[field + 1 :]) for value in values if value != kind[field]]
    return [o for o in options if o not in HELD_OUT and o[1:] not in [other[1:] for other in others]]


def make_scene(seed: int, split: str, index: int, twins: int = 1) -> Scene:
    """Scene `index` of a split; with `twins` > 1, runs of that many neighbours differ in one change only."""
    base = sample_scene(generator(seed, split, index - index % twins), held_out=split == "test")
    return twin(base, generator(seed, split, index, 1)) if index % twins else base


def render(scene: Scene) -> np.ndarray:
    """Draws a scene. Returns uint8 [72, 72, 3]: anti-aliased objects on a dark ground with noise."""
    rng = np.random.default_rng(scene.noise)
    image = rng.random((IMAGE_SIZE, IMAGE_SIZE, 3), np.float32) * 14 + np.float32(rng.uniform(20, 60))
    for thing in scene.things:
        color = np.asarray(COLORS[thing.color], np.float32) + rng.uniform(-14, 14, 3).astype(np.float32)
        reach = int(thing.radius) + 2
        rows = slice(max(int(thing.y) - reach, 0), int(thing.y) + reach + 1)
        cols = slice(max(int(thing.x) - reach, 0), int(thing.x) + reach + 1)
        patch = image[rows, cols]
        y = np.arange(rows.start, rows.start + patch.shape[0], dtype=np.float32)[:, None] + 0.5 - thing.y
        x = np.arange(cols.start, cols.start + patch.shape[1], dtype=np.float32)[None, :] + 0.5 - thing.x
        alpha = np.clip(0.5 - _distance(thing.shape, x, y, thing.radius), 0, 1)[..., None]
        patch += alpha * (color - patch)
    return np.clip(image, 0, 255).astype(np.uint8)


def _distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance in pixels (approximate at corners) from an outline; negative inside."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.74 * radius) - 0.24 * radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.84 * radius
    if shape == "cross":
        arm = 0.3 * radius
        return np.minimum(
            np.maximum(np.abs(x) - arm, np.abs(y) - radius), np.maximum(np.abs(x) - radius, np.abs(y) - arm)
        )
    if shape == "triangle":
        return np.maximum(y - 0.62 * radius, 0.87 * np.abs(x) - 0.5 * y - 0.55 * radius)
    # star: five straight outlines in polar form, outer radius 1, inner radius 0.42
    angle = np.abs((np.arctan2(x, -y) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    inner_x, inner_y = 0.42 * np.cos(np.pi / 5), 0.42 * np.sin(np.pi / 5)
    normal = np.array([inner_y, 1 - inner_x]) / np.hypot(inner_y, 1 - inner_x)
    distance = np.hypot(x, y)
    return distance * (np.cos(angle) * normal[0] + np.sin(angle) * normal[1]) - radius * normal[0]


def caption(scene: Scene, rng: np.random.Generator, complete: float = 0.0) -> str:
    """One English description; at least with probability `complete` one that names every attribute of every object."""
    style = rng.random() * (0.6 if rng.random() < complete else 1.0)
    if style < 0.3:
        return "a picture of " + _join([_phrase(t) for t in scene.things])
    things = [scene.things[i] for i in rng.permutation(len(scene.things))]
    if style < 0.45:
        return _counted(things) + ": " + _join([_phrase(t) for t in things])
    if style < 0.6:
        return _join([f"at {t.position} {_noun(t, size=True)}" for t in things])
    if style < 0.75 and len(things) > 1:
        return _related(things, rng)
    if style < 0.85:
        return _stated(things, rng)
    short = [_noun(t, size=bool(rng.integers(2))) for t in things]
    return _join(short) if style < 0.92 else f"{_counted(things)}: {_join(short)}"


def _noun(thing: Thing, size: bool, article: str = "a") -> str:
    words = (article, thing.size, thing.color, thing.shape) if size else (article, thing.color, thing.shape)
    return " ".join(words).replace("a orange", "an orange")


def _phrase(thing: Thing) -> str:
    return f"{_noun(thing, size=True)} at {thing.position}"


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _counted(things: list[Thing]) -> str:
    return "there is one object" if len(things) == 1 else f"there are {COUNTS[len(things) - 1]} objects"


def _related(things: list[Thing], rng: np.random.Generator) -> str:
    first, second = things[:2]
    axis, word = _relations(first, second)[int(rng.integers(len(_relations(first, second))))]
    preposition = f"to the {word} of" if axis == "x" else word
    text = f"{_noun(first, True)} is {preposition} {_noun(second, True)}"
    return text if len(things) == 2 else f"{text} and there is {_noun(things[2], True)}"


def _stated(things: list[Thing], rng: np.random.Generator) -> str:
    forms = (
        lambda t: f"the {t.shape} is {t.color}",
        lambda t: f"the {t.color} {t.shape} is {t.size}",
        lambda t: f"the {t.color} {t.shape} is at {t.position}",
        lambda t: f"the {t.color} object is a {t.shape}",
    )
    form = forms[int(rng.integers(len(forms)))]
    return _join([form(t) for t in things])


def _relations(first: Thing, second: Thing) -> list[tuple[str, str]]:
    """Where `first` is, seen from `second`: (axis, word) for each axis on which their quadrants differ."""
    a, b = POSITIONS.index(first.position), POSITIONS.index(second.position)
    relations = []
    if a % 2 != b % 2:
        relations.append(("x", "left" if a % 2 < b % 2 else "right"))
    if a // 2 != b // 2:
        relations.append(("y", "above" if a // 2 < b // 2 else "below"))
    return relations


def ask(scene: Scene, kind: str, rng: np.random.Generator) -> Question | None:
    """A question of one type, or None where the scene allows none that has exactly one right answer."""
    things = [scene.things[i] for i in rng.permutation(len(scene.things))]
    if kind == "count":
        noun = ("objects", "shapes", "things")[int(rng.integers(3))]
        return Question(kind, f"how many {noun} are there?", COUNTS[len(things) - 1])
    if kind == "existence":
        return _ask_existence(things, rng)
    if kind == "relation":
        return _ask_relation(things, rng)
    if kind == "color":
        named = [t for t in things if sum(o.shape == t.shape for o in things) == 1]
        template, noun = "what color is the {}?", "shape"
    elif kind == "shape":
        named = [t for t in things if sum(o.color == t.color for o in things) == 1]
        template, noun = "what shape is the {} object?", "color"
    else:
        named = things
        template, noun = ("what size is the {}?", None) if kind == "size" else ("where is the {}?", None)
    if kind in ("color", "shape") and rng.random() < 0.25:
        thing = things[0]
        return Question(kind, f"what {kind} is the object at {thing.position}?", getattr(thing, kind))
    if not named:
        return None
    thing = named[0]
    name = getattr(thing, noun) if noun else f"{thing.color} {thing.shape}"
    return Question(kind, template.format(name), getattr(thing, kind))


def _ask_existence(things: list[Thing], rng: np.random.Generator) -> Question:
    thing, present = things[0], {(t.color, t.shape) for t in things}
    color, shape = thing.color, thing.shape
    truth = bool(rng.integers(2))
    while not truth and (color, shape) in present:  # half of the absent objects share a colour or a shape with one here
        near = int(rng.integers(4))
        color = thing.color if near == 0 else tuple(COLORS)[int(rng.integers(len(COLORS)))]
        shape = thing.shape if near == 1 else SHAPES[int(rng.integers(len(SHAPES)))]
    noun = f"{color} {shape}".strip()
    article = "an" if noun.startswith("orange") else "a"
    return Question("existence", f"is there {article} {noun}?", "yes" if truth else "no")


def _ask_relation(things: list[Thing], rng: np.random.Generator) -> Question | None:
    if len(things) < 2:
        return None
    first, second = things[:2]
    relations = _relations(first, second)
    axis, answer = relations[int(rng.integers(len(relations)))]
    names = f"the {first.color} {first.shape}", f"the {second.color} {second.shape}"
    choice = "to the left or to the right of" if axis == "x" else "above or below"
    return Question("relation", f"is {names[0]} {choice} {names[1]}?", answer)


def question_set(seed: int, split: str, count: int) -> Iterator[tuple[int, Scene, Question]]:
    """`count` questions, the types in turn, each with the index of its scene (several may share one scene)."""
    index, asked = 0, 0
    while asked < count:
        scene = make_scene(seed, split, index)
        rng = generator(seed, split, index, 2)
        for _ in range(2):
            kind = QUESTION_TYPES[asked % len(QUESTION_TYPES)]
            question = ask(scene, kind, rng)
            if question is None or asked == count:
                break
            yield index, scene, question
            asked += 1
        index += 1


def parse_caption(text: str) -> list[tuple[str, str, str, str]]:
    """Reads the captions of this world back: (size, colour, shape, position) of each object, "" where unsaid.

    Each shape word is an object; the size and colour words before it belong to it, and one right after "is" to the
    object before. A position belongs to the object before it or, where that has one or there is none, to the next one.
    Other words are passed over.
    """
    words = text.lower().replace(",", " ").replace(".", " ").replace(":", " ").split()
    objects: list[list[str]] = []
    ahead = ["", "", "", ""]
    for before, word, after in zip(["", *words], words, [*words[1:], ""], strict=False):
        if word in RADII or word in COLORS:
            field = int(word in COLORS)
            (objects[-1] if objects and before == "is" else ahead)[field] = word
        elif word in SHAPES:
            objects.append([*ahead[:2], word, ahead[3]])
            ahead = ["", "", "", ""]
        elif f"{word} {after}" in POSITIONS:
            (objects[-1] if objects and not objects[-1][3] else ahead)[3] = f"{word} {after}"
    return [tuple(f) for f in objects]
