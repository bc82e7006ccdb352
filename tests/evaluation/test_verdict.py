"""The verdict: constructed times in which each one is the truth, and the boundaries between."""

import dataclasses
import re

import pytest
from helpers import assert_names

from early_exit.evaluation.report import Environment, StaticRow
from early_exit.evaluation.verdict import judge, short
from early_exit.inference.latency import BatchSeconds, Timing

FLOAT32 = Environment("a CPU", "float32", {}, "eval.py", runtime="onnxruntime")
BATCHES = 10


def batch_seconds(ms: float) -> BatchSeconds:
    """Ten batches of one time each."""
    return BatchSeconds(ms / 1000, ms / 1000, BATCHES * ms / 1000)


def times(
    plain: float,
    live: float,
    spread: tuple[float, float] | None = None,
    batch_size: int = 1,
    **networks: float,
) -> Timing:
    """Milliseconds per batch. spread: of the speed-ups over repeats; default: all are equal."""
    return Timing(
        batch_size=batch_size,
        images=BATCHES * batch_size,
        repeats=5,
        plain=batch_seconds(plain),
        live=batch_seconds(live),
        ideal=batch_seconds(live),
        no_exit_taken=batch_seconds(plain),
        without_heads=None,
        segment_seconds=(live / 1000,),
        speedup_range=spread or (plain / live, plain / live),
        networks={name: batch_seconds(ms) for name, ms in networks.items()},
    )


def static(name: str, accuracy: float, share: float = 0.5) -> StaticRow:
    """A network without exits."""
    return StaticRow(name, accuracy, share, "somewhere")


def verdict(
    timing: Timing,
    accuracy: float = 0.926,
    final: float = 0.93,
    environment: Environment = FLOAT32,
    **values,
):
    """The verdict on a policy of this accuracy."""
    return judge(timing, environment, accuracy=accuracy, final_accuracy=final, **values)


class TestExitsPay:
    def test_it_says_how_much_where_and_at_what_loss(self):
        found = verdict(times(1.32, 1.0, (1.29, 1.35)), accuracy=0.9257)
        assert found.words == (
            "In onnxruntime (float32) at batch 1, exits are 1.32 times as fast as the plain network"
            " (1.29 to 1.35 over 5 repeats) at 0.43 points lost."
        )
        assert (found.kind, found.batch_size, found.network) == ("exits", 1, None)

    @pytest.mark.parametrize("accuracy", [0.93, 0.95])
    def test_no_accuracy_is_lost(self, accuracy):
        words = verdict(times(2, 1), accuracy=accuracy).words
        assert "at no loss" in words and "points" not in words

    def test_of_several_cuts_the_first_is_meant(self):
        assert "first of 10 cuts" in verdict(times(2, 1), cuts=10).words
        assert "cuts" not in verdict(times(2, 1)).words
        timing, rows = times(1.6, 1.1, resnet32=0.9), [static("resnet32", 0.93)]
        words = verdict(timing, static_networks=rows, cuts=10).words
        assert "with exits, on the first of 10 cuts; deploy it" in words

    @pytest.mark.parametrize(
        ("low", "kind"), [(1 + 1e-9, "exits"), (1.0, "plain"), (1 - 1e-9, "plain")]
    )
    def test_only_if_every_repeat_is_faster(self, low, kind):
        assert verdict(times(1.2, 1.0, (low, 1.3))).kind == kind


class TestExitsDoNotPay:
    def test_the_plain_network_is_faster(self):
        found = verdict(times(1.0, 1.04, (1 / 1.07, 1 / 1.02)))
        assert found.words == (
            "In onnxruntime (float32) at batch 1, exits do not pay: they take 1.04 times the plain"
            " network's time (1.02 to 1.07 over 5 repeats); deploy the plain network."
        )
        assert found.kind == "plain"

    def test_not_in_every_repeat(self):
        found = verdict(times(1.0, 0.98, (0.96, 1.04)))
        assert found.kind == "plain"
        assert_names(found.words, "in every repeat", "0.98 times", "deploy the plain network")

    def test_as_fast_as_the_plain_network(self):
        found = verdict(times(1.0, 1.0))
        assert found.kind == "plain" and "do not pay:" in found.words

    def test_where_a_few_slow_repeats_move_the_range_the_medians_count_too(self):
        found = verdict(times(1.0, 1.25, (1.1, 1.3)))
        assert found.kind == "plain"
        assert_names(found.words, "1.25 times", "0.77 to 1.25")
        assert verdict(times(2.0, 1.0, (0.9, 1.1))).kind == "plain"


