"""The requests that the pages show."""

import json
import shlex
import shutil
import subprocess

import pytest
from helpers import ROOT
from server_process import PATIENCE

PAGES = [ROOT / "README.md", ROOT / "docs-src" / "docs" / "serve.md"]


@pytest.mark.slow
def test_the_requests(deployed_model, photos, tmp_path, start):
    if not shutil.which("curl"):
        pytest.skip("needs curl")
    server = start(deployed_model)
    for name, photo in zip(("photo.jpg", "one.jpg", "two.png"), sorted(photos.rglob("*.png"))):
        shutil.copy(photo, tmp_path / name)
    lines = [
        line for page in PAGES for line in page.read_text().splitlines() if line.startswith("curl ")
    ]
    assert len(lines) == 4
    for line in lines:
        assert "http://127.0.0.1:8000" in line
        words = shlex.split(line.replace("http://127.0.0.1:8000", server.url))
        done = subprocess.run(
            ["curl", "-sf", *words[1:]], cwd=tmp_path, capture_output=True, timeout=PATIENCE
        )
        assert done.returncode == 0, line
        if "classify" in line:
            found = json.loads(done.stdout)["predictions"]
            assert len(found) == line.count("@") and found[0]["exit"]
    assert server.stop() == 0
