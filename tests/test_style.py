"""The repository as a whole: style, docstrings, and every command and example that is shown."""

import ast
import importlib
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from helpers import ROOT
from PIL import Image

from cifar10 import eval as evaluation_script
from cifar10 import trainer
from early_exit import config as configs
from early_exit.cli import settings
from early_exit.data.folders import FolderRun
from early_exit.evaluation import live
from early_exit.inference.criteria import CRITERIA
from early_exit.model.heads import HEADS
from early_exit.training.phases import plan_phases
from imagenet import eval as imagenet_eval
from imagenet import main, networks

PACKAGES = [name for name in ("early_exit", "cifar10", "imagenet") if (ROOT / name).is_dir()]
SOURCES = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
PAGES = sorted(
    page
    for pattern in ("*.md", "docs-src/**/*.md", "docker/**/*.md")
    for page in ROOT.glob(pattern)
)


def relative(path: Path) -> str:
    """A path as it is called in the repository."""
    return str(path.relative_to(ROOT))


def tracked() -> list[Path]:
    """Every file that is, or would be, part of the repository."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("this is not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def run_module(*command: str) -> tuple[int, str]:
    """Exit code and output of `python -m`, in the repository."""
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("command", [("check",), ("format", "--check")], ids=" ".join)
def test_ruff_finds_nothing(command):
    code, output = run_module("ruff", *command, "--quiet", ".")
    assert (code, output) == (0, "")


@pytest.mark.slow  # `make lint` runs it too
def test_mypy_finds_nothing():
    code, output = run_module("mypy")
    assert code == 0, output


def test_make_lint_runs_the_same():
    makefile = (ROOT / "Makefile").read_text()
    for command in ("ruff check .", "ruff format --check .", "mypy"):
        assert f"$(PY) -m {command}\n" in makefile


def test_files_of_tests_are_short_and_have_names_of_their_own():
    files = [path for path in tracked() if ROOT / "tests" in path.parents and path.suffix == ".py"]
    assert [relative(path) for path in files if len(path.read_text().splitlines()) >= 1000] == []
    names = [path.name for path in files if path.name != "conftest.py"]
    assert [name for name in sorted(set(names)) if names.count(name) > 1] == []


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_every_public_thing_has_a_docstring(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "the module"
    for node in tree.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef) or node.name.startswith("_"):
            continue
        assert ast.get_docstring(node), node.name
        bases = [ast.unparse(base) for base in getattr(node, "bases", ())]
        if isinstance(node, ast.FunctionDef) or "Protocol" in bases:
            continue
        for method in node.body:
            # the class says what `forward` maps
            if isinstance(method, ast.FunctionDef) and not re.match("_|forward$", method.name):
                assert ast.get_docstring(method), f"{node.name}.{method.name}"


def test_no_file_names_the_machine_it_was_written_on():
    """Private paths, and remarks on how a file was written, mean nothing to a reader."""
    words = ["/wo" + "rk/", "sub" + "agent", "this " + "session"]
    pattern = re.compile("|".join(map(re.escape, words)), re.IGNORECASE)
    found = []
    for path in tracked():
        text = path.read_bytes().decode(errors="ignore")
        found += [f"{relative(path)}: {match[0]}" for match in pattern.finditer(text)]
    assert found == []


def fenced(page: Path) -> list[tuple[str, str]]:
    """The language and the content of every fenced block of a page."""
    return re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands() -> list[tuple[str, str]]:
    """Every shown command that runs a script, with the file that shows it: in the pages' fenced
    blocks and lines, and in the scripts' own docstrings, which explain it after two spaces."""
    found = []
    for page in PAGES:
        for _, block in fenced(page):
            for line in block.replace("\\\n", " ").splitlines():
                found.append((relative(page), line.strip().removeprefix("$ ")))
        for line in re.findall(r"`((?:python|torchrun) [^`]+)`", page.read_text()):
            found.append((relative(page), " ".join(line.split())))
    for path in [*SOURCES, *(ROOT / "benchmarks").glob("*.py"), *ROOT.glob("docs-src/**/*.py")]:
        docstring = ast.get_docstring(ast.parse(path.read_text()), clean=False) or ""
        for line in docstring.splitlines():
            if line.startswith(("    python ", "    torchrun ")):
                found.append((relative(path), re.split(r"\s{2,}", line.strip())[0]))
    script = re.compile(
        r"((\S*/)?python3?|torchrun( --\S+ \d+)*) ((\S+\.py)\b|-m early_exit\.\w+ )"
    )
    return list(dict.fromkeys((where, line) for where, line in found if script.match(line)))


