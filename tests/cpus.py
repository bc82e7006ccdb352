"""The quick tests as other processors would run them: a Markdown table, exit code 1 for a failure.

    python tests/cpus.py                                   every level, with 1 and 2 threads
    python tests/cpus.py --levels AVX2,machine --threads 1 tests/model -x
    python tests/cpus.py --levels perturbed --perturb 16

A level is the newest instructions that oneDNN may use (ONEDNN_MAX_CPU_ISA). `machine` sets nothing,
`default` takes torch's own kernels without vector instructions (ATEN_CPU_CAPABILITY), and
`perturbed` is the machine with every convolution and linear layer a little off
(tests/perturbation.py). Other arguments are passed to pytest.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PERTURBED = "perturbed"
LEVELS = {
    "SSE41": {"ONEDNN_MAX_CPU_ISA": "SSE41"},
    "AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "AVX512_CORE": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "machine": {},
    "default": {"ATEN_CPU_CAPABILITY": "default"},
    PERTURBED: {},
}
OURS = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "EARLY_EXIT_PERTURB")


def known_levels(text: str) -> list[str]:
    """The levels that a comma-separated list names."""
    levels = text.split(",")
    unknown = [level for level in levels if level not in LEVELS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no level {unknown[0]}; choose from {', '.join(LEVELS)}")
    return levels


def parser() -> argparse.ArgumentParser:
    """The script's flags."""
    parser = argparse.ArgumentParser(
        prog="tests/cpus.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--levels",
        type=known_levels,
        default=list(LEVELS),
        metavar="NAME,...",
        help=f"some of {', '.join(LEVELS)} (default all)",
    )
    parser.add_argument(
        "--threads",
        type=lambda text: [int(count) for count in text.split(",")],
        default=[1, 2],
        metavar="N,...",
        help="default 1,2",
    )
    parser.add_argument(
        "--perturb",
        type=float,
        default=4,
        metavar="EPSILONS",
        help="how far the level `perturbed` is off, in epsilon of the dtype (default 4)",
    )
    return parser


def plan(levels: list[str], threads: list[int]) -> list[tuple[str, int]]:
    """Which level runs with how many threads; the perturbed one runs once."""
    runs = [(level, count) for level in levels if level != PERTURBED for count in threads]
    return runs + [(PERTURBED, threads[0])] * (PERTURBED in levels)


def environment(level: str, threads: int, epsilons: float) -> dict[str, str]:
    """The environment of a run."""
    variables = {name: value for name, value in os.environ.items() if name not in OURS}
    count = str(threads)
    variables |= {
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "EARLY_EXIT_TEST_THREADS": count,
    }
    if level == PERTURBED:
        variables["EARLY_EXIT_PERTURB"] = str(epsilons)
    return variables | LEVELS[level]


def row(level: str, threads: int, results: Path, code: int) -> str:
    """A run's line of the table, from the XML that pytest wrote."""
    if code not in (0, 1) or not results.exists():  # no tests ran, or pytest itself failed
        return f"| {level} | {threads} | | | | pytest ended with code {code} |"
    cases = list(ET.parse(results).iter("testcase"))
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    passed = len(cases) - len(failed) - skipped
    return f"| {level} | {threads} | {passed} | {len(failed)} | {skipped} | {', '.join(failed)} |"


def main() -> int:
    """Runs pytest once for each line of the table."""
    args, rest = parser().parse_known_args()
    table = [
        "| level | threads | passed | failed | skipped | names of the failed |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    worst = 0
    for level, threads in plan(args.levels, args.threads):
        print(f"\n{level}, {threads} threads", flush=True)
        with tempfile.TemporaryDirectory() as directory:
            results = Path(directory) / "results.xml"
            done = subprocess.run(
                [sys.executable, "-m", "pytest", "-q", f"--junit-xml={results}", *rest],
                cwd=ROOT,
                env=environment(level, threads, args.perturb),
                check=False,
            )
            shown = f"{PERTURBED} ({args.perturb:g})" if level == PERTURBED else level
            table.append(row(shown, threads, results, done.returncode))
        worst = worst or done.returncode
    print("", *table, sep="\n")
    return int(worst != 0)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # names of tests have any letters
    sys.exit(main())
