"""Points of the literature that the user names."""

import pytest
import yaml
from helpers import ROOT, assert_names, refusal

from early_exit.evaluation.literature import LiteraturePoint, read_points

POINT = {
    "label": "net",
    "dataset": "shapes",
    "accuracy_percent": 90,
    "macs_millions": 2.5,
    "source": "a paper,\n  figure 3",
}


def written(tmp_path, values):
    """A file of values."""
    path = tmp_path / "points.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_points_on_the_data_set_are_read(tmp_path):
    other = {**POINT, "dataset": "letters"}
    timed = {**POINT, "milliseconds": 3}
    del timed["macs_millions"]
    path = written(tmp_path, {"points": [POINT, other, timed]})
    assert read_points(path, "shapes") == [
        LiteraturePoint("net", 0.9, "a paper, figure 3", 2.5e6, None),
        LiteraturePoint("net", 0.9, "a paper, figure 3", None, 0.003),
    ]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"acuracy_percent": 3}, ("acuracy_percent", "accuracy_percent")),
        ({"source": None}, ("source",)),
        ({"source": ...}, ("source", "add")),
        ({"label": ...}, ("label", "add")),
        ({"dataset": ...}, ("dataset", "add")),
        ({"accuracy_percent": ...}, ("accuracy_percent", "add")),
        ({"macs_millions": ...}, ("macs_millions", "milliseconds")),
        ({"accuracy_percent": 9000}, ("accuracy_percent", "100")),
        ({"macs_millions": "22"}, ("macs_millions", "22")),
        ({"macs_millions": True}, ("macs_millions", "True")),
        ({"macs_millions": 10**400}, ("macs_millions",)),
        ({"macs_millions": float("inf")}, ("macs_millions",)),
        ({"dataset": "letters"}, ("shapes", "letters")),
    ],
)
def test_errors_are_one_line_that_names_file_and_key(tmp_path, changed, named):
    point = {key: value for key, value in {**POINT, **changed}.items() if value is not ...}
    path = written(tmp_path, {"points": [point]})
    message = refusal(read_points, path, "shapes")
    assert "\n" not in message
    assert_names(message, path, *named)


@pytest.mark.parametrize("values", [{}, {"points": []}, {"points": 3}, {"point": [POINT]}, [POINT]])
def test_another_file_is_refused(tmp_path, values):
    path = written(tmp_path, values)
    assert_names(refusal(read_points, path, "shapes"), path)
    assert_names(refusal(read_points, tmp_path / "none", "shapes"), "none")


def test_a_point_that_is_not_a_mapping_is_refused(tmp_path):
    assert_names(refusal(read_points, written(tmp_path, {"points": [3]}), "shapes"), "point 1", 3)


def test_the_points_that_come_with_the_project():
    points = read_points(ROOT / "benchmarks" / "literature.yaml", "cifar10")
    assert {point.label for point in points} == {"MSDNet", "RANet", "L2W-DEN"}
    assert all("arXiv:" in point.source and "read off" in point.source for point in points)
