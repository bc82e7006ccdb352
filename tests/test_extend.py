"""What users bring along: their own network, head, criterion, data, loss, training loop, policy."""

import dataclasses
import json
import math
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts import CPU, DOOR, few_digits, refusal, tiny_network, tiny_run
from tolerance import assert_close, bound
from torch import Tensor, nn

from early_exit import checkpoint, criteria, heads
from early_exit.choosing import Goal, choose, outcome
from early_exit.classifier import load
from early_exit.config import Config, LossConfig, ModelConfig, OptimConfig, RunConfig
from early_exit.config import build as build_config
from early_exit.cost import network_cost
from early_exit.evaluation import evaluate
from early_exit.inference import infer
from early_exit.losses import joint_loss
from early_exit.network import MultiExitNetwork
from early_exit.policy import Policy
from early_exit.records import ExitRecord, disagreements, replay, score_record
from early_exit.tensors import ImageSet, cut
from early_exit.training import adopt, default_run_dir, train


def quickly(run: Path | str, door=DOOR, goal: Goal | None = None, **options) -> dict:
    """The report of an evaluation without clock and pictures, as written."""
    goal = goal or Goal(max_drop=0.01)
    options = {"overrides": CPU, "live": False, "draw": False, **options}
    _, directory = evaluate(run, door, goal, **options)
    return json.loads((directory / "report.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run with two early exits, evaluated. Not to be changed."""
    directory = tiny_run(tmp_path_factory.mktemp("extend") / "run", DOOR)
    quickly(directory)
    return directory


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """A copy of `finished`, to be changed."""
    return shutil.copytree(finished, tmp_path / "copy")


class Cut(nn.Module):
    """A network whose forward does something between its modules."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.body = nn.Conv2d(4, 4, 3, padding=1)
        self.end = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
        self.scale = scale

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        return self.end(features + self.scale * self.body(features))


class Sum(nn.Module):
    """The block of `Cut` that is no module there."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, features: Tensor) -> Tensor:
        return features + self.body(features)


class Untaught(nn.Module):
    """A network some of whose parts change nothing as they are made."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.zero = Sum(nn.Conv2d(4, 4, 3, padding=1))
        nn.init.zeros_(self.zero.body.weight)
        nn.init.zeros_(self.zero.body.bias)
        self.end = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
        self.scale = Sum(nn.Linear(5, 5, bias=False))
        nn.init.constant_(self.scale.body.weight, 1e-6)

    def forward(self, images: Tensor) -> Tensor:
        return self.scale(self.end(self.zero(self.norm(self.stem(images)))))


def with_units(backbone: nn.Module, head="linear", places=("stem",), **units) -> MultiExitNetwork:
    """`backbone` as a multi-exit network of `units`, for five classes."""
    return MultiExitNetwork(
        backbone, units, places, head=head, num_classes=5, example=torch.zeros(1, 3, 8, 8)
    )


class TestNetwork:
    def test_a_unit_may_say_what_the_forward_does(self):
        net = Cut()
        made = with_units(net, stem=net.stem, body=Sum(net.body), end=net.end).double().eval()
        images = torch.rand(3, 3, 8, 8, dtype=torch.float64)
        assert_close(made(images)[-1], net(images), terms=3 * 9 + 4 * 9 + 8 * 8 + 4 + 4)

    def test_a_step_that_no_unit_takes_is_noticed(self):
        net = Cut()
        said = refusal(with_units, net, stem=net.stem, body=net.body, end=net.end)
        assert "backbone" in said and "forward" in said

    def test_so_is_one_that_is_only_slightly_another(self):
        net = Cut(scale=1.1)
        said = refusal(with_units, net, stem=net.stem, body=Sum(net.body), end=net.end)
        assert "backbone" in said and "forward" in said

    @pytest.mark.parametrize("left_out", ["norm", "zero", "scale"])
    def test_so_is_what_changes_nothing_before_it_has_learned(self, left_out):
        """A fresh BatchNorm in eval mode, a last layer that begins at zero, a tiny layer scale."""
        net = Untaught()
        parts = {"stem": net.stem, "norm": net.norm, "zero": net.zero, "end": net.end}
        assert with_units(net, **parts, scale=net.scale).num_exits == 2
        units = {**parts, "scale": net.scale}
        del units[left_out]
        said = refusal(with_units, net, **units)
        assert "backbone" in said and "forward" in said

    def test_what_is_not_a_number_is_not_the_backbone(self):
        net = Cut()

        class Broken(Sum):
            def forward(self, features):
                return super().forward(features) * math.nan

        said = refusal(with_units, net, stem=net.stem, body=Broken(net.body), end=net.end)
        assert "backbone" in said and "forward" in said

    def test_a_flattening_that_is_forgotten_between_two_units(self):
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5))
        said = refusal(with_units, net, stem=net[0], end=net[2])
        assert "unit end " in said and "(1, 4, 6, 6)" in said

    @pytest.mark.parametrize("tuples", [True, False])
    def test_units_that_give_no_tensor(self, tuples):
        class Odd(nn.Module):
            def forward(self, features):
                return (features,) if tuples else None

        net = nn.Sequential(Odd(), nn.Flatten(), nn.Linear(192, 5))
        said = refusal(with_units, net, stem=net[0], flat=net[1], end=net[2])
        kind = "tuple" if tuples else "NoneType"
        assert "unit flat " in said and kind in said

    def test_another_number_of_classes_than_announced(self):
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 7))
        said = refusal(with_units, net, stem=net[0], flat=net[1], end=net[2])
        assert "backbone" in said and "(1, 7)" in said and "(1, 5)" in said

    def test_the_backbones_own_parameter_may_be_a_units(self):
        class Shift(nn.Module):
            def __init__(self, shift: nn.Parameter) -> None:
                super().__init__()
                self.shift = shift

            def forward(self, features: Tensor) -> Tensor:
                return features + self.shift

        class Shifted(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.shift = nn.Parameter(torch.rand(3, 8, 8))
                self.end = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))

            def forward(self, images: Tensor) -> Tensor:
                return self.end(images + self.shift)

        net = Shifted()
        assert with_units(net, stem=Shift(net.shift), end=net.end).num_exits == 2

    @pytest.mark.parametrize("where", ["backbone", "head"])
    def test_answers_that_hang_on_the_batch(self, where):
        def norm() -> nn.Module:
            return nn.BatchNorm2d(4, track_running_stats=False)

        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5))
        if where == "backbone":
            net[0] = nn.Sequential(net[0], norm())

        def head(shape: torch.Size, num_classes: int) -> nn.Module:
            conv = heads.ConvHead(shape[1], num_classes)
            return nn.Sequential(norm(), conv) if where == "head" else conv

        said = refusal(with_units, net, head, stem=net[0], flat=net[1], end=net[2])
        assert "track_running_stats=False" in said
        assert ("backbone.0" if where == "backbone" else "heads.stem") in said

    def test_building_moves_no_number_no_mode_and_no_chance(self):
        net = Cut().train()
        before = {name: value.clone() for name, value in net.state_dict().items()}
        torch.manual_seed(0)
        with_units(net, stem=net.stem, body=Sum(net.body), end=net.end)
        made = torch.rand(1)
        torch.manual_seed(0)
        heads.LinearHead(4, 5)
        assert torch.equal(made, torch.rand(1))  # the head alone drew something
        assert all(module.training for module in net.modules())
        for name, value in net.state_dict().items():
            assert torch.equal(value, before[name])

    def test_a_flattening_that_no_unit_does(self):
        net = Cut()
        said = refusal(with_units, net, stem=net.stem, body=Sum(net.body))
        assert "(1, 4, 8, 8)" in said and "(1, 5)" in said

    @pytest.mark.parametrize(
        "foreign", [nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.Dropout(0.5), nn.Dropout2d(0.5)]
    )
    def test_what_the_backbone_has_not_would_not_be_trained_or_switched(self, foreign):
        net = Cut()
        stem = nn.Sequential(net.stem, foreign)
        said = refusal(with_units, net, stem=stem, body=Sum(net.body), end=net.end)
        name = type(foreign).__name__
        assert "unit stem " in said and f" {name} " in said

    def test_what_keeps_nothing_may_be_anybodys(self):
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5))
        end = nn.Sequential(nn.Flatten(), net[2])
        assert with_units(net, stem=net[0], end=end).num_exits == 2

    @pytest.mark.parametrize("taken", ["final", "keys"])
    def test_an_exit_whose_name_is_taken(self, taken):
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5))
        units = {taken: net[0], "flat": net[1], "end": net[2]}
        assert taken in refusal(with_units, net, places=(taken,), **units)

    def test_two_exits_of_one_key(self):
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
        units = {"a.b": net[0], "a_b": net[1], "flat": net[2], "end": net[3]}
        said = refusal(with_units, net, places=("a.b", "a_b"), **units)
        assert "'a_b'" in said


class TestHead:
    def test_a_function_from_the_features_shape(self):
        net, shapes = Cut(), []

        def head(features: torch.Size, num_classes: int) -> nn.Module:
            shapes.append(features)
            size = features[1:].numel()
            return nn.Sequential(nn.Flatten(), nn.Linear(size, num_classes))

        made = with_units(net, head, stem=net.stem, body=Sum(net.body), end=net.end).eval()
        assert shapes == [torch.Size((1, 4, 8, 8))]
        assert [said.shape for said in made(torch.rand(2, 3, 8, 8))] == [(2, 5), (2, 5)]

    def test_one_for_each_place_some_by_name(self):
        net = Cut()
        kinds = ["conv", lambda features, classes: heads.LinearHead(features[1], classes)]
        units = {"stem": net.stem, "body": Sum(net.body), "end": net.end}
        made = with_units(net, kinds, ("stem", "body"), **units)
        assert [type(head) for head in made.heads.values()] == [heads.ConvHead, heads.LinearHead]

    @pytest.mark.parametrize(
        ("head", "made"),
        [
            (lambda shape, classes: nn.Flatten(), "(1, 256)"),
            (lambda shape, classes: nn.Conv2d(4, classes, 1), "(1, 5, 8, 8)"),
            (lambda shape, classes: nn.Sequential(nn.Flatten(), nn.Linear(256, 7)), "(1, 7)"),
        ],
    )
    def test_one_that_makes_no_logits(self, head, made):
        net = Cut()
        units = {"stem": net.stem, "body": Sum(net.body), "end": net.end}
        said = refusal(with_units, net, head, **units)
        assert "stem" in said and all(shape in said for shape in (made, "(1, 4, 8, 8)", "(1, 5)"))

    def test_one_that_does_not_take_the_features(self):
        net = Cut()
        units = {"stem": net.stem, "body": Sum(net.body), "end": net.end}
        said = refusal(with_units, net, lambda shape, classes: nn.Linear(9, classes), **units)
        assert "head" in said and "stem" in said and "(1, 4, 8, 8)" in said

    @pytest.mark.parametrize("count", [16, 17])
    def test_tokens_with_and_without_a_class_token(self, count):
        tokens = torch.rand(2, count, 6)
        laid_out = heads.TokenMap()(tokens)
        assert laid_out.shape == (2, 6, 4, 4)
        assert torch.equal(laid_out[:, :, 0, 0], tokens[:, count - 16])
        assert torch.equal(laid_out[:, :, 3, 3], tokens[:, -1])
        head = heads.build_head("linear", tokens[:1].shape, 5).eval()
        assert head(tokens).shape == (2, 5)

    @pytest.mark.parametrize("shape", [(1, 6), (1, 18, 6), (1, 2, 3, 4, 5)])
    def test_features_that_no_kind_is_made_for(self, shape):
        said = refusal(heads.build_head, "conv", torch.Size(shape), 5)
        assert str(shape) in said

    def test_a_kind_of_ones_own_by_name_from_training_to_classifying(self, monkeypatch, tmp_path):
        said = refusal(ModelConfig, head="means")
        assert "means" in said and "conv" in said
        monkeypatch.setitem(heads.HEADS, "means", Means)
        run = tiny_run(tmp_path / "run", DOOR, head="means")
        quickly(run, name="mine")
        assert type(load(run, "mine", door=DOOR, device="cpu").loaded.network.stages[0].head) is (
            Means
        )


class Means(nn.Sequential):
    """A linear layer on every channel's mean."""

    def __init__(self, channels: int, num_classes: int) -> None:
        pooling = nn.AdaptiveAvgPool2d(1)
        super().__init__(pooling, nn.Flatten(), nn.Linear(channels, num_classes))


def logit_energy(logits: Tensor, state: None = None) -> tuple[Tensor, Tensor, None]:
    """log sum exp of the logits (Liu et al., arXiv:2010.03759)."""
    return logits, logits.logsumexp(dim=-1), None


def votes(logits: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """How many exits so far say what this one says. state: (B, K), votes for each class."""
    best = logits.argmax(dim=-1, keepdim=True)
    state = torch.zeros_like(logits) if state is None else state
    state = state.scatter_add(1, best, torch.ones_like(best, dtype=logits.dtype))
    return logits, state.gather(1, best).squeeze(1), state


@pytest.fixture
def own_criteria(monkeypatch) -> Iterator[None]:
    """`logit_energy` and `votes`, known by their names."""
    for criterion in (logit_energy, votes):
        monkeypatch.setitem(criteria.CRITERIA, criterion.__name__, criterion)


@pytest.mark.usefixtures("own_criteria")
class TestCriterion:
    def test_it_remembers_if_it_keeps_a_state(self, stored):
        policy = Policy(exit_names=stored.info.exit_names, thresholds=(0.5,) * 3)
        kept = [
            name for name in criteria.CRITERIA
            if score_record(stored, dataclasses.replace(policy, criterion=name)).remembers
        ]
        assert kept == ["patience", "votes"]

    @pytest.mark.parametrize(
        "made",
        [lambda said, state: (said, said.amax(1, keepdim=True), None),
         lambda said, state: (said, said.amax(), None),
         lambda said, state: (said.argmax(1), said.amax(1), None)],
    )
    def test_what_it_makes_has_the_right_shape(self, monkeypatch, stored, made):
        monkeypatch.setitem(criteria.CRITERIA, "odd", made)
        policy = Policy(
            exit_names=stored.info.exit_names, thresholds=(0.5,) * 3, criterion="odd"
        )
        said = refusal(replay, stored, policy)
        answer, score, _ = made(torch.zeros(2048, 4), None)
        assert "odd" in said and str(tuple(answer.shape)) in said
        assert str(tuple(score.shape)) in said

    @pytest.mark.parametrize("criterion", ["logit_energy", "votes"])
    def test_live_equals_replay(self, exact_net, exact_images, exact_stored, criterion):
        early = Policy(
            exit_names=exact_net.exit_names, thresholds=(2.0, 2.0, 2.0), criterion=criterion
        )
        scores = score_record(exact_stored, early).scores[:, :3]
        if criterion == "logit_energy":
            # halfway between two images: nobody lies within float32's rounding of it
            low, high = np.sort(scores, axis=0)[300:302]
            assert (high - low > 100 * torch.finfo(torch.float32).eps * high).all()
            early = dataclasses.replace(early, thresholds=tuple(((low + high) / 2).tolist()))
        answers, replayed = infer(exact_net, exact_images, early), replay(exact_stored, early)
        assert len({*replayed.exit_index}) > 1
        assert (answers.exit_index.numpy() == replayed.exit_index).all()

    @pytest.mark.parametrize("criterion", ["patience", "votes"])
    @pytest.mark.parametrize("goal", [{"budget": 0.8}, {"max_drop": 0.02}])
    def test_no_exit_is_switched_off_under_one_that_remembers(self, stored, criterion, goal):
        """The scores that are chosen from would not be the ones of the fewer exits."""
        cost = dataclasses.replace(
            stored.cost, stage_macs=(100, 100, 100, 100), head_macs=(1, 90, 1, 0)
        )
        assert not all(choose(stored, Goal(**goal), cost).enabled)  # the test can fail
        policy = choose(stored, Goal(**goal, criterion=criterion), cost)
        assert all(policy.enabled)
        point, _ = outcome(score_record(stored, policy), policy, cost)
        final = score_record(stored, policy).right[:, -1].mean()
        kept = point.macs_share <= 0.8 if "budget" in goal else point.accuracy >= final - 0.02
        assert kept

    def test_it_reaches_evaluation_and_classifier(self, copy):
        quickly(copy, goal=Goal(max_drop=0.05, criterion="logit_energy"), name="mine")
        assert load(copy, "mine", door=DOOR, device="cpu").policy.criterion == "logit_energy"

    def test_a_goal_asks_for_one_that_is_known(self):
        said = refusal(Goal, budget=0.5, criterion="vote")
        assert "'vote'" in said and "votes" in said


def test_the_front_doors_module_may_bring_the_criterion(copy, monkeypatch, tmp_path):
    monkeypatch.setitem(criteria.CRITERIA, "brought", logit_energy)
    door = dataclasses.replace(DOOR, name="brings_a_criterion:DOOR")
    quickly(copy, door, Goal(max_drop=0.05, criterion="brought"), name="mine")
    del criteria.CRITERIA["brought"]
    (tmp_path / "brings_a_criterion.py").write_text(
        "from early_exit.criteria import CRITERIA, max_prob\nfrom scripts import DOOR\n"
        "CRITERIA['brought'] = max_prob\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert load(copy, "mine", device="cpu").policy.criterion == "brought"
    finally:
        sys.modules.pop("brings_a_criterion", None)
        criteria.CRITERIA.pop("brought", None)


def test_another_policys_exits_are_refused(stored):
    policy = Policy(exit_names=("a", "b", "c", "final"), thresholds=(0.5,) * 3)
    for call in (replay, score_record):
        said = refusal(call, stored, policy)
        assert "a, b, c, final" in said and "stem, layer1, layer2, final" in said


class TestData:
    def test_a_split_is_told_apart_by_its_images_and_targets(self):
        data = few_digits(0)
        part = data.splits["test"]
        images, targets = part.images.clone(), part.targets.clone()
        images[7, 0, 3, 3] += 1
        targets[7] = (targets[7] + 1) % 10
        others = [
            ImageSet(images, part.targets), ImageSet(part.images, targets),
            part.subset(np.arange(59)),
        ]
        hashes = {data.digest("test")}
        for other in others:
            splits = {**data.splits, "test": other}
            hashes.add(dataclasses.replace(data, splits=splits).digest("test"))
        assert len(hashes) == 4
        twin = ImageSet(part.images.clone(), part.targets.clone())
        again = dataclasses.replace(data, splits={**data.splits, "test": twin})
        assert again.digest("test") == data.digest("test")
        assert data.digest("val") != data.digest("test")

    @pytest.mark.parametrize("split", ["val", "test"])
    def test_records_of_images_that_changed_are_made_anew(self, copy, split):
        """Under the same name, of the same number: only their content tells them apart."""
        data = few_digits(0)
        part = data.splits[split]
        noise = torch.randint(
            256, part.images.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        )
        splits = {**data.splits, split: ImageSet(noise, part.targets)}
        changed = dataclasses.replace(data, splits=splits)
        stored = ExitRecord.load(str(copy / "records" / f"{split}-off")).logits
        quickly(copy, dataclasses.replace(DOOR, load_data=lambda settings: changed))
        now = ExitRecord.load(copy / "records" / f"{split}-off").logits
        # of one image no exit says the same: noise moves logits by more than rounding could
        assert (abs(stored - now).max(axis=(1, 2)) > 1e-3 * abs(stored).max()).all()

    @pytest.mark.parametrize(
        ("images", "targets"),
        [
            (torch.zeros(4, 3, 8, 8), torch.zeros(4)),
            (torch.zeros(4, 8, 8, dtype=torch.uint8), torch.zeros(4)),
            (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(5)),
        ],
    )
    def test_images_that_are_none(self, images, targets):
        said = refusal(ImageSet, images, targets.long())
        assert "uint8" in said and "(N, C, H, W)" in said

    @pytest.mark.parametrize("size", [0, 60, 61])
    def test_a_val_that_leaves_nothing(self, size):
        part = few_digits(0).splits["test"]
        said = refusal(cut, "some", part, part, list("0123456789"), val_size=size)
        assert "val_size" in said and str(size) in said and "60" in said


class TestLoss:
    def test_it_is_what_training_minimises(self, tmp_path):
        calls = []

        def final_alone(logits, target, weights, **settings):
            calls.append((len(logits), tuple(weights), settings))
            return joint_loss(logits[-1:], target, weights[-1:])

        door = dataclasses.replace(DOOR, loss=final_alone)
        run = tiny_run(tmp_path / "run", door)
        assert len(calls) == 2 * (6 + 1)  # steps, and val
        assert {(number, weights) for number, weights, _ in calls} == {(3, (1.0, 1.0, 1.0))}
        # what no gradient reached is as it was drawn, but for the decay, which scales it: each
        # step multiplies every weight by the same number, with two roundings
        torch.manual_seed(0)
        drawn = tiny_network(Config(model=ModelConfig(exits=("layer1", "layer2"))), 10).state_dict()
        trained = checkpoint.load(run)["network"]
        for name, scaled in (("heads.layer1.5.weight", True), ("backbone.linear.weight", False)):
            before, after = drawn[name].double(), trained[name].double()
            scale = (before * after).sum() / before.square().sum()
            off = float((after - scale * before).abs().max() / after.abs().max())
            assert (off < bound(torch.float32, 12 * 4)) is scaled

    def test_it_gets_the_settings_that_are_its_own(self, tmp_path):
        seen = set()

        def focal(logits, target, weights, gamma, **settings):
            seen.add((gamma, *sorted(settings)))
            return joint_loss(logits, target, weights)

        config = dataclasses.replace(
            TestAdopt.CONFIG, loss=FocalConfig(gamma=3.0), optim=OptimConfig(epochs=1, batch_size=8)
        )
        door = dataclasses.replace(DOOR, loss=focal, config=FocalRun)
        run = train(config, door, runs=tmp_path, run_dir=tmp_path / "run")
        training = (3.0, "distill", "distill_temperature", "label_smoothing")
        assert seen == {training, (3.0,)}  # and on val its own alone
        assert checkpoint.load(run)["config"]["loss"]["gamma"] == 3.0

    def test_a_section_of_ones_own_is_fixed(self, tmp_path):
        door = dataclasses.replace(DOOR, config=ExtraRun)
        base = vars(TestAdopt.CONFIG) | {"optim": OptimConfig(epochs=1, batch_size=8)}
        config = ExtraRun(**base)
        run = train(config, door, runs=tmp_path, run_dir=tmp_path / "run")
        other = dataclasses.replace(config, extra=Extra(which="b"))
        said = refusal(train, other, door, runs=tmp_path, run_dir=run, resume="auto")
        assert re.search(r"extra\.which.*\ba\b.*\bb\b", said)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FocalConfig(LossConfig):
    """The loss with a setting more."""

    gamma: float = 2.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class FocalRun(Config):
    """A run with that loss."""

    loss: FocalConfig = FocalConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extra:
    """A section of a front door's own."""

    which: str = "a"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtraRun(Config):
    """A run with a section more."""

    extra: Extra = Extra()


class TestAdopt:
    CONFIG = Config(
        model=ModelConfig(exits=("layer1", "layer2")), optim=OptimConfig(batch_size=8),
        run=RunConfig(device="cpu", threads=1),
    )

    @pytest.fixture
    def taught(self) -> MultiExitNetwork:
        """A network that a loop of its own has trained for a few steps with Adam."""
        torch.manual_seed(3)
        data, network = few_digits(0), tiny_network(self.CONFIG, 10).train()
        optimizer = torch.optim.Adam(network.parameters(), 1e-3)
        for images, targets in data.train_batches(8, seed=0, epoch=0):
            optimizer.zero_grad()
            joint_loss(network(images), targets, (1.0, 1.0, 1.0)).backward()
            optimizer.step()
        return network.eval()

    def test_what_was_trained_elsewhere_is_evaluated_and_used(self, taught, tmp_path):
        data = few_digits(0)
        run = adopt(taught, DOOR, self.CONFIG, data, str(tmp_path / "run"))
        report = quickly(run, name="mine", live=True, batch_sizes=(1,), timing_images=4)
        assert report["weights"].endswith("of the last epoch")
        assert report["live"]["differing_beyond_rounding"] == 0
        record = ExitRecord.load(run / "records" / "test-off")
        images = torch.cat([images for images, _ in data.eval_batches("test", 500)])
        with torch.no_grad():
            said = torch.stack(taught(images), dim=1)
        # eight layers, of at most 64 channels and 3x3 kernels
        assert_close(torch.from_numpy(record.logits), said, terms=8 * 64 * 9)
        classify = load(run, "mine", door=DOOR, device="cpu")
        answers = classify.answer(data.splits["test"].images)
        _, unexplained = disagreements(
            record, classify.policy, answers.classes.numpy(), answers.exit_index.numpy()
        )
        assert not unexplained.any()

    def test_it_is_a_finished_run(self, taught, tmp_path, caplog):
        run = adopt(taught, DOOR, self.CONFIG, few_digits(0), tmp_path / "run")
        before = (run / checkpoint.NAME).read_bytes()
        with caplog.at_level("INFO"):
            train(self.CONFIG, DOOR, runs=tmp_path, run_dir=run, resume="auto")
        assert [message for message in caplog.messages if str(run) in message]
        assert (run / checkpoint.NAME).read_bytes() == before

    def test_seen_val_is_not_fitted_on(self, taught, tmp_path):
        data = few_digits(0)
        run = adopt(taught, DOOR, self.CONFIG, data, tmp_path / "run", val_unseen=False)
        assert "--val-from test" in refusal(quickly, run)
        assert quickly(run, val_from="test")["val_images"] == 30

    def test_another_network_than_the_doors(self, taught, tmp_path):
        other = Config(model=ModelConfig(exits=("layer1",)))
        said = refusal(adopt, taught, DOOR, other, few_digits(0), tmp_path / "run")
        assert "'heads.layer2" in said
        assert not (tmp_path / "run").exists()

    def test_a_directory_that_is_there(self, taught, finished):
        said = refusal(adopt, taught, DOOR, self.CONFIG, few_digits(0), finished)
        assert str(finished) in said

    def test_the_callers_chance_is_left_alone(self, taught, tmp_path):
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        adopt(taught, DOOR, self.CONFIG, few_digits(0), tmp_path / "run")
        assert torch.equal(torch.rand(3), expected)


def test_an_evaluation_is_in_float32_whatever_training_did(copy):
    state = checkpoint.load(copy)
    state["config"]["run"]["amp"] = "bf16"
    checkpoint.save(copy, state)
    report, _ = evaluate(copy, DOOR, Goal(budget=0.8), live=False, draw=False)
    assert report.precision == "float32"


class TestPolicy:
    OWN = Policy(
        exit_names=("layer1", "layer2", "final"), thresholds=(-0.4, -1.5), criterion="entropy",
        temperatures=(2.0, 1.5, 1.0), enabled=(True, False), guarantee={"risk": 0.1},
    )

    def test_it_is_taken_whole_without_its_guarantee(self, finished):
        val = ExitRecord.load(finished / "records" / "val-off")
        chosen = choose(val, Goal(policy=self.OWN), val.cost)
        assert chosen == dataclasses.replace(self.OWN, guarantee=None)

    def test_the_report_says_that_nothing_was_fitted(self, copy):
        _, directory = evaluate(
            str(copy), DOOR, Goal(policy=self.OWN), overrides=CPU, live=False, draw=False
        )
        page = (directory / "report.md").read_text()
        assert directory.name == "given-policy-entropy"
        assert Policy.load(str(directory / "policy.yaml")).temperatures == (2.0, 1.5, 1.0)
        assert Policy.load(directory / "policy.yaml").thresholds == self.OWN.thresholds
        assert "given" in page and "60 images" in page and "entropy" in page

    def test_numbers_of_numpy_are_numbers(self, tmp_path):
        policy = Policy(
            exit_names=["a", "b", "final"], thresholds=np.array([0.25, 0.5]),
            temperatures=np.float32([1, 2, 3]), enabled=np.array([True, False]),
        )
        policy.save(tmp_path / "policy.yaml")
        assert Policy.load(tmp_path / "policy.yaml") == policy
        assert policy == Policy(
            exit_names=("a", "b", "final"), thresholds=(0.25, 0.5), temperatures=(1.0, 2.0, 3.0),
            enabled=(True, False),
        )
        assert policy.shared(np.float32(0.5)).thresholds == (0.5, 0.5)

    def test_other_exits(self, copy):
        other = Policy(exit_names=("layer1", "final"), thresholds=(0.5,))
        said = refusal(quickly, copy, goal=Goal(policy=other))
        assert "layer1, final" in said and "layer1, layer2, final" in said

    def test_it_is_a_goal_like_the_others(self):
        assert "budget" in refusal(Goal, policy=self.OWN, budget=0.5)
        assert "--per-exit" in refusal(Goal, policy=self.OWN, per_exit=True)


def test_a_section_given_in_part_keeps_the_rest_of_its_default():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Short(Config):
        optim: OptimConfig = OptimConfig(epochs=2, batch_size=16)

    built = build_config(Short, {"optim": {"lr": "1e-4"}}).optim
    assert (built.epochs, built.batch_size, built.lr) == (2, 16, 1e-4)
    assert build_config(Config, {"optim": {"lr": 0.2}}).optim == OptimConfig(lr=0.2)


def test_a_record_knows_its_price(finished):
    record = ExitRecord.load(finished / "records" / "test-off")
    network = tiny_network(TestAdopt.CONFIG, 10)
    cost = network_cost(network)
    assert record.cost.cumulative() == cost.cumulative()
    assert record.cost.shares((True, False)) == cost.shares((True, False))


def test_a_run_directory_has_a_name_without_a_data_set():
    path = default_run_dir(Path("runs"), Config(), ("layer1", "final"))
    assert path == Path("runs/data-resnet32-layer1-joint-seed0")
