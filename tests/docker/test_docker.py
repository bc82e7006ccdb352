"""The files of docker/: valid, in agreement, and every rule finds a planted mistake."""

import contextlib
import copy
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from helpers import ROOT, needs_proc, wait_for, waits_for_a_child
from manifests import CREATED_OFTEN, of_flags, problems

DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
IGNORED = (DOCKER / "Dockerfile.dockerignore").read_text()


def parsed(directory: Path) -> dict[str, list[dict]]:
    """The objects of every file."""
    paths = directory.glob("*.yaml")
    return {path.name: list(yaml.safe_load_all(path.read_text())) for path in paths}


FILES = parsed(DOCKER)
DOCUMENTS = [(name, number) for name, docs in FILES.items() for number in range(len(docs))]
PAGE = (ROOT / "docs-src" / "docs" / "kubernetes.md").read_text()
LIMIT = 120  # seconds; ends a test that would never end
LINTED = ("docker", ".github", "cifar10/configs", "imagenet/configs", "docs-src/mkdocs.yml")


def tool(name: str, *arguments: object) -> subprocess.CompletedProcess:
    """A command that pip installed."""
    command = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    assert command, f"{name} is not installed; run: pip install -r requirements.txt"
    return subprocess.run([command, *map(str, arguments)], capture_output=True, text=True)


class TestTools:
    @pytest.mark.parametrize("version", ["1.29", "1.37"])  # the oldest that the page names
    @pytest.mark.parametrize(("name", "number"), DOCUMENTS)
    def test_every_object_fits_its_schema(self, name, number, version):
        kubernetes_validate.validate(FILES[name][number], version, strict=True)

    def test_the_schema_finds_a_planted_mistake(self):
        doc = copy.deepcopy(FILES["train_pod.yaml"][0])
        doc["spec"]["restartPolice"] = doc["spec"].pop("restartPolicy")
        with pytest.raises(kubernetes_validate.ValidationError, match="restartPolice"):
            kubernetes_validate.validate(doc, "1.37", strict=True)

    @pytest.mark.parametrize("path", [*LINTED, ".yamllint", ".pre-commit-config.yaml"])
    def test_yamllint(self, path):
        done = tool("yamllint", "--strict", "-c", ROOT / ".yamllint", ROOT / path)
        assert (done.returncode, done.stdout) == (0, "")

    @pytest.mark.parametrize(
        ("text", "rule"),
        [
            ("kind: Pod\nkind: Job\n", "key-duplicates"),
            ("args: [a\n", "syntax"),
            ("amp: yes\n", "truthy"),
            (f"words: {'long ' * 30}\n", "line-length"),
        ],
    )
    def test_yamllint_finds_a_planted_mistake(self, tmp_path, text, rule):
        (tmp_path / "planted.yaml").write_text(text)
        done = tool("yamllint", "--strict", "-c", ROOT / ".yamllint", tmp_path)
        assert done.returncode and f"({rule})" in done.stdout

    @pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.deploy"])
    def test_hadolint(self, name):
        done = tool("hadolint", DOCKER / name)
        assert (done.returncode, done.stdout) == (0, "")

    def test_hadolint_finds_a_planted_mistake(self, tmp_path):
        (tmp_path / "Dockerfile").write_text(DOCKERFILE.replace("WORKDIR /", "WORKDIR "))
        assert "DL3000" in tool("hadolint", tmp_path / "Dockerfile").stdout


def pod(files: dict, name: str = "train_pod.yaml") -> dict:
    """The pod of a file."""
    doc = files[name][-1]
    return doc["spec"]["template"]["spec"] if doc["kind"] == "Job" else doc["spec"]


def container(files: dict, name: str = "train_pod.yaml") -> dict:
    return pod(files, name)["containers"][0]


def put(value: object, *keys: object, name: str = "train_pod.yaml", where=pod):
    """A mistake: another value at these keys of a pod (or of what `where` finds)."""

    def plant(files: dict) -> None:
        part = where(files, name)
        for key in keys[:-1]:
            part = part[key]
        part[keys[-1]] = value

    return plant


def first(files: dict, name: str) -> dict:
    return files[name][0]


def last(files: dict, name: str) -> dict:
    return files[name][-1]


