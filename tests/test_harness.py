"""lmms-eval finds a student by its entry point and drives it by its own interface."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import environment

DRIVEN = """
import json
from lmms_eval.api.instance import Instance
from lmms_eval.models import get_model
from PIL import Image
from vlkd_jax import VLKD
from vlkd_jax.errors import UserError
from vlkd_jax.shapes import world

DOCUMENTS = [
    {"image": Image.fromarray(world.render(scene)), "question": question.question, "answer": question.answer}
    for _, scene, question in world.question_set(9, "test", 14)
]
visual = lambda document: [document["image"]]

def request(kind, number, context, second, task="vqav2_val", pictures=visual):
    metadata = {"task": task, "doc_id": number, "repeats": 1}
    return Instance(kind, (context, second, pictures, number, task, "test"), 0, metadata=metadata)

Model = get_model("vlkd")
model = Model.create_from_arg_string("", {"batch_size": "4", "max_batch_size": None, "device": "cpu"})
tasks = ("vqav2_val", "coco2014_cap_val")
model.task_dict = {task: {"test": DOCUMENTS} for task in tasks}
greedy = {"max_new_tokens": 16, "temperature": 0, "do_sample": False, "until": ["\\n\\n"]}
beam = {"max_new_tokens": 1024, "num_beams": 3, "until": [" at"]}
ask = "\\nAnswer the question using a single word or phrase."
requests = [request("generate_until", k, d["question"] + ask, greedy) for k, d in enumerate(DOCUMENTS)]
captions = [request("generate_until", k, "Describe it.", beam, tasks[1]) for k in range(5)]
mixed = [*requests[:7], *captions, *requests[7:]]
said = model.generate_until(mixed)
student = VLKD.from_pretrained()
images, questions = ([d[name] for d in DOCUMENTS] for name in ("image", "question"))
expected = student.answer(images, questions, max_new_tokens=16)
described = [text.split(" at")[0] for text in student.caption(images[:5], method="beam", beams=3, max_new_tokens=32)]
assert said == [*expected[:7], *described, *expected[7:]] and len(set(said)) > 8

likely = model.loglikelihood(
    [request("loglikelihood", 0, questions[0], text) for text in (expected[0], "purple ring", lambda d: d["answer"])]
)
scored = {s.text: s.score for s in student.rank(images[0], [expected[0], "purple ring"], questions[0])}
assert abs(likely[0][0] - scored[expected[0]]) < 1e-3 and abs(likely[1][0] - scored["purple ring"]) < 1e-3
assert [greedily for _, greedily in likely[:2]] == [True, False] and likely[0][0] > likely[1][0]

def refused(call, *arguments):
    try:
        call(*arguments)
    except UserError as e:
        return str(e)

two = request("generate_until", 1, "what?", greedy, pictures=lambda d: [d["image"]] * 2)
print(json.dumps({
    "class": f"{Model.__module__}.{Model.__name__}", "simple": Model.is_simple,
    "two": refused(model.generate_until, [two]),
    "alone": refused(model.loglikelihood, [Instance("loglikelihood", ("", "red"), 0, metadata=two.metadata)]),
    "rounds": refused(model.generate_until_multi_round, []),
    "whole": Model(whole_context=True)._question("a\\nb"),
}))
"""


def run(code, place):
    """With the installed package, whose entry point counts: a checkout on the path would hide it."""
    settings = environment() | {"PYTHONPATH": str(Path(sys.prefix) / "lmms-eval")}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=settings, cwd=place)


def test_the_harness_drives_a_student(tmp_path):
    done = run(DRIVEN, tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["class"], told["simple"]) == ("vlkd_jax.use.harness.VLKDModel", True)
    assert told["two"] == "vqav2_val, document 1: 2 pictures or videos; vlkd reads one picture"
    assert "has none" in told["alone"] and "several rounds" in told["rounds"] and told["whole"] == "a\nb"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {}),
        ({"max_new_tokens": 5, "temperature": 0, "top_p": None, "num_beams": 1}, {"max_new_tokens": 5}),
        ({"num_beams": 4, "length_penalty": 0.5}, {"method": "beam", "beams": 4, "length_penalty": 0.5}),
        ({"do_sample": True, "temperature": 0.7, "top_p": 0.9}, {"method": "sample", "temperature": 0.7, "top_p": 0.9}),
        ({"do_sample": True, "temperature": 0}, {}),
    ],
)
def test_options(given, expected, tmp_path):
    code = f"from vlkd_jax.use.harness import decoding_options; print(decoding_options({given}) == {expected})"
    done = run(code, tmp_path)
    assert done.stdout.splitlines()[-1:] == ["True"], done.stderr
