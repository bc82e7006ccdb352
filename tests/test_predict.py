"""Classifying one's own images: from Python, on the command line, and with an exported copy."""

import dataclasses
import errno
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from claims import assert_names
from scripts import CPU, DOOR, ROOT, SIDE, finish, refusal, tiny_run

from early_exit import checkpoint, classifier, export, predict
from early_exit.choosing import Goal
from early_exit.classifier import load
from early_exit.config import DataConfig, OptimConfig
from early_exit.errors import UserError
from early_exit.evaluation import evaluate
from early_exit.inference import Answers, infer
from early_exit.policy import Policy
from early_exit.records import ExitRecord

FLAGS = ("--device", "cpu", "--threads", "1")
NAMED = dataclasses.replace(DOOR, name="test_predict:NAMED")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of two epochs with two evaluations; in one of them, about half of the first images of
    test exit at once. Not to be changed."""
    directory = tiny_run(tmp_path_factory.mktemp("predict") / "run", NAMED)
    evaluate(directory, NAMED, Goal(max_drop=0.005), overrides=CPU, live=False, draw=False)
    record = ExitRecord.load(directory / "records" / "test-off")
    scores = torch.from_numpy(record.logits[:7, 0]).softmax(dim=-1).amax(dim=-1).sort().values
    widest = int(scores.diff()[1:5].argmax()) + 1  # a gap that rounding does not cross
    halfway = Goal(thresholds=(float(scores[widest : widest + 2].mean()),), calibrate=False)
    evaluate(directory, NAMED, halfway, overrides=CPU, live=False, draw=False, name="mine")
    return directory


@pytest.fixture
def copy(run, tmp_path) -> Path:
    """A copy of the run, to be changed."""
    return shutil.copytree(run, tmp_path / "copy")


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder with the first images of test as files, in two folders below."""
    data = DOOR.load_data(DataConfig(dataset="digits"))
    for index in range(7):
        path = tmp_path / "photos" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(data.picture("test", index)).save(path)
    return tmp_path / "photos"


def printed(capsys, *arguments) -> list[str]:
    """The lines that predict prints."""
    predict.main([*map(str, arguments), *FLAGS])
    return capsys.readouterr().out.splitlines()


