"""Shared names for arrays and trees. Shape words used across the package:

users / clients  one user is one client        items  the catalogue
rows             one client's working set: the item ids it can touch this round, padded with `items`
history          one client's training items    samples / steps / batch  one client's local training data
dim              embedding width                feat  width of a given item feature
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Key

PRNGKey = Key[Array, ""]
PyTree = Any
Params = dict[str, PyTree]
"""Parameters keyed by role. Roles in ITEM_ROLES hold arrays whose leading axis is the catalogue (or, on a
client, its working set of rows)."""

ITEM_ROLES = frozenset({"item", "own_item", "views", "guide"})
"""The closed list of roles with an item axis: the shared table, a client's persistent own table, views made
by the server, a guiding table. The engine restricts these, and only these, to the rows a client touches."""
