"""Captions against scenes: an independent pairing of objects, and figures worked out by hand."""

from collections import Counter

import pytest

from vlkd_jax.evals.captions import f1, word_f1
from vlkd_jax.shapes import world
from vlkd_jax.shapes.suite import scene_match


def best_pairing(said, true):
    """Most attributes that agree when objects are paired one to one, by trying every choice for the first object."""
    if not said or not true:
        return 0
    first, rest = said[0], said[1:]
    best = best_pairing(rest, true)  # the first object stays alone
    for k, other in enumerate(true):
        agree = sum(bool(a) and a == b for a, b in zip(first, other, strict=True))
        best = max(best, agree + best_pairing(rest, true[:k] + true[k + 1 :]))
    return best


def tell(objects):
    """The text of (size, colour, shape, position) tuples, "" left out."""
    parts = (f"a {' '.join(one[:3])}" + (f" at {one[3]}" if one[3] else "") for one in objects)
    return " and ".join(parts)


def damaged(rng, scene):
    """Attributes as a poor caption would give them: some wrong, some left out, an object too many or too few."""
    things = []
    for thing in scene.things:
        size, color, shape, position = thing.attributes
        things.append(
            (
                str(rng.choice([size, "small", ""])),
                str(rng.choice([color, "red", ""])),
                str(rng.choice([shape, "ring"])),
                str(rng.choice([position, "top left", ""])),
            )
        )
    extra = int(rng.integers(-1, 3))
    things += [("large", "blue", "star", "")] * extra
    return things[1:] if extra < 0 else things


def test_scene_match_equals_brute_force(rng):
    for index in range(200):
        scene = world.make_scene(1, "test", index)
        said, true = damaged(rng, scene), [thing.attributes for thing in scene.things]
        exact, right, count, total = scene_match(tell(said), true)
        assert right == best_pairing(said, true)
        assert count == sum(bool(a) for one in said for a in one)
        assert total == 4 * len(true)
        assert exact == (Counter(said) == Counter(true))
        assert exact == (f1(right, count, total) == 1)


@pytest.mark.parametrize("seed", range(3))
def test_a_complete_caption_of_the_world_is_exact(seed):
    """In the forms that name an object before its place, as every caption does that begins with "a picture of"."""
    checked = 0
    for index in range(60):
        scene = world.make_scene(seed, "test", index)
        said = world.caption(scene, world.generator(seed, "test", index, 7), complete=1.0)
        if not said.startswith("at "):
            checked += 1
            assert scene_match(said, [t.attributes for t in scene.things]) == (True, *[4 * len(scene.things)] * 3)
    assert checked > 30


def test_order_does_not_matter_and_repetition_costs():
    scene = next(s for s in (world.make_scene(0, "test", i) for i in range(50)) if len(s.things) == 3)
    objects = [thing.attributes for thing in scene.things]
    assert scene_match(tell(objects[::-1]), objects) == (True, 12, 12, 12)
    assert scene_match(tell([*objects, objects[0]]), objects) == (False, 12, 16, 12)
    assert scene_match(tell([objects[0]] * 3), objects)[0] is False


def test_a_caption_without_objects():
    scene = world.make_scene(0, "test", 0)
    for text in ("", "nothing to see", "red large at top left"):
        assert scene_match(text, [t.attributes for t in scene.things]) == (False, 0, 0, 4 * len(scene.things))


def test_a_long_stammer_is_scored_and_not_exact():
    scene = world.make_scene(0, "test", 0)
    exact, right, said, total = scene_match("a ring " * 30, [t.attributes for t in scene.things])
    assert (exact, said, total) == (False, 30, 4 * len(scene.things))
    assert right <= len(scene.things)


def test_f1():
    assert f1(0, 0, 0) == f1(0, 4, 4) == 0
    assert f1(4, 4, 4) == 1
    assert f1(3, 4, 8) == pytest.approx(2 * (3 / 4) * (3 / 8) / (3 / 4 + 3 / 8))


def test_word_f1_takes_the_best_reference():
    assert word_f1("A red, round ball.", ["the red round ball"]) == 1
    assert word_f1("red red ball", ["red ball"]) == pytest.approx(2 * 2 / 5)
    assert word_f1("red ball", ["blue cube", "red cube"]) == pytest.approx(0.5)
    assert word_f1("", ["red ball"]) == 0
