"""Evaluation suites by name: `--config=suites:shapes,vqav2`; any field can be overridden.

Files have their official names and lie below `--config.root=DIR`. A path in a suite is taken below that root unless it
is absolute, and `{split}` in it becomes the suite's `split`.

Prompts: the encoder reads the one with `<mask>`, the decoder is forced through the other; what it adds is the answer.
"""

from ml_collections import ConfigDict

from vlkd_jax.configs import base
from vlkd_jax.data.glue import GLUE
from vlkd_jax.errors import UserError

DECODING = {  # see vlkd_jax/decoding/options.py
    "method": "greedy",  # or beam, sample
    "min_new_tokens": 0,
    "no_repeat_ngram": 0,
    "returns": 1,
    "beams": 5,  # of beam search, as the next two
    "length_penalty": 1.0,
    "early_stopping": False,
    "temperature": 1.0,  # of sampling, as the next three
    "top_k": 0,
    "top_p": 1.0,
    "seed": 0,
}
QUESTION = {
    "question_encoder": base.PROMPTS["question_encoder"],
    "question_decoder": base.PROMPTS["question_decoder"],
    "answer_tokens": 10,  # new tokens at most, </s> included
}
CAPTION = {
    "caption_encoder": base.PROMPTS["caption_encoder"],
    "caption_decoder": base.PROMPTS["caption_decoder"],
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
    "decoding": DECODING,
    "caption_encoder": "<mask>",  # behind words one mask stands for a short span: captions would end early
    "caption_tokens": 32,
}
PICTURES = {
    "root": "",  # config.root, where the suite is not given its own
    "max_unusable": 0.0,  # share of pictures that may be missing or damaged; with more it is an error
    "unusable": "left_out",  # these pictures are counted and left out of the score; miss: counted, and score 0
}
RECORDS = {"records": "none"}  # of vlkd prepare-suite: texts and pictures, instead of the files and folders named below
VQA = {
    "kind": "vqa",
    **PICTURES,
    **RECORDS,
    # names of pictures; of several with | between, the one that fits most of the folder
    "image_name": "COCO_{split}_{image_id:012d}.jpg|{image_id:012d}.jpg",
    "metric": "vqa_accuracy",  # of ten human answers; exact_match: right if it is one of the answers, however many
    "answer_field": "answer",  # of each human answer; OK-VQA also has raw_answer, as it was typed
    "answers_needed": 10,  # by vqa_accuracy, of every question; below 10 (4 at least) fewer are scored, and counted
    "answers": "none",  # generated; or candidates to choose from: a file, one a line, a JSON list, or annotations
    "answers_top": 3000,  # of annotations (of a training set!) so many of the most frequent answers
    **QUESTION,
    "decoding": DECODING,
}
CAPTIONS = {
    "kind": "caption",
    **PICTURES,
    **RECORDS,
    "metric": "coco",  # BLEU, ROUGE-L and CIDEr-D as the COCO tools count them; beside them word_f1
    **CAPTION,
    "decoding": {**DECODING, "method": "beam"},
}
RETRIEVAL = {
    "kind": "retrieval",
    **PICTURES,
    **RECORDS,
    "metric": "recall",  # at 1, 5 and 10, in both directions
    "captions_each": 5,  # the first of each picture's; 0: all
    "text_template": "{caption}",  # what the text tower reads
}
KARPATHY_COCO = {"split": "test", "captions": "dataset_coco.json", "images": "."}
KARPATHY_FLICKR30K = {"split": "test", "captions": "dataset_flickr30k.json", "images": "flickr30k-images"}
SUITES = {
    # every scene holds an object whose size, colour and shape no training scene has together
    "shapes": {**SHAPES, "split": "test"},
    # new scenes; every object is of a kind that training scenes have
    "shapes_seen": {**SHAPES, "split": "test_seen"},
    "vqav2": {
        **VQA,
        "split": "val2014",
        "questions": "v2_OpenEnded_mscoco_{split}_questions.json",
        "annotations": "v2_mscoco_{split}_annotations.json",  # none: answered without a score
        "images": "{split}",  # folder of the pictures
    },
    "vqav2_test_dev": {
        **VQA,
        "split": "test-dev2015",
        "questions": "v2_OpenEnded_mscoco_{split}_questions.json",
        "annotations": "none",
        "images": "test2015",
        "image_name": "COCO_test2015_{image_id:012d}.jpg|{image_id:012d}.jpg",
    },
    "okvqa": {
        **VQA,
        "split": "val2014",
        "questions": "OpenEnded_mscoco_{split}_questions.json",
        "annotations": "mscoco_{split}_annotations.json",
        "images": "{split}",
    },
    # captions: Karpathy's splits, or a file as data.captions; a COCO file may have images alone; none: every picture
    "coco_caption": {**CAPTIONS, **KARPATHY_COCO},  # pictures lie in val2014 and train2014 below `images`
    "flickr30k_caption": {**CAPTIONS, **KARPATHY_FLICKR30K},
    "nocaps": {**CAPTIONS, "split": "val", "captions": "nocaps_{split}_4500_captions.json", "images": "nocaps_{split}"},
    "coco_retrieval": {**RETRIEVAL, **KARPATHY_COCO},
    "flickr30k_retrieval": {**RETRIEVAL, **KARPATHY_FLICKR30K},
    "imagenet_zeroshot": {
        "kind": "classification",
        **PICTURES,
        "split": "val",
        "images": "{split}",  # a folder for each class, or all in one as `labels` says
        "labels": "LOC_{split}_solution.csv",  # read if there are no folders in `images`
        # names of the folders: a line `FOLDER NAME, ...` each, JSON {FOLDER: NAME} or a list in the order of the
        # folders; none: their own names
        "classes": "LOC_synset_mapping.txt",
        "metric": "accuracy",  # top 1 and top 5, and the mean over classes
        "image_name": "{image_id}.JPEG",  # of the pictures in `labels`
        "templates": (  # CLIP's published choice of seven; the embedding of a class is their mean
            "itap of a {name}.",
            "a bad photo of the {name}.",
            "a origami {name}.",
            "a photo of the large {name}.",
            "a {name} in a video game.",
            "art of the {name}.",
            "a photo of the small {name}.",
        ),
    },
    **{
        f"glue_{name}": {
            "kind": "glue",
            "root": "",
            "task": name,
            "split": task.validation[0],  # of MNLI also dev_mismatched
            "labelled": True,  # False: of a test set, which is answered without a score
            "rows": f"{task.folder}/{{split}}.tsv",  # or that with .gz
            "metric": "glue",
        }
        for name, task in GLUE.items()
    },
    "xsum": {
        "kind": "summary",
        "root": "",
        "split": "test",
        # one a line, or .jsonl, .parquet with the column document; cut to what the encoder has positions for
        "documents": "{split}.source",
        "summaries": "{split}.target",  # likewise, with the column summary; none: written without a score
        "metric": "rouge",
        "summary_encoder": "{document}",
        "summary_decoder": "",
        "summary_tokens": 60,
        "decoding": {  # BART's for XSum (Lewis et al. 2020)
            **DECODING,
            "method": "beam",
            "beams": 6,
            "early_stopping": True,
            "min_new_tokens": 9,  # 10 with `<s>`, as it is counted there
            "no_repeat_ngram": 3,
        },
    },
}


def get_config(names: str = "shapes") -> ConfigDict:
    unknown = [name for name in names.split(",") if name not in SUITES]
    if unknown:
        raise UserError(f"unknown suite {unknown[0]!r}; there are {', '.join(SUITES)}")
    # prompts: a JSON list of {"name": ..., template fields of the suite}; each is run and reported as SUITE/NAME
    chosen = {name: {**SUITES[name], "name": name, "prompts": "none"} for name in names.split(",")}
    config = ConfigDict(
        {
            "suites": tuple(chosen),
            "root": ".",  # the folder that the files of all suites lie below
            "tower": "student",  # whose embeddings of texts retrieval and classification use; clip: the teacher's
            "batch_size": 64,
            "mesh": {"data": -1, "fsdp": 1, "model": 1, "slices": 1},  # devices along each axis, as in configs/base.py
            **chosen,
        }
    )
    for name in chosen:
        if "root" in chosen[name]:
            config[name].root = config.get_oneway_ref("root")
    return config
