"""Classifying image files on the command line."""

import dataclasses
import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, TASK, assert_names, fail_to_list, finish, refusal

from early_exit import predict
from early_exit.classifier import load
from early_exit.errors import Unavailable, UserError

FLAGS = ("--task", "helpers:TASK", "--device", "cpu", "--threads", "1")


def printed(capsys, *arguments) -> list[str]:
    """The lines that predict prints."""
    predict.main([*map(str, arguments), *FLAGS])
    return capsys.readouterr().out.splitlines()


class TestCommand:
    def test_a_table(self, evaluated_run, photos, capsys):
        _, *lines, last = printed(capsys, evaluated_run, photos, "--eval", "mine")
        found = load(evaluated_run, "mine", task=TASK)(sorted(photos.rglob("*.png")))
        assert len(lines) == len(found) == 7
        for line, one, path in zip(lines, found, sorted(photos.rglob("*.png")), strict=True):
            assert line.split() == [
                one.name,
                f"{100 * one.confidence:.1f}",
                "%",
                one.exit,
                f"{100 * one.macs_share:.1f}",
                "%",
                str(path),
            ]
        mean = sum(one.macs_share for one in found) / 7
        assert_names(last, 7, f"{100 * mean:.1f} %")
        for name in {one.exit for one in found}:
            assert_names(last, name)

    def test_lines_of_json(self, evaluated_run, photos, capsys):
        flags = ("--eval", "mine", "--json", "-b", "2", "--device", "cpu")
        lines = printed(capsys, evaluated_run, photos, *flags)
        found = load(evaluated_run, "mine", task=TASK, device="cpu")(
            sorted(photos.rglob("*.png")), batch_size=2
        )
        assert [json.loads(line) for line in lines] == [
            {
                "image": str(path),
                "class": one.name,
                **{k: v for k, v in dataclasses.asdict(one).items() if k != "name"},
            }
            for path, one in zip(sorted(photos.rglob("*.png")), found, strict=True)
        ]

    def test_names_on_standard_input(self, evaluated_run, photos, capsys, monkeypatch):
        names = [str(photos / "a" / "0.png"), "", str(photos / "b")]
        stdin(monkeypatch, "\n".join(names) + "\n")
        lines = printed(capsys, evaluated_run, "-", photos / "a" / "2.png", "--json")
        shown = [Path(json.loads(line)["image"]).name for line in lines]
        assert shown == ["0.png", "1.png", "3.png", "5.png", "2.png"]

    def test_each_odd_name_on_standard_input_fails_alone(
        self, evaluated_run, photos, capsys, monkeypatch
    ):
        """Spaces, bytes that are not UTF-8, a NUL, a name too long for any file system: those that
        name a file are answered, in their order."""
        image = (photos / "a" / "0.png").read_bytes()
        kept = [
            b" both ends ",
            b"caf\xe9",
            "\u202edlo".encode(),
            b"-dash",
            b'"%s" \xf0\x9f\x90\xb1',
        ]
        if sys.platform == "darwin":  # its names are UTF-8
            kept.remove(b"caf\xe9")
        for name in kept:
            Path(os.fsdecode(bytes(photos) + b"/" + name)).write_bytes(image)
        lines = [bytes(photos) + b"/" + name for name in kept]
        lines[2:2] = [b"a\0b", b"x" * 5000]
        stdin(monkeypatch, b"\n".join(lines) + b"\n")
        message = refusal(predict.main, [str(evaluated_run), "-", "--json", *FLAGS])
        assert_names(message, 2, 2 + len(kept))
        shown = capsys.readouterr()
        found = [json.loads(line)["image"] for line in shown.out.splitlines()]
        assert [Path(name).name for name in found] == [os.fsdecode(name) for name in kept]
        assert len(shown.err.splitlines()) == 2

    def test_what_was_read_before_standard_input_failed_is_answered(
        self, evaluated_run, photos, capsys, monkeypatch
    ):
        def failing(*_):
            yield str(photos / "a" / "0.png")
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(predict, "read_names", failing)
        stdin(monkeypatch, "")
        with pytest.raises(Unavailable, match=os.strerror(errno.EIO)):
            predict.main([str(evaluated_run), "-", "--json", *FLAGS])
        assert len(capsys.readouterr().out.splitlines()) == 1

    def test_standard_input_that_is_closed(self, evaluated_run, monkeypatch):
        monkeypatch.setattr(sys, "stdin", None)
        refusal(predict.main, [str(evaluated_run), "-", *FLAGS])

    def test_names_that_end_with_nul(self, evaluated_run, photos, capsys, monkeypatch):
        odd = photos / "a" / "new\nline.png"
        (photos / "a" / "0.png").rename(odd)
        stdin(monkeypatch, f"{odd}\0{photos / 'b'}\0")
        lines = printed(capsys, evaluated_run, "-", "-0", "--json")
        assert json.loads(lines[0])["image"] == str(odd)
        assert len(lines) == 1 + 3

    def test_nul_without_standard_input(self, evaluated_run, photos):
        message = refusal(predict.main, [str(evaluated_run), str(photos), "-0", *FLAGS])
        assert_names(message, "-0", "-")

    def test_an_evaluation_can_be_named_by_its_directory(self, evaluated_run, photos, capsys):
        assert printed(capsys, evaluated_run / "eval" / "mine", photos) == printed(
            capsys, evaluated_run, photos, "--eval", "mine"
        )

    def test_half_a_point_is_the_default_evaluation(self, evaluated_run, photos, capsys):
        assert printed(capsys, evaluated_run, photos) == printed(
            capsys, evaluated_run, photos, "--eval", "max-drop-0.5-max_prob"
        )

    def test_what_cannot_be_read_is_named_and_skipped(self, evaluated_run, photos, capsys):
        (photos / "a" / "torn.png").write_bytes((photos / "a" / "0.png").read_bytes()[:60])
        (photos / "text.jpg").write_text("no image")
        (photos / "empty").mkdir()
        names = [photos, photos / "empty", photos / "none.png"]
        message = refusal(predict.main, [str(evaluated_run), *map(str, names), "--json", *FLAGS])
        assert_names(message, 4, 11)
        shown = capsys.readouterr()
        assert len(shown.out.splitlines()) == 7
        errors = shown.err.splitlines()
        names = ("a/torn.png", "text.jpg", "empty", "none.png")
        for line, name in zip(errors, names, strict=True):
            assert line.startswith("early_exit.predict: ")
            assert_names(line, photos / name)
        assert os.strerror(errno.ENOENT) in errors[3]

    def test_a_file_name_with_a_line_break_is_printed_in_one_line(
        self, evaluated_run, photos, capsys
    ):
        odd = photos / "a" / "new\nline.png"
        (photos / "a" / "0.png").rename(odd)
        (photos / "b" / "bad\nname.png").write_text("no image")
        with pytest.raises(UserError):
            predict.main([str(evaluated_run), str(photos), *FLAGS])
        shown = capsys.readouterr()
        assert len(shown.out.splitlines()) == 1 + 7 + 1
        assert r"new\nline.png" in shown.out and r"bad\nname.png" in shown.err
        assert len(shown.err.splitlines()) == 1

    def test_what_is_no_image_is_left_out_and_counted(self, evaluated_run, photos, capsys):
        for name in ("text.pdf", "data.h5", "photo.heic", "._0.png", ".ipynb_checkpoints"):
            (photos / "a" / name).write_text("no image")
        (photos / "a" / "loop").symlink_to("..")
        predict.main([str(evaluated_run), str(photos), "--json", *FLAGS])
        out, err = capsys.readouterr()
        assert len(out.splitlines()) == 7
        (line,) = err.splitlines()
        assert_names(line, photos, ".pdf", ".h5", ".heic", 1)
        (photos / "a" / "0.png").rename(photos / "a" / ".hidden")
        predict.main([str(evaluated_run), str(photos / "a" / ".hidden"), "--json", *FLAGS])
        assert len(capsys.readouterr().out.splitlines()) == 1  # named, so it is read

    @pytest.mark.parametrize("code", [errno.EACCES, errno.ESTALE])
    def test_a_folder_that_cannot_be_listed(self, evaluated_run, photos, capsys, monkeypatch, code):
        fail_to_list(monkeypatch, photos / "b", code)
        assert_names(refusal(predict.main, [str(evaluated_run), str(photos), *FLAGS]), 1, 5)
        (line,) = capsys.readouterr().err.splitlines()
        assert_names(line, photos / "b", os.strerror(code))

    def test_a_batch_size_below_one(self, evaluated_run):
        message = refusal(predict.main, [str(evaluated_run), "x.png", "-b", "0"])
        assert_names(message, "--batch-size", 1, 0)

    @pytest.mark.slow
    def test_as_a_process(self, evaluated_copy, photos):
        """From another directory; the one bad image is skipped and the exit code is 2."""
        (photos / "bad.jpg").write_text("no image")
        process = as_process(photos, evaluated_copy, photos, "--eval", "mine", "--json", *FLAGS)
        assert process.returncode == 2
        assert len(process.stdout.splitlines()) == 7
        assert "Traceback" not in process.stderr
        last = process.stderr.splitlines()[-1]
        assert last.startswith("early_exit.predict: ")
        assert_names(last, 1, 8)


def stdin(monkeypatch, content: str | bytes) -> None:
    """Standard input with this content."""
    content = content if isinstance(content, bytes) else content.encode()
    file = io.BufferedReader(io.BytesIO(content))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(file))


def as_process(cwd: Path, *arguments: object) -> subprocess.CompletedProcess:
    """`python -m early_exit.predict` as a process that finds the module of the task."""
    return finish(
        subprocess.Popen(
            [sys.executable, "-m", "early_exit.predict", *map(str, arguments)],
            cwd=cwd,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}"},
        )
    )
