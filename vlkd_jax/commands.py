"""Every command of `vlkd`: its options, its help, its example. Nothing heavy is imported."""

from __future__ import annotations

import click

from vlkd_jax.options import Command, argument, choice, config, flag, integer, number, text

PROCESSES = (
    text("coordinator", "HOST:PORT", "address of process 0; SLURM, Open MPI, JobSets, TPU pods tell these three"),
    integer("processes", "N", "how many processes run this command together", minimum=1),
    integer("process", "I", "which of them this is, from 0", minimum=0),
    integer("start_seconds", "N", "how long each waits for the others", default=300, minimum=1),
    integer(
        "heartbeat_seconds", "N", "silence after which one is given up; longer than compiling", default=300, minimum=1
    ),
)
"""Options of a command that several processes can run together."""


def planned(required: bool) -> tuple[click.Option, ...]:
    """A config for training, on machines or with models that may not be here."""
    overrides = "overrides a field; config.plan.clip and config.plan.bart stand for models that are not here"
    return config("NAME", "of training, as for vlkd train", overrides, required)


def annotations(required: bool) -> click.Option:
    """What predictions are scored by."""
    told = "official annotations, captions (COCO, nocaps, Karpathy's), or a reference a line"
    return text("annotations", "FILE", told, required=required)


SCORED = (
    text("questions", "FILE", "of VQA: the questions that count; default: those of the annotations"),
    text("split", "NAME", "of Karpathy's files", default="test"),
    choice("answer_field", "of each human answer; OK-VQA has both", ("answer", "raw_answer"), default="answer"),
    flag("allow_partial", "score what has a prediction, where some of the split have none"),
)
"""Options of commands that read predictions from files."""
SCORED_SUITES = ("vqav2", "okvqa", "caption", "nocaps", "xsum")
JSON = flag("json", "print one JSON object")
MODEL = text(
    "model",
    "DIR",
    "an export, a run's workdir, or hf:OWNER/NAME; without it the package's own, which knows shapes alone",
)
CHOSEN = (
    choice("method", "greedy unless given", ("greedy", "beam", "sample")),
    integer("beams", "N", "of method beam; 5 unless given", minimum=1),
    integer("max_new_tokens", "N", "of a text", minimum=1),
    integer("returns", "N", "texts each, of methods beam and sample; 1 unless given", minimum=1),
    integer("seed", "N", "of method sample; 0 unless given", minimum=0),
    flag("scores", "tell each text's log-likelihood"),
)
"""How a text is chosen."""
BEAM = text("beam", "OPTIONS", 'an Apache Beam pipeline does the work: "--runner=FlinkRunner ..."')

