"""The files that start runs elsewhere: linted, validated against real schemas, run as far as one machine goes."""

import copy
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from test_many_processes import MESH, reached, same_bits, wait_for
from test_processes import endings, port, running  # noqa: F401  # port is a fixture
from tiny import ROOT, arguments, environment

from vlkd_jax import cluster
from vlkd_jax.commands import COMMANDS
from vlkd_jax.configs import base
from vlkd_jax.options import EXIT_CODES
from vlkd_jax.runs import load_run

LAUNCH = ROOT / "launch"
BIN = Path(sys.executable).parent
SHELLS = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch", ROOT / ".ci" / "run"]
JOBSETS = sorted(LAUNCH.glob("gke_jobset*.yaml"))
SCHEMA = ROOT.parent / "shared" / "data" / "schemas" / "jobset.x-k8s.io_jobsets.yaml"
FINAL = {0, 1, 2, 3, 130}
"""Exit codes after which a job is over; after the others the same command goes on."""


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


def container_of(jobset: dict) -> tuple[dict, dict]:
    """(job, container) of a JobSet of one kind of job."""
    [replicated] = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    [container] = job["template"]["spec"]["containers"]
    return job, container


def program(directory: Path, name: str, text: str) -> None:
    """A stand-in for a program of a cluster or a cloud."""
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(text)
    (directory / name).chmod(0o755)


def check_vlkd(argv: list[str]) -> None:
    """Every option is one of the command, every field one of the configs."""
    command, *options = argv
    names = {option.name for option in COMMANDS[command].params}
    for option in options:
        name, equals, _ = option.removeprefix("--").partition("=")
        assert equals, option
        if name.startswith("config."):
            field = base.get_config()
            for part in name.split(".")[1:]:
                assert part in field, option
                field = field[part]
        else:
            assert name in names, option


def test_shells_are_clean():
    result = subprocess.run(
        [BIN / "shellcheck", "--external-sources", *SHELLS], capture_output=True, text=True, cwd=ROOT
    )
    assert (result.returncode, result.stdout) == (0, "")


def test_the_dockerfile_is_clean():
    """And what it copies is there, and reaches docker."""
    result = subprocess.run([BIN / "hadolint", LAUNCH / "Dockerfile"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "")
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    copied = [source for line in lines if line.startswith("COPY ") for source in line.split()[1:-1]]
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(copied) == kept and all((ROOT / source).exists() for source in copied)


@pytest.mark.shared_data
@pytest.mark.parametrize("path", JOBSETS, ids=lambda path: path.name)
def test_jobsets_are_valid(path):
    """By JobSet's schema, unknown fields refused, and their jobs by that of Kubernetes."""
    [version] = [v for v in read(SCHEMA)["spec"]["versions"] if v["name"] == "v1alpha2"]
    schema = closed(version["schema"]["openAPIV3Schema"])
    jobset = read(path)
    jsonschema.validate(jobset, schema)
    job, _ = container_of(jobset)
    whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": job}
    kubernetes_validate.validate(whole, kubernetes_validate.latest_version(), strict=True)
    for change in ({"replicasx": 1}, {"replicas": "1"}):
        wrong = copy.deepcopy(jobset)
        wrong["spec"]["replicatedJobs"][0] |= change
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)


