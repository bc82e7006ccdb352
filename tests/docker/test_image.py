"""All programs as they are installed: by the Dockerfile's steps, in the image, and from a wheel."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import ROOT
from manifests import installs_here, instructions
from packaging.requirements import Requirement
from PIL import Image

DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
INSTRUCTIONS = instructions(DOCKERFILE)
PACKAGES = ("early_exit", "cifar10", "imagenet")
PRETRAINED = "cifar10/pretrained/airbench"
LOCAL = ("--no-deps", "--no-build-isolation")  # pip uses only what is installed for the tests


def check_programs(run: Callable[..., str], runs: Path, pretrained: str = PRETRAINED) -> None:
    """Trains, evaluates and predicts. run: runs a command and gives its standard output; runs: its
    directory runs/."""
    machine = ("--device", "cpu", "--threads", "1")
    network = ("--dataset", "digits", "--arch", "resnet20", "--exits", "layer1", "--epochs", "1")
    run("python", "cifar10/trainer.py", *network, *machine, "--save-dir", "runs/run")
    timing = ("--timing-images", "8", "--batch-sizes", "1", "--name", "chosen")
    run("python", "cifar10/eval.py", "runs/run", *machine, *timing)
    found = {path.name for path in (runs / "run" / "eval" / "chosen").iterdir()}
    assert {"policy.yaml", "report.json", "report.md", "report.html"} <= found
    assert any(name.endswith(".png") for name in found)
    Image.new("RGB", (32, 32), "red").save(runs / "red.png")
    for model in ("runs/run", pretrained):
        command = ("python", "-m", "early_exit.predict", model, "runs/red.png", "--json")
        assert json.loads(run(*command, *machine))["exit"]


def steps() -> Iterator[list[str]]:
    """The commands of the Dockerfile, and each COPY as one, in order."""
    for key, rest in INSTRUCTIONS:
        if key == "COPY":
            yield [key, *shlex.split(rest)]
        elif key == "RUN":
            yield from map(shlex.split, rest.split(" && "))


def copy(sources: list[str], target: Path) -> None:
    """As COPY does: files into a directory, the files of a directory to another."""
    for source in (ROOT / name for name in sources):
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, target, dirs_exist_ok=True, ignore=ignored)
        else:
            shutil.copy(source, target)


@pytest.fixture
def python(tmp_path) -> Path:
    """The Python of an environment that has the packages of the tests, but not this repository."""
    pytest.importorskip("setuptools", minversion="70.1")  # makes wheels by itself
    venv.create(tmp_path / "venv", symlinks=True)
    (site,) = (tmp_path / "venv" / "lib").glob("*/site-packages")
    ours = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site / "tests.pth").write_text("\n".join(ours))
    return tmp_path / "venv" / "bin" / "python"


@pytest.fixture
def run(python, tmp_path) -> Callable[..., str]:
    """Runs a command with that Python, in the directory of its name, with the variables of the
    image."""
    variables = dict(
        word.split("=") for key, rest in INSTRUCTIONS if key == "ENV" for word in shlex.split(rest)
    )
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    path = f"{python.parent}:{os.environ['PATH']}"

    def run(*command: object, cwd: Path = tmp_path) -> str:
        done = subprocess.run(
            list(map(str, command)),
            cwd=cwd,
            env={**kept, **variables, "HOME": str(tmp_path), "PATH": path},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{shlex.join(map(str, command))}\n{done.stderr}"
        return done.stdout

    return run


def states(directory: Path) -> dict[Path, int]:
    """Every file and directory, and when it was changed."""
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*")}


@pytest.mark.slow
def test_the_steps_of_the_dockerfile(run, tmp_path):
    home = tmp_path / "workspace"
    home.mkdir()
    installs = 0
    for command, *words in steps():
        if command == "COPY":
            copy(words[:-1], home / words[-1])
        elif command in ("mkdir", "chmod"):
            run(command, *words, cwd=home)
        elif installs_here(words):
            editable = [word for word in words if word in ("-e", "--editable")]
            run("python", "-m", "pip", "install", *LOCAL, *editable, ".", cwd=home)
            installs += 1
    assert installs == 1
    for package in PACKAGES:
        code = f"import {package}; print({package}.__file__)"
        assert run("python", "-c", code).strip() == str(home / package / "__init__.py")
    sources = {name: states(home / name) for name in (*PACKAGES, "benchmarks")}
    check_programs(lambda *command: run(*command, cwd=home), home / "runs")
    # nothing is written beside the volumes: the file system of a pod is read-only
    assert {name: states(home / name) for name in sources} == sources


def test_the_dockerfile_installs_all_that_the_programs_need():
    (command,) = (words for words in steps() if words[:2] == ["python", "-c"])
    done = subprocess.run(
        [sys.executable, "-c", command[2]], cwd=ROOT, capture_output=True, text=True, check=True
    )
    names = {Requirement(line).name for line in done.stdout.split("\n") if line.strip()}
    always = {"torch", "torchvision", "numpy", "pillow", "tqdm", "pyyaml"}
    assert names == always | {"scikit-learn", "matplotlib", "plotly", "markdown", "tensorboard"}


@pytest.mark.slow
def test_a_wheel_is_complete(run, python, tmp_path):
    sources = tmp_path / "sources"
    sources.mkdir()
    copy(["setup.cfg", "pyproject.toml", "README.md", "LICENSE"], sources)
    for name in PACKAGES:
        copy([name], sources / name)
    expected = {
        path.relative_to(sources).as_posix()
        for name in PACKAGES
        for path in (sources / name).rglob("*")
        if path.is_file()
    }
    run("python", "-m", "pip", "wheel", *LOCAL, "--wheel-dir", tmp_path, ".", cwd=sources)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == expected

    run("python", "-m", "pip", "install", "--no-deps", wheel)
    (pretrained,) = tmp_path.glob(f"venv/lib/*/site-packages/{PRETRAINED}")
    (tmp_path / "runs").mkdir()

    def run_module(*command: str) -> str:
        script = re.sub(r"(\w+)/(\w+)\.py$", r"-m \1.\2", command[1]).split()
        return run(command[0], *script, *command[2:])

    check_programs(run_module, tmp_path / "runs", str(pretrained))


@pytest.mark.slow
def test_the_image(tmp_path):
    """With buildah, on a local base that has torch: EARLY_EXIT_TEST_BASE names it."""
    base = os.environ.get("EARLY_EXIT_TEST_BASE")
    if not shutil.which("buildah") or not base:
        pytest.skip("needs buildah, and EARLY_EXIT_TEST_BASE=<a local image with torch>")
    isolated = ("--isolation", "chroot")
    values = (f"BASE={base}", "TORCH_INDEX=https://pypi.org/simple", "REVISION=tested")
    arguments = [word for value in values for word in ("--build-arg", value)]
    build = ["buildah", "bud", *isolated, "--network", "host", "--format", "docker", *arguments]
    command = [*build, "-f", "docker/Dockerfile", "-t", "early-exit:test", "."]
    subprocess.run(command, cwd=ROOT, check=True)

    def run(*command: str, image: str = "early-exit:test") -> str:
        name = subprocess.check_output(["buildah", "from", image], text=True).strip()
        try:
            mount = ("-v", f"{tmp_path}:/workspace/runs")
            return subprocess.check_output(
                ["buildah", "run", *isolated, *mount, name, "--", *command], text=True
            )
        finally:
            subprocess.check_call(["buildah", "rm", name])

    tmp_path.chmod(0o777)
    code = "import torch as t, torchvision as v; print(t.__version__, v.__version__)"
    assert run("python3", "-c", code) == run("python3", "-c", code, image=base)
    assert run("id", "-u").strip() == "10001"
    assert run("sh", "-c", "touch setup.cfg || echo refused") == "refused\n"
    check_programs(run, tmp_path)
    assert '"git": "tested"' in (tmp_path / "run" / "versions.json").read_text()
