"""The built-in world: a pure function of its seed, splits that keep to their pairs, right answers, true pictures."""

import itertools
import re
from collections import Counter

import numpy as np
import pytest

from vlkd_jax.shapes import world
from vlkd_jax.shapes.world import COLORS, HELD_OUT, POSITIONS, QUESTION_TYPES, SHAPES, SPLITS

COUNT = 400
FIELDS = ("size", "color", "shape", "position")


def scenes(split, count=COUNT, seed=0, twins=1):
    return [world.make_scene(seed, split, index, twins) for index in range(count)]


def attributes(scene):
    return {thing.attributes for thing in scene.things}


def everything(seed, split, index):
    """All that the world says of one index."""
    scene = world.make_scene(seed, split, index, twins=4)
    rng = world.generator(seed, split, index, 2)
    questions = [world.ask(scene, kind, rng) for kind in QUESTION_TYPES]
    return scene, world.render(scene).tobytes(), world.caption(scene, rng), questions


@pytest.mark.parametrize("split", SPLITS)
def test_all_is_a_function_of_the_seed(split):
    indices = range(24)
    forward = [everything(3, split, i) for i in indices]
    np.random.seed(1)  # nothing global matters
    backward = [everything(3, split, i) for i in reversed(indices)]
    assert forward == backward[::-1]
    others = [everything(4, split, i) for i in indices]
    assert not any(a[1] == b[1] for a, b in zip(forward, others))
    assert list(world.question_set(3, split, 30)) == list(world.question_set(3, split, 40))[:30]


def test_splits_differ():
    pictures = {split: {world.render(scene).tobytes() for scene in scenes(split, 100)} for split in SPLITS}
    assert all(len(views) == 100 for views in pictures.values())
    for a, b in itertools.combinations(SPLITS, 2):
        assert not pictures[a] & pictures[b]
        assert sum(x.things == y.things for x, y in zip(scenes(a, 100), scenes(b, 100))) == 0


def test_held_out_kinds():
    """Each attribute is seen in training, some kinds of object never; every test scene has one of these."""
    values = (tuple(world.RADII), tuple(COLORS), SHAPES)
    assert [set(column) for column in zip(*HELD_OUT)] == [set(v) for v in values]
    for split, twins in (("train", 1), ("train", 4), ("validation", 1)):
        seen = {t.attributes[:3] for scene in scenes(split, 1200, twins=twins) for t in scene.things}
        assert seen == set(itertools.product(*values)) - HELD_OUT
    tested = [{t.attributes[:3] for t in scene.things} & HELD_OUT for scene in scenes("test")]
    assert all(tested) and set().union(*tested) == HELD_OUT


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_are_well_formed(split):
    counts = set()
    for scene in scenes(split):
        counts.add(len(scene.things))
        places = [POSITIONS.index(t.position) for t in scene.things]
        assert places == sorted(set(places))
        assert len({(t.color, t.shape) for t in scene.things}) == len(scene.things)
        for t in scene.things:
            low, high = world.RADII[t.size]
            assert low <= t.radius <= high
            half = world.IMAGE_SIZE / 2
            left, top = half * ("right" in t.position), half * ("bottom" in t.position)
            assert left <= t.x - t.radius and t.x + t.radius <= left + half
            assert top <= t.y - t.radius and t.y + t.radius <= top + half
    assert counts == {1, 2, 3}


def test_twins_differ_in_one_change():
    changed = dict.fromkeys((*FIELDS, "places", "more", "less"), 0)
    drawn = scenes("train", COUNT, twins=4)
    for base, *others in (drawn[i : i + 4] for i in range(0, COUNT, 4)):
        for twin in others:
            old, new = set(base.things) - set(twin.things), set(twin.things) - set(base.things)
            if len(old) + len(new) == 1:
                changed["more" if new else "less"] += 1
                continue
            assert len(old) == len(new)
            if len(old) == 2:
                assert {t.attributes[:3] for t in old} == {t.attributes[:3] for t in new}
                assert {t.position for t in old} == {t.position for t in new}
                changed["places"] += 1
                continue
            (old,), (new,) = old, new
            fields = [field for field in FIELDS if getattr(old, field) != getattr(new, field)]
            assert len(fields) == 1
            changed[fields[0]] += 1
    assert min(changed.values()) > 20


