"""Splits: stratified, seeded and identified by a hash."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from early_exit.data import splits


class TestStratified:
    @given(
        targets=st.lists(st.integers(0, 4), min_size=1, max_size=80),
        share=st.floats(0, 1),
        seed=st.integers(0, 1000),
    )
    def test_every_class_gets_its_share_to_within_one(self, targets, share, seed):
        targets = np.array(targets)
        size = int(share * len(targets))
        chosen = splits.stratified(targets, size, seed)
        assert len(chosen) == size
        assert chosen.tolist() == sorted(set(chosen.tolist()))
        for label in np.unique(targets):
            exact = (targets == label).sum() * size / len(targets)
            assert abs((targets[chosen] == label).sum() - exact) < 1

    def test_the_seed_decides(self):
        targets = np.arange(100) % 5
        first, again, other = (splits.stratified(targets, 20, seed) for seed in (0, 0, 1))
        assert np.array_equal(first, again)
        assert not np.array_equal(first, other)

    def test_every_image_can_be_chosen(self):
        targets = np.arange(20) % 2
        chosen = [splits.stratified(targets, 4, seed) for seed in range(100)]
        assert set(np.concatenate(chosen)) == set(range(20))


class TestHash:
    def test_names_the_images(self):
        one = splits.index_hash("cifar10", np.array([1, 2, 3]))
        assert one == splits.index_hash("cifar10", np.array([1, 2, 3], dtype=np.int32))
        assert one != splits.index_hash("cifar10", np.array([1, 2, 4]))
        assert one != splits.index_hash("digits", np.array([1, 2, 3]))


class TestShard:
    def test_micro_batches_go_round_the_processes(self):
        """Micro-batch k is computed by process k mod 2."""
        first, second = (splits.Shard(rank, 2, 3) for rank in range(2))
        assert (list(first.numbers), list(second.numbers)) == ([0, 2, 4], [1, 3, 5])
        assert second.slices(12) == [slice(2, 4), slice(6, 8), slice(10, 12)]

    def test_every_held_out_image_is_in_one_shard(self):
        assert splits.Shard(0, 2).eval_slices(11, 4) == [slice(0, 4), slice(8, 11)]
        assert splits.Shard(1, 2).eval_slices(11, 4) == [slice(4, 8)]

    def test_alone_it_is_everything(self):
        assert splits.WHOLE.slices(8) == [slice(0, 8)]


def test_a_seed_depends_on_every_number_and_its_place():
    numbers = [(1, 2), (2, 1), (1, 2, 1), (1, 3)]
    seeds = {splits.seed_of(*each) for each in numbers}
    assert len(seeds) == 4 and all(0 <= seed < 2**63 for seed in seeds)
    assert splits.seed_of(1, 2) == splits.seed_of(1, 2)
