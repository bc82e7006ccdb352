"""Tasks: which ones a file may name, and how another one is allowed."""

import pytest
from helpers import refusal

from early_exit import task as tasks
from early_exit.task import TASKS, find_task, import_task


@pytest.mark.parametrize("name", TASKS)
def test_a_known_task_is_found_and_names_itself(name):
    assert find_task(name).name == name


def test_an_unknown_task_is_refused_without_an_import(monkeypatch):
    monkeypatch.setattr(tasks.importlib, "import_module", lambda name: pytest.fail(name))
    for name in ("os:system", "antigravity:TASK", "cifar10.trainer:TASK", ""):
        assert "--task" in refusal(find_task, name)


def test_a_task_is_allowed_by_adding_it(monkeypatch):
    monkeypatch.setitem(TASKS, "mine", "cifar10.trainer:TASK")
    assert find_task("mine") is find_task("cifar10")


def test_a_path_without_a_task_is_named():
    for path in ("no_such_module:TASK", "cifar10.trainer:NOTHING", "cifar10.trainer", ""):
        assert path in refusal(import_task, path)
    assert "Path" in refusal(import_task, "cifar10.trainer:ROOT")


def test_a_path_that_is_relative_is_named():
    assert ".mine:TASK" in refusal(import_task, ".mine:TASK")
