"""The policy: built, checked, saved and read."""

import dataclasses
import math

import pytest
import torch
from helpers import bound
from hypothesis import given, settings
from hypothesis import strategies as st

from early_exit.errors import UserError
from early_exit.inference.criteria import CRITERIA
from early_exit.inference.policy import NEVER, Policy

NAMES = ("layer1", "layer2", "final")


def make(**changes):
    """A policy of two early exits."""
    return Policy(**{"exit_names": NAMES, "thresholds": (0.9, 0.8), **changes})


@st.composite
def policies(draw):
    """Any policy of one to five early exits."""
    early = draw(st.integers(1, 5))
    criterion = draw(st.sampled_from(list(CRITERIA) if early > 1 else ["max_prob", "margin"]))
    enabled = draw(st.lists(st.booleans(), min_size=early, max_size=early))
    if criterion == "patience":
        enabled[:2] = [True, True]
    sizes = {"min_size": early, "max_size": early}
    return Policy(
        exit_names=(*(f"layer{index}.0" for index in range(early)), "final"),
        thresholds=tuple(draw(st.lists(st.floats(allow_nan=False), **sizes))),
        criterion=criterion,
        temperatures=tuple(
            draw(st.lists(st.floats(1e-6, 1e30), min_size=early + 1, max_size=early + 1))
        ),
        enabled=tuple(enabled),
    )


@settings(max_examples=30)
@given(policy=policies())
def test_a_policy_is_read_as_it_was_saved(policy, tmp_path_factory):
    path = tmp_path_factory.mktemp("policy") / "policy.yaml"
    policy.save(path)
    assert Policy.load(path) == policy  # floats compare to the last bit


@pytest.mark.parametrize(
    "threshold", [0.1 + 0.2, math.nextafter(1, 0), 5e-324, 1e-5, 1e22, -0.0, NEVER, -NEVER]
)
def test_thresholds_survive_to_the_last_bit(threshold, tmp_path):
    make(thresholds=(threshold, 0.5)).save(tmp_path / "policy.yaml")
    read = Policy.load(tmp_path / "policy.yaml").thresholds[0]
    assert read.hex() == threshold.hex()


def test_temperatures_are_one_and_exits_enabled_by_default():
    policy = make()
    assert policy.criterion == "max_prob"
    assert policy.temperatures == (1.0, 1.0, 1.0)
    assert policy.enabled == (True, True)
    assert policy.num_exits == 3


def test_the_final_exit_is_always_enabled():
    policy = make(enabled=(False, True))
    assert [policy.is_enabled(index) for index in range(3)] == [False, True, True]


def test_the_plain_network_has_a_policy():
    policy = Policy(exit_names=("final",), thresholds=())
    assert policy.is_enabled(0)


def test_a_row_exits_at_its_threshold_but_not_below():
    policy = make(thresholds=(0.75, NEVER))
    score = torch.tensor([0.75, math.nextafter(0.75, 0) - 1e-7, 1.0])
    assert policy.exits(0, score).tolist() == [True, False, True]
    assert policy.exits(1, score).tolist() == [False, False, False]


def test_every_exit_is_divided_by_its_own_temperature():
    policy = make(temperatures=(2.0, 0.5, 1.0))
    logits = torch.tensor([[2 * math.log(3), 0.0]])
    rounded = bound(torch.float32, 32)  # a quotient and a softmax of two classes
    answer, score, _ = policy.score(0, logits)
    assert answer[0, 0].item() == pytest.approx(math.log(3), rel=rounded)
    assert score.item() == pytest.approx(3 / 4, rel=rounded)  # odds 3 : 1
    _, score, _ = policy.score(1, logits)
    assert score.item() == pytest.approx(81 / 82, rel=rounded)  # odds 3 ** 4 : 1
    _, score, _ = policy.score(2, logits)
    assert score.item() == pytest.approx(9 / 10, rel=rounded)


