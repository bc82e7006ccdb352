"""Decorations of a result: one that fails is left out, with one line, and the result is kept."""

import errno
import json
import logging
import os
import re
import sys

import pytest
from by_hand import quickly

from early_exit.choosing.goals import MaxDrop
from early_exit.errors import UserError
from early_exit.evaluation import evaluate as evaluation
from early_exit.evaluation import page, plots, rows
from early_exit.inference.policy import Policy

NO_LATEX = RuntimeError("Failed to process string with tex\nbecause latex could not be found")
FULL_DISK = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


NUMBERS = {"policy.yaml", "report.json"}
PICTURES = {"accuracy_vs_macs.png", "confusion.png", "gallery.png", "overthinking.png"}
ALL = NUMBERS | PICTURES | {"report.html", "report.md"}


class TestDecoration:
    """Pictures, the page and report.md: one that fails is left out, with one line."""

    def evaluated(self, run, caplog) -> tuple[set[str], list[str]]:
        """The files of a new evaluation, and the warnings. report.md shows what is there."""
        caplog.clear()
        quickly(run, MaxDrop(0.0), name="mine", draw=True)
        directory = run / "eval" / "mine"
        found = {path.name for path in directory.iterdir()}
        if "report.md" in found:
            shown = re.findall(r"\]\((.*?)\)", (directory / "report.md").read_text("utf-8"))
            assert set(shown) == found & PICTURES
        warnings = [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]
        assert not [line for line in warnings if "\n" in line]
        return found, warnings

    @pytest.mark.parametrize(
        ("module", "name", "missing", "error"),
        [
            (plots, "accuracy_vs_macs", {"accuracy_vs_macs.png"}, NO_LATEX),
            (plots, "confusion", {"confusion.png"}, FULL_DISK),
            (plots, "gallery", {"gallery.png", "overthinking.png"}, MemoryError()),
            (rows, "galleries", {"gallery.png", "overthinking.png"}, UserError("no file")),
            (page, "write", {"report.html"}, FULL_DISK),
            (evaluation, "to_markdown", {"report.md"}, FULL_DISK),
        ],
    )
    def test_what_fails_is_left_out(self, copy, caplog, monkeypatch, module, name, missing, error):
        def fail(*_):
            directory = copy / "eval" / "mine"
            Policy.load(directory / "policy.yaml")  # the results are there already
            json.loads((directory / "report.json").read_text())
            raise error

        # what is not tried here need not be drawn
        for other in ("accuracy_vs_macs", "confusion", "gallery"):
            monkeypatch.setattr(plots, other, lambda *arguments: arguments[-1].touch())
        monkeypatch.setattr(page, "write", lambda *arguments: arguments[-1].touch())
        monkeypatch.setattr(module, name, fail)
        found, warnings = self.evaluated(copy, caplog)
        assert found == ALL - missing
        assert 1 <= len(warnings) <= len(missing)
        for line, file in zip(warnings, sorted(missing), strict=False):
            assert file in line

    @pytest.mark.parametrize(
        ("package", "missing"),
        [
            ("matplotlib", PICTURES),
            ("plotly.offline", {"report.html"}),
            ("markdown", {"report.html"}),
        ],
    )
    def test_a_package_that_is_not_installed(self, copy, caplog, monkeypatch, package, missing):
        if package != "matplotlib":
            monkeypatch.setattr(plots, "draw_all", lambda *_: {})
            expected = ALL - missing - PICTURES
        else:
            monkeypatch.setattr(page, "write", lambda *arguments: arguments[-1].touch())
            expected = ALL - missing
        monkeypatch.setitem(sys.modules, package, None)
        found, warnings = self.evaluated(copy, caplog)
        assert found == expected
        assert len(warnings) == len(missing)
        assert all(package.partition(".")[0] in line for line in warnings)

    def test_pictures_of_an_earlier_evaluation_do_not_stay(self, copy, caplog):
        quickly(copy, MaxDrop(0.0), name="mine")
        (copy / "eval" / "mine" / "gallery.png").touch()
        quickly(copy, MaxDrop(0.0), name="mine")
        assert {path.name for path in (copy / "eval" / "mine").iterdir()} == {
            *NUMBERS,
            "report.md",
        }

    def test_a_network_whose_energy_cannot_be_estimated(self, copy, caplog, monkeypatch):
        monkeypatch.setattr("early_exit.model.energy.estimate", lambda *_: 1 / 0)
        report, _ = quickly(copy, MaxDrop(0.0), name="mine")
        assert report["energy"] == []
        assert (copy / "eval" / "mine" / "report.md").exists()
