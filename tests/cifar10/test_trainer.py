"""The CIFAR trainer as a program: exit codes, and the next command that it prints."""

import shlex
import sys
from pathlib import Path

import pytest
import yaml
from helpers import (
    TINY,
    assert_names,
    finish,
    start,
)


@pytest.mark.slow
class TestProcess:
    """The script itself, run from another working directory."""

    @pytest.fixture(scope="class")
    @classmethod
    def done(cls, tmp_path_factory):
        elsewhere = tmp_path_factory.mktemp("elsewhere")
        (elsewhere / "full").mkdir()
        (elsewhere / "full" / "notes.txt").write_text("mine")
        started = {
            "full": start(
                "cifar10/trainer.py", "--dataset", "digits", "--save-dir", "full", cwd=elsewhere
            ),
            "eval": start("cifar10/eval.py", "nowhere", cwd=elsewhere),
        }
        return {name: finish(process) for name, process in started.items()}

    def test_a_user_error_is_one_line_and_code_2(self, done):
        assert done["full"].returncode == 2
        line = done["full"].stderr
        assert line.startswith("trainer.py: ") and line.count("\n") == 1
        assert_names(line, "full", "--resume auto", "--save-dir")

    def test_a_user_error_of_an_evaluation_is_one_line_and_code_2(self, done):
        assert done["eval"].returncode == 2
        line = done["eval"].stderr
        assert line.startswith("eval.py: ") and line.count("\n") == 1
        assert_names(line, "nowhere")


class TestNextCommand:
    def next_of(self, out: str) -> list[str]:
        last = out.splitlines()[-1]
        return shlex.split(last[last.index(shlex.quote(sys.executable)) :])

    def test_an_evaluation(self, run, tmp_path):
        directory = tmp_path / "a run"
        code, out, _ = run(*TINY, "--epochs", "1", "--save-dir", directory)
        assert code == 0
        python, script, run_dir = self.next_of(out)
        assert (python, run_dir) == (sys.executable, str(directory))
        assert script.endswith("eval.py") and Path(script).is_file()

    def test_a_choice_of_stages_after_cdl(self, run, tmp_path):
        flags = ("--regime", "cdl", "--epochs", "1", "--backbone-epochs", "1")
        code, out, err = run(*TINY, *flags, "--save-dir", tmp_path / "run")
        assert (code, err) == (0, "")
        assert self.next_of(out)[-2:] == ["--delta", "0.9"]
        config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
        assert config["model"]["head"] == ["linear"]  # without being asked for

    def test_the_score_of_a_plain_network(self, run, tmp_path):
        directory = tmp_path / "run"
        _, out, _ = run(*TINY, "--epochs", "1", "--save-dir", directory, "--exits", "none")
        code, out, _ = run(*self.next_of(out)[2:])
        assert code == 0
        assert_names(out, "test", "final")
