"""The image that classifies and serves with a deployed model: what it installs and what is copied
into it."""

import shlex
import subprocess
import sys

from helpers import ROOT
from manifests import instructions
from packaging.requirements import Requirement

DOCKERFILE = ROOT / "docker" / "Dockerfile.deploy"
INSTRUCTIONS = instructions(DOCKERFILE.read_text())


def test_it_installs_what_a_deployed_model_needs_and_no_torch():
    """The step that lists the requirements, run on the repository's setup.cfg."""
    (step,) = (rest for key, rest in INSTRUCTIONS if key == "RUN" and "configparser" in rest)
    command, _, _ = step.partition(" > ")
    words = shlex.split(command)
    done = subprocess.run(
        [sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True, check=True
    )
    names = {Requirement(line).name for line in done.stdout.splitlines() if line.strip()}
    served = {"uvicorn", "starlette", "prometheus-client", "python-multipart"}
    assert names == {"numpy", "pillow", "pyyaml", "onnxruntime"} | served


def test_what_is_copied_is_not_ignored():
    kept = {
        line.removeprefix("!")
        for line in (ROOT / "docker" / "Dockerfile.deploy.dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    copied = {
        name for key, rest in INSTRUCTIONS if key == "COPY" for name in shlex.split(rest)[:-1]
    }
    assert copied == kept
    assert all((ROOT / name).exists() for name in copied)


def test_it_runs_as_a_user_without_rights_and_names_both_mounts():
    last = dict(INSTRUCTIONS)
    assert last["USER"] == "10001:10001"
    assert last["ENTRYPOINT"] == '["python", "-m", "early_exit.predict"]'
    assert last["CMD"] == '["/model", "/photos"]'