def solve(scene, text):
    """The answer to a question, from the objects and where they are drawn; fails unless there is just one."""

    def only(candidates):
        assert len(candidates) == 1, (text, scene)
        return candidates[0]

    things, middle = scene.things, world.IMAGE_SIZE / 2

    def is_at(t, place):
        return place == f"{'top' if t.y < middle else 'bottom'} {'left' if t.x < middle else 'right'}"

    def named(words):
        color, shape = words.split()
        return only([t for t in things if t.color == color and t.shape == shape])

    if re.fullmatch(r"how many (objects|shapes|things) are there\?", text):
        return {1: "one", 2: "two", 3: "three"}[len(things)]
    if match := re.fullmatch(r"is there (an?) (\w+) (\w+)\?", text):
        assert (match[1] == "an") == (match[2] == "orange")
        return "yes" if any(t.color == match[2] and t.shape == match[3] for t in things) else "no"
    if match := re.fullmatch(r"what (color|shape) is the object at (.+)\?", text):
        return getattr(only([t for t in things if is_at(t, match[2])]), match[1])
    if match := re.fullmatch(r"what color is the (\w+)\?", text):
        return only([t.color for t in things if t.shape == match[1]])
    if match := re.fullmatch(r"what shape is the (\w+) object\?", text):
        return only([t.shape for t in things if t.color == match[1]])
    if match := re.fullmatch(r"what size is the (\w+ \w+)\?", text):
        return "small" if named(match[1]).radius < 11.5 else "large"
    if match := re.fullmatch(r"where is the (\w+ \w+)\?", text):
        return only([place for place in POSITIONS if is_at(named(match[1]), place)])
    if match := re.fullmatch(r"is the (\w+ \w+) to the left or to the right of the (\w+ \w+)\?", text):
        return "left" if named(match[1]).x < named(match[2]).x else "right"
    match = re.fullmatch(r"is the (\w+ \w+) above or below the (\w+ \w+)\?", text)
    return "above" if named(match[1]).y < named(match[2]).y else "below"


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_is_right(split):
    answers = {kind: [] for kind in QUESTION_TYPES}
    for index, scene in enumerate(scenes(split)):
        rng = world.generator(0, split, index, 9)
        for kind in QUESTION_TYPES:
            question = world.ask(scene, kind, rng)
            if question is None:
                continue
            assert question.kind == kind and question.answer == solve(scene, question.question)
            answers[kind].append(question.answer)
    for kind, said in answers.items():  # no type is rare, and none can be answered with one word
        assert len(said) > COUNT / 2, kind
        assert max(said.count(a) for a in set(said)) < 0.65 * len(said), kind


def test_question_set():
    assert len(QUESTION_TYPES) >= 6
    asked = list(world.question_set(0, "test", 350))
    assert len(asked) == 350
    kinds = [question.kind for _, _, question in asked]
    assert kinds == list(itertools.islice(itertools.cycle(QUESTION_TYPES), 350))
    for index, scene, question in asked:
        assert scene == world.make_scene(0, "test", index)
        assert question.answer == solve(scene, question.question)
    answers = [question.answer for _, _, question in asked if question.kind == "existence"]
    assert 0.25 < answers.count("yes") / len(answers) < 0.75


NOUN = r"an? (?:(small|large) )?(\w+) (circle|square|triangle|star|cross|ring)"
STATED = (
    (r"the (\w+) is (\w+)", ("shape", "color")),
    (r"the (\w+) (\w+) is (small|large)", ("color", "shape", "size")),
    (r"the (\w+) (\w+) is at (.+)", ("color", "shape", "position")),
    (r"the (\w+) object is a (\w+)", ("color", "shape")),
)


def claims(text):
    """What a caption says of single objects: a list of {field: value}."""
    if text.startswith("the "):
        clauses = [clause for part in text.split(" and ") for clause in part.split(", ")]
        return [
            dict(zip(fields, match.groups()))
            for clause in clauses
            for match, fields in ((re.fullmatch(form, clause), fields) for form, fields in STATED)
            if match
        ]
    if text.startswith("at "):
        stated = re.findall(r"at (\w+ \w+) " + NOUN, text)
        return [dict(zip(("position", "size", "color", "shape"), values)) for values in stated]
    return [dict(zip(("size", "color", "shape"), values)) for values in re.findall(NOUN, text)]


