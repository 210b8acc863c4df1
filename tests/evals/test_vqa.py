"""VQA accuracy and the official normaliser, against cases worked out by hand and an independent leave-one-out count."""

import numpy as np
import pytest

from vlkd_jax.evals.vqa import accuracy, exact_match, normalize_answer, plain


@pytest.mark.parametrize(
    ("answer", "humans", "expected"),
    [
        ("two", ["2"] * 10, 0),  # ten equal answers: nothing is normalised
        ("t-shirt", ["t-shirt"] * 10, 1),
        ("yes.", ["yes"] * 10, 0),
        ("Yes", ["yes"] * 10, 0),
        ("\tyes\n", ["yes"] * 10, 1),
        ("red\tand\nblue", ["red and blue"] * 10, 1),
        ("red and blue", ["red\tand\nblue"] * 10, 1),
        ("two", ["2"] * 9 + ["3"], 1),  # they differ: everything is normalised
        ("beach", ["the beach"] * 5 + ["beach"] * 3 + ["sand"] * 2, 1),
        ("yes", ["yes"] * 4 + ["no"] * 6, 1),
        ("yes", ["yes"] * 3 + ["no"] * 7, 0.9),
        ("yes", ["yes"] * 2 + ["no"] * 8, 0.6),
        ("yes", ["yes"] + ["no"] * 9, 0.3),
        ("maybe", ["yes"] * 5 + ["no"] * 5, 0),
        ("", ["", "", "", "no", "no", "no", "no", "no", "no", "no"], 0.9),
    ],
)
def test_accuracy_by_hand(answer, humans, expected):
    assert accuracy(answer, humans) == pytest.approx(expected, abs=1e-12)


def test_accuracy_is_the_mean_over_ten_humans_left_out(rng):
    words = ["cat", "dog", "bird", "fish"]
    for _ in range(300):
        humans = [str(w) for w in rng.choice(words[: int(rng.integers(1, 5))], 10)]
        answer = str(rng.choice(words))
        scores = []
        for left_out in range(10):
            others = humans[:left_out] + humans[left_out + 1 :]
            scores.append(min(1.0, sum(other == answer for other in others) / 3))
        assert accuracy(answer, humans) == pytest.approx(np.mean(scores), abs=1e-12)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The dog.", "dog"),
        ("a cat and an apple", "cat and apple"),
        ("two dogs", "2 dogs"),
        ("none", "0"),
        ("Zero", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("t-shirt", "t shirt"),  # no space beside it: a space in its place
        ("t- shirt", "t shirt"),  # a space beside it: dropped
        ("t-shirt pre- war", "tshirt pre war"),  # then it is dropped wherever it stands
        ("t-shirt -5", "tshirt 5"),
        ("t-shirt pre-\nwar", "tshirt pre war"),  # a line's end and a tab are spaces
        ("t-shirt pre-\twar", "tshirt pre war"),
        ("yes,no", "yes no"),
        ("yes, no", "yes no"),
        ("1,000", "1000"),
        ("1,000-mile", "1000mile"),  # a comma between digits: every mark is dropped, wherever it stands
        ("1.5", "1.5"),
        (".5", ".5"),
        ("3. 5", "3 5"),
        ("p.m.", "pm"),
        ("who?!", "who"),
        ('"stop"', "stop"),
        ("50%", "50%"),
        ("man's hat", "man's hat"),
        ("dont", "don't"),
        ("wouldnt've", "wouldn't've"),
        ("wouldn'tve", "wouldn't've"),
        ("wouldntve", "wouldntve"),
        ("lets", "lets"),
        ("cold've", "cold've"),  # another letter than the apostrophe is not put back
        ("somebody'd", "somebodyd"),
        ("ow's'at", "'ow's'at"),
        ("Im", "im"),
        (" red\nand\tblue ", "red and blue"),
        ("." * 33 + "x", ".x"),  # the official script takes away 32 full stops at most
        ("", ""),
    ],
)
def test_normalize_answer(text, expected):
    assert normalize_answer(text) == expected


def test_number_words():
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    assert [normalize_answer(word) for word in words] == [str(k) for k in range(11)]


def test_marks_are_spaces_and_the_others_stay():
    """Of ASCII; full stops have their own rule."""
    marks = ';/[]"{}()=+\\_-><@`,?!'
    for code in set(range(ord("!"), 127)) - {ord(".")}:
        mark = chr(code)
        assert normalize_answer(f"x{mark}y") == ("x y" if mark in marks else f"x{mark}y".lower())


def test_exact_match_passes_over_case_punctuation_and_articles():
    assert exact_match(" The top-left. ", "top left")
    assert not exact_match("top left corner", "top left")
    assert not exact_match("", "no")
    assert plain("It's a Ring!") == "it s ring"
