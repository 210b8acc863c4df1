"""Every field a run can have, with its default. The other files in this folder override some of them."""

from ml_collections import ConfigDict

PROMPTS = {
    "question_encoder": "question: {question} answer: <mask>",
    "question_decoder": "question: {question} answer:",
    "caption_encoder": "a picture of <mask>",
    "caption_decoder": "a picture of",
}


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "objective": "vlkd",  # vlkd | clip_contrastive | bart_denoise | classify | summarize | caption | answer
            "clip": "",  # Hugging Face directory or builtin:shapes/clip; the teacher, or what clip_contrastive trains
            "bart": "",  # Hugging Face directory or builtin:shapes/bart; where the student or bart_denoise starts
            "start": "",  # caption, answer: the export that they fine-tune, or builtin:shapes/student
            "seed": 0,  # of the data's order (shapes: of the scenes), the corruption, the dropout and the two linears
            "steps": 1000,
            "batch_size": 64,  # global: pairs (or texts) an optimizer step
            "accumulate": 1,  # parts of a batch computed one after the other: less memory, one more forward pass
            "dtype": "float32",  # of activations: float32 | bfloat16; parameters stay float32
            "dropout": 0.0,  # BART's; replaces the value in its config.json
            "remat": False,  # recompute layers in the backward pass: less memory, more time
            "remat_policy": "nothing",  # what is kept of a layer nevertheless: nothing | dots (its matrix products)
            "data": {
                "source": "shapes",  # shapes | shapes_texts | folder | tfds | glue | documents | questions
                "captions": "",  # folder: COCO captions .json, or .jsonl (image, caption), or .tsv (image<TAB>caption)
                "images": "",  # folder, questions: where the images lie
                # tfds: record files, as vlkd prepare writes them; with weights several: DIR,DIR
                # glue: the folder of one task, glue/RTE; documents: that of train.jsonl, .parquet or .source
                "directory": "",
                "task": "rte",  # glue: cola | sst2 | mrpc | stsb | qqp | mnli | qnli | rte | wnli
                "questions": "",  # questions: VQA v2's file of questions, or one like it
                "annotations": "",  # questions: the file of their answers, of which the most frequent is learned
                "image_name": "COCO_train2014_{image_id:012d}.jpg",  # questions: of a picture
                "examples": 0,  # so many records to train on, of classes so many of each (few-shot); 0: all
                "weights": (),  # tfds: of each directory its share of what is drawn, in any unit: 3,1
                "split": "train[1%:]",  # tfds: what is trained on, in tensorflow-datasets' terms
                "validation_split": "train[:1%]",  # tfds: what is held out
                # one image (or document) in so many is held out, with all its captions, where there is no other split
                "validation_every": 20,
                "teacher_cache": "",  # from vlkd cache-teacher, instead of decoding pictures and running the teacher
                # texts for loss.denoise and retention: a file (a text a line), shapes_texts, captions (or empty)
                "replay": "",
                "twins": 1,  # shapes: runs of so many scenes that differ in one attribute (hard negatives)
                "complete": 0.0,  # shapes: chance that a caption must name every attribute (most do anyway)
                "smallest_crop": 1.0,  # least share of a picture's area in a random part of it; 1: always the middle
                "flip": False,  # mirror every second picture; captions say left and right
                "text_length": 64,  # tokens of a clean caption, <s> and </s> included
                "source_length": 64,  # tokens of a corrupted one
                "context_length": 0,  # tokens of a text-only record's context (shapes_texts); 0: none
                "replay_length": 64,  # tokens of a corrupted text-only record beside the pairs (replay, retention)
                "truncate": False,  # cut captions that are too long; otherwise they cannot be used
                "max_unusable": 0.01,  # share of records that may be bad: they are passed over; more end the run
                "threads": 2,  # that read, decode and tokenise ahead, in this process or in each worker
                "workers": 0,  # processes for that; 0: none but this one
            },
            "corruption": {  # BART's text infilling
                "ratio": 0.3,  # share of a caption's tokens that is masked
                "poisson": 3.0,  # mean span length
                "mask_all": 0.15,  # chance that the whole caption becomes one mask
            },
            "student": {
                "image_tokens": "projected",  # projected (N x E) | hidden | penultimate (N x CLIP's width) | pooled
                "whiten": 0,  # images at the start that set a fixed whitening of these tokens; 0: none
                "sentence_position": "eos",  # eos | bos: the encoder state that stands for the sentence
                "logit_scale": "learned",  # learned (from 1/0.07) | clip (CLIP's own, frozen)
                "ttdm": "normalised",  # normalised | raw: vectors whose distance TTDM takes
            },
            "loss": {  # weights
                "ttdm": 1.0,
                "itcl": 1.0,
                "icti": 1.0,
                "denoise": 0.0,  # text-only denoising of data.replay
                "label_smoothing": 0.0,  # summarize, caption, answer: share of a target that all tokens have alike
                "l2": 0.0,  # pull of BART's parameters towards their start: half the squared distance
            },
            "optim": {
                "lr": 1e-4,  # of CLIP's or BART's own parameters
                "lr_linears": 1e-3,  # of the two linears and the logit scale
                "schedule": "cosine",  # after the warm-up: constant | linear | cosine
                "warmup": 50,
                "b1": 0.9,
                "b2": 0.98,
                "eps": 1e-6,
                "weight_decay": 0.01,
                "clip_norm": 1.0,  # of the global gradient; 0: off
            },
            "eval": {  # during training: held-out losses, and what became of the text abilities
                "every": 200,  # steps; 0: never
                "batches": 4,  # of held-out pairs, and of held-out texts
                "questions": 256,  # shapes: text-only questions for retention/text_qa; 0: none
            },
            "early_stop": {
                "metric": "",  # e.g. retention/text_qa; empty: off
                "max_drop": 0.03,  # stop when it falls further below its start; the last good checkpoint stays
            },
            "nan_limit": 10,  # stop after so many updates in a row that were not finite
            "log_every": 20,
            "save_every": 500,
            "keep": 2,  # checkpoints
            "keep_teacher": "auto",  # copy clip and bart into the workdir: auto (if below 2 GiB) | yes | no
            "watchdog_seconds": 1800,  # a process that makes no step for so long ends with its threads' stacks; 0: off
            "prompts": dict(PROMPTS),  # of VLKD and its exports; suites.py has those of evaluations
            "plan": {  # what vlkd plan takes where clip or bart is empty
                "clip": "",  # vit_b32 | vit_b16 | vit_l14
                "bart": "",  # base | large
            },
            "mesh": {  # devices along each axis; -1: all that are left
                "data": -1,  # parts of a batch; every part holds whatever fsdp and model do not split
                "fsdp": 1,  # parts of a batch that also split parameters, moments and teacher; gathered layer by layer
                "model": 1,  # parts of every layer's heads and hidden units (tensor parallel): keep it within one host
                "slices": 1,  # parts of a pod between which the network is slow; data spans them
            },
        }
    )
