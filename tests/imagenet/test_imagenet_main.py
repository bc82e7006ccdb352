"""imagenet/main.py and imagenet/eval.py as their command lines run them."""

import hashlib
import json
import logging
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch
import yaml
from helpers import (
    ROOT,
    assert_names,
    finish,
    make_folders,
    read_journal,
    refusal,
    run_main,
    start,
    wait_for,
    wait_for_file,
)
from torchvision import models

from early_exit.cli import settings
from early_exit.errors import UserError
from early_exit.training import checkpoint
from early_exit.training.optimizer import lr_at
from imagenet import eval as evaluation
from imagenet import main as front
from imagenet import networks, weights

SMALL = (
    "--arch",
    "resnet18",
    "--train-crop",
    "32",
    "--val-resize",
    "36",
    "--val-crop",
    "32",
    "--device",
    "cpu",
    "--threads",
    "1",
    "--amp",
    "off",
    "-j",
    "0",
)
QUICK = (*SMALL, "--epochs", "1", "-b", "6", "--val-size", "6")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("folders") / "set")


@pytest.fixture
def main(monkeypatch, capsys):
    """Runs main.py: exit code, stdout and stderr."""
    return lambda *flags: run_main(front.main, "main.py", monkeypatch, capsys, *flags)


@pytest.fixture(scope="module")
def trained(folders, tmp_path_factory):
    """A run with an exit after layer1."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["main.py"])
        front.main(
            [
                str(folders),
                *QUICK,
                "--exits",
                "layer1",
                "--ema",
                "0.9",
                "--save-dir",
                str(directory),
            ]
        )
    return directory


def configured(*flags):
    """The configuration that the flags ask for."""
    args = front.parser().parse_args([str(flag) for flag in flags])
    return settings.resolve_config(args, None, front.CLASSIC, front.FolderRun)


class TestFlags:
    def test_mean_what_they_mean_in_the_pytorch_example(self):
        config = configured(
            "somewhere",
            "-a",
            "resnet34",
            "-j",
            3,
            "--epochs",
            7,
            "-b",
            64,
            "--lr",
            0.2,
            "--momentum",
            0.8,
            "--wd",
            1e-3,
            "-p",
            5,
            "--seed",
            4,
            "--gpu",
            1,
        )
        assert config.data.root == str(Path("somewhere").absolute())
        assert (config.model.arch, config.data.workers) == ("resnet34", 3)
        optim = config.optim
        assert (optim.epochs, optim.batch_size, optim.lr) == (7, 64, 0.2)
        assert (optim.momentum, optim.weight_decay) == (0.8, 1e-3)
        assert (config.run.print_freq, config.run.seed, config.run.device) == (5, 4, "cuda:1")

    def test_defaults_are_the_classic_recipe(self):
        config = configured()
        assert config.model.arch == "resnet50" and config.model.head == ("separable",)
        assert (config.optim.epochs, config.optim.batch_size, config.optim.lr) == (90, 256, 0.1)
        rates = [lr_at(config.optim, epoch) for epoch in (0, 29.9, 30, 60)]
        assert rates == pytest.approx([0.1, 0.1, 0.01, 0.001])

    @pytest.mark.parametrize(
        "flags, exits",
        [
            ((), ()),
            (("--exits",), None),
            (("--exits", "layer3"), ("layer3",)),
            (("--exits", "none"), ()),
        ],
    )
    def test_exits_absent_bare_and_named(self, flags, exits):
        assert configured(*flags).model.exits == exits

    def test_without_a_directory_it_is_the_repositorys(self, main, monkeypatch, tmp_path):
        assert configured().data.root is None
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(front, "DATA", tmp_path / "data" / "imagenet")
        code, _, err = main("--exits", "--check")
        assert code == 2
        assert err.startswith("main.py: ") and f"{tmp_path}/data/imagenet" in err

    def test_a_directory_is_meant_from_where_one_is(self, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        assert configured("here").data.root == f"{tmp_path}/here"

    def test_a_directory_after_the_heads_is_not_a_head(self, main):
        code, _, err = main("--exits", "layer2", "--head", "conv", "/data/imagenet")
        assert code == 2
        assert "--head" in err and "/data/imagenet" in err

    def test_bare_dummy_is_as_large_as_imagenet(self):
        assert configured("--dummy").data.dummy == 1_281_167
        assert configured("--dummy", 200).data.dummy == 200

    @pytest.mark.parametrize(
        "flag", ["--multiprocessing-distributed", "--world-size", "--rank", "--dist-url"]
    )
    def test_a_launchers_flags_name_torchrun(self, main, flag):
        code, _, err = main(flag, "1")
        assert code == 2 and "torchrun --nproc-per-node" in err

    def test_exits_do_not_eat_the_directory(self, main, folders):
        code, _, err = main("--exits", folders)
        assert code == 2
        assert "--exits" in err and str(folders) in err
        assert configured(folders, "--exits").data.root == str(folders)
        assert configured("--exits", "--", folders).data.root == str(folders)

    def test_one_gpu_that_is_not_there(self, main, folders):
        code, _, err = main(folders, "--gpu", 99)
        assert code == 2 and "cuda:99" in err

    def test_sync_bn_on_a_cpu(self, main, folders, tmp_path):
        code, _, err = main(folders, *QUICK, "--sync-bn", "--save-dir", tmp_path / "run")
        assert code == 2 and "--sync-bn" in err
        assert not (tmp_path / "run").exists()

    def test_a_vit_takes_images_of_one_size(self, main, folders):
        code, _, err = main(folders, "--arch", "vit_b_32", "--train-crop", 192, "--check")
        assert code == 2
        assert all(word in err for word in ("vit_b_32", "--train-crop", "192", "--val-crop", "224"))

    def test_a_vit_takes_whole_patches(self, main, folders):
        code, _, err = main(folders, "--arch", "vit_b_32", "--train-crop", 112, "--val-crop", 112)
        assert code == 2 and err.count("\n") == 1
        assert all(word in err for word in ("vit_b_32", "112", "multiple of 32"))

    def test_a_regime_needs_early_exits(self, main, folders):
        code, _, err = main(folders, *QUICK, "--regime", "mixed", "--check")
        assert code == 2 and err.count("\n") == 1
        assert all(word in err for word in ("--regime", "--exits"))

    def test_list_archs(self, main, monkeypatch):
        monkeypatch.setattr(networks, "list_archs", lambda: ["resnet18", "mobilenet_v3_small"])
        code, out, _ = main("--list-archs")
        assert code == 0
        assert "layer1.0 19.3%, layer1 32.0%" in out.replace("\n", " ")
        title = next(line for line in out.splitlines() if line.startswith("resnet18"))
        assert "layer1.0 layer2.0" in title  # the default places

    @pytest.mark.parametrize(
        "flags, nearest",
        [(("--arch", "resnet19"), r"\bresnet1[08]\b"), (("--exits", "layer9"), r"\blayer[1-4]\b")],
    )
    def test_the_nearest_network_or_place_is_named(self, main, folders, flags, nearest):
        code, _, err = main(folders, *flags, "--check")
        assert code == 2 and flags[1] in err and re.search(nearest, err)


class TestCheck:
    def test_prints_the_run_in_a_few_lines_and_writes_nothing(
        self, main, folders, tmp_path, caplog
    ):
        caplog.set_level(logging.INFO)
        code, _, _ = main(folders, *QUICK, "--exits", "--check", "--save-dir", tmp_path / "run")
        assert code == 0
        assert len(caplog.text.splitlines()) < 10
        sizes = r"train\D* 18\b.*val\D* 6\b.*test\D* 12\b"
        assert re.search(sizes, caplog.text)
        assert re.search(r"layer2\.0 .*%", caplog.text)  # what an exit there costs
        assert list(tmp_path.iterdir()) == []

    def test_print_config_prints_a_preset_of_every_setting(self, main, folders, tmp_path):
        code, out, _ = main(folders, *QUICK, "--exits", "--print-config")
        assert code == 0
        preset = tmp_path / "preset.yaml"
        preset.write_text(out)
        assert yaml.safe_load(out)["optim"]["batch_size"] == 6
        assert main("--config", preset, "--print-config")[1] == out

    def test_data_that_is_not_there(self, main, tmp_path):
        code, _, err = main(tmp_path / "none", "--check")
        assert code == 2 and err.count("\n") == 1 and str(tmp_path / "none") in err

    def test_imagenets_val_without_class_folders(self, main, tmp_path):
        root = make_folders(tmp_path / "a b", train=1)
        for folder in list((root / "val").iterdir()):
            shutil.rmtree(folder)
        (root / "val" / "ILSVRC2012_val_00000293.JPEG").touch()
        code, _, err = main(root, "--check")
        assert code == 2 and err.count("\n") == 1
        assert f"cd '{root}/val' && wget " in err
        (root / "val" / "ILSVRC2012_val_00000293.JPEG").rename(root / "val" / "0.JPEG")
        code, _, err = main(root, "--check")
        assert code == 2 and "wget" not in err

    def test_steps_that_cannot_be_shared(self, main, folders):
        code, _, err = main(folders, *QUICK, "--accumulate", 4, "--check")
        assert code == 2 and re.search(r"\b6 images\b.*\b4\b", err) and "--accumulate" in err

    def test_a_step_of_more_images_than_there_are(self, main, folders):
        code, _, err = main(folders, *SMALL, "-b", 64, "--check")
        assert code == 2 and re.search(r"\b64 images\b.*\b22\b", err) and "--batch-size" in err

    def test_check_is_for_training_alone(self, main, folders):
        code, _, err = main(folders, *QUICK, "--check", "-e", "--resume", "x")
        assert code == 2 and "--check" in err and "-e" in err


class TestTraining:
    def test_journal_and_checkpoint(self, trained):
        (line,) = read_journal(trained)
        assert list(line["val_top1"]) == ["layer1", "final"]
        assert "val_top5" not in line  # of three classes
        saved = checkpoint.load(trained)
        assert saved["classes"] == ["ape", "bee", "cat"]
        assert saved["config"]["data"]["dataset"] == "set"

    def test_both_sets_of_weights_are_saved_and_the_average_is_reported(self, trained):
        saved = checkpoint.load(trained)
        name = "backbone.layer1.0.conv1.weight"
        assert not torch.equal(saved["network"][name], saved["average"][name])
        assert checkpoint.reported(saved) is saved["average"]
        assert saved["averaged"] == 3  # steps

    def test_evaluation_chooses_and_reports(self, trained, monkeypatch, capsys):
        code, out, err = run_main(
            evaluation.main,
            "eval.py",
            monkeypatch,
            capsys,
            trained,
            "--name",
            "whole",
            "--batch-sizes",
            1,
            "--timing-images",
            2,
            "-j",
            1,
            "--threads",
            1,
            "--device",
            "cpu",
        )
        assert code == 0, err
        assert str(trained / "eval" / "whole" / "report.md") in out
        report = json.loads((trained / "eval" / "whole" / "report.json").read_text())
        assert report["choice"]["test_images"] == report["live"]["images"] == 12
        assert report["top5"] is None
        assert "average" in report["run"]["weights"]
        assert report["run"]["dataset"] == "set"
        assert (trained / "eval" / "whole" / "gallery.png").exists()

    def test_evaluation_of_a_cut_test_set(self, trained, monkeypatch, capsys):
        code, _, err = run_main(
            evaluation.main,
            "eval.py",
            monkeypatch,
            capsys,
            trained,
            "--val-from",
            "test",
            "--no-live",
            "--no-plots",
            "-j",
            0,
            "--device",
            "cpu",
            "--name",
            "cut",
        )
        assert code == 0, err
        assert (
            json.loads((trained / "eval/cut/report.json").read_text())["choice"]["val_images"] == 6
        )

    def test_scores_on_test_by_default(self, main, trained, folders):
        code, out, _ = main(folders, *QUICK, "--exits", "layer1", "-e", "--resume", trained)
        assert code == 0 and [line.split()[:2] for line in out.splitlines()] == [
            ["test", "layer1"],
            ["test", "final"],
        ]
        code, out, _ = main(
            folders, *QUICK, "--exits", "layer1", "-e", "--split", "val", "--resume", trained
        )
        assert out.startswith("val layer1")

    def test_other_classes_than_were_trained(self, main, trained, folders, tmp_path):
        more = make_folders(tmp_path / "more")
        for split in ("train", "val"):
            (more / split / "ape").rename(more / split / "ant")
        code, _, err = main(more, *QUICK, "--exits", "layer1", "--resume", trained)
        assert code == 2
        assert "ape, bee, cat" in err and "ant, bee, cat" in err

    def test_an_unreadable_file_stops_it_and_loses_nothing(self, main, tmp_path, caplog):
        folders, run = make_folders(tmp_path / "set"), tmp_path / "run"
        flags = (folders, *QUICK, "--save-dir", run, "--resume", "auto")
        bad = folders / "train" / "bee" / "3.JPEG"
        bad.write_bytes(b"")
        code, _, err = main(*flags, "--val-size", 3)
        assert code == 2 and str(bad) in err and "--bad-files" in err and err.count("\n") == 1
        code, _, _ = main(*flags, "--val-size", 3, "--bad-files", 1)
        assert code == 0 and str(bad) in caplog.text

    def test_noise(self, main, tmp_path, monkeypatch, caplog):
        caplog.set_level(logging.INFO)
        monkeypatch.setattr(front, "RUNS", tmp_path)
        code, _, err = main(
            *SMALL, "--dummy", 100, "--epochs", 1, "-b", 45, "--accumulate", 3, "--exits", "layer1"
        )
        assert code == 0, err
        (line,) = read_journal(tmp_path / "dummy-resnet18-layer1-joint-seed0")
        assert set(line["val_top5"]) == {"layer1", "final"}  # of a thousand classes
        assert re.search(r"top.?5.* layer1 ", caplog.text)


class TestWeights:
    def test_offline_is_one_line(self, main, folders, monkeypatch, tmp_path):
        def offline(*_args, **_kwargs):
            raise URLError("no route")

        monkeypatch.setattr(weights, "WEIGHTS", tmp_path)
        monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
        monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
        code, _, err = main(folders, *QUICK, "--pretrained", "--exits", "--regime", "frozen")
        assert code == 1 and err.count("\n") == 1  # it may pass
        assert "resnet18" in err and "no route" in err and "--backbone FILE" in err

    def test_no_weights_of_that_name(self, main, folders):
        flags = (folders, *QUICK, "--exits", "--regime", "frozen")
        code, _, err = main(*flags, "--pretrained", "IMAGENET1K_V9")
        assert code == 2
        assert all(word in err for word in ("IMAGENET1K_V9", "resnet18", "IMAGENET1K_V1"))

    def test_a_joint_run_refuses_them(self, main, folders):
        code, _, err = main(folders, *QUICK, "--pretrained")
        assert code == 2 and "--pretrained" in err
        assert all(way in err for way in ("--regime frozen", "--regime mixed", "-e"))

    def test_they_are_one_of_two_sources(self, main, folders):
        code, _, err = main(folders, *QUICK, "--pretrained", "--backbone", "x.pth")
        assert code == 2 and "--pretrained" in err and "--backbone" in err

    @pytest.fixture(autouse=True)
    def own_cache(self, monkeypatch, tmp_path):
        """Not the user's, which may hold anything."""
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def test_are_fetched_once_and_freeze(self, folders, monkeypatch, tmp_path):
        monkeypatch.setattr(weights, "WEIGHTS", tmp_path)
        net, asked = networks.build_backbone("resnet18"), []
        monkeypatch.setattr(
            models, "get_model", lambda arch, weights: asked.append((arch, weights.name)) or net
        )
        config = configured(folders, *QUICK)
        path = weights.find(config, "")
        assert path == weights.find(config, "IMAGENET1K_V1")
        assert asked == [("resnet18", "IMAGENET1K_V1")]
        loaded, meta = checkpoint.load_backbone(path, net.state_dict())
        assert meta == {}
        assert all(torch.equal(loaded[k], value) for k, value in net.state_dict().items())

    def test_a_torn_file_in_torchs_cache_is_named(self, folders, monkeypatch, tmp_path):
        """Which torch would take for what was downloaded."""
        monkeypatch.setattr(weights, "WEIGHTS", tmp_path / "weights")
        cached = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
        cached.parent.mkdir(parents=True)
        cached.write_bytes(b"PK\x03\x04")
        assert_names(refusal(weights.find, configured(folders, *QUICK), ""), cached, "remove it")
        whole = f"resnet18-{hashlib.sha256(cached.read_bytes()).hexdigest()[:8]}.pth"
        cached.rename(cached.with_name(whole))
        net = networks.build_backbone("resnet18")
        monkeypatch.setattr(models, "get_model", lambda arch, weights: net)
        weights._fetch("resnet18", SimpleNamespace(url=f"https://x/{whole}"), tmp_path / "mine.pth")
        assert (tmp_path / "mine.pth").is_file()

    def test_without_a_name_the_working_directory_does_not_matter(
        self, folders, monkeypatch, tmp_path
    ):
        monkeypatch.chdir(folders)  # it holds train/
        monkeypatch.setattr(weights, "WEIGHTS", tmp_path)
        path = weights.find(configured(folders, *QUICK), "", fetch=False)
        assert path == tmp_path / "resnet18-IMAGENET1K_V1.pth"

    def test_a_run_has_weights_of_its_own(self, main, trained, folders, monkeypatch, tmp_path):
        monkeypatch.setattr(weights, "find", lambda *_args, **_options: tmp_path / "public.pth")
        given = (folders, *QUICK, "--pretrained", "--resume", trained)
        code, _, err = main(*given, "-e")
        assert code == 2 and all(flag in err for flag in ("--resume", "--pretrained"))
        code, _, err = main(*given, "--exits", "layer1", "--regime", "frozen")
        assert code == 2 and err.count("\n") == 1 and "model.backbone" in err

    def test_flags_may_fit_the_settings_of_its_run_alone(self, main, trained, folders):
        given = (folders, "-e", "--resume", trained)
        code, _, err = main(*given, "--val-resize", 100)  # less than the default crop
        assert (code, err) == (0, "")
        code, _, err = main(folders, "--val-resize", 100)
        assert code == 2 and err.count("\n") == 1 and "100" in err

    def test_a_vits_must_fit_its_images(self, tmp_path):
        config = configured("-a", "vit_l_16", "--val-crop", 384, "--val-resize", 400)
        with pytest.raises(UserError, match=r"(?s)(?=.*IMAGENET1K_V1)(?=.*vit_l_16)(?=.*384)"):
            weights.find(config, "IMAGENET1K_V1")

    def test_of_a_thousand_classes_do_not_fit_three(self, main, folders, tmp_path):
        path = tmp_path / "weights.pth"
        torch.save(models.resnet18().state_dict(), path)
        code, _, err = main(
            folders,
            *QUICK,
            "--backbone",
            path,
            "--exits",
            "--regime",
            "frozen",
            "--save-dir",
            tmp_path / "run",
        )
        assert code == 2 and "1000 classes" in err and "--regime mixed" in err

    def test_they_have_seen_train_so_val_comes_from_test(
        self, main, folders, tmp_path, monkeypatch, capsys
    ):
        path, run = tmp_path / "weights.pth", tmp_path / "run"
        torch.save(models.resnet18(num_classes=3).state_dict(), path)
        code, _, err = main(
            folders,
            *QUICK,
            "--backbone",
            path,
            "--exits",
            "layer1",
            "--regime",
            "frozen",
            "--save-dir",
            run,
        )
        assert code == 0, err
        kept = torch.load(path, weights_only=True)
        saved = checkpoint.load(run)["network"]
        assert all(torch.equal(saved[f"backbone.{name}"], value) for name, value in kept.items())
        code, _, err = run_main(
            evaluation.main, "eval.py", monkeypatch, capsys, run, "-j", 0, "--no-live"
        )
        assert code == 2 and "--val-from test" in err


