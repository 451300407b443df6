"""Grouping of clients: everybody once, padded to the bucket, with the right items forbidden."""

from __future__ import annotations

import numpy as np
import pytest

from fedjax_rec.data import clients
from fedjax_rec.data.splits import Pairs, Split

USERS, ITEMS = 57, 80
POOLS = list(clients.NEGATIVE_POOLS)


def make_split(seed: int = 0, *, cold: bool = False, users: int = USERS) -> Split:
    """Random disjoint parts. User 4 trains on nothing, one on 70 items; item 0 nobody trains, item 1 is in no part."""
    rng = np.random.default_rng(seed)
    part = rng.choice(4, (users, ITEMS), p=[0.1, 0.03, 0.03, 0.84])
    part[min(9, users - 1), :70] = 0
    part[4][part[4] == 0] = 3
    part[:, 0][part[:, 0] == 0] = 2
    part[:, 1] = 3
    candidates = None
    if cold:
        label = np.repeat([0, 1, 2], [50, 10, 20])
        part = np.where(part < 3, label, 3)
        part[4][part[4] == 0] = 3
        candidates = {name: label == k for k, name in enumerate(("train", "valid", "test"))}
    pairs = [Pairs(*(x.astype(np.int32) for x in np.nonzero(part == k))) for k in range(3)]
    return Split("given", users, ITEMS, *pairs, candidates, "")


WIDTHS = [quarter * 2**p for p in range(12) for quarter in (4, 5, 6, 7)]


def items_of(pairs: Pairs, user: int) -> list[int]:
    return pairs.item[pairs.user == user].tolist()


def by_user(built: clients.Clients):
    """(user, bucket, row) of every client that is not padding."""
    for bucket in built.buckets:
        for row, user in enumerate(bucket.user):
            if user < built.num_users:
                yield int(user), bucket, row


@pytest.mark.parametrize("devices", [1, 3, 4, 60])
@pytest.mark.parametrize("max_buckets", [1, 2, 4])
def test_everybody_once_with_their_own_history(devices, max_buckets):
    split = make_split()
    built = clients.build(split, num_devices=devices, max_buckets=max_buckets)
    assert sorted(user for user, _, _ in by_user(built)) == list(range(USERS))
    assert 1 <= len(built.buckets) <= max_buckets
    widths = [b.history.shape[1] for b in built.buckets]
    assert widths == sorted(set(widths)) and set(widths) <= set(WIDTHS)
    for user, bucket, row in by_user(built):
        length = bucket.length[row]
        mine = items_of(split.train, user)
        assert bucket.history[row, :length].tolist() == mine
        assert (bucket.history[row, length:] == ITEMS).all()
        fits = [w for w in widths if w >= len(mine)]
        assert bucket.history.shape[1] == fits[0], "the narrowest bucket that holds it"


