"""Clients: every user's training items, grouped into buckets of similar length and padded inside a bucket."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import numpy as np

from fedjax_rec.data.splits import Pairs, Split

NegativePool = Literal["outside_train", "outside_all", "trained_items"]
NEGATIVE_POOLS: dict[str, str] = {
    "outside_train": "everything outside the user's training items (honest)",
    "outside_all": "everything outside ALL of the user's items: held-out items are never negatives (leaks)",
    "trained_items": "items of somebody's training data, outside the user's: other items are never negatives (leaks)",
}
MAX_BUCKETS = 4
BUCKET_COST = 0.02  # one more bucket must save this share of all slots to be worth its compilation
BUCKET_SLOTS = 10_000  # where their number is left open: the second must save so many, the third twice that, and so on


class Bucket(NamedTuple):
    """Clients whose histories fit into one padded width. Leading axis: device-major clients of the bucket.

    user: [n] user id, or num_users for padding.   slot: [n] place of the user's state on the device, or
    users_per_device for padding.   history: [n, width] sorted item ids, padded with num_items.   length: [n].
    forbidden: [n, f] sorted positions in the pool that must not be drawn, padded with the pool size, or None where
    they are the history.   num_forbidden: [n] or None.
    """

    user: np.ndarray
    slot: np.ndarray
    history: np.ndarray
    length: np.ndarray
    forbidden: np.ndarray | None
    num_forbidden: np.ndarray | None


@dataclasses.dataclass(frozen=True, eq=False)
class Clients:
    """All clients of a run, ready for the device.

    Attributes:
        buckets: one per padded width, clients in order of length inside each device's share.
        num_users, num_items: sizes; users_per_device x num_devices >= num_users.
        slots: [num_users] place of each user's state on the leading axis of client state, which is device-major:
            device k has the slots [k * users_per_device, (k+1) * users_per_device), the last one of which may be
            empty. On one device it is the user id.
        pool: [pool] item ids that may be negatives, or None for the whole catalogue.
        padding_fraction: share of history slots that hold no item.
    """

    buckets: tuple[Bucket, ...]
    num_users: int
    num_items: int
    num_devices: int
    users_per_device: int
    slots: np.ndarray
    pool: np.ndarray | None
    padding_fraction: float

    @property
    def pool_size(self) -> int:
        return self.num_items if self.pool is None else len(self.pool)

    @property
    def num_slots(self) -> int:
        """Users padded to a multiple of the devices: the leading axis of client state."""
        return self.users_per_device * self.num_devices

    @property
    def users(self) -> np.ndarray:
        """[num_slots] the user id in each slot, num_users in empty ones."""
        users = np.full(self.num_slots, self.num_users, np.int32)
        users[self.slots] = np.arange(self.num_users)
        return users


def row_offsets(user: np.ndarray, num_users: int) -> np.ndarray:
    """Start of each user's run in arrays sorted by user, [users + 1]."""
    return np.searchsorted(user, np.arange(num_users + 1))


def padded_rows(pairs: Pairs, users: np.ndarray, offsets: np.ndarray, width: int, fill: int) -> np.ndarray:
    """[users, width] items of each user (any user id >= number of users gives an empty row)."""
    known = users < len(offsets) - 1
    safe = np.where(known, users, 0)
    start = offsets[safe]
    length = np.where(known, offsets[safe + 1] - start, 0)
    index = start[:, None] + np.arange(width)
    inside = np.arange(width) < length[:, None]
    items = pairs.item[np.minimum(index, max(len(pairs.item) - 1, 0))] if len(pairs.item) else 0
    return np.where(inside, items, fill).astype(np.int32)


def bucket_widths(lengths: np.ndarray, max_buckets: int = 0) -> list[int]:
    """Padded widths that waste the fewest slots, with at most `max_buckets` of them.

    Dynamic programme over 4, 5, 6 and 7 times the powers of two; a bucket that saves less than BUCKET_COST of all
    slots is not made.

    Args:
        max_buckets: 0 for at most MAX_BUCKETS that are worth their compilation (see BUCKET_SLOTS).
    """
    longest = int(lengths.max(initial=1))
    steps = [quarter * 2**p for p in range(longest.bit_length()) for quarter in (4, 5, 6, 7)]
    widths = steps[: int(np.searchsorted(steps, longest)) + 1]
    upto = [int((lengths <= w).sum()) for w in widths]
    least = BUCKET_COST * max(int(lengths.sum()), 1)
    best: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(-1, 0): (0.0, ())}
    for last in range(len(widths)):
        for used in range(1, (max_buckets or MAX_BUCKETS) + 1):
            penalty = least if max_buckets else max(least, BUCKET_SLOTS * (used - 1))
            choices = [
                (cost + (upto[last] - (upto[prev] if prev >= 0 else 0)) * widths[last] + penalty, chosen)
                for (prev, n), (cost, chosen) in best.items()
                if n == used - 1 and prev < last
            ]
            if choices:
                cost, chosen = min(choices)
                best[last, used] = (cost, (*chosen, widths[last]))
    return list(min(value for (last, _), value in best.items() if last == len(widths) - 1)[1])