def closed(schema: dict) -> dict:
    """The schema with every object that lists its properties closed to others."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {name: closed(part) for name, part in schema.items()}
    listed = isinstance(inner.get("properties"), dict) and inner.get("type") == "object"
    is_metadata = inner == {"type": "object"}
    return inner | ({"additionalProperties": False} if listed and not is_metadata else {})


@pytest.mark.parametrize("path", JOBSETS, ids=lambda path: path.name)
def test_jobsets_say_what_the_program_does(path):
    jobset = read(path)
    job, container = container_of(jobset)
    check_vlkd(container["args"])
    [rule] = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and set(rule["onExitCodes"]["values"]) == FINAL - {0, 130} < set(EXIT_CODES)
    assert rule["onExitCodes"]["containerName"] == container["name"]
    [restart] = jobset["spec"]["failurePolicy"]["rules"]
    assert (restart["action"], restart["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0 and job["backoffLimit"] == 0
    assert job["template"]["spec"]["terminationGracePeriodSeconds"] >= 60
    assert jobset["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    values = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert values["JOBSET_PODS"] == str(job["parallelism"]) == str(job["completions"])
    assert {*cluster.JOBSET} - {"JOB_COMPLETION_INDEX"} <= set(values)
    [replicated] = jobset["spec"]["replicatedJobs"]
    assert jobset["spec"]["coordinator"]["replicatedJob"] == replicated["name"]
    assert values["JAX_COORDINATOR_PORT"] == str(container["ports"][0]["containerPort"]) == str(cluster.PORT)


def pods(path: Path, jobs: int, each: int) -> list[dict[str, str]]:
    """The variables of every pod, with what JobSet and Kubernetes put in their places."""
    _, container = container_of(read(path))
    variables = []
    for job in range(jobs):
        known = {
            "metadata.annotations['jobset.sigs.k8s.io/coordinator']": "localhost",
            "metadata.labels['jobset.sigs.k8s.io/replicatedjob-replicas']": str(jobs),
            "metadata.labels['jobset.sigs.k8s.io/job-index']": str(job),
        }
        for index in range(each):
            told = {"JOB_COMPLETION_INDEX": str(index)}
            for variable in container["env"]:
                source = variable.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
                told[variable["name"]] = known[source] if source else variable["value"]
            variables.append(told | {"JOBSET_PODS": str(each)})
    return variables


@pytest.mark.parametrize(("name", "jobs", "each"), [("gke_jobset.yaml", 2, 1), ("gke_jobset_gpu.yaml", 1, 2)])
def test_pods_of_a_jobset_meet(name, jobs, each, port):  # noqa: F811
    """By the variables that the file gives them alone."""
    changes = {"JAX_COORDINATOR_PORT": str(port), "JAX_COMPILATION_CACHE_DIR": ""}
    told = [variables | changes for variables in pods(LAUNCH / name, jobs, each)]
    with running(*(([], variables) for variables in told)) as started:
        assert endings(started) == [(0, ["met 0"], ""), (0, ["met 1"], "")]


SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys
world = {{"SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "localhost"}}
world["SLURM_STEP_NUM_NODES"] = "1"
tasks = []
for index in range(2):
    own = world | {{"SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)}}
    tasks.append(subprocess.Popen(sys.argv[1:], env=os.environ | own))
signal.signal(signal.SIGTERM, lambda *_: [task.send_signal(signal.SIGTERM) for task in tasks])
open(os.environ["STEP_PID"], "w").write(str(os.getpid()))
sys.exit(max(task.wait() for task in tasks))
"""
"""Two tasks of a step on this machine; a signal to it goes to the tasks, as SLURM's do."""


@pytest.fixture
def slurm(tmp_path, port):  # noqa: F811
    """Function (argv, variables) -> a running slurm.sbatch; its srun starts two processes, its scontrol notes calls."""
    program(tmp_path / "bin", "srun", SRUN)
    program(tmp_path / "bin", "scontrol", f'#!/bin/bash\necho "$*" >> "{tmp_path}/scontrol"\n')
    shutil.copy(LAUNCH / "slurm.sbatch", tmp_path / "slurm_script")  # SLURM runs a copy of its own
    known = environment() | {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "VLKD_VENV": str(BIN.parent),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "4321",
        "SLURM_NTASKS_PER_NODE": "2",
        "JAX_COORDINATOR_PORT": str(port),
        "STEP_PID": str(tmp_path / "pid"),
    }

    def submit(argv: list[str], **variables: str) -> subprocess.Popen:
        command = ["bash", tmp_path / "slurm_script", *argv]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env=known | variables, cwd=tmp_path, **pipes)

    return submit


def test_a_slurm_job_goes_on_where_its_time_was_up(slurm, assets, tmp_path):
    """SIGTERM to its tasks: saved, exit code 143, queued again; it then ends with an uninterrupted job's bits."""
    sizes = {"data__context_length": 0, "dropout": 0.1, **MESH, "steps": 14, "save_every": 4}

    def submit(name: str, **variables: str) -> subprocess.Popen:
        return slurm(["train", *arguments(assets, tmp_path / name, **sizes)], **variables)

    whole = submit("whole")
    assert whole.wait(300) == 0, whole.stdout.read()
    job = submit("run")
    wait_for(lambda: reached(tmp_path / "run", 5))
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
    assert job.wait(60) == 143, job.stdout.read()
    told = job.stdout.read()
    assert "stopped by SIGTERM after step" in told and "queued again, restart 1" in told
    assert (tmp_path / "scontrol").read_text() == "requeue 4321\n"
    assert load_run(tmp_path / "run")[2] < 14
    again = submit("run", SLURM_RESTART_COUNT="1")
    assert again.wait(300) == 0, again.stdout.read()
    assert (tmp_path / "scontrol").read_text() == "requeue 4321\n"
    same_bits(load_run(tmp_path / "run")[1], load_run(tmp_path / "whole")[1])


