"""The comparison of ways to train: its table, what it refuses, and how it is continued."""

import json
from types import SimpleNamespace

import pytest
from helpers import assert_names, refusal

from benchmarks import ablations
from cifar10 import eval as evaluation
from early_exit.cli import settings


def made(out, arm: str, seed: int, half: float, final: float) -> None:
    """A run that was trained and evaluated, as far as the table reads it."""
    run = out / f"{arm}-seed{seed}"
    report = run / "eval" / ablations.EVALUATION / "report.json"
    report.parent.mkdir(parents=True)
    report.write_text(json.dumps({"val": {"accuracy": half, "macs_share": 0.5}}))
    epochs = [{"val_top1": {"final": value}} for value in (0.1, final)]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, epochs)) + "\n")


def rows(out, arms, seeds) -> list[list[str]]:
    """The cells of the table."""
    lines = ablations.table(out, arms, seeds).splitlines()[2:]
    return [line.strip("| ").split(" | ") for line in lines]


def test_differences_are_paired_by_seed(tmp_path):
    made(tmp_path, "base", 0, 0.80, 0.90)
    made(tmp_path, "base", 1, 0.84, 0.91)
    made(tmp_path, "teacher", 0, 0.81, 0.90)
    made(tmp_path, "teacher", 1, 0.85, 0.91)
    base, teacher = rows(tmp_path, ["base", "distill", "teacher"], [0, 1])  # one is not trained
    spread = "2.83"  # of 80 and 84 %: 4 / sqrt(2)
    assert base == [
        "base",
        "2",
        f"82.00 ± {spread}",
        "+0.00 ± 0.00",
        "50.00 ± 0.00",
        "90.50 ± 0.71",
        "+0.00 ± 0.00",
    ]
    assert teacher[2:4] == [f"83.00 ± {spread}", "+1.00 ± 0.00"]


def test_a_seed_that_base_lacks_is_in_no_difference(tmp_path):
    made(tmp_path, "base", 0, 0.80, 0.90)
    made(tmp_path, "reach", 0, 0.78, 0.90)
    made(tmp_path, "reach", 1, 0.60, 0.90)
    _, reach = rows(tmp_path, ["base", "reach"], [0, 1])
    assert (reach[1], reach[3]) == ("2", "-2.00")


@pytest.mark.parametrize("arm", ablations.ARMS)
def test_the_losses_of_every_arm_have_one_sum(arm):
    flags = [float(word) for word in ablations.ARMS[arm][1:5]]
    twice = {"distill": 3, "teacher": 4}.get(arm, 0)  # exits with two losses
    assert sum(flags) + sum(flags[:twice]) == pytest.approx(2.0, rel=1e-3)


@pytest.mark.parametrize(
    ("flags", "named"), [(["--arms", "teachr"], "teachr"), (["--arms", "teacher"], "--teacher")]
)
def test_mistakes_end_in_one_line(tmp_path, flags, named):
    assert_names(refusal(ablations.main, [*flags, "--out", str(tmp_path)]), named)


def test_runs_of_another_network_are_refused(tmp_path):
    made(tmp_path, "base", 0, 0.80, 0.90)
    config = {"model": {"arch": "airbench_half"}}
    (tmp_path / "base-seed0" / "config.yaml").write_text(json.dumps(config))
    message = refusal(ablations.main, ["--table", "--out", str(tmp_path)])
    assert_names(message, "airbench_half", "airbench_slim", "--out")


def test_what_is_evaluated_is_not_trained_again(tmp_path, monkeypatch, capsys):
    made(tmp_path, "base", 0, 0.80, 0.90)
    monkeypatch.setattr(ablations.subprocess, "run", lambda *_: pytest.fail("trained again"))
    ablations.main(["--arms", "base", "--seeds", "0", "--out", str(tmp_path)])
    assert "80.00" in capsys.readouterr().out


def test_a_run_is_evaluated_under_the_name_that_the_table_reads(tmp_path, monkeypatch):
    called = []
    done = SimpleNamespace(returncode=0)
    monkeypatch.setattr(
        ablations.subprocess, "run", lambda command: called.append(command[2:]) or done
    )
    args = ablations.parser().parse_args(["--arms", "base"])
    ablations.train_and_evaluate(tmp_path / "run", args, "base", 0)
    trained, evaluated = called
    assert "--arch" in trained
    parsed = evaluation.parser().parse_args(evaluated)
    assert settings.evaluation_options(parsed)["name"] == ablations.EVALUATION
