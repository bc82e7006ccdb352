"""The tutorial, run as it stands, on few and small photos and from a backbone of random weights."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, finish, make_folders
from torchvision import models

PAGE = ROOT / "docs-src" / "docs" / "tutorial.md"
# What makes it seconds, and needs no network: smaller photos, one epoch, and weights from a file.
SMALL = "--train-crop 32 --val-resize 32 --val-crop 32 -j 0 --epochs 1 -b 8 --device cpu"
QUICK = "--batch-sizes 1 --timing-images 2 --threads 1 --device cpu"


def commands():
    """The page's commands that begin with python, in order."""
    blocks = re.findall(r"^```\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("python ")]


def run(line: str, directory: Path) -> subprocess.CompletedProcess:
    """A command in a directory, on one thread; its script is the repository's."""
    _, *words = shlex.split(line)
    if words[0] != "-m":
        words[0] = str(ROOT / words[0])
    return finish(
        subprocess.Popen(
            [sys.executable, *words],
            cwd=directory,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    )


@pytest.mark.slow
def test_the_tutorial_leads_to_answers(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    make_folders(tmp_path / "photos", train=16, val=16)
    torch.save(models.resnet18(num_classes=1000).state_dict(), tmp_path / "public.pth")
    photo = next((tmp_path / "photos" / "val").rglob("*.*"))
    (tmp_path / "new.jpg").write_bytes(photo.read_bytes())
    train, evaluate, export, predict = commands()
    train = train.replace("--pretrained", "--backbone public.pth")
    train = re.sub(r"--epochs \d+|-b \d+", "", train)
    outputs = []
    for line in (f"{train} {SMALL}", f"{evaluate} {QUICK}", export, predict):
        done = run(line, tmp_path)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    trained, evaluated, _, predicted = outputs
    assert "its classifier of 1000 classes is replaced" in trained
    assert re.search(r"exits|plain network", evaluated.splitlines()[0])
    assert "new.jpg" in predicted