_ALL = (
    Command(
        "init",
        module="vlkd_jax.init",
        summary="a commented config for your own pictures",
        description="Looks at your captions, pictures and models and writes DIR/config.py, a commented config for "
        "training on them, with lengths and numbers of steps that fit; tells what comes next.",
        options=(
            argument("directory", "DIR"),
            text(
                "captions",
                "FILE",
                "COCO captions .json, .jsonl (image, caption) or .tsv (image, caption)",
                required=True,
            ),
            text("images", "FOLDER", "where the pictures lie that it names", required=True),
            text("clip", "MODEL", "the teacher: a directory, or hf:openai/clip-vit-base-patch16", required=True),
            text("bart", "MODEL", "the student's start: a directory, or hf:facebook/bart-base", required=True),
        ),
        example="mine --captions=captions.tsv --images=photos --clip=models/clip --bart=models/bart",
        needs_device=False,
    ),
    Command(
        "train",
        module="vlkd_jax.train",
        summary="train by a config; the same command again resumes",
        description="Trains by a config. DIR receives config.json, checkpoints/, metrics.jsonl and TensorBoard events; "
        "the same command again goes on from the last checkpoint. Ctrl-C and SIGTERM save the step under way first "
        "(with early_stop.metric the last evaluated step stands); a second one ends at once.",
        options=(
            config(
                "NAME",
                "shapes_vlkd, folder or another config of the package, or the path of your FILE.py",
                "overrides a field; configs/base.py lists every field",
                required=True,
            ),
            text("workdir", "DIR", "directory of the run", required=True),
            *PROCESSES,
        ),
        example="--config=shapes_vlkd --workdir=runs/shapes --config.steps=500 --config.optim.lr=3e-5",
        exit_codes=(0, 1, 2, 3, 4, 130, 143),
    ),
    Command(
        "evaluate",
        module="vlkd_jax.evaluate",
        summary="zero-shot questions, captions and retrieval with a trained student",
        description="Zero-shot evaluation of the newest checkpoint of a training run, or of a CLIP and a BART before "
        "distillation. OUT receives metrics.json and NAME/predictions.jsonl; the same command again goes on where one "
        "was cut off.",
        options=(
            config(
                "suites:NAME[,NAME]",
                "suites by name, as configs/suites.py lists them, or the path of your FILE.py",
                "overrides a field of configs/suites.py, such as --config.shapes.questions=700",
                required=True,
            ),
            text(
                "checkpoint",
                "DIR",
                "--workdir of a training run, an export, or hf:OWNER/NAME; without it --clip and --bart",
            ),
            text("workdir", "OUT", "directory of the results", required=True),
            text("clip", "DIR", "a Hugging Face CLIP; with --checkpoint: where the run's lies now, if it has moved"),
            text("bart", "DIR", "a Hugging Face BART; likewise"),
            *PROCESSES,
        ),
        example="--config=suites:shapes --checkpoint=runs/shapes --workdir=runs/shapes/evaluation",
        exit_codes=(0, 1, 2, 4, 130, 143),
    ),
    Command(
        "caption",
        module="vlkd_jax.use.caption",
        summary="what pictures show",
        description="Captions the pictures IMG with a trained student, zero-shot.",
        options=(argument("images", "IMG", several=True), MODEL, *CHOSEN, JSON),
        example="photo.jpg --model=runs/mine --method=beam",
    ),
    Command(
        "ask",
        module="vlkd_jax.use.ask",
        summary="questions about pictures",
        description="Answers questions about pictures with a trained student, zero-shot: what is a file is a "
        "picture IMG, anything else a question, and every question is asked about every picture. With "
        "--choices one of given answers is chosen, the likeliest first.",
        options=(
            argument("inputs", "IMG|QUESTION", several=True),
            MODEL,
            text("choices", "TEXTS", "answers to choose from, with commas between"),
            *CHOSEN,
            JSON,
        ),
        example='photo.jpg "what color is the car?" --model=runs/mine',
    ),
    Command(
        "embed",
        module="vlkd_jax.use.embed",
        summary="embeddings of pictures and texts in one space",
        description="Prints the embedding of each picture IMG (by the teacher) and each text (by the student), a JSON "
        "object a line; their products are cosines.",
        options=(
            argument("inputs", "IMG|TEXT", several=True),
            MODEL,
            text("output", "FILE.npz", "file to write instead, with names and embeddings"),
        ),
        example='photo.jpg "a red car" --model=runs/mine',
    ),
    Command(
        "serve",
        module="vlkd_jax.web.server",
        summary="a page to ask about pictures, and the same as JSON",
        description="Serves a trained student: a page to drop a picture on, with captions, answers, alternatives and "
        "the parts of the picture that an answer was read from, and a JSON endpoint (/api/caption, /api/ask; schema at "
        "/openapi.json). Only this machine reaches it unless --host says otherwise.",
        options=(
            MODEL,
            text("host", "ADDRESS", "to listen at; 0.0.0.0 is everywhere", default="127.0.0.1"),
            integer("port", "N", "0 takes one that is free", default=8000, minimum=0),
            number("megabytes", "N", "of a picture's file at most", default=10.0, minimum=0.01),
            integer("per_minute", "N", "requests of one address", default=60, minimum=1),
        ),
        example="--model=runs/mine --port=8080",
    ),
    Command(
        "score",
        module="vlkd_jax.score",
        summary="score predictions from files, ours or another system's",
        description="Scores predictions from files by the rules that the suites use: our predictions.jsonl, the "
        "benchmarks' own result files, or for xsum one text a line; plain or gzipped. No model is needed.",
        options=(
            choice("suite", "by whose rules", SCORED_SUITES, required=True),
            text("predictions", "FILE", "what was said", required=True),
            annotations(required=True),
            *SCORED,
            text("spice_jars", "DIR", "where SPICE's own program lies; without it there is no SPICE"),
            JSON,
        ),
        example="--suite=vqav2 --predictions=results.json --annotations=v2_mscoco_val2014_annotations.json",
        needs_device=False,
    ),
    Command(
        "compare",
        module="vlkd_jax.compare",
        summary="the difference of two evaluations, with its interval",
        description="Compares two systems on the same items by a paired bootstrap, clustered by picture. A and B are "
        "workdirs of vlkd evaluate, or two files of predictions, then with --suite and --annotations.",
        options=(
            argument("a", "A"),
            argument("b", "B"),
            choice("suite", "of two files of predictions", SCORED_SUITES),
            annotations(required=False),
            *SCORED,
            JSON,
        ),
        example="runs/before/evaluation runs/after/evaluation",
        needs_device=False,
    ),
    Command(
        "retention",
        module="vlkd_jax.retention",
        summary="what became of the text abilities: a BART and the student that it became",
        description="Puts a BART as it was and the student that it became through the same code, seeds and data: "
        "denoise (texts restored) and shapes (the built-in world's questions, from descriptions) need no training, "
        "glue and xsum fine-tune both. OUT receives retention.json with paired differences, retention.png, every row.",
        options=(
            text("before", "BART", "a directory, hf:facebook/bart-base or builtin:shapes/bart", required=True),
            text("after", "DIR", "a training run's workdir, an export, or another BART", required=True),
            text("output", "OUT", "directory of the results", required=True),
            text("tasks", "NAMES", "of denoise, shapes, glue, xsum, with commas between", default="denoise,shapes"),
            text("texts", "FILE", "of denoise: held-out texts, one a line"),
            text("glue", "DIR", "of glue: the folder of its tasks, such as DIR/RTE/train.tsv; those that are there"),
            text("xsum", "DIR", "of xsum: the folder of train.jsonl and validation.jsonl (document, summary)"),
            integer("limit", "N", "texts, questions or documents of a task at most", default=1000, minimum=1),
            integer("steps", "N", "of fine-tuning", default=500, minimum=1),
            integer("batch_size", "N", "of fine-tuning", default=32, minimum=1),
            number("lr", "RATE", "of fine-tuning", default=3e-5, minimum=0.0),
            integer("examples", "N", "to fine-tune on, of classes so many of each (few-shot); 0: all", default=0),
            integer("seed", "N", "of fine-tuning, corruption and questions", default=0, minimum=0),
            JSON,
        ),
        example="--before=models/bart --after=runs/mine --output=retention --texts=held_out.txt",
        exit_codes=(0, 1, 2, 3, 4, 130, 143),
    ),
    Command(
        "submission",
        module="vlkd_jax.submission",
        summary="the file that a benchmark's server takes, checked",
        description="Writes predictions as the list that EvalAI takes and says what would be rejected: every question "
        "or picture of the split once, ids that are whole numbers, answers that are texts. Without --output it only "
        "checks.",
        options=(
            choice("suite", "whose rules the server has", SCORED_SUITES[:-1], required=True),
            text("predictions", "FILE", "predictions.jsonl or a result file", required=True),
            text("questions", "FILE", "the split's questions; of captions the file of its images", required=True),
            text("output", "FILE", "what to upload; the benchmarks want .json"),
        ),
        example="--suite=vqav2 --predictions=predictions.jsonl --questions=questions.json --output=upload.json",
        needs_device=False,
    ),
    Command(
        "report",
        module="vlkd_jax.report",
        summary="one page about an evaluation: figures, best and worst, pictures",
        description="Writes OUT/report/index.html about every suite of an evaluation, OUT being the --workdir of "
        "vlkd evaluate: figures with intervals, bars by type, the best and the worst answers with "
        "their pictures. One file, which needs no network.",
        options=(argument("out", "OUT"),),
        example="runs/mine_eval",
        needs_device=False,
    ),
    Command(
        "export",
        module="vlkd_jax.hf.export",
        summary="a trained student as Hugging Face directories",
        description="Writes the newest checkpoint of a training run as Hugging Face directories: HF holds the whole "
        "student for PyTorch, with its code, processor, tokenizers and a model card; HF/bart a stock BART. Needs no "
        "torch.",
        options=(
            text("checkpoint", "DIR", "--workdir of the training run", required=True),
            text("output", "HF", "directory to write; must be new or empty", required=True),
            choice("dtype", "of the weights", ("float32", "bfloat16", "float16"), default="float32"),
            text("evaluation", "FILE", "metrics.json of vlkd evaluate, whose figures go into the model card"),
            text("clip", "DIR", "where the CLIP of the run's start lies now, if it has moved"),
            text("bart", "DIR", "likewise the BART"),
        ),
        example="--checkpoint=runs/mine --output=exports/mine --evaluation=runs/mine_eval/metrics.json",
    ),
    Command(
        "import",
        module="vlkd_jax.hf.import_",
        summary="an export back as a run that vlkd evaluate reads",
        description="Gives the Flax side of HF, a directory that vlkd export wrote, back bit for bit: DIR is a "
        "run's directory with a checkpoint and, in parents/, its CLIP and BART.",
        options=(
            argument("hf", "HF"),
            text("output", "DIR", "directory to write; must be new or empty", required=True),
        ),
        example="exports/mine --output=runs/again",
    ),
    Command(
        "convert",
        module="vlkd_jax.hf.convert",
        summary="pickled PyTorch weights as safetensors, once",
        description="Writes model.safetensors from the *.bin, *.pt or *.pth of the Hugging Face directory SOURCE. "
        "PyTorch's weights-only reader takes tensors from a pickle and runs nothing. Needs torch.",
        options=(
            argument("source", "SOURCE"),
            text("output", "DIR", "directory to write; default: the same"),
        ),
        example="models/clip",
    ),
    Command(
        "parity",
        module="vlkd_jax.hf.parity",
        summary="an export in PyTorch against JAX, number by number",
        description="Compares HF, a directory that vlkd export wrote, in PyTorch with the same files in JAX: "
        "tensors, parts, losses, and the texts of 100 prompts, greedy and beam 5, padded and not. "
        "Writes HF/parity.json and the model card's part. Needs torch.",
        options=(
            argument("hf", "HF"),
            JSON,
        ),
        example="exports/mine",
    ),
    Command(
        "ckpt",
        module="vlkd_jax.ckpt",
        summary="a run's checkpoints listed, verified byte by byte, or copied",
        description="ls lists the checkpoints of RUN, a training run's workdir; verify reads every byte and compares "
        "it with what was written (exit code 2 where one differs); cp copies one that is whole to NEW, a workdir from "
        "which vlkd train, evaluate and export go on.",
        options=(
            argument("action", "ls|verify|cp", type=click.Choice(("ls", "verify", "cp"))),
            argument("run", "RUN"),
            argument("new", "NEW", required=False),
            integer(
                "step", "N", "that checkpoint; default: all of them, and of cp the newest that is whole", minimum=0
            ),
            JSON,
        ),
        example="cp runs/mine runs/from_500 --step=500",
        needs_device=False,
    ),
    Command(
        "plan",
        module="vlkd_jax.plan",
        summary="memory, speed and cost of a run on machines that are not here",
        description="Compiles the real train step of a config for a TPU topology, without a TPU and without weights, "
        "or for the devices here (local): whether it fits, bytes a chip, operations, traffic, images/s at a stated "
        "share of the peak, chip-hours. Needs libtpu for a TPU. It takes minutes for large models.",
        options=(
            planned(required=True),
            text("topology", "NAME", "v5e:4x4, v4:2x2x4, v6e:4x4, ..., or local; with --sweep several, by commas"),
            text("mesh", "AXES", "such as data=1,fsdp=16; default: the config's"),
            number("utilisation", "SHARE", "of the chips' peak that is reached", default=0.4),
            integer("rows", "N", "of the batch for each chip; without it the config's batch", minimum=1),
            flag("sweep", "a table over topologies; with --rows that of weak scaling"),
            JSON,
        ),
        example="--config=cc3m_vitl14_bartlarge --topology=v5e:4x4",
        needs_device=False,
    ),
    Command(
        "prepare",
        module="vlkd_jax.data.prepare",
        summary="pairs as you have them into record files for training",
        description="Reads tar shards (img2dataset, webdataset), TSV, JSONL, CSV, Parquet or COCO captions, one "
        "file SOURCE or a folder of them, makes the pictures smaller, and writes a "
        "tensorflow-datasets directory of ArrayRecord files with manifest.json: what was read, kept "
        "and skipped, why, and hashes. The same command again goes on where one was cut off. Train on "
        "it with --config.data.source=tfds --config.data.directory=DIR.",
        options=(
            argument("source", "SOURCE"),
            text("output", "DIR", "directory to write", required=True),
            text("images", "DIR", "where a table's pictures lie; default: paths as they stand"),
            text("image", "NAME", "column of the image; of a TSV its number", default="image"),
            text("caption", "NAME", "column of the caption; of a TSV its number", default="caption"),
            text(
                "names",
                "PATTERN",
                "a picture's file below --images, of {path}, {name}, {row}, {md5}, {sha256}",
                default="{path}",
            ),
            text("name", "NAME", "of the data set", default="pairs"),
            text("split", "NAME", "of the data set", default="train"),
            integer("short", "N", "pixels of the shorter side at most", default=288, minimum=1),
            integer("quality", "N", "of JPEG", default=90, minimum=1),
            integer("rows", "N", "pairs in one record file, of a table", default=10_000, minimum=1),
            integer("workers", "N", "processes", default=2, minimum=1),
            number("max_unusable", "SHARE", "of pairs that may be skipped", default=0.5),
            BEAM,
            JSON,
        ),
        example="shards --output=data/cc3m --workers=8",
        needs_device=False,
    ),
    Command(
        "prepare-suite",
        module="vlkd_jax.data.prepare_suite",
        summary="an evaluation set into record files",
        description="Writes the pictures of a suite, as they are in their files, with all their captions or questions "
        "into a tensorflow-datasets directory of ArrayRecord files, from the official files of COCO captions "
        "(Karpathy's splits), VQA v2, OK-VQA, nocaps (with its domains), Flickr30k or your own in their form. Evaluate "
        "with --config.SUITE.records=DIR; vlkd leakage compares it with a training set.",
        options=(
            config(
                "suites:NAME",
                "one suite of configs/suites.py",
                "overrides a field, such as --config.root=DIR, the folder of the suite's files",
                required=True,
            ),
            text("output", "DIR", "directory to write", required=True),
            integer("workers", "N", "processes", default=2, minimum=1),
            BEAM,
            JSON,
        ),
        example="--config=suites:vqav2 --config.root=coco --output=data/vqav2",
        needs_device=False,
    ),
    Command(
        "cache-teacher",
        module="vlkd_jax.cache_teacher",
        summary="the frozen teacher's outputs computed once, for many epochs",
        description="Runs the frozen CLIP of a config once over the pairs that training reads. Train with the same "
        "config and --config.data.teacher_cache=DIR: pictures are then not decoded, nor is the teacher run. The cache "
        "is tied to the weights, the preprocessing and the data by their hashes. The same command again goes on where "
        "one was cut off.",
        options=(
            config(
                "NAME",
                "of training, as for vlkd train",
                "overrides a field; config.student.image_tokens says which tokens are kept",
                required=True,
            ),
            text("output", "DIR", "directory to write; several processes need one that all see", required=True),
            choice(
                "dtype",
                "the last two tell their error",
                ("float32", "bfloat16", "int8"),
                default="float32",
            ),
            *PROCESSES,
            JSON,
        ),
        example="--config=folder --config.data.captions=captions.jsonl --output=cache",
        exit_codes=(0, 1, 2, 4, 130, 143),
    ),
    Command(
        "leakage",
        module="vlkd_jax.data.leakage",
        summary="pictures of an evaluation set that training has seen",
        description="Compares two directories of vlkd prepare: pictures that are the same file, and nearly the same "
        "ones by a perceptual hash. OUT receives index.html with the nearest pairs side by side, leakage.json with the "
        "counts and leaks.jsonl with all of them.",
        options=(
            text("train", "DIR", "what is trained on", required=True),
            text("eval", "DIR", "what is evaluated", required=True),
            text("output", "OUT", "directory of the page", required=True),
            integer("distance", "N", "bits of 64 that may differ", default=4, minimum=0),
            JSON,
        ),
        example="--train=data/cc3m --eval=data/coco --output=leakage",
        needs_device=False,
    ),
    Command(
        "doctor",
        module="vlkd_jax.doctor",
        summary="what on this machine would stand in a run's way",
        description="Looks at versions, processes, devices, the coordinator's port, disk, /dev/shm and the compilation "
        "cache, and with a config at its mesh and what a step takes of the memory: a line each, with what to do. Under "
        "SLURM, Open MPI, in a JobSet or on a pod run it in every process, as the run.",
        options=(
            planned(required=False),
            text("workdir", "DIR", "of the run to come; default: this directory"),
            *PROCESSES,
            JSON,
        ),
        example="--config=shapes_vlkd --workdir=runs/shapes",
        needs_device=False,
    ),
    Command(
        "completion",
        module="vlkd_jax.completion",
        summary="completion of commands and options in your shell",
        description="Prints what SHELL (bash, zsh or fish) is to evaluate, so that Tab completes commands and options.",
        options=(argument("shell", "SHELL"),),
        example="bash",
        needs_device=False,
    ),
    Command(
        "demo",
        module="vlkd_jax.shapes.demo",
        summary="the whole job on the built-in world: train, evaluate, report",
        description="The whole job on the built-in world, on one CPU: evaluates the student as it starts, distils, "
        "evaluates again. DIR receives demo.json, report/index.html, the training run and every prediction.",
        options=(
            text("workdir", "DIR", "directory that receives everything", required=True),
            integer("seed", "N", "of training and of the held-out questions", default=0, minimum=0),
            number(
                "setup_seconds", "N", "how long launch/demo.sh took before, for demo.json", default=0.0, hidden=True
            ),
        ),
        example="--workdir=runs/demo --seed=1",
        exit_codes=(0, 1, 2, 3, 4, 130, 143),
    ),
)
COMMANDS = {command.name: command for command in _ALL}
"""The commands of `vlkd`, by name. Programs beside them keep their `Command` in their own module."""