MULTI, JOB, SHELL = "train_multinode.yaml", "train_job.yaml", "interactive_pod.yaml"
TRAINING = ("train_pod.yaml", JOB, MULTI)
# what a pod's schema accepts, and much else that would only show on a cluster
MISTAKES = {
    "a mount of no volume": (
        put("dta", "volumeMounts", 0, "name", where=container),
        "volume-unknown: .*dta",
    ),
    "a volume without a mount": (
        lambda files: container(files)["volumeMounts"].pop(),
        "volume-unused: .*tmp",
    ),
    "an enum": (put("Sometimes", "restartPolicy"), "enum: .*restartPolicy.*'Sometimes'"),
    "an access mode": (
        put(["ReadWriteTwice"], "spec", "accessModes", name="volumes.yaml", where=first),
        "access-modes: .*ReadWriteTwice",
    ),
    "half a GPU": (
        put(0.5, "resources", "limits", "nvidia.com/gpu", where=container),
        "gpu-count: .*0.5",
    ),
    "a quantity": (
        put("16Gib", "resources", "requests", "memory", where=container),
        "quantity: .*'16Gib'",
    ),
    "a size": (put("16 Gi", "volumes", 2, "emptyDir", "sizeLimit"), "quantity: .*'16 Gi'"),
    "a medium": (put("Ram", "volumes", 2, "emptyDir", "medium"), "enum: .*medium.*'Ram'"),
    "shared memory on the disk": (
        lambda files: pod(files)["volumes"][2]["emptyDir"].pop("medium"),
        "shared-memory: ",
    ),
    "an unknown claim": (
        put("early-exit-dat", "volumes", 0, "persistentVolumeClaim", "claimName"),
        "claim-unknown: .*early-exit-dat ",
    ),
    "other volumes": (
        lambda files: pod(files, SHELL)["volumes"].append({"name": "more", "emptyDir": {}}),
        "interactive_pod.yaml: differs: .*volumes ",
    ),
    "other mounts": (
        put("/data", "volumeMounts", 0, "mountPath", name=SHELL, where=container),
        "interactive_pod.yaml: differs: .*volumeMounts ",
    ),
    "another image": (
        put("early-exit:latest", "image", name=JOB, where=container),
        "train_job.yaml: differs: .*image ",
    ),
    "a script that does not exist": (
        put("imagenet/train.py", "args", 0, where=container),
        "script-unknown: .*imagenet/train.py",
    ),
    "a flag": (put("--arhc=resnet50", "args", 1, where=container), "flags: .*--arhc=resnet50"),
    "a network": (put("--arch=resnet51", "args", 1, where=container), "flags: .*resnet51"),
    "no resuming": (put("--seed=1", "args", 4, where=container), "resume: "),
    "no check": (
        put(["bash", "-c", 'exec torchrun "$@"', "train"], "command", where=container),
        "command: .*--check",
    ),
    "root": (put(0, "securityContext", "runAsUser"), "pod-rights: "),
    "privileges": (
        put(True, "securityContext", "allowPrivilegeEscalation", where=container),
        "container-rights: ",
    ),
    "a token": (put(True, "automountServiceAccountToken"), "token: "),
    "a path of the node": (
        put({"name": "data", "hostPath": {"path": "/"}}, "volumes", 0),
        "node-path: ",
    ),
    "the node's network": (put(True, "hostNetwork"), "node-namespace: "),
    "no limit": (
        lambda files: container(files)["resources"]["limits"].pop("memory"),
        "limit-missing: .*memory",
    ),
    "no GPU": (
        lambda files: container(files)["resources"]["limits"].pop("nvidia.com/gpu"),
        "device: .*--device=cpu",
    ),
    "a silent training on CPUs": (
        put("--device=auto", "args", 3, where=container),
        "device: .*cuda",
    ),
    "no number of threads": (lambda files: container(files)["env"].pop(0), "threads: "),
    "another number of threads": (
        put({"name": "OMP_NUM_THREADS", "value": "16"}, "env", 0, name=SHELL, where=container),
        "interactive_pod.yaml: threads: ",
    ),
    "threads as requested": (
        put("requests.cpu", "env", 0, "valueFrom", "resourceFieldRef", "resource", where=container),
        "threads: ",
    ),
    "a short grace": (put(30, "terminationGracePeriodSeconds"), "grace: "),
    "a namespace": (put("mine", "metadata", "namespace", where=first), "namespace: "),
    "a fixed name": (
        lambda files: put(
            files["train_pod.yaml"][0]["metadata"].pop("generateName"),
            "metadata",
            "name",
            where=first,
        )(files),
        "name: .*generateName",
    ),
    "labels": (put({}, "metadata", "labels", where=first), "labels: .*{}"),
    "a GPU in the shell": (
        put(1, "resources", "limits", "nvidia.com/gpu", name=SHELL, where=container),
        "gpu-unasked: ",
    ),
    "a shell beside another pod": (
        put(
            "train",
            "affinity",
            "podAffinity",
            "preferredDuringSchedulingIgnoredDuringExecution",
            0,
            "podAffinityTerm",
            "labelSelector",
            "matchLabels",
            "app.kubernetes.io/name",
            name=SHELL,
        ),
        "affinity: ",
    ),
    "a mistake that is retried": (
        lambda files: last(files, JOB)["spec"]["podFailurePolicy"]["rules"].pop(),
        "mistake-retried: ",
    ),
    "a disruption that counts": (
        lambda files: last(files, JOB)["spec"]["podFailurePolicy"]["rules"].pop(0),
        "disruption-counted: ",
    ),
    "a Job that restarts in place": (
        put("OnFailure", "restartPolicy", name=JOB),
        "restart-in-place: ",
    ),
    "a back-off of all pods together": (
        put(20, "spec", "backoffLimit", name=MULTI, where=last),
        "back-off: ",
    ),
    "pods that continue without one": (
        lambda files: last(files, MULTI)["spec"].pop("maxFailedIndexes"),
        "index-failed: ",
    ),
    "a Service of other pods": (
        put({"app": "x"}, "spec", "selector", name=MULTI, where=first),
        "service-selector: ",
    ),
    "a Service with an address": (
        put("10.0.0.1", "spec", "clusterIP", name=MULTI, where=first),
        "service-headless: ",
    ),
    "another subdomain": (put("early-exit", "subdomain", name=MULTI), "subdomain: "),
    "another name": (put("multi", "metadata", "name", name=MULTI, where=last), "master-addr: "),
    "another port": (
        put(29400, "spec", "ports", 0, "port", name=MULTI, where=first),
        "master-port: ",
    ),
    "another number of nodes": (
        put(3, "spec", "completions", name=MULTI, where=last),
        "completions: ",
    ),
    "pods without a number": (
        put("NonIndexed", "spec", "completionMode", name=MULTI, where=last),
        "completion-mode: ",
    ),
}
IMAGE_MISTAKES = {
    "another user": (("USER 10001:10001", "USER 1000:1000"), "user: "),
    "a file that does not exist": (
        ("COPY cifar10 cifar10", "COPY cifar cifar"),
        "copy-missing: .* cifar, ",
    ),
    "no script": (("COPY imagenet imagenet\n", ""), "image-script: .*imagenet/main.py"),
    "another directory": (("WORKDIR /workspace", "WORKDIR /work"), "mount-paths: "),
    "shell form": (('CMD ["python", ', 'CMD python "'), "shell-form: "),
    "a hidden file": (("!setup.cfg\n", ""), "copy-ignored: .*setup.cfg"),
    "an install of empty packages": (
        ("mkdir data runs", 'mkdir data runs imagenet && pip install -e ".[plots]"'),
        "install-early: .*imagenet",
    ),
}