def test_captions_say_nothing_false():
    styles = set()
    for index, scene in enumerate(scenes("train", 1500)):
        text = world.caption(scene, world.generator(0, "train", index, 3))
        said = claims(text)
        styles.add((text.split()[0], " is " in text, ":" in text))
        assert said, text
        for claim in said:
            true = [t for t in scene.things if all(getattr(t, k) == v for k, v in claim.items() if v)]
            assert true, (text, claim)
        if count := re.match("there (?:is|are) (one|two|three) ", text):
            assert world.COUNTS.index(count[1]) + 1 == len(scene.things)
        related = re.match(rf"{NOUN} is (above|below|to the left of|to the right of) {NOUN}", text)
        if related:
            groups = related.groups()
            first, second = (
                next(t for t in scene.things if (t.color, t.shape) == pair) for pair in (groups[1:3], groups[5:7])
            )
            gap = second.y - first.y if groups[3] in ("above", "below") else second.x - first.x
            assert (gap > 0) == (groups[3] in ("above", "to the left of"))
        assert "?" not in text and not {"question", "answer", "yes", "no"} & set(re.findall(r"\w+", text))
    assert {first for first, _, _ in styles} == {"a", "an", "at", "the", "there"}


def test_captions_read_back():
    """Captions that begin "a picture of" name every attribute in reading order."""
    whole = 0
    for index, scene in enumerate(scenes("train", 1000)):
        text = world.caption(scene, world.generator(0, "train", index, 3))
        if text.startswith("a picture of"):
            whole += 1
            assert world.parse_caption(text) == [t.attributes for t in scene.things], text
    assert 200 < whole < 400


def test_complete_captions_name_every_attribute():
    for index, scene in enumerate(scenes("validation")):
        text = world.caption(scene, world.generator(0, "validation", index, 3), complete=1.0)
        words = re.findall(r"\w+", text)
        for t in scene.things:
            assert {t.size, t.color, t.shape} <= set(words) and t.position in text, text
        assert sum(word in SHAPES for word in words) == len(scene.things)
        assert Counter(world.parse_caption(text)) == Counter(t.attributes for t in scene.things), text


def test_parse_caption_passes_over_other_words():
    assert world.parse_caption("A large red circle at TOP left, and: two dogs.") == [
        ("large", "red", "circle", "top left")
    ]
    assert world.parse_caption("a blue thing and a star bottom right") == [("", "blue", "star", "bottom right")]
    assert world.parse_caption("a white ring above a cross") == [("", "white", "ring", ""), ("", "", "cross", "")]
    assert world.parse_caption("the red ring is small and the star is blue") == [
        ("small", "red", "ring", ""),
        ("", "blue", "star", ""),
    ]
    assert world.parse_caption("") == world.parse_caption("top left circus") == []


@pytest.mark.parametrize("split", SPLITS)
def test_pictures_show_the_objects(split):
    """The colour at each object's centre (on the band, for a ring) is its own, and around it lies the dark ground."""
    assert world.IMAGE_SIZE >= 64
    for scene in scenes(split, 150):
        picture = world.render(scene).astype(float)
        assert picture.shape == (world.IMAGE_SIZE, world.IMAGE_SIZE, 3)
        for t in scene.things:
            x = t.x + (0.74 * t.radius if t.shape == "ring" else 0)
            shade = picture[int(t.y), int(x)]
            distances = {name: np.abs(shade - color).max() for name, color in COLORS.items()}
            assert min(distances, key=distances.get) == t.color and distances[t.color] < 40
            corner = picture[int(t.y - t.radius * 0.98), int(t.x - t.radius * 0.98)]
            if t.shape in ("circle", "ring", "cross", "star", "triangle"):
                assert corner.max() < 90
            if t.shape == "ring":
                assert picture[int(t.y), int(t.x)].max() < 90
        empty = set(POSITIONS) - {t.position for t in scene.things}
        half = world.IMAGE_SIZE // 2
        for place in empty:
            # the tip of a triangle, 1.1 radii high, may touch the line
            rows = slice(half + 1, None) if "bottom" in place else slice(half - 1)
            columns = slice(half + 1, None) if "right" in place else slice(half - 1)
            assert picture[rows, columns].max() < 90


def test_shapes_are_drawn_in_their_proportions():
    """Areas in units of radius squared, each shape's own; small and large objects can be told apart."""
    expected = {"circle": np.pi, "square": 2.82, "cross": 2.04, "ring": np.pi * (0.98**2 - 0.5**2)}
    for shape in SHAPES:
        areas = {}
        for size, radius in (("small", 8.0), ("large", 16.0)):
            thing = world.Thing(shape, "white", size, "top left", 18.0, 18.0, radius)
            picture = world.render(world.Scene((thing,), 0)).astype(float)
            ground = picture[60:, 60:].mean()
            areas[size] = ((picture.mean(-1) - ground) / (240 - ground)).sum()
            if shape in expected:
                assert abs(areas[size] / radius**2 - expected[shape]) < 0.35
        assert 3.3 < areas["large"] / areas["small"] < 4.8
