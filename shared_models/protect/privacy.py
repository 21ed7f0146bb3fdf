"""`[protect]` of a study: what is done so that nobody's patient can be found in what leaves a site.

Where a study has `[protect.privacy]`, local training is differentially private with the patient as the unit, and all
that a site sends is the noisy update and numbers that stand in the study: no loss, score, count, time or histogram.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from shared_models.parse import STRICT
from shared_models.protect.accounting import NOISES, Spend
from shared_models.protect.secure import Secured
from shared_models.protect.stages import Compression

if TYPE_CHECKING:
    from shared_models.study import Study


@dataclass(frozen=True, slots=True)
class Privacy:
    """`[protect.privacy]`: DP-SGD (Abadi et al. 2016, Algorithm 1) on patients instead of examples.

    The numbers are the same at every site and stand in the study, so that none of them says how many patients a site
    has. `train.batch_size` is what the noisy sum of a step is divided by: the patients of a step at a typical site.

    Attributes:
        noise_multiplier: deviation of the noise over `clip_norm`.
        sample_rate: probability with which a step takes a patient, each for itself.
        clip_norm: largest length of one patient's gradient over all weights; a longer one is shortened to it.
        examples_per_patient: most slices, patches or volumes of a patient that a step looks at; their loss is one mean.
        trained: `all` weights, or those of the `head` alone: fewer weights get less noise, and the rest of the network
            stays as it was received (weights that were trained on public images, say).
        delta: for which reports state epsilon; a site's ledger uses its own.
    """

    __pydantic_config__ = STRICT
    noise_multiplier: Annotated[float, Field(ge=NOISES[0], le=NOISES[1], allow_inf_nan=False)]
    sample_rate: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
    clip_norm: Annotated[float, Field(ge=1e-6, le=1e6, allow_inf_nan=False)] = 1.0
    examples_per_patient: Annotated[int, Field(ge=1, le=4096)] = 4
    trained: Literal["all", "head"] = "all"
    delta: Annotated[float, Field(gt=0, le=0.01, allow_inf_nan=False)] = 1e-5

    def spend(self, steps: int) -> Spend:
        return Spend(self.noise_multiplier, self.sample_rate, steps)


@dataclass(frozen=True, slots=True)
class Protect:
    """`[protect]`: what is done to what leaves a site; what is left out is off. How they follow on each other, and what
    does not go together, is `shared_models/protect/stages.py`'s.

    Attributes:
        clip_norm: longest update, as a Euclidean norm over all weights; a longer one is shortened by its site.
        compression: `fp16` and `int8` send fewer bits of each weight, `top_k` the largest changes of each tensor alone;
            what is cut off waits at the site for its next update.
        top_k: share of a tensor's weights that is sent; 0.01 if nothing is said.
    """

    __pydantic_config__ = STRICT
    privacy: Privacy | None = None
    secure_aggregation: Secured = None
    clip_norm: Annotated[float, Field(ge=1e-6, le=1e6, allow_inf_nan=False)] | None = None
    compression: Compression = "none"
    top_k: Annotated[float, Field(gt=0, le=1)] | None = None


def check_private(study: "Study") -> None:
    """Raises ValueError, naming key and remedy, where the rest of a study would break what its privacy promises."""
    if study.protect.privacy is None:
        return
    train = study.train
    for broken, words in (
        (
            study.plan == "federated",
            'plan = "federated" needs histograms of every site\'s training patients, and these carry no noise; give '
            "plan, model and preprocess",
        ),
        (
            study.strategy.weighting != "uniform",
            'strategy.weighting must be "uniform": how many examples a site has is not told, and under noise all sites '
            "weigh the same",
        ),
        (
            train.local_steps is None,
            "train.local_steps must be given: the batches of local_epochs depend on how many patients a site has",
        ),
        (
            study.evaluate.every != 0,
            "evaluate.every must be 0: scores of validation and test patients carry no noise; score the released "
            "weights where those patients may be seen",
        ),
        (
            train.scaffold or train.moon_mu > 0 or train.sharpness_rho > 0,
            "train.scaffold, moon_mu and sharpness_rho must be off: they take gradients that nobody has clipped",
        ),
        (
            train.moments != "restart",
            'train.moments must be "restart": the private loop keeps nothing between rounds',
        ),
        (
            study.personal.any,
            "[personal] must be left out: a site's own model is trained and scored without noise",
        ),
        (
            train.deterministic,
            "train.deterministic must be false: noise that could be made again would hide nobody",
        ),
        (
            train.clip_gradient is not None,
            "train.clip_gradient must be left out: each patient is clipped to protect.privacy.clip_norm",
        ),
        (
            train.precision != "float32",
            'train.precision must be "float32": gradients of half precision vanish before they are clipped',
        ),
    ):
        if broken:
            raise ValueError(f"with [protect.privacy] {words}")