def found_by(expected: str, lines: Iterator[str]) -> bool:
    """Whether a line has the rule, and what it names, of the pattern `expected`."""
    return any(re.search(rf"(^|: ){expected}", line) for line in lines)


class TestRules:
    def test_the_files_have_none(self):
        assert list(problems(FILES, DOCKERFILE, IGNORED)) == []

    @pytest.mark.parametrize(("plant", "expected"), MISTAKES.values(), ids=MISTAKES)
    def test_a_mistake_in_an_object_is_found(self, plant, expected):
        files = copy.deepcopy(FILES)
        plant(files)
        assert found_by(expected, problems(files, DOCKERFILE, IGNORED))

    @pytest.mark.parametrize(("change", "expected"), IMAGE_MISTAKES.values(), ids=IMAGE_MISTAKES)
    def test_a_mistake_in_the_image_is_found(self, change, expected):
        assert sum(change[0] in text for text in (DOCKERFILE, IGNORED)) == 1
        texts = (text.replace(*change) for text in (DOCKERFILE, IGNORED))
        assert found_by(expected, problems(FILES, *texts))

    def test_cifar10_is_a_change_of_two_lines(self):
        lines = (DOCKER / "train_pod.yaml").read_text().splitlines()
        marked = [line.partition("# CIFAR-10: ") for line in lines if "# CIFAR-10: " in line]
        assert len(marked) == 2
        changes = {before.strip().removeprefix("- "): after for before, _, after in marked}
        script, *flags = (changes.get(word, word) for word in container(FILES)["args"])
        assert script == "cifar10/trainer.py"
        assert of_flags(script, *flags) == []

    def test_the_pages_commands_that_change_files_work(self, tmp_path):
        shutil.copytree(DOCKER, tmp_path / "docker")
        commands = re.findall("^sed .*", PAGE, re.MULTILINE)
        assert len(commands) == 3  # the registry, CPUs, small nodes
        for command in commands:
            subprocess.run(["sh", "-c", command], cwd=tmp_path, check=True)
        files = parsed(tmp_path / "docker")
        assert list(problems(files, DOCKERFILE, IGNORED)) == []
        for name in TRAINING:
            one = container(files, name)
            assert "--device=cpu" in one["args"]
            assert one["image"].startswith("registry.example.com/")
            assert one["resources"]["limits"] == one["resources"]["requests"]
            assert one["resources"]["limits"] == {"cpu": "1", "memory": "4Gi"}

    def test_marked_lines_are_those_that_differ_on_cpus(self):
        for name in TRAINING:
            lines = (DOCKER / name).read_text().splitlines()
            marked = [line.split("#")[0].strip() for line in lines if "# CPUs: " in line]
            assert marked == ["- --device=cuda", "nvidia.com/gpu: 4"]

    @pytest.mark.parametrize("name", sorted(FILES.keys() - CREATED_OFTEN))
    def test_the_page_deletes_what_has_a_fixed_name(self, name):
        assert f"kubectl delete -f docker/{name}" in PAGE

    @pytest.mark.parametrize("name", FILES)
    def test_the_first_line_is_the_command(self, name):
        first_line = (DOCKER / name).read_text().partition("\n")[0]
        assert first_line == f"# kubectl create -f docker/{name}"