@pytest.mark.parametrize("code", [*EXIT_CODES, 137])
def test_a_slurm_job_is_queued_again_where_that_helps(code, slurm, tmp_path):
    program(tmp_path / "bin", "srun", f'#!/bin/bash\necho "$JAX_LOCAL_DEVICE_IDS|$*"\nexit {code}\n')
    job = slurm(["train", "--config=x"], SLURM_GPUS_ON_NODE="4")
    told = job.communicate(timeout=60)[0]
    assert job.returncode == code, told
    vlkd = f"{BIN}/vlkd"
    assert told.splitlines()[0] == f"|{vlkd} train --config=x --start_seconds=1800 --heartbeat_seconds=900"
    assert (tmp_path / "scontrol").exists() == (code not in FINAL)
    last = slurm(["train"], SLURM_RESTART_COUNT="20", SLURM_NTASKS_PER_NODE="1", SLURM_GPUS_ON_NODE="4")
    assert last.communicate(timeout=60)[0].startswith("0,1,2,3|") and last.returncode == code
    assert len((tmp_path / "scontrol").read_text().splitlines() if code not in FINAL else []) == (code not in FINAL)


@pytest.mark.parametrize(
    ("argv", "variables", "told"),
    [
        ([], {}, "error: no command given; see the top of launch/slurm.sbatch"),
        (
            ["train"],
            {"VLKD_VENV": "/nowhere"},
            "error: /nowhere holds no vlkd; run first: bash launch/slurm.sbatch --set",
        ),
        (["train"], {"SLURM_SUBMIT_DIR": "/"}, "error: / is no checkout of vlkd_jax; submit from the root of one"),
    ],
)
def test_mistakes_of_a_slurm_job(argv, variables, told, slurm):
    job = slurm(argv, **variables)
    line = job.communicate(timeout=60)[0]
    assert job.returncode == 2 and line.startswith(told) and line.count("\n") == 1


def test_slurm_directives():
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    directives = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
    assert {"signal=TERM@120", "requeue", "open-mode=append"} <= set(directives)
    assert not any("gpus-per-task" in directive for directive in directives)
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(i < first for i, line in enumerate(lines) if line.startswith("#SBATCH"))  # SLURM reads no further


GCLOUD = """#!/bin/bash
printf '%q ' "$@" >> "$CALLS"; echo >> "$CALLS"
[[ " $* " == *" list-instances "* ]] && printf 'vlkd-a\\nvlkd-b\\n'
for argument; do
  [[ $argument == --command=* ]] && { bash -c "${argument#--command=}" || exit; }
done
exit 0
"""
DOCKER = """#!/bin/bash
[[ $1 == run ]] && { printf '%s\\0' "$@" > "$DOCKER_CALL.$$"; exit "${DOCKER_EXITS:-0}"; }
exit 0
"""


@pytest.fixture
def cloud(tmp_path):
    """Function (script, argv, variables) -> how it ended, with a gcloud and a docker that note what they are asked."""
    program(tmp_path / "bin", "gcloud", GCLOUD)
    program(tmp_path / "bin", "docker", DOCKER)
    program(tmp_path / "bin", "sudo", '#!/bin/bash\nexec "$@"\n')
    known = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "NAME"))}
    known |= {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}
    known |= {"DOCKER_CALL": str(tmp_path / "docker"), "PROJECT": "mine", "ZONE": "us-east5-b", "CONTAINER": "image:1"}

    def call(script: str, *argv: str, **variables: str) -> subprocess.CompletedProcess:
        return subprocess.run([LAUNCH / script, *argv], env=known | variables, capture_output=True, text=True)

    return call


TRAIN = ["train", "--config=folder", "--workdir=gs://b/run", "--config.data.captions=a b'c.jsonl"]


@pytest.mark.parametrize(("script", "hosts"), [("gce_tpu.sh", 2), ("tpu_vm.sh", 1)])
def test_every_machine_of_a_slice_runs_the_command(script, hosts, cloud, tmp_path):
    """Arguments come through two shells as they were; the exit code comes back."""
    result = cloud(script, "run", *TRAIN)
    assert result.returncode == 0, result.stderr
    started = [path.read_text().split("\0")[:-1] for path in tmp_path.glob("docker.*")]
    assert len(started) == hosts
    for argv in started:
        image = argv.index("image:1")
        assert argv[image + 1 :] == [*TRAIN, "--start_seconds=1800", "--heartbeat_seconds=900"]
        check_vlkd(argv[image + 1 :])
        assert {"--env=JAX_COORDINATOR_PORT=8476", "--network=host", "--privileged"} <= set(argv[:image])
    assert cloud(script, "run", *TRAIN, DOCKER_EXITS="143").returncode == 143