def forbidden_pairs(split: Split, pool: NegativePool) -> Pairs | None:
    """Pairs that may not be drawn as negatives, where they are more than the training pairs."""
    if pool != "outside_all":
        return None
    user = np.concatenate([split.train.user, split.valid.user, split.test.user])
    item = np.concatenate([split.train.item, split.valid.item, split.test.item])
    order = np.lexsort((item, user))
    return Pairs(user[order], item[order])


def candidate_pool(split: Split, pool: NegativePool) -> np.ndarray | None:
    """Item ids that may be negatives at all, sorted; None for the whole catalogue.

    Under a cold-item split the held-out items do not exist yet, so only warm items can be negatives.
    """
    if pool == "trained_items":
        return np.unique(split.train.item).astype(np.int32)
    if split.candidates is not None:
        return np.flatnonzero(split.candidates["train"]).astype(np.int32)
    return None


def build(
    split: Split,
    *,
    negative_pool: str = "outside_train",
    num_devices: int = 1,
    max_buckets: int = 0,
) -> Clients:
    """Groups training histories into buckets (see bucket_widths) and deals the users to the devices, so that each has
    as much to do."""
    if negative_pool not in NEGATIVE_POOLS:
        raise ValueError(f"negative_pool={negative_pool!r}: expected one of {', '.join(NEGATIVE_POOLS)}")
    users_per_device = -(-split.num_users // num_devices)
    offsets = row_offsets(split.train.user, split.num_users)
    lengths = np.diff(offsets)
    slots = deal(lengths, num_devices)
    pool = candidate_pool(split, negative_pool)
    extra = forbidden_pairs(split, negative_pool)
    buckets = []
    low = -1
    for width in bucket_widths(lengths, max_buckets):
        members = np.flatnonzero((lengths > low) & (lengths <= width))
        low = width
        if not len(members):
            continue
        shares = [
            share[np.argsort(lengths[share], kind="stable")]
            for share in (members[slots[members] // users_per_device == k] for k in range(num_devices))
        ]
        users = padded_shares(shares, split.num_users)
        slot = padded_shares([slots[share] % users_per_device for share in shares], users_per_device)
        history = padded_rows(split.train, users, offsets, width, split.num_items)
        forbidden, num_forbidden = _forbidden(split, users, offsets, width, pool, extra)
        length = (history < split.num_items).sum(1).astype(np.int32)
        buckets.append(Bucket(users, slot, history, length, forbidden, num_forbidden))
    held = sum(b.history.size for b in buckets)
    padding = 1.0 - len(split.train.item) / max(held, 1)
    return Clients(
        tuple(buckets), split.num_users, split.num_items, num_devices, users_per_device, slots, pool, padding
    )


def deal(lengths: np.ndarray, num_devices: int) -> np.ndarray:
    """Slot of each user: users by length go to the devices to and fro, so that every device has as many users, give
    or take one, of each length. A device's users are in order of their ids.

    Devices with consecutive users would have unequal work, and very unequal work where the data are sorted by activity.
    """
    num_users = len(lengths)
    turn, seat = np.divmod(np.arange(num_users), num_devices)
    device = np.empty(num_users, np.int64)
    device[np.argsort(lengths, kind="stable")] = np.where(turn % 2, num_devices - 1 - seat, seat)
    slots = np.empty(num_users, np.int64)
    slots[np.argsort(device, kind="stable")] = np.arange(num_users)
    first = np.searchsorted(np.sort(device), np.arange(num_devices))
    return slots - first[device] + device * -(-num_users // num_devices)


def padded_shares(shares: list[np.ndarray], fill: int) -> np.ndarray:
    """The devices' shares one after the other, each padded to the longest."""
    width = max(len(share) for share in shares)
    padded = [np.pad(share, (0, width - len(share)), constant_values=fill) for share in shares]
    return np.concatenate(padded).astype(np.int32)


def _forbidden(split, users, offsets, width, pool, extra):
    """Pool positions that a client may not draw, or (None, None) where that is its history as it stands."""
    if pool is None and extra is None:
        return None, None
    if extra is None:
        items = padded_rows(split.train, users, offsets, width, split.num_items)
    else:
        extra_offsets = row_offsets(extra.user, split.num_users)
        most = int(np.diff(extra_offsets)[users[users < split.num_users]].max())
        items = padded_rows(extra, users, extra_offsets, most, split.num_items)
    size = split.num_items if pool is None else len(pool)
    position = np.full(split.num_items + 1, size, np.int32)
    position[np.arange(split.num_items) if pool is None else pool] = np.arange(size, dtype=np.int32)
    forbidden = np.sort(position[items], axis=1)
    return forbidden, (forbidden < size).sum(1).astype(np.int32)
