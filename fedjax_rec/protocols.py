"""Evaluation protocols: what may be a training negative, what is ranked, and how a round is chosen."""

from __future__ import annotations

import dataclasses

from fedjax_rec.data.clients import NEGATIVE_POOLS


@dataclasses.dataclass(frozen=True)
class Protocol:
    """One protocol.

    Attributes:
        name: as printed in every result.
        negative_pool: see data/clients.py.
        draw, redraw: force the method's Sampling, or None to leave it.
        mask_valid_at_test: the validation item does not compete with the test item.
        keep: the `first` or the `last` of equally good rounds is selected.
        leaks: what a reader must know; printed with the results.
    """

    name: str
    negative_pool: str = "outside_train"
    draw: str | None = None
    redraw: str | None = None
    mask_valid_at_test: bool = True
    keep: str = "first"
    leaks: tuple[str, ...] = ()


HONEST = Protocol("honest")

_PER_USER_LEAK = (
    "training negatives are drawn outside ALL of a user's items, so the held-out items are the only unseen items "
    "that are never pushed down: compare with least_sampled, which has no model",
)
_CATALOGUE_LEAK = (
    "items that occur only in validation or test are nobody's training negative, so they float to the top untrained: "
    "compare with unseen_first, which has no model",
    "the validation item is not masked when the test item is ranked",
)
_OUTSIDE_ALL = Protocol(
    "published", "outside_all", draw="independent", redraw="round", keep="last", leaks=_PER_USER_LEAK
)
_TRAINED_ITEMS = Protocol(
    "published", "trained_items", draw="independent", redraw="epoch", mask_valid_at_test=False, leaks=_CATALOGUE_LEAK
)

PUBLISHED: dict[str, Protocol] = {
    # the released code of FedMR and FedVLR, which these baselines come with
    "fedavg": _TRAINED_ITEMS,
    "fcf": _TRAINED_ITEMS,
    "fedncf": _TRAINED_ITEMS,
    "fedvlr": _TRAINED_ITEMS,
    "fedmr": _TRAINED_ITEMS,
    "mlp_fusion": _TRAINED_ITEMS,
    "fedvbpr": _TRAINED_ITEMS,
    # the released code of PFedRec, FedRAP and FedRKG (whose baseline FedMF is)
    "fedmf": _OUTSIDE_ALL,
    "pfedrec": _OUTSIDE_ALL,
    "fedrap": _OUTSIDE_ALL,
    "fedrkg": _OUTSIDE_ALL,
    "gpfedrec": _OUTSIDE_ALL,
    "cofedrec": _OUTSIDE_ALL,
}


def protocol(name: str, method: str) -> Protocol:
    """The protocol of that name for a method.

    Raises:
        ValueError: unknown name, or a method without a published protocol.
    """
    if name == "honest":
        return HONEST
    if name != "published":
        raise ValueError(f"protocol={name!r}: expected honest or published")
    if method not in PUBLISHED:
        raise ValueError(f"protocol=published: none is known for {method}; known: {', '.join(PUBLISHED)}")
    return PUBLISHED[method]


def describe(chosen: Protocol) -> str:
    """One line for people."""
    text = f"protocol {chosen.name}: negatives from {NEGATIVE_POOLS[chosen.negative_pool]}"
    return "\n".join([text, *(f"  LEAK: {leak}" for leak in chosen.leaks)])
