"""Versions: a broken torchvision is reported, and what ran is named."""

import importlib.metadata
import json
import subprocess

import pytest
from helpers import assert_names, refusal

from early_exit.errors import Unavailable
from early_exit.system import provenance


class TestVersions:
    @pytest.fixture
    def import_error(self, monkeypatch):
        """A function that makes the import of torchvision, or of what it imports, fail."""

        def fail(error: Exception, culprit: str = "torchvision") -> None:
            def broken(name):
                if name in ("torchvision", culprit):
                    raise error

            found = {"torch": "2.15.0", "torchvision": "0.29.2"}
            monkeypatch.setattr(importlib.metadata, "version", found.__getitem__)
            monkeypatch.setattr(importlib, "import_module", broken)

        return fail

    @pytest.mark.parametrize("error", [RuntimeError, ImportError, OSError, AttributeError])
    def test_a_torchvision_that_cannot_be_imported_is_one_sentence(self, import_error, error):
        import_error(error("operator torchvision::nms does not exist\nmore lines"))
        message = refusal(provenance.check_torchvision)
        assert_names(message, "torch 2.15.0", "torchvision 0.29.2", "torchvision::nms", "pip")

    @pytest.mark.parametrize(("module", "package"), [("PIL.Image", "pillow"), ("numpy", "numpy")])
    def test_a_package_that_torchvision_needs_is_named(self, import_error, module, package):
        import_error(RuntimeError("compiled against ABI version 9\nmore"), module)
        message = refusal(provenance.check_torchvision)
        assert_names(message, package, "ABI version 9")
        assert "torch" not in message

    def test_no_torchvision_is_one_sentence(self, import_error):
        import_error(ModuleNotFoundError("No module named 'torchvision'"))
        assert_names(refusal(provenance.check_torchvision), "torchvision", "pip install")

    def test_too_little_memory_for_its_libraries_is_not_a_pair_that_does_not_fit(
        self, import_error
    ):
        import_error(OSError("libtorch_cpu.so: failed to map segment from shared object"))
        with pytest.raises(Unavailable) as refused:
            provenance.check_torchvision()
        assert_names(str(refused.value), "memory", "libtorch_cpu.so")

    def test_the_installed_pair_fits(self):
        provenance.check_torchvision()

    def test_versions_name_what_ran_and_can_be_written_as_json(self):
        found = json.loads(json.dumps(provenance.versions()))
        assert found["torch"] == importlib.metadata.version("torch")
        assert set(found) == {"python", "torch", "torchvision", "numpy", "git"}

    def test_without_git_the_revision_is_unknown(self, monkeypatch):
        def no_git(*_, **__):
            raise FileNotFoundError("git")

        monkeypatch.setattr(subprocess, "run", no_git)
        assert provenance.git_revision.__wrapped__() == "unknown"
        monkeypatch.setenv("EARLY_EXIT_REVISION", "v1-3-gabc")  # as in an image
        assert provenance.git_revision.__wrapped__() == "v1-3-gabc"