@pytest.mark.parametrize("devices", [1, 3, 4, 60])
def test_users_have_their_places_on_the_devices(devices):
    built = clients.build(make_split(), num_devices=devices, max_buckets=4)
    assert built.num_slots == built.users_per_device * devices >= USERS
    assert len(set(built.slots)) == USERS and built.slots.min() >= 0 and built.slots.max() < built.num_slots
    np.testing.assert_array_equal(built.users[built.slots], np.arange(USERS))
    assert (built.users == USERS).sum() == built.num_slots - USERS
    held = np.bincount(built.slots // built.users_per_device, minlength=devices)
    assert held.max() - held.min() <= 1
    for device, share in enumerate(built.users.reshape(devices, -1)):
        assert (share[: held[device]] < USERS).all(), "empty slots come last"
    for bucket in built.buckets:
        for device in range(devices):
            users, slots, lengths = (x.reshape(devices, -1)[device] for x in (bucket.user, bucket.slot, bucket.length))
            real = users < USERS
            assert (slots[real] + device * built.users_per_device == built.slots[users[real]]).all()
            assert (slots[~real] == built.users_per_device).all()
            assert not real[real.sum() :].any() and not lengths[~real].any(), "padding comes last"
            assert (np.diff(lengths[real]) >= 0).all()


def test_on_one_device_users_are_in_order():
    np.testing.assert_array_equal(clients.build(make_split()).slots, np.arange(USERS))


@pytest.mark.parametrize("devices", [2, 3, 8])
def test_devices_have_as_much_to_do_when_users_are_sorted_by_activity(devices):
    lengths = np.sort(np.random.default_rng(0).lognormal(3, 1, 1000).astype(int))[::-1]
    work = np.bincount(clients.deal(lengths, devices) // -(-1000 // devices), lengths, minlength=devices)
    assert work.max() < 1.05 * work.mean()
    held = np.array_split(lengths, devices)
    assert max(map(sum, held)) > 1.4 * work.mean(), "consecutive users would not"


def test_padding_clients_are_empty():
    built = clients.build(make_split(), num_devices=4, max_buckets=4, negative_pool="outside_all")
    padding = [(b, row) for b in built.buckets for row in np.flatnonzero(b.user == USERS)]
    assert padding
    for bucket, row in padding:
        assert (bucket.history[row] == ITEMS).all() and bucket.length[row] == 0
        assert (bucket.forbidden[row] == ITEMS).all() and bucket.num_forbidden[row] == 0


@pytest.mark.parametrize("devices", [1, 4])
def test_padding_fraction_is_counted_over_all_slots(devices):
    split = make_split()
    built = clients.build(split, num_devices=devices, max_buckets=4)
    slots = sum(b.history.size for b in built.buckets)
    filled = sum((b.history < ITEMS).sum() for b in built.buckets)
    assert filled == len(split.train.item)
    assert built.padding_fraction == pytest.approx(1 - filled / slots, abs=1e-12)  # float64


def test_more_buckets_waste_less():
    lengths = np.concatenate([np.full(1000, 4), np.full(100, 30), [1000]])
    waste = [
        sum(w - n for n in lengths for w in [min(w for w in clients.bucket_widths(lengths, most) if w >= n)])
        for most in (1, 2, 3)
    ]
    assert waste[0] > waste[1] > waste[2]
    assert clients.bucket_widths(lengths, 1) == [1024]
    assert clients.bucket_widths(lengths, 4) == [4, 32, 1024]


def test_buckets_that_are_left_open_are_worth_their_compilation():
    lengths = np.concatenate([np.full(500, 4), np.full(100, 30), [1000]])
    assert clients.bucket_widths(lengths, 4) == [4, 32, 1024]
    assert clients.bucket_widths(lengths) == [32, 1024]  # a third one would save 14,000 slots, a second saves 595,200
    assert clients.bucket_widths(np.tile(lengths, 2)) == [4, 32, 1024]
    assert clients.bucket_widths(np.repeat([4, 32], [300, 10])) == [32]  # 8,400
    assert clients.bucket_widths(np.repeat([4, 32], [400, 10])) == [4, 32]


@pytest.mark.parametrize("lengths", [[0], [1], [4], [5], [8, 9], [0, 1024], [1025]])
def test_the_widest_bucket_holds_the_longest_history(lengths):
    widths = clients.bucket_widths(np.array(lengths))
    assert widths[-1] == min(w for w in WIDTHS if w >= max(lengths))


@pytest.mark.parametrize("cold", [False, True])
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("devices", [1, 4])
def test_what_may_be_drawn(pool, cold, devices):
    """In item ids: the pool minus the forbidden positions is what the name of the pool says."""
    split = make_split(cold=cold)
    built = clients.build(split, negative_pool=pool, num_devices=devices, max_buckets=4)
    candidates = set(range(ITEMS)) if built.pool is None else set(built.pool.tolist())
    allowed = set(np.flatnonzero(split.candidates["train"])) if cold else set(range(ITEMS))
    if pool == "trained_items":
        allowed &= set(split.train.item.tolist())
    assert candidates == allowed
    assert built.pool_size == len(candidates)
    ids = np.arange(ITEMS) if built.pool is None else built.pool
    assert (np.diff(ids) > 0).all()
    for user, bucket, row in by_user(built):
        listed, count = (
            (bucket.history[row], bucket.length[row])
            if bucket.forbidden is None
            else (bucket.forbidden[row], bucket.num_forbidden[row])
        )
        assert (np.diff(listed[:count]) > 0).all() and (listed[count:] == built.pool_size).all()
        forbidden = set(items_of(split.train, user))
        if pool == "outside_all":
            forbidden |= {*items_of(split.valid, user), *items_of(split.test, user)}
        assert set(ids[listed[:count]].tolist()) == forbidden & candidates


def test_the_default_pool_stores_no_second_list():
    assert all(
        b.forbidden is None and b.num_forbidden is None for b in clients.build(make_split(), max_buckets=4).buckets
    )


def test_nobody_has_training_items():
    split = make_split(users=6)
    none = Pairs(np.zeros(0, np.int32), np.zeros(0, np.int32))
    empty = Split("given", 6, ITEMS, none, split.valid, split.test, None, "")
    for pool in ("outside_train", "outside_all"):
        built = clients.build(empty, negative_pool=pool, max_buckets=4)
        assert built.padding_fraction == 1
        assert sorted(user for user, _, _ in by_user(built)) == list(range(6))
        assert not any(b.length.any() for b in built.buckets)


def test_padded_rows_of_unknown_users_are_empty():
    pairs = Pairs(np.array([0, 0, 2], np.int32), np.array([5, 7, 1], np.int32))
    rows = clients.padded_rows(pairs, np.array([2, 3, 0, 1, 9]), clients.row_offsets(pairs.user, 3), 3, 8)
    np.testing.assert_array_equal(rows, [[1, 8, 8], [8, 8, 8], [5, 7, 8], [8, 8, 8], [8, 8, 8]])
    assert rows.dtype == np.int32


def test_an_unknown_pool_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="negative_pool='everything': expected one of outside_train, outside_all"):
        clients.build(make_split(), negative_pool="everything")
