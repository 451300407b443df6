"""GAR: a generator makes item vectors from content, against a recommender that tells them from pre-trained ones.

    G(m_i)  = linear, batch norm, tanh, dropout, linear                              the generator
    D(u, x) = tower_U(p_u) . tower_I(x),  tower = batch norm and the same layers     the recommender
    D step  softplus(-[D(u, q_i) - (1 - beta) D(u, G(m_i)) - beta D(u, q_j)]) + l2 / 2 sum |W_D|^2
    G step  (1 - alpha) softplus(-[D(u, G(m_i)) - D(u, q_i)]) + alpha mean |G(m_i) - q_i| + l2 / 2 sum |W_G|^2

means over triples (user u, positive i, negative j). Each batch takes both steps, first D's; the network that does not
step is as in scoring (running statistics, no dropout). p, q are BPR-MF's vectors (see pretrained.py), m whitened
features. Scores are D(u, q_i) of warm items and D(u, G(m_i)) of cold ones.

Follows: Chen et al., Generative Adversarial Framework for Cold-Start Item Recommendation, SIGIR 2022, and its released
code: D sees q_i, q_j and G(m_i) as one batch, which its batch norm needs; squared kernels, no biases.
Deviations: all widths are `dim` (200 there). The release's own vectors are node2vec's.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fedjax_rec.central.pairwise import Triples, over_triples, served
from fedjax_rec.central.pretrained import (
    Phase,
    TaughtConfig,
    Tower,
    Towers,
    descend,
    items_of,
    squares,
    taught,
    untrained,
)
from fedjax_rec.item_sources import Catalogue
from fedjax_rec.method import Method
from fedjax_rec.roles import OPTIMIZERS, masked_mean
from fedjax_rec.validate import between, positive


@dataclasses.dataclass(frozen=True)
class Config(TaughtConfig):
    """Attributes: alpha, beta, l2: see the module docstring. generator_lr: rate of G; lr is D's. generator_dropout,
    dropout: likewise. Others: see TaughtConfig."""

    l2: float = 1e-3
    generator_lr: float = 0.001
    alpha: float = 0.05
    beta: float = 0.1
    generator_dropout: float = 0.1
    dropout: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        positive("generator_lr", self.generator_lr)
        for name in ("alpha", "beta"):
            between(name, getattr(self, name), 0.0, 1.0)
        for name in ("generator_dropout", "dropout"):
            between(name, getattr(self, name), 0.0, 0.99)


def recommender_loss(config: Config, real, made, other, mask: Float[Array, "batch"]) -> Float[Array, ""]:
    """D step's, without l2, from the scores of q_i, G(m_i) and q_j."""
    apart = real - (1.0 - config.beta) * made - config.beta * other
    return masked_mean(jax.nn.softplus(-apart), mask)


def generator_loss(config: Config, real, made, vectors, wanted, mask: Float[Array, "batch"]) -> Float[Array, ""]:
    """G step's, without l2, from the scores of q_i and G(m_i), and G(m_i) and q_i themselves."""
    fooled = masked_mean(jax.nn.softplus(real - made), mask)
    return (1.0 - config.alpha) * fooled + config.alpha * masked_mean(jnp.abs(vectors - wanted).mean(1), mask)


def gar(config: Config, num_users: int, num_items: int, name: str, catalogue: Catalogue) -> Method:
    """GAR; see the module docstring."""
    items = items_of(config, catalogue, name)
    tower = lambda: Tower(config.dim, 0.99, config.dropout, True, nn.initializers.glorot_uniform())
    critic = Towers(tower(), tower())
    generator = Tower(config.dim, 0.99, config.generator_dropout, False, nn.initializers.glorot_uniform())
    optimizers = {
        "critic": OPTIMIZERS[config.optimizer](config.lr),
        "generator": OPTIMIZERS[config.optimizer](config.generator_lr),
    }

    def init(key):
        k_critic, k_generator = jax.random.split(key)
        row = jnp.zeros((1, config.dim))
        return {
            "critic": untrained(critic.init(k_critic, row, row), optimizers["critic"]),
            "generator": untrained(generator.init(k_generator, items.content[:1]), optimizers["generator"]),
            "items": items,
        }

    def scores(variables, users, *several, **training):
        """Of each kind of item in turn, and what training changes."""
        n = len(several)
        found = critic.apply(variables, jnp.tile(users, (n, 1)), jnp.concatenate(several), **training)
        (u, v), moved = found if training else (found, {})
        return jnp.split((u * v).sum(1), n), moved

    def epoch(key, state, users, vectors, seen, since):
        content = state["items"].content
        scale = config.rate_decay ** since.astype(jnp.float32)

        def step(carry, triples: Triples, key):
            held_critic, held_generator = carry
            user, positive, negative, mask = triples
            u, real, other, told = users[user], vectors[positive], vectors[negative], content[positive]
            training = lambda k: {"train": True, "mutable": ["batch_stats"], "rngs": {"dropout": k}}
            k_critic, k_generator = jax.random.split(key)
            made = generator.apply(held_generator.variables, told)

            def of_critic(params, statistics):
                variables = {"params": params, "batch_stats": statistics}
                said, moved = scores(variables, u, real, made, other, mask=jnp.tile(mask, 3), **training(k_critic))
                total = recommender_loss(config, *said, mask)
                return total + config.l2 / 2 * squares(params, "kernel"), moved["batch_stats"]

            held_critic = descend(optimizers["critic"], of_critic, held_critic, mask, scale)

            def of_generator(params, statistics):
                variables = {"params": params, "batch_stats": statistics}
                made, moved = generator.apply(variables, told, mask, **training(k_generator))
                said, _ = scores(held_critic.variables, u, real, made)
                total = generator_loss(config, *said, made, real, mask)
                return total + config.l2 / 2 * squares(params, "kernel"), moved["batch_stats"]

            return held_critic, descend(optimizers["generator"], of_generator, held_generator, mask, scale)

        held = over_triples(key, seen, config.batch_size, step, (state["critic"], state["generator"]))
        return {**state, "critic": held[0], "generator": held[1]}

    def vectors_of(state, users, vectors):
        known = state["items"]
        made = generator.apply(state["generator"].variables, known.content)
        return critic.apply(state["critic"].variables, users, jnp.where(known.cold, made, vectors))

    return served(taught(Phase(init, epoch, vectors_of), config, num_users, items), config, num_users, num_items, name)
