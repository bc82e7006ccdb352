"""What the rows of a comparison are called."""

import json

import pytest
from helpers import assert_names
from reports import made_report, rows


def test_a_row_is_named_by_the_settings_that_distinguish_it(made_run):
    found = rows(
        made_run("a", settings={"model": {"arch": "resnet20"}}),
        made_run("b", settings={"model": {"arch": "resnet20"}, "run": {"regime": "mixed"}}),
        made_run("c", settings={"model": {"arch": "resnet56"}}, exits=(0.5, 0.6)),
        made_run("d", settings={"model": {"arch": "resnet20"}}, exits=()),
    )
    assert [row.name for row in found] == [
        "resnet20, joint",
        "resnet20, mixed",
        "resnet56",
        "resnet20, plain",
    ]


@pytest.mark.parametrize(
    ("names", "common"),
    [
        (("net-joint-seed42", "net-joint-seed43"), "net-joint"),
        (("net-9", "net-10", "net-11"), "net"),
        (("net-10", "net-11"), "net"),
        (("net-1", "net-10"), "net"),
        (("resnet56", "resnet56-b"), "resnet56"),  # no number is cut
    ],
)
def test_several_seeds_have_the_name_that_their_directories_share(made_run, names, common):
    (row,) = rows(*[made_run(name, seed) for seed, name in enumerate(names)])
    assert row.name == common


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ({"optim": {"epochs": 30}}, [200, 30]),
        ({"model": {"head": ["linear"]}}, ["conv", "linear"]),
        ({"loss": {"weights": [0.3, 1.0]}}, ["1 1", "0.3 1"]),
        ({"optim": {"weight_decay": 5e-4}}, [0.0001, 0.0005]),
    ],
)
def test_a_setting_in_words(made_run, setting, values):
    for row, value in zip(
        rows(made_run("a"), made_run("b", settings=setting)), values, strict=True
    ):
        assert_names(row.name, value)


def test_the_label_has_the_goal_and_the_criterion_if_they_differ(made_run):
    directory = made_run("net", evaluation="a", goal="budget 50 % of MACs")
    other = made_report(goal="max drop 1 points", criterion="entropy", calibrated=False)
    (directory / "eval" / "b").mkdir()
    (directory / "eval" / "b" / "report.json").write_text(json.dumps(other))
    found = rows(directory)
    assert [row.name for row in found] == ["net", "net"]
    assert_names(found[0].label, "net", "budget 50 % of MACs")
    assert "max_prob" not in found[0].label and "temperature" not in found[0].label
    assert_names(found[1].label, "net", "max drop 1 points", "entropy")
    assert "temperature" in found[1].label


class TestRuntimes:
    """A label names the runtime only where the compared ones differ."""

    GOAL = "budget 50 % of MACs"

    def test_of_one_runtime_it_is_not_named(self, made_run):
        found = rows(
            made_run("a", runtime="onnxruntime"),
            made_run("b", runtime="onnxruntime", settings={"optim": {"epochs": 3}}),
        )
        assert [row.goal for row in found] == [self.GOAL] * 2
        assert not any("onnxruntime" in row.label for row in found)

    def test_of_several_each_is_named_and_says_its_precision(self, made_run):
        found = rows(
            made_run("a"),
            made_run("b", runtime="openvino-bf16", precision="bfloat16"),
            made_run("c", runtime="onnxruntime", exits=()),
        )
        assert [row.goal for row in found] == [
            f"{self.GOAL}, torch",
            f"{self.GOAL}, openvino-bf16",
            "onnxruntime",
        ]

    def test_two_precisions_of_one_runtime_are_told_apart(self, made_run):
        found = rows(
            made_run("a"),
            made_run("b", precision="bfloat16"),
            made_run("c", runtime="openvino"),
        )
        assert [row.goal.removeprefix(self.GOAL) for row in found] == [
            ", torch, float32",
            ", torch, bfloat16",
            ", openvino",
        ]