def test_default_data_lies_in_the_repository():
    assert front.DATA == ROOT / "data" / "imagenet"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_to_the_whole_group_saves_and_stops(folders, tmp_path, workers):
    run = tmp_path / "run"
    flags = (
        folders,
        *SMALL,
        "--epochs",
        100,
        "-b",
        2,
        "--val-size",
        6,
        "-j",
        workers,
        "--ema",
        0.9,
        "--accumulate",
        1,
        "--save-dir",
        run,
        "--resume",
        "auto",
    )
    process = start("imagenet/main.py", *flags, cwd=tmp_path, alone=True)
    wait_for_file(run / checkpoint.NAME, process)
    os.killpg(process.pid, signal.SIGTERM)
    done = finish(process)
    assert done.returncode == 143, done.stderr  # not 0, after a hundred epochs
    assert done.stderr.count("\n") == 1 and str(run) in done.stderr
    before, epochs = checkpoint.load(run)["position"], len(read_journal(run))
    assert before["phase"] == 0
    process = start("imagenet/main.py", *flags, cwd=tmp_path, alone=True)
    wait_for(lambda: len(read_journal(run)) > epochs or process.poll() is not None, "another epoch")
    os.killpg(process.pid, signal.SIGINT)
    done = finish(process)
    assert done.returncode == 130, done.stderr
    assert str(run / checkpoint.NAME) in done.stdout  # what it began with
    after = checkpoint.load(run)["position"]
    assert (after["epoch"], after["step"]) > (before["epoch"], before["step"])
