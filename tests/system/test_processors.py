"""How many processors a process may use."""

import os

import pytest

from early_exit.system import processors


@pytest.mark.parametrize(
    ("limit", "count"),
    [("max 100000", 64), ("100000 100000", 1), ("50000 100000", 1), ("250000 100000", 3), ("", 64)],
)
def test_processors_are_those_of_the_container(tmp_path, monkeypatch, limit, count):
    (tmp_path / "cpu.max").write_text(f"{limit}\n")
    monkeypatch.setattr(processors, "CPU_LIMIT", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    assert processors.processors() == count
