"""MSDNet: its layers, its cost by an independent formula, and features that are a tuple of maps,
from costs to inference."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import assert_close, in_torch, replay
from torch import nn

from cifar10 import data, trainer
from cifar10.msdnet import LAYERS, Layer, MSDNet
from cifar10.networks import build_network
from early_exit import infer_stream
from early_exit.cli import settings
from early_exit.inference.infer import infer
from early_exit.inference.latency import measure
from early_exit.inference.policy import NEVER, Policy
from early_exit.inference.segment_times import all_spans, segment_times
from early_exit.model.checks import check_network
from early_exit.model.cost import count_macs, network_cost, place_shares
from early_exit.model.energy import estimate
from early_exit.model.heads import MSDNetHead
from early_exit.model.network import MultiExitNetwork, run_units

GREY, COLOUR = data.SHAPES["mnist"], data.SHAPES["cifar10"]
CLASSES, SIDE = 4, 16
# at each exit, and of the plain network
MILLIONS = {
    "msdnet9": [6.78, 16.79, 29.07, 24.79],
    "msdnet15": [6.78, 14.19, 27.24, 41.33, 58.03, 45.93],
}
# of the longest path in `tiny`: the stem, six layers of a 1x1 and a 3x3 convolution, two
# transitions and the classifier, of at most 128 channels, each with BatchNorm and ReLU
TERMS = 9 * (3 + 8 + 16) + 6 * (80 + 9 * 16) + 2 * 80 + 9 * (52 + 128) + 128 + 4 * 20


def tiny_backbone() -> MSDNet:
    """Six layers in four blocks, narrow: 3, 2, 1 and 1 maps at the ends of the blocks."""
    torch.manual_seed(0)
    return MSDNet((1, 2, 2, 1), CLASSES, (3, SIDE, SIDE), channels=8, growth=4)


@pytest.fixture
def images():
    """Forty images in float64."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(40, 3, SIDE, SIDE, dtype=torch.float64, generator=generator)


@pytest.fixture
def tiny(images):
    """`tiny_backbone` with exits of three kinds, in float64; BatchNorm has the images' statistics,
    so that scores differ between images."""
    backbone = tiny_backbone()
    network = MultiExitNetwork(
        backbone,
        backbone.units(),
        backbone.default_exits,
        head=["msdnet", "conv", "pooled"],
        num_classes=CLASSES,
        example=torch.zeros(1, 3, SIDE, SIDE),
    ).double()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None
    with torch.no_grad():
        network(images)
    return network.eval()