@pytest.mark.parametrize("page", ["README.md", "docs-src/docs/kubernetes.md"])
def test_every_file_that_a_page_names_exists(page):
    named = re.findall(r"-f (docker/[\w.]+)", (ROOT / page).read_text())
    assert len(named) >= 4
    assert [name for name in named if not (ROOT / name).is_file()] == []


class TestCommands:
    """What the pods run, with a python and a torchrun that only print their arguments."""

    @pytest.fixture
    def run(self, tmp_path):
        """Starts a file's command with its arguments and `more`, with a CPU limit of 33 and so many
        GPUs. `check` and `torchrun`: what those do; `sleep` prints a line first."""
        started: list[tuple[subprocess.Popen, threading.Timer]] = []
        sleep = f'echo up\nexec {shutil.which("sleep")} "$@"'

        def start(
            name: str, check: str, torchrun='echo "torchrun $*"', more=(), gpus=0, stderr=None
        ) -> subprocess.Popen:
            for number in range(gpus):
                (tmp_path / f"nvidia{number}").touch()
            (tmp_path / "nvidiactl").touch()
            for program, body in (("python", check), ("torchrun", torchrun), ("sleep", sleep)):
                path = tmp_path / program
                path.write_text(f"#!/bin/sh\n{body}\n")
                path.chmod(0o755)
            one = container(FILES, name)
            command = [*one["command"], *one.get("args", []), *more]
            process = subprocess.Popen(
                [word.replace("/dev/nvidia", f"{tmp_path}/nvidia") for word in command],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={
                    "PATH": f"{tmp_path}:{os.environ['PATH']}",
                    "JOB_COMPLETION_INDEX": "1",
                    "OMP_NUM_THREADS": "33",
                    "EARLY_EXIT_LAST_LINE": str(tmp_path / "last-line"),
                },
                start_new_session=True,
            )
            # a line that never comes ends the test instead of holding it
            timer = threading.Timer(LIMIT, kill, [process])
            timer.start()
            started.append((process, timer))
            return process

        def kill(process: subprocess.Popen) -> None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        yield start
        for process, timer in started:
            timer.cancel()
            kill(process)

    @pytest.mark.parametrize(
        ("name", "launch"),
        [
            ("train_pod.yaml", "--standalone"),
            (JOB, "--standalone"),
            (MULTI, "--nnodes=2 --node-rank=1"),
        ],
    )
    def test_torchrun_follows_the_check(self, run, name, launch):
        process = run(name, 'echo "python $*"')
        out, _ = process.communicate(timeout=LIMIT)
        script = " ".join(container(FILES, name)["args"])
        checked, started = out.splitlines()
        assert checked == f"python {script} --check"
        assert started.startswith(f"torchrun {launch} ") and started.endswith(script)
        assert process.returncode == 0

    @pytest.mark.parametrize("name", TRAINING)
    def test_a_mistake_ends_it_with_the_code_of_the_check(self, run, name):
        process = run(name, "exit 2")
        assert process.communicate(timeout=LIMIT) == ("", None)
        assert process.returncode == 2

    @needs_proc
    @pytest.mark.parametrize("name", TRAINING)
    def test_torchrun_gets_the_signal_and_decides_the_exit_code(self, run, name, tmp_path):
        os.mkfifo(tmp_path / "idle")  # reading blocks until the test writes
        os.mkfifo(tmp_path / "save")
        saving = f"echo signalled; read _ <{tmp_path}/save; echo saved; exit 1"
        idle = f"while :; do read _ <{tmp_path}/idle; done"
        process = run(name, "true", f"trap '{saving}' TERM; echo up; {idle}")
        assert process.stdout.readline() == "up\n"
        # the shell has set its trap once it waits for torchrun
        wait_for(lambda: waits_for_a_child(process.pid), "the pod's shell waits", LIMIT)
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "signalled\n"
        assert process.poll() is None
        (tmp_path / "save").write_text("continue\n")
        assert process.stdout.readline() == "saved\n"
        assert process.wait(timeout=LIMIT) == 1  # 143 if it were ended by the signal

    @pytest.mark.parametrize("name", TRAINING)
    @pytest.mark.parametrize(
        ("more", "gpus", "processes", "threads"),
        [((), 4, "gpu", 9), (("--device=cpu",), 0, "1", 33), (("--device", "cpu"), 0, "1", 33)],
    )
    def test_processes_share_the_cpus(self, run, name, more, gpus, processes, threads):
        process = run(name, "true", 'echo "$OMP_NUM_THREADS $*"', more, gpus)
        out, _ = process.communicate(timeout=LIMIT)
        assert out.startswith(f"{threads} ")
        assert f" --nproc-per-node={processes} " in out

    @pytest.mark.parametrize("name", TRAINING)
    def test_what_the_training_ends_with_comes_last(self, run, name, tmp_path):
        (tmp_path / "last-line").write_text("of a container before this one")
        training = 'echo saved >> "$EARLY_EXIT_LAST_LINE"; echo traceback >&2; exit 1'
        process = run(name, "true", training, stderr=subprocess.STDOUT)
        assert process.communicate(timeout=LIMIT)[0] == "traceback\nsaved\n"
        assert process.returncode == 1

    @pytest.mark.parametrize("code", [0, 1])
    def test_its_exit_code_is_that_of_torchrun(self, run, code):
        assert run("train_pod.yaml", "true", f"exit {code}").wait(timeout=LIMIT) == code

    @pytest.mark.parametrize("name", ["train_pod.yaml", SHELL])
    def test_it_ends_at_once_when_it_is_deleted(self, run, name):
        process = run(name, "exec sleep infinity")
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(timeout=LIMIT)
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # as the end of a container does to the others
        # a Job would count 0 as success
        assert code == 143 if name == "train_pod.yaml" else code is not None
