"""Evaluation suites by name: `--config=suites:shapes,vqav2`; any field can be overridden.

Prompts: the encoder reads the one with `<mask>`, the decoder is forced through the other; what it adds is the answer.
"""

from ml_collections import ConfigDict

from vlkd_jax.errors import UserError

QUESTION = {
    "question_encoder": "question: {question} answer: <mask>",
    "question_decoder": "question: {question} answer:",
    "answer_tokens": 10,  # new tokens at most, </s> included
}
CAPTION = {
    "caption_encoder": "a picture of <mask>",
    "caption_decoder": "a picture of",
    "caption_tokens": 20,
}
SHAPES = {
    "kind": "shapes",
    "seed": 0,
    "questions": 1400,
    "captions": 400,
    "retrieval": 500,  # scenes; duplicates among them are dropped
    "text_questions": 1050,
    "baselines": True,  # also the student before distillation, the blind one and the most frequent answers
    **QUESTION,
    **CAPTION,
    "caption_encoder": "<mask>",  # behind words one mask stands for a short span: captions would end early
    "caption_tokens": 32,
}
SUITES = {
    # every scene holds an object whose size, colour and shape no training scene has together
    "shapes": {**SHAPES, "split": "test"},
    # new scenes; every object is of a kind that training scenes have
    "shapes_seen": {**SHAPES, "split": "test_seen"},
    "vqav2": {
        "kind": "vqa",
        "questions": "",  # official questions JSON
        "annotations": "",  # official annotations JSON; none: answered without a score
        "metric": "vqa_accuracy",  # of ten human answers; exact_match: right if it is one of the answers, however many
        "images": "",  # folder of the pictures
        "image_name": "{image_id:012d}.jpg",  # the official sets: COCO_val2014_{image_id:012d}.jpg
        "max_unusable": 0.0,  # share of pictures that may be missing or damaged; theirs is left out of the score
        **QUESTION,
    },
    "coco_caption": {
        "kind": "caption",
        "captions": "",  # as data.captions; a COCO file may have images alone; none: every picture of the folder
        "images": "",
        "max_unusable": 0.0,
        **CAPTION,
    },
}


def get_config(names: str = "shapes") -> ConfigDict:
    unknown = [name for name in names.split(",") if name not in SUITES]
    if unknown:
        raise UserError(f"unknown suite {unknown[0]!r}; there are {', '.join(SUITES)}")
    chosen = {name: {**SUITES[name], "name": name} for name in names.split(",")}
    mesh = {"data": -1, "fsdp": 1, "model": 1, "slices": 1}  # devices along each axis, as in configs/base.py
    return ConfigDict({"suites": tuple(chosen), "batch_size": 64, "mesh": mesh, **chosen})
