"""What tests of the system's calls share."""

import os

import pytest


@pytest.fixture
def lacking(monkeypatch):
    """Makes a call of `os` fail with an error, for some of its arguments."""

    def lack(name: str, number: int, when=lambda *_: True):
        real = getattr(os, name)

        def call(*arguments, **options):
            if when(*arguments):
                raise OSError(number, os.strerror(number))
            return real(*arguments, **options)

        monkeypatch.setattr(os, name, call)

    return lack