def test_scores_are_float32_whatever_the_network_ran_in():
    answer, score, _ = make().score(0, torch.zeros(2, 3, dtype=torch.bfloat16))
    assert answer.dtype == score.dtype == torch.float32


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"thresholds": (0.9,)}, r"\b3\b.*\b2 thresholds\b.*\b1\b"),
        ({"thresholds": ()}, r"\b2 thresholds\b.*\b0\b"),
        ({"temperatures": (1.0, 1.0)}, r"\b3 temperatures\b.*\b2\b"),
        ({"enabled": (True,)}, r"\b2 enabled\b.*\b1\b"),
        ({"thresholds": (0.9, math.nan)}, "threshold"),
        ({"temperatures": (1.0, 0.0, 1.0)}, r"temperatures.*1\.0, 0\.0, 1\.0"),
        ({"temperatures": (1.0, -1.0, 1.0)}, r"temperatures.*1\.0, -1\.0, 1\.0"),
        ({"temperatures": (1.0, 1e-40, 1.0)}, r"1e-06.*1\.0, 1e-40, 1\.0"),
        ({"temperatures": (1.0, math.nan, 1.0)}, r"temperatures.*1\.0, nan, 1\.0"),
        ({"temperatures": (1.0, math.inf, 1.0)}, r"temperatures.*1\.0, inf, 1\.0"),
        ({"criterion": "oracle"}, "'oracle'"),
        ({"criterion": "patience", "enabled": (True, False)}, r"patience.*\b1\b"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused_in_one_line(changes, match):
    with pytest.raises(UserError, match=match) as error:
        make(**changes)
    assert "\n" not in str(error.value)


def test_patience_is_refused_for_a_single_early_exit():
    with pytest.raises(UserError, match="patience"):
        Policy(exit_names=("layer1", "final"), thresholds=(1.0,), criterion="patience")


def test_a_policy_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().criterion = "margin"


def test_a_missing_policy_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"policy\.yaml"):
        Policy.load(tmp_path / "policy.yaml")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"just words",
        b"- 1\n- 2\n",
        b"exit_names: [a, final]\n",
        b"exit_names: [a, final]\nthresholds: 0.5\n",
        b"exit_names: [a, final]\nthresholds: [high]\n",
        b"exit_names: [a, final]\nthresholds: [0.5]\ncolour: red\n",
        b"thresholds: [0.5\n",
        b"\x80\x81\xff",
        b"!!python/object/apply:os.getcwd []\n",
    ],
)
def test_a_file_that_is_not_a_policy_is_refused_in_one_line(content, tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=str(path)) as error:
        Policy.load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("exit_names: [a, final]\nthresholds: [0.5]\nenabled: ['false']", "enabled"),
        ("exit_names: [a, final]\nthresholds: ['0,5']", "0,5"),
        ("exit_names: [a, final]\nthresholds: [yes]", "thresholds"),
        (f"exit_names: [a, final]\nthresholds: [{10**400}]", "thresholds"),
        ("exit_names: a final\nthresholds: [0.5]", "exit_names"),
        ("exit_names: [a, final]\nthresholds: [0.5]\nguarantee: sure", "guarantee"),
        ("exit_names: [a, final]\nthreshold: [0.5]", "'threshold'"),
        ("exit_names: [a, final]\nthreshold: [0.5]", "thresholds"),
        ("exit_names: [a, final]\nthresholds:\n\t- 0.5", "line 3"),
        ("exit_names: [a, final]\nthresholds: [0.5]\ncriterion: [margin]", "criterion"),
    ],
)
def test_a_policy_written_by_hand_is_told_what_is_wrong(text, named, tmp_path):
    (tmp_path / "policy.yaml").write_text(text)
    with pytest.raises(UserError, match=rf"policy\.yaml.*{named}") as error:
        Policy.load(tmp_path / "policy.yaml")
    assert "\n" not in str(error.value)


def test_what_people_write_by_hand_is_read(tmp_path):
    text = "exit_names: [1, final]\r\nthresholds: ['1e-1']\r\nenabled: [no]\r\n"
    (tmp_path / "policy.yaml").write_bytes(text.encode("utf-8-sig"))
    assert Policy.load(tmp_path / "policy.yaml") == Policy(
        exit_names=("1", "final"), thresholds=(0.1,), enabled=(False,)
    )


def test_a_directory_instead_of_a_policy_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        Policy.load(tmp_path)


def test_a_policy_with_wrong_values_names_them(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text("exit_names: [a, final]\nthresholds: [0.5, 0.6]\n")
    with pytest.raises(UserError, match=r"\b1 thresholds\b.*\b2\b"):
        Policy.load(path)


def test_a_guarantee_is_void_with_other_thresholds_or_exits():
    guaranteed = make(guarantee={"words": "sure"})
    assert (
        guaranteed.with_threshold(0.1).guarantee is guaranteed.with_all_enabled().guarantee is None
    )
