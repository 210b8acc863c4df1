"""What every command is told and tells: its options, its help, its exit codes. Flags and help texts come from here.

Nothing heavy is imported, so that help is answered at once.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence

EXIT_CODES = {
    0: "done",
    1: "a fault of the program",
    2: "a mistake in what was given",
    3: "training diverged",
    4: "no step within watchdog_seconds, or another process was lost",
    130: "stopped by Ctrl-C",
    143: "stopped by SIGTERM",
}
COLUMNS = 120


@dataclasses.dataclass(frozen=True)
class Option:
    """`--name=VALUE` of a command.

    Attributes:
      value: what stands for the value in the help.
      help: without a full stop; default and "required" are added to it.
      kind: "string", "integer", "number", "choice", "config", an ml_collections config file, "flag", which has no
        value, "argument", which is given without its name, or "arguments", all that come behind those, one at least.
      default: None: there is none.
      minimum: of an integer or a number.
      choices: of a choice.
      overrides: of a config, the help of `--name.FIELD=VALUE`.
      hidden: not told in the help, for the project's own scripts.
    """

    name: str
    value: str
    help: str
    kind: str = "string"
    default: str | int | float | None = None
    required: bool = False
    minimum: float | None = None
    choices: tuple[str, ...] = ()
    overrides: str = ""
    hidden: bool = False


@dataclasses.dataclass(frozen=True)
class Command:
    """A program of the package.

    Attributes:
      module: what `python -m` runs.
      summary: one line for the list of commands.
      description: one paragraph.
      example: the arguments of one use.
      exit_codes: keys of `EXIT_CODES`.
      needs_device: whether it computes with jax.
    """

    module: str
    summary: str
    description: str
    options: tuple[Option, ...]
    example: str
    exit_codes: Sequence[int] = (0, 1, 2, 130, 143)
    needs_device: bool = True


PROCESSES = (
    Option("coordinator", "HOST:PORT", "address of process 0; SLURM, Open MPI, JobSets, TPU pods tell these three"),
    Option("processes", "N", "how many processes run this command together", kind="integer", minimum=1),
    Option("process", "I", "which of them this is, from 0", kind="integer", minimum=0),
    Option("start_seconds", "N", "how long each waits for the others", kind="integer", default=300, minimum=1),
    Option(
        "heartbeat_seconds",
        "N",
        "silence after which one is given up; longer than compiling",
        kind="integer",
        default=300,
        minimum=1,
    ),
)
"""Options of a command that several processes can run together."""

SCORED = (
    Option("annotations", "FILE", "official annotations, captions (COCO, nocaps, Karpathy's), or a reference a line"),
    Option("questions", "FILE", "of VQA: the questions that count; default: those of the annotations"),
    Option("split", "NAME", "of Karpathy's files", default="test"),
    Option(
        "answer_field",
        "FIELD",
        "of each human answer; OK-VQA has both",
        kind="choice",
        default="answer",
        choices=("answer", "raw_answer"),
    ),
    Option("allow_partial", "", "score what has a prediction, where some of the split have none", kind="flag"),
)
"""Options of commands that read predictions from files."""
SCORED_SUITES = ("vqav2", "okvqa", "caption", "nocaps", "xsum")
SUITE = Option("suite", "SUITE", "|".join(SCORED_SUITES), kind="choice", required=True, choices=SCORED_SUITES)
JSON = Option("json", "", "print one JSON object", kind="flag")
PLANNED = Option(
    "config",
    "NAME",
    "of training, as for vlkd train",
    kind="config",
    overrides="overrides a field; config.plan.clip and config.plan.bart stand for models that are not here",
)
MODEL = Option("model", "DIR", "an export, a run's workdir, or hf:OWNER/NAME", required=True)
CHOSEN = (
    Option(
        "method",
        "METHOD",
        "greedy|beam|sample (default greedy)",
        kind="choice",
        choices=("greedy", "beam", "sample"),
    ),
    Option("beams", "N", "of method beam (default 5)", kind="integer", minimum=1),
    Option("max_new_tokens", "N", "of a text", kind="integer", minimum=1),
    Option("returns", "N", "texts each, of methods beam and sample (default 1)", kind="integer", minimum=1),
    Option("seed", "N", "of method sample (default 0)", kind="integer", minimum=0),
    Option("scores", "", "tell each text's log-likelihood", kind="flag"),
)
"""How a text is chosen."""
BEAM = Option("beam", "OPTIONS", 'an Apache Beam pipeline does the work: "--runner=FlinkRunner ..."')

COMMANDS = {
    "train": Command(
        module="vlkd_jax.train",
        summary="train by a config; the same command again resumes",
        description="Trains by a config. DIR receives config.json, checkpoints/, metrics.jsonl and TensorBoard events; "
        "the same command again goes on from the last checkpoint. Ctrl-C and SIGTERM save the step under way first "
        "(with early_stop.metric the last evaluated step stands); a second one ends at once.",
        options=(
            Option(
                "config",
                "NAME",
                "shapes_vlkd, folder or another config of the package, or the path of your FILE.py",
                kind="config",
                required=True,
                overrides="overrides a field; configs/base.py lists every field",
            ),
            Option("workdir", "DIR", "directory of the run", required=True),
            *PROCESSES,
        ),
        example="--config=shapes_vlkd --workdir=runs/shapes --config.steps=500 --config.optim.lr=3e-5",
        exit_codes=(0, 1, 2, 3, 4, 130, 143),
    ),
    "evaluate": Command(
        module="vlkd_jax.evaluate",
        summary="zero-shot questions, captions and retrieval with a trained student",
        description="Zero-shot evaluation of the newest checkpoint of a training run, or of a CLIP and a BART before "
        "distillation. OUT receives metrics.json and NAME/predictions.jsonl; the same command again goes on where one "
        "was cut off.",
        options=(
            Option(
                "config",
                "suites:NAME[,NAME]",
                "suites by name, as configs/suites.py lists them, or the path of your FILE.py",
                kind="config",
                required=True,
                overrides="overrides a field of configs/suites.py, such as --config.shapes.questions=700",
            ),
            Option("checkpoint", "DIR", "--workdir of a training run, or an export; without it --clip and --bart"),
            Option("workdir", "OUT", "directory of the results", required=True),
            Option("clip", "DIR", "a Hugging Face CLIP; with --checkpoint: where the run's lies now, if it has moved"),
            Option("bart", "DIR", "a Hugging Face BART; likewise"),
            *PROCESSES,
        ),
        example="--config=suites:shapes --checkpoint=runs/shapes --workdir=runs/shapes/evaluation",
        exit_codes=(0, 1, 2, 4, 130, 143),
    ),
    "caption": Command(
        module="vlkd_jax.use.caption",
        summary="what pictures show",
        description="Captions pictures with a trained student, zero-shot.",
        options=(Option("images", "IMG", "pictures", kind="arguments", required=True), MODEL, *CHOSEN, JSON),
        example="photo.jpg --model=runs/mine --method=beam",
    ),
    "ask": Command(
        module="vlkd_jax.use.ask",
        summary="questions about pictures",
        description="Answers questions about pictures with a trained student, zero-shot: what is a file is a picture, "
        "anything else a question, and every question is asked about every picture. With --choices one of given "
        "answers is chosen, the likeliest first.",
        options=(
            Option("inputs", "IMG|QUESTION", "pictures and questions", kind="arguments", required=True),
            MODEL,
            Option("choices", "TEXTS", "answers to choose from, with commas between"),
            *CHOSEN,
            JSON,
        ),
        example='photo.jpg "what color is the car?" --model=runs/mine',
    ),
    "embed": Command(
        module="vlkd_jax.use.embed",
        summary="embeddings of pictures and texts in one space",
        description="Prints the embedding of each picture (by the teacher) and each text (by the student), a JSON "
        "object a line; their products are cosines.",
        options=(
            Option("inputs", "IMG|TEXT", "pictures and texts", kind="arguments", required=True),
            MODEL,
            Option("output", "FILE.npz", "file to write instead, with names and embeddings"),
        ),
        example='photo.jpg "a red car" --model=runs/mine',
    ),
    "serve": Command(
        module="vlkd_jax.web.server",
        summary="a page to ask about pictures, and the same as JSON",
        description="Serves a trained student: a page to drop a picture on, with captions, answers, alternatives and "
        "the parts of the picture that an answer was read from, and a JSON endpoint (/api/caption, /api/ask; schema at "
        "/openapi.json). Only this machine reaches it unless --host says otherwise.",
        options=(
            MODEL,
            Option("host", "ADDRESS", "to listen at; 0.0.0.0 is everywhere", default="127.0.0.1"),
            Option("port", "N", "0 takes one that is free", kind="integer", default=8000, minimum=0),
            Option("megabytes", "N", "of a picture's file at most", kind="number", default=10.0, minimum=0.01),
            Option("per_minute", "N", "requests of one address", kind="integer", default=60, minimum=1),
        ),
        example="--model=runs/mine --port=8080",
    ),
    "score": Command(
        module="vlkd_jax.score",
        summary="score predictions from files, ours or another system's",
        description="Scores predictions from files by the rules that the suites use: our predictions.jsonl, the "
        "benchmarks' own result files, or for xsum one text a line; plain or gzipped. No model is needed.",
        options=(
            SUITE,
            Option("predictions", "FILE", "what was said", required=True),
            dataclasses.replace(SCORED[0], required=True),
            *SCORED[1:],
            Option("spice_jars", "DIR", "where SPICE's own program lies; without it there is no SPICE"),
            JSON,
        ),
        example="--suite=vqav2 --predictions=results.json --annotations=v2_mscoco_val2014_annotations.json",
        needs_device=False,
    ),
    "compare": Command(
        module="vlkd_jax.compare",
        summary="the difference of two evaluations, with its interval",
        description="Compares two systems on the same items by a paired bootstrap, clustered by picture. A and B are "
        "workdirs of vlkd evaluate, or two files of predictions, then with --suite and --annotations.",
        options=(
            Option("a", "A", "workdir of an evaluation, or a file of predictions", kind="argument", required=True),
            Option("b", "B", "the other", kind="argument", required=True),
            dataclasses.replace(SUITE, help=f"of two files of predictions: {SUITE.help}", required=False),
            *SCORED,
            JSON,
        ),
        example="runs/before/evaluation runs/after/evaluation",
        needs_device=False,
    ),
    "submission": Command(
        module="vlkd_jax.submission",
        summary="the file that a benchmark's server takes, checked",
        description="Writes predictions as the list that EvalAI takes and says what would be rejected: every question "
        "or picture of the split once, ids that are whole numbers, answers that are texts. Without --output it only "
        "checks.",
        options=(
            dataclasses.replace(SUITE, choices=SCORED_SUITES[:-1], help="|".join(SCORED_SUITES[:-1])),
            Option("predictions", "FILE", "predictions.jsonl or a result file", required=True),
            Option("questions", "FILE", "the split's questions; of captions the file of its images", required=True),
            Option("output", "FILE", "what to upload; the benchmarks want .json"),
        ),
        example="--suite=vqav2 --predictions=predictions.jsonl --questions=questions.json --output=upload.json",
        needs_device=False,
    ),
    "report": Command(
        module="vlkd_jax.report",
        summary="one page about an evaluation: figures, best and worst, pictures",
        description="Writes OUT/report/index.html about every suite of an evaluation: figures with intervals, bars by "
        "type, the best and the worst answers with their pictures. One file, which needs no network.",
        options=(Option("out", "OUT", "--workdir of vlkd evaluate", kind="argument", required=True),),
        example="runs/mine_eval",
        needs_device=False,
    ),
    "export": Command(
        module="vlkd_jax.hf.export",
        summary="a trained student as Hugging Face directories",
        description="Writes the newest checkpoint of a training run as Hugging Face directories: HF holds the whole "
        "student for PyTorch, with its code, processor, tokenizers and a model card; HF/bart a stock BART. Needs no "
        "torch.",
        options=(
            Option("checkpoint", "DIR", "--workdir of the training run", required=True),
            Option("output", "HF", "directory to write; must be new or empty", required=True),
            Option(
                "dtype",
                "DTYPE",
                "of the weights",
                kind="choice",
                default="float32",
                choices=("float32", "bfloat16", "float16"),
            ),
            Option("evaluation", "FILE", "metrics.json of vlkd evaluate, whose figures go into the model card"),
            Option("clip", "DIR", "where the CLIP of the run's start lies now, if it has moved"),
            Option("bart", "DIR", "likewise the BART"),
        ),
        example="--checkpoint=runs/mine --output=exports/mine --evaluation=runs/mine_eval/metrics.json",
    ),
    "import": Command(
        module="vlkd_jax.hf.import_",
        summary="an export back as a run that vlkd evaluate reads",
        description="Gives the Flax side of an export back, bit for bit: DIR is a run's directory with a checkpoint "
        "and, in parents/, its CLIP and BART.",
        options=(
            Option("hf", "HF", "directory that vlkd export wrote", kind="argument", required=True),
            Option("output", "DIR", "directory to write; must be new or empty", required=True),
        ),
        example="exports/mine --output=runs/again",
    ),
    "convert": Command(
        module="vlkd_jax.hf.convert",
        summary="pickled PyTorch weights as safetensors, once",
        description="Writes model.safetensors from the *.bin, *.pt or *.pth of a Hugging Face directory. PyTorch's "
        "weights-only reader takes tensors from a pickle and runs nothing. Needs torch.",
        options=(
            Option("source", "SOURCE", "directory with pickled weights", kind="argument", required=True),
            Option("output", "DIR", "directory to write; default: the same"),
        ),
        example="models/clip",
    ),
    "parity": Command(
        module="vlkd_jax.hf.parity",
        summary="an export in PyTorch against JAX, number by number",
        description="Compares an export in PyTorch with the same files in JAX: tensors, parts, losses, and the texts "
        "of 100 prompts, greedy and beam 5, padded and not. Writes HF/parity.json and the model card's part. Needs "
        "torch.",
        options=(
            Option("hf", "HF", "directory that vlkd export wrote", kind="argument", required=True),
            JSON,
        ),
        example="exports/mine",
    ),
    "plan": Command(
        module="vlkd_jax.plan",
        summary="memory, speed and cost of a run on machines that are not here",
        description="Compiles the real train step of a config for a TPU topology, without a TPU and without weights, "
        "or for the devices here (local): whether it fits, bytes a chip, operations, traffic, images/s at a stated "
        "share of the peak, chip-hours. Needs libtpu for a TPU. It takes minutes for large models.",
        options=(
            dataclasses.replace(PLANNED, required=True),
            Option("topology", "NAME", "v5e:4x4, v4:2x2x4, v6e:4x4, ..., or local; with --sweep several, by commas"),
            Option("mesh", "AXES", "such as data=1,fsdp=16; default: the config's"),
            Option("utilisation", "SHARE", "of the chips' peak that is reached", kind="number", default=0.4),
            Option("rows", "N", "of the batch for each chip; without it the config's batch", kind="integer", minimum=1),
            Option("sweep", "", "a table over topologies; with --rows that of weak scaling", kind="flag"),
            JSON,
        ),
        example="--config=cc3m_vitl14_bartlarge --topology=v5e:4x4",
        needs_device=False,
    ),
    "prepare": Command(
        module="vlkd_jax.data.prepare",
        summary="pairs as you have them into record files for training",
        description="Reads tar shards (img2dataset, webdataset), TSV, JSONL, CSV, Parquet or COCO captions, one file "
        "or a folder of them, makes the pictures smaller, and writes a tensorflow-datasets directory of ArrayRecord "
        "files with manifest.json: what was read, kept and skipped, why, and hashes. The same command again goes on "
        "where one was cut off. Train on it with --config.data.source=tfds --config.data.directory=DIR.",
        options=(
            Option("source", "SOURCE", "file, or folder of files", kind="argument", required=True),
            Option("output", "DIR", "directory to write", required=True),
            Option("images", "DIR", "where a table's pictures lie; default: paths as they stand"),
            Option("image", "NAME", "column of the image; of a TSV its number", default="image"),
            Option("caption", "NAME", "column of the caption; of a TSV its number", default="caption"),
            Option(
                "names",
                "PATTERN",
                "a picture's file below --images, of {path}, {name}, {row}, {md5}, {sha256}",
                default="{path}",
            ),
            Option("name", "NAME", "of the data set", default="pairs"),
            Option("split", "NAME", "of the data set", default="train"),
            Option("short", "N", "pixels of the shorter side at most", kind="integer", default=288, minimum=1),
            Option("quality", "N", "of JPEG", kind="integer", default=90, minimum=1),
            Option("rows", "N", "pairs in one record file, of a table", kind="integer", default=10_000, minimum=1),
            Option("workers", "N", "processes", kind="integer", default=2, minimum=1),
            Option("max_unusable", "SHARE", "of pairs that may be skipped", kind="number", default=0.5),
            BEAM,
            JSON,
        ),
        example="shards --output=data/cc3m --workers=8",
        needs_device=False,
    ),
    "prepare-suite": Command(
        module="vlkd_jax.data.prepare_suite",
        summary="an evaluation set into record files",
        description="Writes the pictures of a suite, as they are in their files, with all their captions or questions "
        "into a tensorflow-datasets directory of ArrayRecord files, from the official files of COCO captions "
        "(Karpathy's splits), VQA v2, OK-VQA, nocaps (with its domains), Flickr30k or your own in their form. Evaluate "
        "with --config.SUITE.records=DIR; vlkd leakage compares it with a training set.",
        options=(
            Option(
                "config",
                "suites:NAME",
                "one suite of configs/suites.py",
                kind="config",
                required=True,
                overrides="overrides a field, such as --config.root=DIR, the folder of the suite's files",
            ),
            Option("output", "DIR", "directory to write", required=True),
            Option("workers", "N", "processes", kind="integer", default=2, minimum=1),
            BEAM,
            JSON,
        ),
        example="--config=suites:vqav2 --config.root=coco --output=data/vqav2",
        needs_device=False,
    ),
    "cache-teacher": Command(
        module="vlkd_jax.cache_teacher",
        summary="the frozen teacher's outputs computed once, for many epochs",
        description="Runs the frozen CLIP of a config once over the pairs that training reads. Train with the same "
        "config and --config.data.teacher_cache=DIR: pictures are then not decoded, nor is the teacher run. The cache "
        "is tied to the weights, the preprocessing and the data by their hashes. The same command again goes on where "
        "one was cut off.",
        options=(
            Option(
                "config",
                "NAME",
                "of training, as for vlkd train",
                kind="config",
                required=True,
                overrides="overrides a field; config.student.image_tokens says which tokens are kept",
            ),
            Option("output", "DIR", "directory to write; several processes need one that all see", required=True),
            Option(
                "dtype",
                "DTYPE",
                "float32|bfloat16|int8; the last two tell their error",
                kind="choice",
                default="float32",
                choices=("float32", "bfloat16", "int8"),
            ),
            *PROCESSES,
            JSON,
        ),
        example="--config=folder --config.data.captions=captions.jsonl --output=cache",
        exit_codes=(0, 1, 2, 4, 130, 143),
    ),
    "leakage": Command(
        module="vlkd_jax.data.leakage",
        summary="pictures of an evaluation set that training has seen",
        description="Compares two directories of vlkd prepare: pictures that are the same file, and nearly the same "
        "ones by a perceptual hash. OUT receives index.html with the nearest pairs side by side, leakage.json with the "
        "counts and leaks.jsonl with all of them.",
        options=(
            Option("train", "DIR", "what is trained on", required=True),
            Option("eval", "DIR", "what is evaluated", required=True),
            Option("output", "OUT", "directory of the page", required=True),
            Option("distance", "N", "bits of 64 that may differ", kind="integer", default=4, minimum=0),
            JSON,
        ),
        example="--train=data/cc3m --eval=data/coco --output=leakage",
        needs_device=False,
    ),
    "doctor": Command(
        module="vlkd_jax.doctor",
        summary="what on this machine would stand in a run's way",
        description="Looks at versions, processes, devices, the coordinator's port, disk, /dev/shm and the compilation "
        "cache, and with a config at its mesh and what a step takes of the memory: a line each, with what to do. Under "
        "SLURM, Open MPI, in a JobSet or on a pod run it in every process, as the run.",
        options=(
            PLANNED,
            Option("workdir", "DIR", "of the run to come; default: this directory"),
            *PROCESSES,
            JSON,
        ),
        example="--config=shapes_vlkd --workdir=runs/shapes",
        needs_device=False,
    ),
    "completion": Command(
        module="vlkd_jax.completion",
        summary="completion of commands and options in your shell",
        description="Prints what a shell is to evaluate, so that Tab completes the commands and their options.",
        options=(Option("shell", "SHELL", "bash|zsh", kind="argument", required=True),),
        example="bash",
        needs_device=False,
    ),
    "demo": Command(
        module="vlkd_jax.shapes.demo",
        summary="the whole job on the built-in world: train, evaluate, report",
        description="The whole job on the built-in world, on one CPU: evaluates the student as it starts, distils, "
        "evaluates again. DIR receives demo.json, report/index.html, the training run and every prediction.",
        options=(
            Option("workdir", "DIR", "directory that receives everything", required=True),
            Option("seed", "N", "of training and of the held-out questions", kind="integer", default=0, minimum=0),
            Option(
                "setup_seconds",
                "N",
                "how long launch/demo.sh took before, for demo.json",
                kind="number",
                default=0.0,
                hidden=True,
            ),
        ),
        example="--workdir=runs/demo --seed=1",
        exit_codes=(0, 1, 2, 3, 4, 130, 143),
    ),
}
"""The commands of `vlkd`, by name. Programs beside them keep their `Command` in their own module."""


def overview() -> str:
    """The text of `vlkd --help`."""
    lines = _table([(name, command.summary) for name, command in COMMANDS.items()])
    more = _table(
        [("vlkd COMMAND --help", "the options of a command, with an example"), ("vlkd --version", "the version")]
    )
    return "\n".join(
        [
            "usage: vlkd COMMAND --OPTION=VALUE ...",
            *("", "Vision-language knowledge distillation, CLIP into BART, in JAX.", "", *lines, "", *more),
            *("", "example: vlkd demo --workdir=runs/demo"),
        ]
    )


def usage(command: Command, program: str) -> str:
    """The text of `PROGRAM --help`, `program` being what one types to start it."""
    told = [option for option in command.options if not option.hidden]
    overrides = [f"[--{option.name}.FIELD=VALUE ...]" for option in told if option.overrides]
    synopsis = " ".join([program, *map(_synopsis, told), *overrides])
    rows = [(_spelled(option), option.help + _notes(option)) for option in told]
    rows += [(f"--{option.name}.FIELD=VALUE", option.overrides) for option in told if option.overrides]
    codes = ", ".join(f"{code} {EXIT_CODES[code]}" for code in command.exit_codes)
    sections = [
        textwrap.fill(f"usage: {synopsis}", COLUMNS, subsequent_indent="  ", break_on_hyphens=False),
        textwrap.fill(command.description, COLUMNS, break_on_hyphens=False),
        "\n".join(_table(rows)),
        textwrap.fill(f"exit codes: {codes}", COLUMNS),
        f"example: {program} {command.example}",
    ]
    return "\n\n".join(sections)


def _spelled(option: Option) -> str:
    if option.kind == "argument":
        return option.value
    if option.kind == "arguments":
        return f"{option.value}..."
    return f"--{option.name}" if option.kind == "flag" else f"--{option.name}={option.value}"


def _synopsis(option: Option) -> str:
    return _spelled(option) if option.required else f"[{_spelled(option)}]"


def _notes(option: Option) -> str:
    notes = "" if option.default is None else f" (default {option.default})"
    return " (required)" if option.required else notes


def _table(rows: Sequence[tuple[str, str]]) -> list[str]:
    width = max(len(left) for left, _ in rows)
    return [f"  {left:{width}}  {right}" for left, right in rows]