COMMANDS = commands()


def test_commands_are_found():
    files = {where for where, _ in COMMANDS}
    assert {"README.md", "cifar10/trainer.py", "cifar10/eval.py"} <= files


@pytest.mark.parametrize(
    ("where", "command"), COMMANDS, ids=[f"{where}: {command}" for where, command in COMMANDS]
)
def test_a_shown_command_is_accepted_by_its_script(where, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(networks, "describe_archs", lambda: ())  # half a minute; tested by itself
    words = shlex.split(command, comments=True)
    words = words[: next((at for at, word in enumerate(words) if word in "<>|"), None)]
    if words[1] == "-m":
        importlib.import_module(words[2]).parser().parse_args(words[3:])
        return
    at = next(number for number, word in enumerate(words) if word.endswith(".py"))
    script, flags = words[at], words[at + 1 :]
    assert (ROOT / script).exists()
    if script.startswith("docs-src/"):
        module = runpy.run_path(str(ROOT / script))
        module["parser"]().parse_args(flags)
        return
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    try:
        args = module.parser().parse_args(flags)
    except SystemExit as ended:  # a flag that prints and ends
        assert ended.code == 0
        return
    if module in (evaluation_script, imagenet_eval):
        if args.policy:  # a file of the reader's
            args.policy, args.thresholds = None, [0.5]
        settings.goal_of(args)
        settings.evaluation_options(args)
    elif module is trainer:
        config = settings.resolve_config(args, None, trainer.script_defaults(args))
        settings.check_flags_have_effect(args, config)
        with torch.device("meta"):
            network = trainer.build_network(config, 10)
        assert args.evaluate or plan_phases(config, network.num_exits)
    elif module is main:
        backbone = None if args.pretrained is None else "weights.pth"  # which `main` downloads
        own = configs.merge(main.CLASSIC, {"model": {"backbone": backbone}})
        config = settings.resolve_config(args, None, own, FolderRun)
        settings.check_flags_have_effect(args, config)
        with torch.device("meta"):
            network = main.build_network(config, 1000)
        assert args.evaluate or plan_phases(config, network.num_exits)


def test_make_has_the_targets_that_are_shown():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    shown = [
        line.split()[1]
        for page in PAGES
        for _, block in fenced(page)
        for line in block.splitlines()
        if line.startswith("make ")
    ]
    assert set(shown) <= set(targets)


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_and_pictures_of_a_page_exist(page):
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    broken = [
        target
        for target in targets
        if not target.startswith(("http:", "https:", "mailto:"))
        and not (page.parent / target).exists()
    ]
    assert broken == []


EXAMPLES = [
    (page, block) for page in PAGES for language, block in fenced(page) if language == "python"
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "example"), EXAMPLES, ids=[relative(page) for page, _ in EXAMPLES]
)
def test_a_shown_python_example_runs(page, example, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar10").symlink_to(ROOT / "cifar10")
    Image.new("RGB", (64, 48), "blue").save("photo.jpg")
    monkeypatch.setattr(live, "time_batch", lambda *_: None)  # takes half a minute
    with patch.dict(CRITERIA), patch.dict(HEADS):
        # as a script, but for one that reads the command line
        name = "script" if "border" in example else "__main__"
        exec(compile(example, relative(page), "exec"), {"__name__": name})
    assert capsys.readouterr().err == ""
