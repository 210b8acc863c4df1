"""Pictures that evaluation and training share: exact and near ones, against a search over all pairs."""

import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from tiny import command_line

from vlkd_jax.data import leakage
from vlkd_jax.data.inputs import Columns
from vlkd_jax.data.prepare import Options, prepare
from vlkd_jax.errors import UserError


def scene(seed: int) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((160, 120), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, quality: int = 95) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def data_set(directory, pictures: list[tuple[bytes, str]]):
    """A prepared directory of these pairs."""
    directory.mkdir()
    lines = []
    for number, (data, caption) in enumerate(pictures):
        (directory / f"{number}.jpg").write_bytes(data)
        lines.append(json.dumps({"image": f"{number}.jpg", "caption": caption}))
    (directory / "pairs.jsonl").write_text("\n".join(lines))
    columns = Columns(images=str(directory))
    prepare(directory / "pairs.jsonl", directory / "data", columns, Options(rows=7), workers=1)
    return directory / "data"


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Of 12 evaluation pictures two are in training as they are, three made smaller, lighter or compressed anew."""
    root = tmp_path_factory.mktemp("leakage")
    seen = [jpeg(scene(k)) for k in range(5)]
    changed = [
        jpeg(scene(2).resize((80, 60))),
        jpeg(scene(3).point(lambda value: min(255, value + 12))),
        jpeg(scene(4), quality=40),
    ]
    train = [
        *((jpeg(scene(100 + k)), f"other {k}") for k in range(20)),
        *zip(seen[:2], ("a", "b")),
        *zip(changed, "cde"),
    ]
    evaluation = [*zip(seen, ("x <b>", "b", "y", "z", "w")), *((jpeg(scene(200 + k)), f"mine {k}") for k in range(7))]
    return data_set(root / "train", train), data_set(root / "eval", evaluation)


def test_exact_and_near_ones_are_found(sets):
    told, leaks = leakage.find(*sets, distance=4)
    assert (told["train"], told["eval"], told["exact"], told["near"]) == (25, 12, 2, 3)
    assert told["eval_captions_seen"] == 1
    assert [(leak["eval_record"], leak["train_record"], leak["kind"]) for leak in leaks] == [
        *[(0, 20, "exact"), (1, 21, "exact"), (2, 22, "near"), (3, 23, "near"), (4, 24, "near")]
    ]
    assert all(leak["distance"] <= 4 and "pairs.jsonl row" in leak["train"] for leak in leaks)


@pytest.mark.parametrize("distance", [0, 1, 4, 8])
def test_the_search_finds_what_all_pairs_show(distance):
    rng = np.random.default_rng(distance)
    hashes = rng.integers(0, 2**64, 300, dtype=np.uint64)
    flips = [sum(1 << int(b) for b in rng.choice(64, rng.integers(0, 11), replace=False)) for _ in range(400)]
    others = np.array([int(hashes[rng.integers(300)]) ^ flip for flip in flips], np.uint64)
    bits = np.bitwise_count(others[:, None] ^ hashes[None])
    wanted = {(int(a), int(b), int(bits[a, b])) for a, b in zip(*np.nonzero(bits <= distance))}
    assert set(leakage._Bands(hashes, distance).near(others)) == wanted and len(wanted) > 20


def test_the_command_and_its_page(sets, tmp_path):
    train, evaluation = sets
    argv = [f"--train={train}", f"--eval={evaluation}", f"--output={tmp_path / 'out'}"]
    result = command_line("data.leakage", argv)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(
        "of 12 evaluation pictures 2 are in training as the same file, 3 nearly; 1 captions;"
    )
    text = (tmp_path / "out" / "index.html").read_text()
    assert text.count("data:image/jpeg;base64,") == 10 and "x &lt;b&gt;" in text and "<script" not in text
    assert "5 of 12 evaluation pictures are in training" in text and not re.search(r"(src|href)='?\"?https?:", text)
    leaks = [json.loads(line) for line in (tmp_path / "out" / "leaks.jsonl").read_text().splitlines()]
    assert len(leaks) == 5 and json.loads((tmp_path / "out" / "leakage.json").read_text())["near"] == 3
    told = command_line("data.leakage", [*argv, "--json", "--distance=0"])
    assert json.loads(told.stdout)["near"] <= 3


def test_none_and_mistakes(sets, tmp_path):
    told, leaks = leakage.find(sets[0], sets[0], 2)
    assert told["exact"] == told["eval"] == 25 and {leak["kind"] for leak in leaks} == {"exact"}
    with pytest.raises(UserError, match=r"no manifest\.json with hashes\.jsonl in it"):
        leakage.find(tmp_path, sets[1], 2)
    for name in ("manifest.json", "hashes.jsonl"):
        (tmp_path / name).write_text("{}\n")
    with pytest.raises(UserError, match="not as vlkd prepare writes it"):
        leakage.find(tmp_path, sets[1], 2)
