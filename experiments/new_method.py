"""A whole new method in one file: matrix factorisation with item biases that are shared and user biases that stay.

    python experiments/new_method.py --dataset=synthetic --rounds=100 --set dim=16 --set bias_lr_scale=0.5

Every flag of launch.py works: workdirs, seeds, search, benchmark. The method is what stands between the two rules.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for launch.py

# ---- the method ----------------------------------------------------------------------------------------------
import dataclasses

import jax
import jax.numpy as jnp

from fedjax_rec.methods import METHODS, Entry
from fedjax_rec.roles import binary_cross_entropy, local_sgd
from fedjax_rec.sharing import LocalConfig, item_table, sharing_method


@dataclasses.dataclass(frozen=True)
class Config(LocalConfig):
    bias_lr_scale: float = 1.0  # rate of the user's bias relative to lr


def biased_mf(config, num_users, num_items, name="biased_mf"):
    """score_ui = p_u . q_i + b_i + c_u: the first column of the shared table is b, the rest is q."""

    def predict(params, rows):
        return rows[:, 1:] @ params["user"] + rows[:, 0] + params["bias"]

    def loss(params, vectors, batch):
        return binary_cross_entropy(predict(params, vectors["item"]), batch)

    rates = {"user": config.lr, "bias": config.lr * config.bias_lr_scale, "item": config.item_lr(num_users)}
    return sharing_method(
        name,
        init_shared=lambda key: {"item": item_table(key, num_items, config.dim + 1, config.init_std)},
        init_private=lambda key: {"user": 0.01 * jax.random.normal(key, (config.dim,)), "bias": jnp.zeros(())},
        train=local_sgd(loss, rates, optimizer=config.optimizer),
        score=lambda params: predict(params, params["item"]),
        config=config,
    )


METHODS["biased_mf"] = Entry(biased_mf, Config())
# ---- the command line ----------------------------------------------------------------------------------------

if __name__ == "__main__":
    import launch

    launch.FLAGS.set_default("method", "biased_mf")
    sys.exit(launch.command_line())