class TestFromPython:
    def test_it_says_what_inference_says(self, run, photos):
        classify = load(run, "mine")
        files = [photos / "ab"[index % 2] / f"{index}.png" for index in range(7)]
        data = NAMED.load_data(DataConfig(dataset="digits"))
        images = data.normalise(data.splits["test"].images[:7])
        policy = Policy.load(run / "eval" / "mine" / "policy.yaml")
        parts = [infer(classify.loaded.network, part, policy) for part in images.split(3)]
        expected = Answers(*(
            torch.cat([getattr(part, name) for part in parts])
            for name in ("logits", "exit_index", "score")
        ))
        found = classify(files, batch_size=3)
        assert [one.class_index for one in found] == expected.classes.tolist()
        assert [one.exit_index for one in found] == expected.exit_index.tolist()
        assert len({one.exit for one in found}) > 1  # or the order would show nothing
        sure = expected.logits.softmax(dim=-1).amax(dim=-1).tolist()
        # some thousand products a path from the image to a logit, each rounded
        rounding = 3000 * torch.finfo(torch.float32).eps
        assert [one.confidence for one in found] == pytest.approx(sure, abs=rounding)
        for one in found:
            assert one.name == data.classes[one.class_index]
            assert one.macs == classify.cost.cumulative()[one.exit_index]
            assert one.macs_share == pytest.approx(one.macs / classify.cost.plain_macs)

    def test_pil_images_do_as_well(self, run, photos):
        classify = load(run, "mine")
        path = photos / "a" / "0.png"
        assert classify([Image.open(path)]) == classify([path]) == classify([str(path)])

    def test_a_switched_off_exit_is_not_paid_for(self, copy):
        path = copy / "eval" / "mine" / "policy.yaml"
        policy = dataclasses.replace(Policy.load(path), enabled=(False, True))
        policy.save(path)
        classify = load(copy, "mine")
        found = classify([Image.new("RGB", (20, 20))])[0]
        assert found.macs == classify.cost.cumulative((False, True))[found.exit_index]

    def test_an_image_of_another_form_is_cut_and_resized(self, run):
        """A white bar left and right of a square is cut off."""
        classify = load(run)
        picture = Image.new("RGB", (80, 40), "white")
        picture.paste(Image.new("RGB", (40, 40), "red"), (20, 0))
        expected = torch.tensor([255, 0, 0], dtype=torch.uint8)
        image = classify.read(picture)
        assert image.shape == (3, SIDE, SIDE)
        assert (image[:, :, 1:-1] == expected[:, None, None]).all()

    def test_an_image_lying_on_its_side_is_put_upright(self, run, tmp_path):
        picture = Image.new("RGB", (SIDE, SIDE))
        picture.paste("white", (0, 0, SIDE, SIDE // 2))  # white above
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by 90 degrees clockwise
        picture.save(tmp_path / "turned.png", exif=exif)
        image = load(run).read(tmp_path / "turned.png")
        assert (image[:, :, SIDE // 2 :] == 255).all() and (image[:, :, : SIDE // 2] == 0).all()

    @pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
    def test_every_kind_of_picture_is_read(self, run, mode):
        assert load(run).read(Image.new(mode, (20, 20))).shape == (3, SIDE, SIDE)

    def test_sixteen_bits_show_what_eight_show(self, run, tmp_path):
        ramp = np.arange(SIDE, dtype=np.uint16)[None].repeat(SIDE, 0) * 4096
        Image.fromarray(ramp).save(tmp_path / "16.png")
        Image.fromarray((ramp // 256).astype(np.uint8)).save(tmp_path / "8.png")
        found = [load(run).read(tmp_path / f"{bits}.png") for bits in (16, 8)]
        assert torch.equal(*found)
        assert found[0].max() == 240

    @pytest.mark.parametrize("mode", ["I", "F"])
    def test_pixels_whose_white_nobody_knows_are_refused(self, run, mode):
        assert_names(refusal(load(run).read, Image.new(mode, (20, 20))), 32)

    def test_a_huge_photo_is_read_without_a_warning(self, run, recwarn):
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, 300
        try:
            picture = io.BytesIO()
            Image.new("RGB", (20, 20)).save(picture, "PNG")
            path = run.parent / "huge.png"
            path.write_bytes(picture.getvalue())
            load(run).read(path)
        finally:
            Image.MAX_IMAGE_PIXELS = limit
        assert [str(one.message) for one in recwarn if "bomb" in str(one.message)] == []

    def test_the_front_door_may_say_how_images_are_cut(self, run):
        door = dataclasses.replace(
            NAMED, held_out=lambda config, image: image.crop((0, 0, SIDE, SIDE))
        )
        picture = Image.new("RGB", (80, 40), "white")
        picture.paste(Image.new("RGB", (SIDE, SIDE), "red"), (0, 0))
        image = load(run, door=door).read(picture)
        assert (image[0] == 255).all() and (image[1] == 0).all()

    def test_random_states_are_left_alone(self, run):
        torch.manual_seed(5)
        expected = torch.rand(1)
        torch.manual_seed(5)
        load(run)
        assert torch.equal(torch.rand(1), expected)


class TestCommand:
    def test_a_table(self, run, photos, capsys):
        _, *lines, last = printed(capsys, run, photos, "--eval", "mine")
        found = load(run, "mine")(sorted(photos.rglob("*.png")))
        assert len(lines) == len(found) == 7
        for line, one, path in zip(lines, found, sorted(photos.rglob("*.png")), strict=True):
            assert line.split() == [
                one.name, f"{100 * one.confidence:.1f}", "%", one.exit,
                f"{100 * one.macs_share:.1f}", "%", str(path),
            ]
        mean = sum(one.macs_share for one in found) / 7
        assert_names(last, 7, f"{100 * mean:.1f} %")
        for name in {one.exit for one in found}:
            assert_names(last, name)

    def test_lines_of_json(self, run, photos, capsys):
        lines = printed(capsys, run, photos, "--eval", "mine", "--json", "-b", "2")
        found = load(run, "mine")(sorted(photos.rglob("*.png")), batch_size=2)
        assert [json.loads(line) for line in lines] == [
            {"image": str(path), "class": one.name,
             **{k: v for k, v in dataclasses.asdict(one).items() if k != "name"}}
            for path, one in zip(sorted(photos.rglob("*.png")), found, strict=True)
        ]

    def test_names_on_standard_input(self, run, photos, capsys, monkeypatch):
        names = [str(photos / "a" / "0.png"), "", str(photos / "b")]
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(names) + "\n"))
        lines = printed(capsys, run, "-", photos / "a" / "2.png", "--json")
        shown = [Path(json.loads(line)["image"]).name for line in lines]
        assert shown == ["0.png", "1.png", "3.png", "5.png", "2.png"]

    def test_an_evaluation_can_be_named_by_its_directory(self, run, photos, capsys):
        assert printed(capsys, run / "eval" / "mine", photos) == printed(
            capsys, run, photos, "--eval", "mine"
        )

    def test_half_a_point_is_the_usual_one(self, run, photos, capsys):
        assert printed(capsys, run, photos) == printed(
            capsys, run, photos, "--eval", "max-drop-0.5-max_prob"
        )

    def test_what_cannot_be_read_is_named_and_skipped(self, run, photos, capsys):
        (photos / "a" / "torn.png").write_bytes((photos / "a" / "0.png").read_bytes()[:60])
        (photos / "text.jpg").write_text("no image")
        (photos / "empty").mkdir()
        names = [photos, photos / "empty", photos / "none.png"]
        message = refusal(predict.main, [str(run), *map(str, names), "--json", *FLAGS])
        assert_names(message, 4, 11)
        said = capsys.readouterr()
        assert len(said.out.splitlines()) == 7
        wrong = said.err.splitlines()
        names = ("a/torn.png", "text.jpg", "empty", "none.png")
        for line, name in zip(wrong, names, strict=True):
            assert line.startswith("early_exit.predict: ")
            assert_names(line, photos / name)
        assert os.strerror(errno.ENOENT) in wrong[3]

    def test_a_name_is_one_line_whatever_is_in_it(self, run, photos, capsys):
        odd = photos / "a" / "new\nline.png"
        (photos / "a" / "0.png").rename(odd)
        (photos / "b" / "bad\nname.png").write_text("no image")
        with pytest.raises(UserError):
            predict.main([str(run), str(photos), *FLAGS])
        said = capsys.readouterr()
        assert len(said.out.splitlines()) == 1 + 7 + 1
        assert r"new\nline.png" in said.out and r"bad\nname.png" in said.err
        assert len(said.err.splitlines()) == 1

    def test_a_document_in_a_folder_is_no_image(self, run, photos, capsys):
        (photos / "a" / "text.pdf").write_text("no image")
        assert len(printed(capsys, run, photos, "--json")) == 7

    @pytest.mark.slow
    def test_as_a_process(self, copy, photos):
        """From another directory; the one bad image is skipped and the exit code is 2."""
        (photos / "bad.jpg").write_text("no image")
        process = as_process(photos, copy, photos, "--eval", "mine", "--json", *FLAGS)
        assert process.returncode == 2
        assert len(process.stdout.splitlines()) == 7
        assert "Traceback" not in process.stderr
        last = process.stderr.splitlines()[-1]
        assert last.startswith("early_exit.predict: ")
        assert_names(last, 1, 8)


def as_process(cwd: Path, *arguments: object) -> subprocess.CompletedProcess:
    """`python -m early_exit.predict` as a process of its own, which finds this module's door."""
    return finish(subprocess.Popen(
        [sys.executable, "-m", "early_exit.predict", *map(str, arguments)], cwd=cwd, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}"},
    ))


class TestMistakes:
    def test_no_run(self, tmp_path):
        assert_names(refusal(load, tmp_path / "none"), tmp_path / "none")

    def test_a_run_that_was_not_evaluated(self, copy):
        shutil.rmtree(copy / "eval")
        assert_names(refusal(load, copy), copy)

    def test_an_evaluation_that_is_not_there(self, run):
        message = refusal(load, run, "none")
        assert_names(message, run, "none", "--eval", "max-drop-0.5-max_prob", "mine")

    def test_several_and_none_is_the_usual_one(self, copy):
        (copy / "eval" / "max-drop-0.5-max_prob").rename(copy / "eval" / "other")
        assert_names(refusal(load, copy), copy, "--eval", "mine", "other")

    def test_a_run_that_went_on_after_its_evaluation(self, copy):
        state = checkpoint.load(copy)
        state["network"]["backbone.linear.bias"] += 1
        checkpoint.save(copy, {key: value for key, value in state.items() if key != "format"})
        assert_names(refusal(load, copy), copy)

    def test_an_evaluation_that_was_never_finished_is_none(self, copy):
        shutil.rmtree(copy / "eval" / "mine")
        shutil.copytree(copy / "eval" / "max-drop-0.5-max_prob", copy / "eval" / ".mine.partial")
        (copy / "eval" / "max-drop-0.5-max_prob").rename(copy / "eval" / "other")
        assert classifier.evaluation_directory(copy).name == "other"

    @pytest.mark.parametrize("content", ["{", "[]", "{}", None])
    def test_a_torn_report(self, copy, content):
        path = copy / "eval" / "mine" / "report.json"
        path.unlink() if content is None else path.write_text(content)
        assert str(path) in refusal(load, copy, "mine")

    @pytest.mark.parametrize(
        "door", ["", "no.such.module:DOOR", "test_predict:NOTHING", "json:dumps", "nothing"]
    )
    def test_a_door_that_cannot_be_found(self, copy, door):
        path = copy / "eval" / "mine" / "report.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "door": door}))
        message = refusal(load, copy, "mine")
        assert door in message and (door or str(copy) in message)

    def test_compile_compiles_every_stage(self, run, monkeypatch):
        compiled = []
        monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **options: compiled.append(1))
        load(run, "mine", device="cpu", overrides={"run": {"compile": True}})
        assert len(compiled) == 3
        load(run, "mine", device="cpu")
        assert len(compiled) == 3

    def test_a_batch_of_none(self, run):
        assert "--batch-size" in refusal(predict.main, [str(run), "x.png", "-b", "0"])


class TestExport:
    @pytest.fixture
    def exported(self, run, tmp_path) -> Path:
        """The copy that is given away."""
        arguments = [str(run), str(tmp_path / "given"), "--eval", "mine", "--licence", "MIT"]
        export.main([*arguments, "--source", "Digits are everybody's."])
        return tmp_path / "given"

    def test_it_says_the_same(self, run, exported, photos):
        files = sorted(photos.rglob("*.png"))
        assert load(exported)(files) == load(run, "mine")(files)

    def test_what_only_training_needs_stays_behind(self, run, exported):
        state = checkpoint.load(exported)
        assert not {"optimizer", "scaler", "tally", "average"} & set(state)
        names = {str(path.relative_to(exported)) for path in exported.rglob("*") if path.is_file()}
        assert names == {
            "README.md", "checkpoint.pt", "eval/mine/policy.yaml", "eval/mine/report.json"
        }

    def test_the_running_average_is_what_is_given(self, copy, tmp_path):
        state = checkpoint.load(copy)
        state["average"] = {name: value + 1 for name, value in state["network"].items()}
        slim = export.slim(state)
        assert torch.equal(
            slim["network"]["backbone.linear.bias"], state["network"]["backbone.linear.bias"] + 1
        )

    def test_a_run_with_a_running_average_is_given_away(self, photos, tmp_path):
        optim = OptimConfig(epochs=1, batch_size=8, lr=0.05, ema=0.9)
        run = tiny_run(tmp_path / "run", NAMED, optim)
        evaluate(run, NAMED, Goal(budget=0.8), overrides=CPU, live=False, draw=False, name="mine")
        export.main([str(run), str(tmp_path / "given")])
        files = sorted(photos.rglob("*.png"))
        assert load(tmp_path / "given")(files) == load(run)(files)
        given, own = (load(path).loaded for path in (tmp_path / "given", run))
        average = checkpoint.load(run)["average"]
        assert given.weights == own.weights
        for name, value in given.network.state_dict().items():
            assert torch.equal(value, average[name]), name

    @pytest.mark.parametrize(
        ("command", "left"),
        [
            ("trainer.py --data /home/alice/x", "trainer.py --data x"),
            ("trainer.py --data=/home/alice/x", "trainer.py --data=x"),
            ("trainer.py --set data.root=/home/alice/x/", "trainer.py --set data.root=x"),
            ("'/home/a b/trainer.py' --data='/home/a b/c d'", "trainer.py '--data=c d'"),
            ("/home/a=b/trainer.py --lr=0.1 -- ../x", "trainer.py --lr=0.1 -- ../x"),
        ],
    )
    def test_of_a_command_names_alone_are_left(self, command, left):
        assert export.without_directories(shlex.split(command)) == left

    def test_no_path_of_this_machine_is_given_away(self, copy, tmp_path):
        state = checkpoint.load(copy)
        state["config"]["data"]["root"] = "/home/somebody/data"
        state["config"]["model"]["backbone"] = "/home/somebody/resnet.th"
        config = export.slim(state)["config"]
        assert config["data"]["root"] is None
        assert config["model"]["backbone"] == "resnet.th"

    def test_the_card(self, run, exported):
        card = " ".join((exported / "README.md").read_text().split())
        report = json.loads((run / "eval" / "mine" / "report.json").read_text())
        for accuracy in (report["test"]["accuracy"], report["final_accuracy"]):
            assert_names(card, f"{100 * accuracy:.2f} %")
        assert_names(card, "MIT")
        assert "Digits are everybody's." in card
        assert_names(card, 10, "0, 1, 2, 3, 4, 5, 6, 7, 8, 9")

    @pytest.mark.parametrize(
        ("goal", "fitted"),
        [(Goal(max_drop=0.005), {"thresholds", "temperatures"}),
         (Goal(thresholds=(0.5,)), {"temperatures"}),
         (Goal(thresholds=(0.5,), calibrate=False), set()),
         (Goal(delta=0.9, calibrate=False), {"stages"})],
        ids=str,
    )
    def test_the_card_says_what_was_fitted(self, copy, tmp_path, goal, fitted):
        shutil.rmtree(copy / "eval")
        evaluate(copy, NAMED, goal, overrides=CPU, live=False, draw=False)
        export.main([str(copy), str(tmp_path / "given")])
        card = " ".join((tmp_path / "given" / "README.md").read_text().split())
        (before,) = re.findall(r"([^.]*)\b40 images", card)  # the sentence up to them
        words = set(re.findall("thresholds|temperatures|stages", before.lower()))
        assert words == fitted

    def test_no_file_names_a_directory_of_this_machine(self, copy, tmp_path):
        path = copy / "eval" / "mine" / "report.json"
        report = json.loads(path.read_text())
        report["command"] = f"python {tmp_path}/eval.py {copy} --data {tmp_path}/data"
        path.write_text(json.dumps(report))
        export.main([str(copy), str(tmp_path / "given"), "--eval", "mine"])
        for file in (tmp_path / "given").rglob("*"):
            assert not file.is_file() or str(tmp_path).encode() not in file.read_bytes(), file
        assert "`python eval.py copy --data data`" in " ".join(
            (tmp_path / "given" / "README.md").read_text().split()
        )

    def test_a_report_of_another_version(self, copy, tmp_path):
        path = copy / "eval" / "mine" / "report.json"
        report = json.loads(path.read_text())
        del report["calibrated"]
        path.write_text(json.dumps(report))
        message = refusal(export.main, [str(copy), str(tmp_path / "given"), "--eval", "mine"])
        assert_names(message, path)
        assert not (tmp_path / "given").exists()

    def test_a_directory_that_is_there_is_left_alone(self, run, tmp_path):
        (tmp_path / "there").mkdir()
        assert_names(refusal(export.main, [str(run), str(tmp_path / "there")]), tmp_path / "there")
        assert list((tmp_path / "there").iterdir()) == []


class TestPretrained:
    """The network in the repository."""

    PATH = ROOT / "cifar10" / "pretrained" / "resnet20"

    def test_it_is_small(self):
        files = [path for path in self.PATH.rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files) < 2_000_000

    def test_it_classifies(self):
        classify = load(self.PATH)
        assert classify.classes[3] == "cat"
        found = classify([Image.new("RGB", (320, 240), "blue")])[0]
        assert found.exit in ("layer1", "layer2", "final") and 0.1 < found.confidence <= 1

    def test_its_card_says_what_its_report_says(self):
        card = " ".join((self.PATH / "README.md").read_text().split())
        (path,) = self.PATH.glob("eval/*/report.json")
        report = json.loads(path.read_text())
        assert_names(card, f"{100 * report['test']['accuracy']:.2f} %")

    @pytest.mark.slow
    def test_it_is_as_accurate_as_its_card_says(self):
        """On CIFAR-10's test set, where that is."""
        from cifar10 import data

        try:
            test = data.load("cifar10").splits["test"]
        except Exception as error:
            pytest.skip(f"no CIFAR-10 here: {error}")
        classify = load(self.PATH)
        right = np.zeros(0, bool)
        for start_ in range(0, len(test), 500):
            answers = classify.answer(test.images[start_ : start_ + 500])
            answered = answers.classes == test.targets[start_ : start_ + 500]
            right = np.concatenate([right, answered.numpy()])
        (path,) = self.PATH.glob("eval/*/report.json")
        assert right.mean() == pytest.approx(
            json.loads(path.read_text())["test"]["accuracy"], abs=5e-4
        )


def test_evaluations_are_found_where_they_lie(run):
    assert classifier.evaluation_directory(run, "mine") == run / "eval" / "mine"
    assert classifier.evaluation_directory(run / "eval" / "mine") == run / "eval" / "mine"
    message = refusal(classifier.evaluation_directory, run / "eval" / "mine", "mine")
    assert_names(message, "--eval")