def by_hand(layers, side=32, classes=10, channels=16, growth=6):
    """MACs of each block, the stem in the first, and of the paper's classifier after each."""
    pixels = [(side >> scale) ** 2 for scale in range(3)]
    third = -(-sum(layers) // 3)

    def bottleneck(inputs, new, read, written):
        """A 1x1 convolution on one scale and a 3x3 convolution to the same or the next."""
        between = min(inputs, 2**read * new)
        return inputs * between * pixels[read] + 9 * between * new * pixels[written]

    n, before, number = channels, 0, 0
    blocks, heads = [], []
    macs = 9 * (3 * n * pixels[0] + n * 2 * n * pixels[1] + 2 * n * 4 * n * pixels[2])
    for count in layers:
        for _ in range(count):
            finest = number // third
            for scale in range(finest, 3):
                wide, new = n * 2**scale, growth * 2**scale
                if scale == before:
                    macs += bottleneck(wide, new, scale, scale)
                else:
                    macs += bottleneck(wide // 2, new // 2, scale - 1, scale)
                    macs += bottleneck(wide, new // 2, scale, scale)
            n += growth
            if finest > before:  # a transition
                macs += sum(n * (n // 2) * 4**scale * pixels[scale] for scale in range(finest, 3))
                n //= 2
            before, number = finest, number + 1
        blocks.append(macs)
        half, quarter = (side // 8) ** 2, (side // 16) ** 2
        heads.append(9 * 4 * n * 128 * half + 9 * 128 * 128 * quarter + 128 * classes)
        macs = 0
    return blocks, heads


class TestCost:
    @pytest.mark.parametrize("arch", LAYERS)
    def test_stages_and_heads_by_hand(self, arch):
        with torch.device("meta"):
            cost = network_cost(build_network(arch))
        blocks, heads = by_hand(LAYERS[arch])
        blocks[-1] += heads[-1]
        heads[-1] = 0
        assert (cost.stage_macs, cost.head_macs) == (tuple(blocks), tuple(heads))
        assert 0.3 < cost.head_macs[0] / cost.cumulative()[0] < 0.35
        if arch in MILLIONS:  # as the presets and the pages say
            found = [round(macs / 1e6, 2) for macs in (*cost.cumulative(), cost.plain_macs)]
            assert found == MILLIONS[arch]

    def test_as_the_public_code_counts_it(self):
        """Of five blocks for CIFAR-100, with one operation for each value that ReLU gives, that
        pooling reads and that a bias is added to."""
        with torch.device("meta"):
            network = build_network("msdnet15", num_classes=100).eval()
            features = torch.zeros(1, *COLOUR)
        operations, totals = 0, []

        def count(module, inputs, output):
            nonlocal operations
            if isinstance(module, nn.Conv2d):
                operations += module.weight.numel() * output[0, 0].numel()
            elif isinstance(module, nn.Linear):
                operations += module.weight.numel() + module.bias.numel()
            elif isinstance(module, nn.ReLU):
                operations += output.numel()
            elif isinstance(module, nn.AdaptiveAvgPool2d):
                operations += inputs[0].numel()

        for module in network.modules():
            module.register_forward_hook(count)
        for stage in network.stages:
            features, _ = stage(features)
            totals.append(round(operations / 1e6, 2))
        assert totals == [6.86, 14.35, 27.54, 41.71, 58.48]

    @pytest.mark.parametrize("layers", [(4, 2, 2), (2, 2, 2, 2), (1, 1, 1)])
    def test_blocks_of_any_size_by_hand(self, layers):
        blocks, heads = by_hand(layers)
        network = MSDNet(layers).to("meta").eval()
        found = count_macs(network, torch.zeros(1, *COLOUR, device="meta"))
        assert found == sum(blocks) + heads[-1]

    def test_places(self):
        backbone = tiny_backbone()
        shares = place_shares(backbone.units(), torch.empty(1, 3, SIDE, SIDE))
        blocks, heads = by_hand((1, 2, 2, 1), SIDE, CLASSES, channels=8, growth=4)
        expected = np.cumsum(blocks)[:-1] / (sum(blocks) + heads[-1])
        assert list(shares) == [
            "stem",
            "block1",
            "block2.0",
            "block2",
            "block3.0",
            "block3",
            "block4",
        ]
        found = [shares[name] for name in backbone.default_exits]
        assert found == pytest.approx(expected.tolist())


class TestLayers:
    def test_maps_of_each_unit(self):
        features, shapes = torch.zeros(1, 3, SIDE, SIDE), {}
        for name, unit in tiny_backbone().eval().units().items():
            features = unit(features)
            if isinstance(features, tuple):
                shapes[name] = [tuple(part.shape[1:3]) for part in features]
        assert shapes == {
            "stem": [(8, 16), (16, 8), (32, 4)],
            "block1.0": [(12, 16), (24, 8), (48, 4)],
            "block2.0": [(16, 16), (32, 8), (64, 4)],
            "block2.1": [(20, 8), (40, 4)],  # of 20, halved to 10
            "block3.0": [(28, 8), (56, 4)],
            "block3.1": [(36, 4)],  # of 18, halved to 9
            "block4.0": [(52, 4)],
        }
        assert features.shape == (1, CLASSES)

    def test_a_layer_appends_to_each_map_from_it_and_from_the_finer_one(self):
        torch.manual_seed(0)
        layer = Layer(channels=2, growth=2, start=0, finest=0).eval()
        fine, middle, coarse = (
            torch.randn(1, 2, 8, 8),
            torch.randn(1, 4, 4, 4),
            torch.ones(1, 8, 2, 2),
        )
        zero = torch.zeros_like
        _, of_middle, _ = layer((zero(fine), middle, coarse))
        assert torch.equal(of_middle[:, :4], middle)
        assert not of_middle[:, 4:6].any() and of_middle[:, 6:].any()
        of_fine, changed, of_coarse = layer((fine, zero(middle), coarse))
        assert changed[:, 4:6].any() and not changed[:, 6:].any()
        assert torch.equal(of_fine[:, :2], fine) and of_fine.shape[1] == 4
        assert torch.equal(of_coarse[:, :8], coarse) and of_coarse.shape[1] == 16

    def test_a_layer_reads_the_map_that_it_drops(self):
        torch.manual_seed(0)
        layer = Layer(channels=2, growth=2, start=0, finest=1).eval()
        maps = torch.randn(1, 2, 8, 8), torch.randn(1, 4, 4, 4), torch.randn(1, 8, 2, 2)
        middle, coarse = layer(maps)
        assert (middle.shape, coarse.shape) == ((1, 8, 4, 4), (1, 16, 2, 2))
        changed, same = layer((-maps[0], *maps[1:]))
        assert not torch.equal(changed[:, 4:6], middle[:, 4:6])
        assert torch.equal(changed[:, 6:], middle[:, 6:]) and torch.equal(same, coarse)

    @pytest.mark.parametrize("layers", [(1,), (1, 1), (2, 2), (1, 2, 2, 1), (1, 3, 3)])
    def test_nothing_is_computed_that_the_classifier_does_not_depend_on(self, layers):
        """Nor does DistributedDataParallel find a parameter without gradient. With four layers the
        paper's network would compute two scales in the last one."""
        backbone = MSDNet(layers, CLASSES, (3, SIDE, SIDE), channels=2, growth=2)
        *features, logits = run_units(backbone.units(), torch.randn(4, 3, SIDE, SIDE))
        maps = [part for group in features for part in group]
        for part in maps:
            part.retain_grad()
        logits.sum().backward()
        assert all(part.grad is not None for part in maps)
        assert all(parameter.grad is not None for parameter in backbone.parameters())

    @pytest.mark.parametrize("training", [False, True])
    def test_units_one_after_the_other_are_the_network(self, images, training):
        backbone = tiny_backbone().double().train(training)
        with torch.no_grad():
            *_, logits = run_units(backbone.units(), images)
            # in training each BatchNorm adds up the pixels of all images
            assert_close(logits, backbone(images), TERMS + 20 * 40 * SIDE**2)

    def test_the_head_by_hand(self):
        head = MSDNetHead(channels=1, num_classes=1).double().eval()
        with torch.no_grad():
            head[0].weight.fill_(1.0)
            head[3].weight.fill_(1 / 128)
            head[-1].weight.fill_(1 / 128)
            head[-1].bias.fill_(3.0)
        # ones of 4x4: windows of 4, 6, 6 and 9 of them; then one window of all four, 25; two fresh
        # BatchNorms divide by sqrt(1 + 1e-5)
        logits = head(torch.ones(1, 1, 4, 4, dtype=torch.float64))
        assert logits.item() == pytest.approx(25 / (1 + 1e-5) + 3)


class TestNetwork:
    def test_it_passes_its_checks(self, tiny):
        check_network(tiny.float())

    def test_the_plain_network_is_the_last_exit(self, tiny, images):
        with torch.no_grad():
            assert_close(tiny(images)[-1], tiny.backbone(images), TERMS)

    def test_heads_of_its_own_by_default(self):
        network = build_network("msdnet6")
        assert network.exit_names == ("block1", "block2", "final")
        assert all(isinstance(head[1], MSDNetHead) for head in network.heads.values())
        assert isinstance(network.backbone.classifier, MSDNetHead)

    def test_fewer_exits_and_none_do_not_change_the_backbone(self):
        with torch.device("meta"):
            none, one = (
                network_cost(build_network("msdnet6", exits)) for exits in ((), ("block2",))
            )
        blocks, heads = by_hand(LAYERS["msdnet6"])
        assert none.stage_macs == (sum(blocks) + heads[-1],)
        assert one.stage_macs == (blocks[0] + blocks[1], blocks[2] + heads[-1])
        assert one.head_macs == (heads[1], 0)

    @pytest.mark.parametrize("shape", [GREY, COLOUR])
    def test_shapes_of_images(self, shape):
        network = build_network("msdnet6", shape=shape).eval()
        with torch.no_grad():
            logits = network(torch.zeros(2, *shape))
        assert [part.shape for part in logits] == [(2, 10)] * 3


def halving(network, images, **options) -> Policy:
    """A policy with each threshold in the widest gap around the median of the scores."""
    blank = Policy(exit_names=network.exit_names, thresholds=(NEVER,) * 3, **options)
    thresholds = []
    for index, logits in enumerate(network(images)[:-1]):
        scores = blank.score(index, logits)[1].sort().values[10:-10]
        widest = int(scores.diff().argmax())
        thresholds.append(float(scores[widest : widest + 2].mean()))
    return replace(blank, thresholds=tuple(thresholds))


class TestInference:
    @pytest.fixture
    def policy(self, tiny, images):
        """At which images exit everywhere."""
        with torch.no_grad():
            return halving(tiny, images)

    @pytest.mark.parametrize(
        "enabled", [(True, True, True), (True, False, True), (False, True, False)]
    )
    def test_exits_taken_equal_the_stored_logits(self, tiny, images, policy, record_of, enabled):
        stored = record_of(tiny, images, torch.zeros(len(images), dtype=torch.int64))
        assert stored.logits.shape == (40, 4, CLASSES)
        policy = replace(policy, enabled=enabled)
        live, expected = infer(tiny, images, policy), replay(stored, policy)
        assert set(live.exit_index.tolist()) == {*np.flatnonzero(enabled).tolist(), 3}
        assert live.exit_index.tolist() == expected.exit_index.tolist()
        assert live.classes.tolist() == expected.answers.tolist()

    def test_a_stream_gives_the_same_answers(self, tiny, images, policy):
        expected = infer(tiny, images, policy)
        found = list(infer_stream(tiny, images.split(7), policy, batch_size=5))
        assert torch.cat([part.exit_index for part in found]).equal(expected.exit_index)
        # an answer is the logits over a temperature of 1
        assert_close(torch.cat([part.logits for part in found]), expected.logits, TERMS)

    def test_energy_and_seconds(self, tiny, images, policy):
        tiny, images = tiny.float(), images[:8].float()
        energy = estimate(tiny, network_cost(tiny))["SRAM"]
        assert len(energy.stages) == 4 and min(energy.stages) > 0
        running = in_torch(tiny, images[:2])
        timing = measure(running, [images], policy, repeats=1)
        assert len(timing.segment_seconds) == 4
        times = segment_times(running, images, "max_prob", all_spans((0, 2), 4), repeats=3)
        assert times.sizes == (1, 2, 4, 8) and set(times.seconds) == {*all_spans((0, 2), 4)}


@pytest.mark.parametrize(
    ("flags", "head", "exits"),
    [
        (("--arch", "msdnet9"), "msdnet", None),
        (("--arch", "msdnet9", "--dataset", "digits"), "msdnet", None),
        (("--arch", "msdnet9", "--head", "conv", "--exits", "block2"), "conv", ("block2",)),
        (("--arch", "msdnet9", "--regime", "cdl"), "linear", None),
        (("--arch", "resnet20"), "conv", None),
        (("--dataset", "digits"), "conv", ("layer1", "layer2")),
        (("--arch", "airbench", "--dataset", "digits"), "conv", None),
    ],
)
def test_the_trainers_defaults(flags, head, exits):
    args = trainer.parser().parse_args(list(flags))
    model = settings.resolve_config(args, None, trainer.script_defaults(args)).model
    assert (model.head, model.exits) == ((head,), exits)
