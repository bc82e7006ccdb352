"""benchmarks/serving.py: its load, its arms and its tables, and one small run of it all."""

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import serving_load
from fake_segments import POLICY, fake_segments, images
from helpers import run_main
from serving_arms import ADAPTIVE, PLAIN, REGROUPED, TOGETHER, Usage, as_one_segment
from serving_figure import draw
from serving_load import Latencies, Reply, arrival_times, percentile, summary
from serving_results import Loaded, loaded, loaded_row, saturated_table, to_json
from serving_saturated import IDEAL, Saturated, ideal, rows_that_reach, saturate

from benchmarks import serving
from early_exit import deployed
from early_exit.inference.infer import run_segments
from early_exit.serving.engine import EngineSettings, EngineState

SEEN = Latencies(
    requests=200,
    answered=150,
    rejected=50,
    failed=0,
    answers_per_second=75.0,
    p50=0.01,
    p99=0.5,
    accuracy=0.9,
    late_p99=0.001,
)


class TestArrivals:
    def test_they_rise_within_the_seconds_and_repeat_with_the_seed(self):
        times = arrival_times(100, 5, seed=1)
        assert (np.diff(times) >= 0).all() and 0 <= times[0] and times[-1] < 5
        assert np.array_equal(times, arrival_times(100, 5, seed=1))
        assert not np.array_equal(times[:10], arrival_times(100, 5, seed=2)[:10])

    def test_they_are_poisson(self):
        """The counts of 20,000 intervals of a mean of 2 have that mean and variance, within five
        standard errors: 0.01 and about 0.032."""
        times = arrival_times(2, 20_000, seed=0)
        counts = np.bincount(times.astype(int), minlength=20_000)
        assert abs(counts.mean() - 2) < 0.05
        assert abs(counts.var() - 2) < 0.16


def test_percentiles_are_values_that_were_seen():
    values = list(range(1, 201))
    assert [percentile(values, share) for share in (0.5, 0.99, 1)] == [100, 198, 200]
    assert percentile([7.0], 0.99) == 7
    assert np.isnan(percentile([], 0.5))


def reply(due, done, status=200, answer=0, begun=None):
    body = json.dumps({"outputs": [{"data": [answer]}]}).encode()
    return Reply(due, due if begun is None else begun, done, status, body)


def test_a_summary_counts_from_when_requests_were_due():
    """The first request is of the warm-up; its late answer still arrives in the time measured."""
    replies = [
        reply(0.5, 1.5, answer=9),
        reply(1.0, 1.25, answer=3),
        reply(1.5, 2.5, answer=4, begun=2.0),  # the client was late: that counts
        reply(2.0, 2.5, status=503),
        reply(2.5, 2.5, status=0),
        reply(2.75, 3.25, answer=5),
    ]
    found = summary(replies, 1.0, 2.0, [0, 3, 4, 0, 0, 0])
    assert (found.requests, found.answered, found.rejected, found.failed) == (5, 3, 1, 1)
    assert (found.p50, found.p99, found.late_p99) == (0.5, 1.0, 0.5)
    assert found.answers_per_second == 3 / 2
    assert found.accuracy == 2 / 3


def test_without_answers_there_are_no_latencies():
    found = summary([reply(0.0, 0.5, status=503)], 0.0, 1.0, [0])
    assert np.isnan(found.p99) and found.accuracy is None


class Stub:
    """A server on loopback that answers the length of each body, and hangs up on an empty one."""

    def __init__(self):
        self.connections, self._ready = 0, threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._ready.wait(60)

    def _run(self):
        async def serve():
            server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
            self.port = server.sockets[0].getsockname()[1]
            self._end = asyncio.Event()
            self._ready.set()
            await self._end.wait()
            server.close()

        self._loop.run_until_complete(serve())
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))

    async def _answer(self, reader, writer):
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(re.search(rb"Content-Length: (\d+)", head)[1])
                await reader.readexactly(length)
                if not length:
                    break
                body = b"%d" % length
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        writer.close()

    def stop(self):
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(60)
        self._loop.close()


@pytest.fixture
def stub():
    """See `Stub`."""
    server = Stub()
    yield server
    server.stop()


class TestClient:
    def test_every_request_gets_its_own_answer(self, stub):
        sizes = [*range(1, 41), 0]
        requests = [serving_load.http_post("/", "text/plain", "", b"x" * size) for size in sizes]
        due = np.linspace(0, 0.05, len(sizes))
        replies = serving_load.send_all(stub.port, requests, due)
        assert [one.body for one in replies[:-1]] == [b"%d" % size for size in sizes[:-1]]
        assert [one.status for one in replies] == [200] * 40 + [0]
        assert [one.due for one in replies] == due.tolist()
        assert all(one.due <= one.begun <= one.done for one in replies)

    def test_no_more_connections_than_asked_for(self, stub):
        requests = [serving_load.http_post("/", "text/plain", "", b"x")] * 50
        assert serving_load.answers_per_second(stub.port, requests, connections=3) > 0
        assert stub.connections == 3