class TestStaticNetworks:
    def test_one_is_faster_and_no_less_accurate(self):
        timing = times(1.6, 1.1, resnet32=0.9, resnet44=1.2)
        rows = [static("resnet32", 0.9263), static("resnet44", 0.94)]
        found = verdict(timing, static_networks=rows)
        assert found.words == (
            "In onnxruntime (float32) at batch 1, the static resnet32 is faster at no lower"
            " accuracy: 0.90 ms at 92.63 % against 1.10 ms at 92.60 % with exits; deploy it."
        )
        assert (found.kind, found.network, short(found)) == (
            "static",
            "resnet32",
            "deploy resnet32",
        )

    @pytest.mark.parametrize(
        ("accuracy", "ms", "kind"),
        [
            (0.926, 0.9, "static"),  # as accurate
            (0.926 - 1e-9, 0.9, "exits"),
            (0.95, 1.0, "exits"),  # as fast as with exits
            (0.95, 1.0 - 1e-9, "static"),
        ],
    )
    def test_the_boundaries_where_exits_pay(self, accuracy, ms, kind):
        found = verdict(times(1.6, 1.0, small=ms), static_networks=[static("small", accuracy)])
        assert found.kind == kind

    @pytest.mark.parametrize(("ms", "kind"), [(1.1, "plain"), (1.0, "plain"), (0.99, "static")])
    def test_where_exits_do_not_pay_it_is_faster_than_the_plain_network_too(self, ms, kind):
        timing = times(1.0, 1.2, small=ms)
        assert verdict(timing, static_networks=[static("small", 0.95)]).kind == kind

    def test_the_fastest_of_several(self):
        timing = times(2.0, 1.5, a=1.2, b=0.8, c=0.5)
        rows = [static("a", 0.95), static("b", 0.93), static("c", 0.8)]
        assert verdict(timing, static_networks=rows).network == "b"

    def test_the_plain_network_trained_by_others_is_not_faster_than_itself(self):
        timing = times(1.0, 1.2, same=0.99)
        assert verdict(timing, static_networks=[static("same", 0.95, share=1.0)]).kind == "plain"

    def test_one_that_was_not_timed_does_not_count(self):
        assert verdict(times(1.6, 1.0), static_networks=[static("small", 0.95)]).kind == "exits"

    def test_milliseconds_are_those_of_a_batch(self):
        timing = times(160.0, 110.0, batch_size=64, small=90.0)
        words = verdict(timing, static_networks=[static("small", 0.95)]).words
        assert_names(words, "batch 64", "90.00 ms", "110.00 ms")

    def test_in_another_precision_its_accuracy_is_that_of_float32(self):
        environment = dataclasses.replace(FLOAT32, runtime="openvino-bf16", precision="bfloat16")
        timing, rows = times(1.6, 1.1, resnet32=0.9), [static("resnet32", 0.9263)]
        found = verdict(timing, environment=environment, static_networks=rows)
        assert found.words == (
            "In openvino-bf16 (bfloat16) at batch 1, the static resnet32 is faster at no lower"
            " accuracy: 0.90 ms at 92.63 % (as its source states, in float32) against 1.10 ms at"
            " 92.60 % with exits; deploy it."
        )

    def test_in_8_bit_integers_its_accuracy_is_not_known(self):
        name = "onnxruntime-int8"
        integers = dataclasses.replace(FLOAT32, runtime=name, precision="8-bit integers")
        timing, rows = times(1.6, 1.1, small=0.9), [static("small", 0.95)]
        assert verdict(timing, environment=integers, static_networks=rows).kind == "exits"


class TestNoExitIsEnabled:
    def test_the_policy_is_the_plain_network_and_no_speedup_is_claimed(self):
        found = verdict(times(1.6, 1.5, (1.05, 1.08)), any_enabled=False)
        assert found.kind == "disabled"
        assert_names(found.words, "the policy chose the plain network", "1.60 ms")
        assert not re.search("times|faster|repeats", found.words)

    def test_a_given_policy_was_not_chosen(self):
        found = verdict(times(1.6, 1.5), any_enabled=False, given=True)
        assert "given" in found.words and "chose" not in found.words

    @pytest.mark.parametrize(("ms", "kind"), [(1.59, "static"), (1.6, "disabled")])
    def test_a_static_network_may_be_faster_than_the_plain_one(self, ms, kind):
        timing = times(
            1.6, 1.0, small=ms
        )  # the time "with exits" is the plain network's, and noise
        rows = [static("small", 0.95)]
        found = verdict(timing, any_enabled=False, static_networks=rows)
        assert found.kind == kind
        assert "with exits" not in found.words


@pytest.mark.parametrize(
    "timing", [times(2, 1), times(1, 2), times(2, 1, (0.9, 2.1)), times(3, 2, a=1)]
)
@pytest.mark.parametrize("enabled", [True, False])
def test_it_is_one_sentence_that_names_runtime_precision_and_batch(timing, enabled):
    found = verdict(timing, any_enabled=enabled, static_networks=[static("a", 0.95)])
    assert found.words.startswith("In onnxruntime (float32) at batch 1, ")
    assert found.words.count(". ") == 0 and found.words.endswith(".")
    assert dataclasses.asdict(found)["kind"] in ("exits", "plain", "static", "disabled")
    assert short(found)
