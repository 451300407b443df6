"""MDiffFR: a diffusion model on the server learns the shared item table and makes rows for untouched items.

    clients, server    a round of the backbone: E <- E + mean of the changes              Algorithm 1, lines 5, 14-17
    theta <- theta - rate d/dtheta E_t |x^_0(x_t, t, m) - x_0|^2, x_0 a warm row of E     Algorithm 1, lines 7-13
    cold i: x_T ~ N(0, I), x_{t-1} = mu_theta(x_t, t, m_i), E_i = x_0                     Algorithm 2

The features m may come down to `condition_dim` principal components (64 in the release); clients only ever get rows.
Equations: server/diffusion.py.

Follows: "MDiffFR", Algorithms 1 and 2, over the paper's client (PFedRec) or any other of methods/over.BACKBONES. Over
FedRAP the made rows stand in for the common table, and a cold item's personal row is as it started (zero by
default). Presets:

    paper     Eq. 14 with uniform weights, the attention's query as the only way in for x_t, Adam (the paper names none)
    released  the released code: SGD 1e-4 with weight decay 1e-3 and SNR-difference weights. Its noise ends at 0.045
              while sampling starts at 1, and its output hardly depends on x_t
    proper    a residual path from x_t, rows standardised, a schedule that ends in the prior, AdamW, averaged weights,
              classifier-free guidance

`neighbours` = k, .. is our variant: beside the features the denoiser is told the mean row of the k warm items nearest
to the item in content (itself left out), for each k, so that it need not learn from noisy rows what the nearest of them
say. Where `guidance` withholds the features it withholds these too: no means, zeros, or those of random neighbours.

`light_mdifffr` trains the diffusion every second round (Section 4.6). `guidance` withholds the features (`none`: no
modality token; `zero`, `random`: constant or meaningless ones), `fusion` replaces the attention (Table 4 gives no
replacement; here the mean, or a map of the concatenation). Without the residual path x_t is the attention's query and
nothing else: guidance=none then makes all cold rows equal (an attention over time alone has nothing to choose), and
fusion=mean|concat makes rows that no noise moves.

Deviations: principal components are those of warm items (released: of all) and scaled to size 1. Cold rows are made
afresh in every round, though only an evaluation reads them. The paper's rows of warm items that the code makes and
never uses are not made. The presets are the server's alone and leave the client at this library's defaults (lr 0.5,
item rate lr x clients, rows from N(0, 0.1^2), a head of each client's own). The paper has lr 0.1 (Section 6.3); the
released client, with item rate lr x warm items x 80, is `lr=0.1 init_std=1 client_init=shared` and
`item_lr_scale` = 80 x warm items / clients.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_rec.item_sources import Catalogue
from fedjax_rec.item_sources.cold import (
    RowMaker,
    conditions,
    neighbour_means,
    some_cold,
    warm_and_cold,
    with_cold_rows,
)
from fedjax_rec.method import Method
from fedjax_rec.methods.over import BACKBONES, OverConfig, plain_method
from fedjax_rec.server.diffusion import Diffusion, Settings, check
from fedjax_rec.validate import one_of, positive

NAMES = {
    "steps": "diffusion_steps",
    "scale": "noise_scale",
    "low": "noise_low",
    "high": "noise_high",
    "weights": "loss_weights",
    "optimizer": "diffusion_optimizer",
    "lr": "diffusion_lr",
    "weight_decay": "diffusion_decay",
    "epochs": "server_epochs",
    "batch_size": "diffusion_batch",
}
"""What the diffusion's Settings are called here, where a client has an lr too; the others have one name."""