class TestArms:
    @pytest.mark.parametrize("runtime", serving.RUNTIMES)
    def test_all_are_loaded_in_the_runtime(self, monkeypatch, tmp_path, runtime):
        asked, model = [], SimpleNamespace(segments=fake_segments(), policy=POLICY)
        monkeypatch.setattr(
            deployed, "load", lambda _, runtime, threads: asked.append((runtime, threads)) or model
        )
        args = serving.parser().parse_args([str(tmp_path), "--runtime", runtime])
        serving.fill_in(args)
        for arm in serving.arms_of(args, tmp_path):
            arm.load()
        assert asked == [(runtime, 1)] * 4

    def test_as_one_segment_a_batch_is_answered_as_a_whole(self):
        segments, exits = fake_segments(), [2, 0, 1, 0]
        one, policy = as_one_segment(segments, POLICY)
        expected = run_segments(segments, images(5, exits), POLICY)
        found = run_segments(one, images(5, exits), policy)
        assert np.array_equal(found.logits, expected.logits)
        assert found.exit_index.tolist() == [2] * 4
        assert [segment.sizes for _, segment in segments] == [[4, 4], [2, 2], [1, 1]]

    def test_the_rows_that_reach_a_segment_are_repeated(self):
        exits = [2, 0, 1, 0] * 25
        shares, reaching = rows_that_reach(fake_segments(), POLICY, images(0, exits), 60)
        assert shares == [1, 0.5, 0.25]
        assert [len(rows.index) for rows in reaching] == [60] * 3
        assert (reaching[2].index % 4 == 0).all()
        assert reaching[2].index[:26].tolist() == [*range(0, 100, 4), 0]

    def test_a_segment_that_no_row_reaches_costs_nothing(self):
        segments = fake_segments()
        shares, reaching = rows_that_reach(segments, POLICY, images(0, [0, 1]), 4)
        assert shares == [1, 0.5, 0] and reaching[2] is None
        assert ideal(segments, POLICY, shares, reaching, 2, 0.001).seconds > 0
        assert segments[2][1].calls == []

    def test_a_saturated_engine_runs_full_batches(self):
        found = saturate(fake_segments(), POLICY, images(0, [0, 1, 2, 2]), EngineSettings(4), 0.01)
        assert found.seconds > 0
        assert len(found.rows) == 3 and 3 < found.rows[0] <= 4

    def test_the_servers_need_no_torch(self):
        """The process of a server imports serving.py, as the main module of its parent."""
        code = f"import sys; sys.path[:0] = {sys.path}; sys.modules['torch'] = None; import serving"
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

    def test_an_error_of_a_segment_is_raised(self):
        segments = fake_segments()
        segments[1][1].fails_on = 3.0
        with pytest.raises(Exception, match="ArithmeticError"):
            saturate(segments, POLICY, images(0, [0, 1, 2, 2]), EngineSettings(4), 0.01)


def usage(answered, runs, rows, workers, process):
    return Usage(EngineState((0, 0), 0, answered, runs, rows, (0.0, 0.0)), workers, process)


class TestResults:
    BEFORE = usage((5, 5), (4, 2), (8, 2), 1.0, 2.0)
    AFTER = usage((35, 25), (14, 7), (68, 22), 2.5, 5.0)

    def test_seconds_and_rows_are_of_the_load_alone(self):
        """50 answers took 1.5 s in the workers and 1.5 s elsewhere."""
        found = loaded(REGROUPED, 100.0, SEEN, self.BEFORE, self.AFTER)
        assert found.model_seconds == found.other_seconds == 0.03
        assert found.rows == (6, 4)
        cells = loaded_row(found).split(" | ")
        assert cells[0] == "| 100" and cells[2:7] == ["75", "10.0", "500.0", "25.0 %", "90.00 %"]
        assert cells[7:10] == ["30.000", "30.000", "6.0 / 4.0"]

    def test_failures_are_told(self):
        seen = replace(SEEN, failed=3, p50=float("nan"))
        found = Loaded(PLAIN, 1.0, seen, 0.0, 0.0, (1.0,))
        assert "3 failed" in loaded_row(found)
        assert to_json(found)["seen"]["p50"] is None

    def test_ratios_are_taken_turn_by_turn(self):
        """The machine is half as fast in the second turn."""
        seconds = {PLAIN: 4, TOGETHER: 2.2, REGROUPED: 2, IDEAL: 1.8}
        arms = {
            name: [Saturated(value / 1000, (2.0,)), Saturated(2 * value / 1000, (3.0, 1.0))]
            for name, value in seconds.items()
        }
        row = saturated_table({8: arms}).splitlines()[-1]
        assert row == (
            "| 8 | 6.000 | 3.300 | 3.000 | 2.700 | 0.90 (0.90 to 0.90) | 1.10 (1.10 to 1.10)"
            " | 2.00 (2.00 to 2.00) | 3.0 / 1.0 | 3.0 / 1.0 |"
        )

    @pytest.mark.parametrize("accuracy", [0.9, None])
    def test_the_figure_is_drawn(self, tmp_path, accuracy):
        pytest.importorskip("matplotlib")
        seen = replace(SEEN, accuracy=accuracy)
        nothing = replace(seen, answered=0, p50=float("nan"), p99=float("nan"))
        found = [
            Loaded(arm, rate, values, 0.01, 0.01, (1.0,))
            for arm in (PLAIN, ADAPTIVE)
            for rate, values in ((10.0, seen), (20.0, nothing))
        ]
        draw(found, 0.25, "title", tmp_path / "figure.png")
        assert (tmp_path / "figure.png").stat().st_size > 0


