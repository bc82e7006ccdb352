"""Names that no user gave, and names in one line."""

import pytest

from early_exit.system.names import is_hidden, is_system_name
from early_exit.system.text import in_a_line


@pytest.mark.parametrize(
    "name", [".DS_Store", "._a.jpg", "@eaDir", "thumbs.db", "$Recycle.Bin", "a.jpg:Zone.Identifier"]
)
def test_systems_names(name):
    assert is_system_name(name) and is_system_name(name.encode()) and is_hidden(name)


@pytest.mark.parametrize("name", [".git", ".checkpoint.pt", "..data", ".\udcff"])
def test_hidden_names_may_be_the_users(name):
    assert is_hidden(name) and not is_system_name(name)


@pytest.mark.parametrize(
    "name", ["a.jpg", "_x", "@home", "#1", "recycled", "~a", "lost", "\udcff."]
)
def test_other_names(name):
    assert not is_hidden(name)


def test_a_line():
    assert in_a_line("a\nb\x1b[31m \udcff \u00e9") == "a\\nb\\x1b[31m \\xff \u00e9"