def test_what_is_made_is_deleted(cloud, tmp_path):
    for script, kinds in (
        ("gce_tpu.sh", ["resource-policies", "instance-templates", "instance-groups"]),
        ("tpu_vm.sh", ["queued-resources"]),
    ):
        for verb in ("create", "delete"):
            assert cloud(script, verb).returncode == 0
            calls = [shlex.split(line) for line in (tmp_path / "calls").read_text().splitlines()]
            (tmp_path / "calls").unlink()
            done = {kind for call in calls for kind in kinds if kind in call and verb in call and "vlkd" in call}
            assert done == set(kinds)
            assert all("--project=mine" in call for call in calls)


@pytest.mark.parametrize("script", ["gce_tpu.sh", "tpu_vm.sh"])
@pytest.mark.parametrize(
    ("argv", "variables", "told"),
    [
        ([], {}, "say create, run, stop, logs or delete; see"),
        (["start"], {}, "say create, run, stop, logs or delete; see"),
        (["create"], {"PROJECT": ""}, "PROJECT and ZONE must be set"),
        (["run"], {}, "no vlkd command given; see"),
        (["run", *TRAIN], {"CONTAINER": ""}, "CONTAINER is not set; name an image of launch/Dockerfile"),
        (["run", "train", "--workdir=here"], {}, "--workdir has to be gs://BUCKET/DIR: all machines write one run"),
    ],
)
def test_mistakes_on_a_slice(script, argv, variables, told, cloud, tmp_path):
    result = cloud(script, *argv, **variables)
    assert (result.returncode, result.stdout) == (2, "") and result.stderr.startswith(f"error: {told}"), result
    assert not (tmp_path / "calls").exists()


@pytest.mark.parametrize(("accelerator", "given"), [("cuda12", True), ("tpu", False)])
def test_skypilot_tells_each_machine_its_place(accelerator, given, tmp_path):
    task = read(LAUNCH / "skypilot.yaml")
    (tmp_path / "vlkd").mkdir()
    program(tmp_path / "vlkd" / "bin", "vlkd", "#!/bin/bash\nprintf '%s\\n' \"$@\"\n")
    variables = os.environ | task["envs"] | {"HOME": str(tmp_path), "ACCELERATOR": accelerator}
    variables |= {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    argv = subprocess.check_output(
        ["bash", "-euo", "pipefail", "-c", task["run"]], env=variables, text=True
    ).splitlines()
    check_vlkd(argv)
    where = ["--coordinator=10.0.0.1:8476", "--processes=2", "--process=1"]
    assert argv[-3:] == where if given else not set(where) & set(argv)
    checked = subprocess.run(
        [BIN / "shellcheck", "--shell=bash", "--exclude=SC1091", "-"],  # SC1091: setup.sh, checked by itself
        input=task["setup"] + task["run"],
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stdout


def test_the_xpk_example(tmp_path):
    program(tmp_path / "bin", "xpk", "#!/bin/bash\nprintf '%s\\n' \"$@\"\n")
    names = ("CLUSTER", "PROJECT", "ZONE", "CONTAINER", "BUCKET")
    variables = os.environ | dict.fromkeys(names, "mine") | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    told = subprocess.check_output([LAUNCH / "xpk.sh"], env=variables, text=True).splitlines()
    [command] = [shlex.split(line.removeprefix("--command=")) for line in told if line.startswith("--command=")]
    assert command[0] == "vlkd"
    check_vlkd(command[1:])
    codes = next(line.partition("=")[2] for line in told if line.startswith("--restart-on-exit-codes"))
    assert not {int(code) for code in codes.split(",")} & FINAL


def test_the_cluster_toolkit_example():
    """Every module that another one uses is there before it."""
    known: set[str] = set()
    for group in read(LAUNCH / "cluster_toolkit.yaml")["deployment_groups"]:
        for module in group["modules"]:
            assert set(module.get("use", [])) <= known, module
            known.add(module["id"])
    assert {"nodes", "login", "controller"} <= known


def test_the_readme_tells_of_every_file():
    text = (LAUNCH / "README.md").read_text()
    missing = [path.name for path in LAUNCH.iterdir() if path.name != "README.md" and f"`{path.name}`" not in text]
    assert missing == []