def test_the_defaults_are_those_of_what_is_served():
    served = {}
    for words in ([], ["RUN"]):
        args = serving.parser().parse_args(words)
        serving.fill_in(args)
        served[bool(words)] = (args.arch, args.images, args.max_drop)
    assert served == {False: ("resnet56", 1024, None), True: (None, None, 2.0)}


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs benchmarks/serving.py: exit code, stdout, stderr."""
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("processes cannot be pinned here")
    own = os.sched_getaffinity(0)
    yield lambda *flags: run_main(serving.main, "serving.py", monkeypatch, capsys, *flags)
    os.sched_setaffinity(0, own)


@pytest.mark.parametrize(
    "flags, named",
    [
        (("--cores", "0"), ["--cores", "0"]),
        (("--max-rows", "63"), ["--max-rows", "63", "64"]),
        (("--seconds", "nan"), ["--seconds", "nan"]),
        (("--rates", "0.5", "nan"), ["--rates", "nan"]),
        (("--seed", "-1"), ["--seed", "-1"]),
        (("--image-size", "16"), ["--image-size", "32", "16"]),
        (("RUN", "--batch-sizes", "8", "0"), ["--batch-sizes", "0"]),
        (("--exit-shares", "0.5"), ["--exit-shares", "2"]),
        (("RUN", "--arch", "resnet56"), ["--arch", "with a RUN"]),
        (("RUN", "--exits", "layer1", "--exit-shares", "1"), ["--exits and --exit-shares"]),
        (("RUN", "--images", "0", "--image-size", "32"), ["--image-size and --images"]),
        (("--data", "photos", "--max-drop", "2"), ["--data and --max-drop", "without a RUN"]),
        (("--eval", "mine", "--task", "helpers:TASK"), ["--eval and --task", "without a RUN"]),
        (("--runtime", "openvino", "--cores", "2"), ["--cores", "openvino", "2"]),
        (("--runtime", "torch"), ["--runtime", "torch", *serving.RUNTIMES]),
    ],
)
def test_mistakes_are_refused_in_one_line(run, flags, named):
    code, _, err = run(*flags)
    assert code == 2
    assert err.startswith("serving.py: ") and err.count("\n") == 1
    assert all(part in err for part in named)


SMALL = (
    *("--batch-sizes", "1", "4", "--max-batch", "4", "--turns", "1", "--saturated-seconds", "0.05"),
    *("--seconds", "0.5", "--rates", "0.2", "2"),
)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--encoded",)])
def test_a_run_is_served_in_every_arm(run, evaluated_run, tmp_path, flags):
    for package in (*serving.PACKAGES, "onnxruntime", "onnxscript", "matplotlib"):
        pytest.importorskip(package)
    chosen = ("--eval", "mine", "--task", "helpers:TASK", "--max-drop", "50")
    code, out, err = run(evaluated_run, *chosen, *SMALL, *flags, "--out", tmp_path / "out")
    assert code == 0, err
    values = json.loads((tmp_path / "out" / "serving.json").read_text())
    assert {size: set(arms) for size, arms in values["saturated"].items()} == {
        size: {PLAIN, TOGETHER, REGROUPED, IDEAL} for size in ("1", "4")
    }
    arms = (PLAIN, TOGETHER, REGROUPED, ADAPTIVE)
    assert [one["arm"] for one in values["loaded"]] == [*arms, *arms]
    for one in values["loaded"]:
        seen = one["seen"]
        assert seen["failed"] == 0
        assert seen["answered"] + seen["rejected"] == seen["requests"] > 0
        assert one["model_seconds"] > 0 and one["other_seconds"] > 0
        assert 0 < seen["accuracy"] <= 1
        assert all(1 <= rows <= 4 for rows in one["rows"])
    assert len(re.findall(r"^\| \d+ \| ", out, re.MULTILINE)) == 2 + 8
    assert (tmp_path / "out" / "serving.png").stat().st_size > 0


@pytest.mark.slow
@pytest.mark.parametrize("runtime", serving.RUNTIMES)
def test_random_weights_need_no_data(run, runtime):
    for package in (*serving.PACKAGES, runtime, "onnxscript"):
        pytest.importorskip(package)
    network = ("--arch", "resnet20", "--images", "64", "--exits", "layer2.0", "--runtime", runtime)
    code, out, err = run(*network, "--exit-shares", "0.5", *SMALL, "--rates", "0.5")
    assert code == 0, err
    assert f", {runtime} " in out.splitlines()[0]  # with its version
    assert f"random weights, 32 pixels; {runtime}, server" in out
    assert len(re.findall(r"^\| \d+ \| ", out, re.MULTILINE)) == 2 + 3
