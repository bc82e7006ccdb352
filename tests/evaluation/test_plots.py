"""The plots of an evaluation."""

import logging
import os
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from helpers import ROOT

from early_exit.evaluation import plots
from early_exit.evaluation.report import Picture


def test_a_gallery_of_single_images_can_be_drawn(tmp_path):
    row = [Picture(np.zeros((4, 4, 3), np.uint8), "cat", False, "cat, is dog")]
    plots.gallery([("first", row), ("second", row)], tmp_path / "gallery.png")
    assert (tmp_path / "gallery.png").stat().st_size > 1000


@pytest.mark.filterwarnings("error")
def test_images_that_are_all_as_confused_can_be_drawn(tmp_path):
    plots.confusion(np.zeros(5), np.array([True] * 5), tmp_path / "confusion.png")
    assert (tmp_path / "confusion.png").stat().st_size > 1000


def drawn(path) -> bytes:
    plots.confusion(np.arange(5.0), np.array([True] * 3 + [False] * 2), path)
    return path.read_bytes()


@pytest.mark.filterwarnings("error")
def test_the_users_settings_have_no_effect_and_are_kept(tmp_path, monkeypatch):
    expected = drawn(tmp_path / "plain.png")
    settings = {"text.usetex": True, "axes.facecolor": "red", "font.size": 30, "figure.dpi": 10}
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # an import of it fails
    with matplotlib.rc_context(settings):
        assert drawn(tmp_path / "mine.png") == expected
        assert {name: matplotlib.rcParams[name] for name in settings} == settings


@pytest.mark.filterwarnings("error")
def test_names_of_any_letters_and_length(tmp_path, capfd, caplog):
    names = [
        "$x^{_",
        "\u4e2d\u56fd",
        "\U0001f40c",
        "long " * 500,
        "two\nlines",
        "\udcff",
        "_",
        "%s",
    ]
    pictures = [Picture(np.zeros((4, 4, 3), np.uint8), name, False, name) for name in names]
    plots.gallery([("first", pictures)], tmp_path / "gallery.png")
    assert (tmp_path / "gallery.png").stat().st_size > 1000
    assert capfd.readouterr() == ("", "")
    # one line at most, if no font that is installed has the letters
    warnings = [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]
    assert len(warnings) <= 1 and all("gallery.png" in line for line in warnings)


@pytest.mark.slow
@pytest.mark.parametrize(
    "env",
    [
        {"MPLBACKEND": "module://matplotlib_inline.backend_inline"},
        {"MPLBACKEND": "no_such_backend"},
        {"MPLBACKEND": "TkAgg", "DISPLAY": ""},
        {"HOME": "/nonexistent", "MPLCONFIGDIR": "/dev/null/none"},
        {"MATPLOTLIBRC": "matplotlibrc"},
    ],
    ids=lambda env: next(iter(env)) + "=" + next(iter(env.values())),
)
def test_any_environment(tmp_path, env):
    """The pictures are the same, and nothing is printed."""
    (tmp_path / "matplotlibrc").write_text("text.usetex: true\nno.such.key: 1\nfont.size: huge\n")
    drawing = (
        "import numpy as np; from early_exit.evaluation import plots;"
        "plots.confusion(np.arange(5.0), np.array([True] * 3 + [False] * 2), plots.Path('a.png'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", drawing],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "a.png").read_bytes() == drawn(tmp_path / "expected.png")