@dataclasses.dataclass(frozen=True)
class Config(OverConfig):
    """Settings of MDiffFR; those of OverConfig besides.

    Attributes:
        independence, sparsity, anneal, own_lr_scale, own_init_std: of FedRAP, see there.
        preset: `paper`, `released` or `proper`; sets the defaults of everything below.
        condition_dim: principal components of the features, 0 for the features themselves.
        guidance: `features`, or the ablations `none`, `zero`, `random`.
        neighbours: numbers of warm items whose mean row the denoiser is told, nearest in content; 0 for none (the
            paper).
        train_every: rounds between trainings of the diffusion model.
        diffusion_steps, noise_scale, noise_low, noise_high: T, s and the bounds of Eq. 6.
        diffusion_optimizer, diffusion_lr, diffusion_decay, server_epochs, diffusion_batch: its training.
        residual, hidden, heads, dropout, fusion, loss_weights, ema, drop_condition, guidance_scale, sampling_noise,
            standardise: see server/diffusion.Settings.
    """

    dim: int = 64
    lr: float = 0.5
    item_lr_scale: float = 1.0
    negatives: int = 5
    init_std: float = 0.1
    independence: float = 0.001
    sparsity: float = 0.001
    anneal: bool = True
    own_lr_scale: float = 0.2
    own_init_std: float = 0.0
    preset: str = "paper"
    condition_dim: int = 0
    guidance: str = "features"
    neighbours: tuple[int, ...] = (0,)
    train_every: int = 1
    diffusion_steps: int = 10
    noise_scale: float = 0.1
    noise_low: float = 1e-4
    noise_high: float = 0.02
    residual: bool = False
    hidden: int = 128
    heads: int = 4
    dropout: float = 0.1
    fusion: str = "attention"
    loss_weights: str = "uniform"
    diffusion_optimizer: str = "adam"
    diffusion_lr: float = 1e-3
    diffusion_decay: float = 0.0
    server_epochs: int = 1
    diffusion_batch: int = 256
    ema: float = 0.0
    drop_condition: float = 0.0
    guidance_scale: float = 1.0
    sampling_noise: bool = False
    standardise: bool = False

    OVER = tuple(BACKBONES)

    def __post_init__(self):
        super().__post_init__()
        one_of("preset", self.preset, ("paper", "released", "proper"))
        one_of("guidance", self.guidance, ("features", "none", "zero", "random"))
        positive("train_every", self.train_every)
        positive("condition_dim", self.condition_dim, zero_allowed=True)
        for k in self.neighbours:
            positive("neighbours", k, zero_allowed=True)
        check(self, NAMES)

    @property
    def means(self) -> tuple[int, ...]:
        return tuple(k for k in self.neighbours if k and self.guidance != "none")

    def diffusion(self) -> Settings:
        names = (field.name for field in dataclasses.fields(Settings))
        return Settings(**{name: getattr(self, NAMES.get(name, name)) for name in names})


PRESETS = {
    "paper": Config(),
    "released": Config(
        preset="released",
        condition_dim=64,
        diffusion_optimizer="sgd",
        diffusion_lr=1e-4,
        diffusion_decay=1e-3,
        loss_weights="snr",
    ),
    "proper": Config(
        preset="proper",
        condition_dim=64,
        residual=True,
        standardise=True,
        noise_scale=1.0,
        noise_low=0.01,
        noise_high=0.999,
        diffusion_optimizer="adamw",
        diffusion_decay=1e-2,
        ema=0.99,
        drop_condition=0.1,
        guidance_scale=1.5,
    ),
}
LIGHT = {name: dataclasses.replace(preset, train_every=2) for name, preset in PRESETS.items()}


def mdifffr(config: Config, num_users: int, num_items: int, name: str, catalogue: Catalogue) -> Method:
    """MDiffFR; see the module docstring."""
    values = conditions_of(config, name, catalogue)
    warm, cold = some_cold(catalogue, name, config.backbone)
    of_warm, of_cold = (_conditioned_on(config, name, catalogue, values, index) for index in (warm, cold))
    model = Diffusion(config.diffusion(), config.width, values.shape[1] + len(config.means) * config.width)

    def learn(key, state, rows, round_):
        train = lambda held: model.train(key, held, rows, of_warm(rows))
        if config.train_every == 1:
            return train(state)
        return jax.lax.cond(round_ % config.train_every == 0, train, lambda held: held, state)

    maker = RowMaker(model.init, learn, lambda key, state, rows: model.sample(key, state, of_cold(rows)))
    return with_cold_rows(plain_method(config, num_users, num_items, name), maker, catalogue)


def _conditioned_on(config: Config, name: str, catalogue: Catalogue, values: np.ndarray, of: np.ndarray):
    """What the denoiser is told of the items `of`, given the warm rows: their features, and beside them the mean rows
    of their neighbours where the configuration has any."""
    if not config.means:
        return lambda rows: jnp.asarray(values[of])
    if config.guidance == "zero":
        return lambda rows: jnp.zeros((len(of), values.shape[1] + len(config.means) * config.width))
    warm, _ = warm_and_cold(catalogue)
    near_by = values if config.guidance == "random" else conditions(catalogue, name, 0)
    means, values = neighbour_means(near_by, warm, of, *config.means), jnp.asarray(values[of])

    def told(rows):
        unit = (rows - rows.mean(0)) / jnp.maximum(rows.std(0), 1e-6)
        return jnp.concatenate([values, means(unit)], axis=1)

    return told


def conditions_of(config: Config, name: str, catalogue: Catalogue) -> np.ndarray:
    """What the denoiser is told of every item, float32 [items, feat]; no columns without guidance."""
    values = conditions(catalogue, name, config.condition_dim)
    if config.guidance == "random":
        return np.random.default_rng(0).standard_normal(values.shape).astype(np.float32)
    return {"features": values, "zero": np.zeros_like(values), "none": values[:, :0]}[config.guidance]
