"""The fields of a card that model hubs read."""

import json

import pytest
import yaml

from early_exit.front_matter import front_matter, licence_fields


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("MIT", {"license": "mit"}),
        ("mit license", {"license": "mit"}),
        ("Apache License 2.0", {"license": "apache-2.0"}),
        ("CC BY 4.0", {"license": "cc-by-4.0"}),
        ("not stated", {"license": "unknown"}),
        ("MIT, but not for sale", {"license": "other", "license_name": "mit-but-not-for-sale"}),
        ("GPL-3.0-or-later", {"license": "other", "license_name": "gpl-3.0-or-later"}),
        ("学術", {"license": "other", "license_name": "unnamed"}),
    ],
)
def test_licences_are_not_taken_for_others(text, fields):
    assert licence_fields(text) == fields


@pytest.fixture
def report(evaluated_run):
    """The report of an evaluation."""
    return json.loads((evaluated_run / "eval" / "mine" / "report.json").read_text())


def parsed(text: str) -> dict:
    """The fields of a text that has no more than them."""
    before, fields, after = text.split("---\n")
    assert before == after == ""
    return yaml.safe_load(fields)


def test_the_fields(report):
    fields = parsed(front_matter(report, "MIT", "owner/digits"))
    assert fields["license"] == "mit"
    assert fields["library_name"] == "early-exit"
    assert fields["pipeline_tag"] == "image-classification"
    assert fields["datasets"] == ["owner/digits"]
    assert "early-exit" in fields["tags"]
    (entry,) = fields["model-index"]
    (result,) = entry["results"]
    assert entry["name"] and result["task"]["type"] == "image-classification"
    assert result["dataset"]["type"] == "owner/digits" and result["dataset"]["split"] == "test"
    assert "60 images" in result["dataset"]["name"]
    values = {metric["name"]: (metric["type"], metric["value"]) for metric in result["metrics"]}
    assert len(values) == 3
    assert values["accuracy with exits taken"] == (
        "accuracy",
        pytest.approx(report["test"]["accuracy"], abs=1e-6),
    )
    assert values["accuracy of the final exit"] == (
        "accuracy",
        pytest.approx(report["final_accuracy"], abs=1e-6),
    )


def test_half_of_the_official_test_set_is_named_so(report):
    report["choice"]["val_from"] = "half of the official test set, cut by seed 0"
    (result,) = parsed(front_matter(report, "MIT"))["model-index"][0]["results"]
    assert "half" in result["dataset"]["name"]


def test_odd_names_are_valid_yaml(report):
    report["run"] |= {"dataset": "a: [b\udcff\n---\n#", "arch": "- {x"}
    text = front_matter(report, "it's: mine\n---")
    fields = yaml.safe_load(text.removeprefix("---\n").removesuffix("---\n"))
    assert text.count("\n---\n") == 1
    assert fields["datasets"] == ["a-b"]


def test_no_value_is_written_as_a_reference(report):
    assert "&id" not in front_matter(report, "MIT") and "*id" not in front_matter(report, "MIT")


def test_a_plain_network_takes_no_exits(report):
    plain = {**report, "exits": report["exits"][-1:]}
    fields = parsed(front_matter(plain, "MIT"))
    assert "multi-exit" not in fields["tags"]
    (metric,) = fields["model-index"][0]["results"][0]["metrics"]
    assert (metric["type"], metric["name"]) == ("accuracy", "accuracy")


def test_the_final_exit_has_its_own_accuracy(report):
    other = {**report, "final_accuracy": 0.123}  # of answers that are made of several exits
    metrics = parsed(front_matter(other, "MIT"))["model-index"][0]["results"][0]["metrics"]
    (final,) = [one["value"] for one in metrics if one["name"] == "accuracy of the final exit"]
    assert final == pytest.approx(report["exits"][-1]["accuracy"], abs=1e-6)
