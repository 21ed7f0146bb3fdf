"""`[strategy]` and `[personal]` of a study: how updates become weights, what a site keeps, and what goes together."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from shared_models.model_table import FEATURES
from shared_models.parse import STRICT

if TYPE_CHECKING:
    from shared_models.study import Study

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Below1 = Annotated[float, Field(ge=0, lt=1)]
ADAPTIVE = ("fedadam", "fedyogi", "fedadagrad")


@dataclass(frozen=True, slots=True)
class Strategy:
    """`[strategy]`: how updates become the next weights.

    Attributes:
        name: the server optimizer: of Reddi et al. 2021, Algorithm 2, with the mean update in the place of a gradient,
            or `fedavgm` (Hsu et al. 2019, section 4.3).
        weighting: a site's share in the mean: by its `examples`, `uniform`, or `inverse_variance`: one over the
            sampling variance of its mean local step, within a quarter and four times the cohort's median share.
        server_learning_rate: factor on the step; left out it is 1 (McMahan et al. 2017, Algorithm 1), or 0.01 for
            the three that scale each weight by its history.
        momentum: of `fedavgm`.
        beta1, beta2, tau: of `fedadam` and `fedyogi`: fading of first and second moment, and what keeps a weight that
            hardly moves from moving much; of `fedadagrad`: beta1 and tau.
        normalise_steps: FedNova (Wang et al. 2020, equation 6): a site's update is divided by the steps that it took,
            so that a site with many images does not pull the federation towards its own optimum.
        robust: a rule that bears `malicious` sites, in the place of the mean: `median`, `trimmed_mean` (Yin et al.
            2018), `krum`, `multi_krum` (Blanchard et al. 2017), `bulyan` (El Mhamdi et al. 2018); or the mean of
            updates none of which is longer than `norm_bound` (Sun et al. 2019), or, as `centred_clip`, none farther
            than that from the one in their middle (Karimireddy et al. 2021), which bears backdoors too.
        malicious: how many sites of a round may send anything at all; the quorum must be large enough for it.
        norm_bound: longest update, or farthest from the middle, as a Euclidean norm; left out it is the median of
            the norms, or distances, of the round.
    """

    __pydantic_config__ = STRICT
    name: Literal["fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad"] = "fedavg"
    weighting: Literal["examples", "uniform", "inverse_variance"] = "examples"
    server_learning_rate: Positive | None = None
    momentum: Below1 = 0.9
    beta1: Below1 = 0.9
    beta2: Below1 = 0.99
    tau: Positive = 1e-3
    normalise_steps: bool = False
    robust: Literal["none", "median", "trimmed_mean", "krum", "multi_krum", "bulyan", "norm_bound", "centred_clip"] = (
        "none"
    )
    malicious: Annotated[int, Field(ge=0, le=300)] = 0
    norm_bound: Positive | None = None

    def __post_init__(self) -> None:
        if self.norm_bound is not None and self.robust not in ("norm_bound", "centred_clip"):
            raise ValueError(f'norm_bound is for robust = "norm_bound" or "centred_clip", and it is "{self.robust}"')
        if self.malicious and self.robust in ("none", "norm_bound"):
            raise ValueError(
                f'malicious = {self.malicious} with robust = "{self.robust}", which promises nothing against a number '
                f"of sites; use median, trimmed_mean, krum, multi_krum or bulyan"
            )
        if not self.malicious and self.robust in ("trimmed_mean", "krum", "multi_krum", "bulyan"):
            raise ValueError(f'robust = "{self.robust}" needs malicious, how many sites it is to bear: at least 1')
        if self.robust not in ("none", "norm_bound") and self.weighting != "uniform":
            raise ValueError(
                f'robust = "{self.robust}" needs weighting = "uniform": a site that claims many examples would '
                f"otherwise weigh more"
            )
        if self.robust == "norm_bound" and self.weighting == "inverse_variance":
            raise ValueError('robust = "norm_bound" needs weighting = "examples" or "uniform"')
        if self.normalise_steps and (self.robust != "none" or self.weighting == "inverse_variance"):
            raise ValueError('normalise_steps needs robust = "none" and weighting = "examples" or "uniform"')

    @property
    def rate(self) -> float:
        if self.server_learning_rate is not None:
            return self.server_learning_rate
        return 0.01 if self.name in ADAPTIVE else 1.0

    @property
    def fewest_updates(self) -> int:
        """Updates without which the rule promises nothing."""
        f = self.malicious
        return {"krum": 2 * f + 3, "multi_krum": 2 * f + 3, "bulyan": 4 * f + 3, "none": 1, "norm_bound": 1}.get(
            self.robust, 2 * f + 1
        )


@dataclass(frozen=True, slots=True)
class Personal:
    """`[personal]`: what makes a site's model its own; nothing of it leaves the site.

    Attributes:
        keep: layers that stay at the site: `norm` (FedBN, Li et al. 2021: here the affine parameters of the norm
            layers, with batch norm its statistics too) and `head`, the last layer (FedPer, Arivazhagan et al. 2019).
        head_epochs: FedRep (Collins et al. 2021, Algorithm 1): the head is trained alone so often over the site's
            images, then all but the head as `[train]` says; 0 trains both together.
        ditto_lambda: Ditto (Li et al. 2021, Algorithm 1): a second model of the site's own, trained on the same
            batches with this pull towards the received weights.
        apfl_alpha: APFL (Deng et al. 2020, Algorithm 1): a second model of the site's own, mixed into the received
            weights with this share.
        apfl_adaptive: the share is learned as well (its equation 10).
        fine_tune_epochs, fine_tune_steps: training of the site's model, by itself, after the last round.
        fine_tune_rate: its highest learning rate as a share of `train.learning_rate`; left out, it is that of the last
            round, which a `cosine` schedule has brought down to a twentieth. It is reached after a tenth of the steps
            and falls to a 32nd by the last (Howard & Ruder 2018, section 3.2).
    """

    __pydantic_config__ = STRICT
    keep: Annotated[tuple[Literal["norm", "head"], ...], Field(max_length=2)] = ()
    head_epochs: Annotated[int, Field(ge=0, le=1000)] = 0
    ditto_lambda: NotNegative = 0.0
    apfl_alpha: Annotated[float, Field(gt=0, le=1)] | None = None
    apfl_adaptive: bool = False
    fine_tune_epochs: Annotated[int, Field(ge=0, le=1000)] = 0
    fine_tune_steps: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    fine_tune_rate: Annotated[float, Field(gt=0, le=10)] | None = None

    def __post_init__(self) -> None:
        if len(set(self.keep)) < len(self.keep):
            raise ValueError(f"keep {list(self.keep)} names a kind of layer twice")
        own = [self.keep != (), self.ditto_lambda > 0, self.apfl_alpha is not None]
        if sum(own) > 1:
            raise ValueError("keep, ditto_lambda and apfl_alpha each make a site's model its own; choose one of them")
        if self.head_epochs and "head" not in self.keep:
            raise ValueError(f'head_epochs = {self.head_epochs} needs keep = ["head"]')
        if self.apfl_adaptive and self.apfl_alpha is None:
            raise ValueError("apfl_adaptive needs apfl_alpha, the share to begin with")
        if self.fine_tune_epochs and self.fine_tune_steps:
            raise ValueError("fine_tune_epochs and fine_tune_steps are two measures of one thing; give one of them")
        if self.fine_tune_rate is not None and not self.fine_tunes:
            raise ValueError("fine_tune_rate is for fine-tuning; give fine_tune_epochs or fine_tune_steps")

    @property
    def fine_tunes(self) -> bool:
        return bool(self.fine_tune_epochs or self.fine_tune_steps)

    @property
    def any(self) -> bool:
        """Whether a site has a model of its own."""
        return bool(self.keep or self.ditto_lambda or self.apfl_alpha is not None or self.fine_tunes)


def remembers(study: "Study") -> bool:
    """Whether a site needs something of its last counted round to go on."""
    own, train = study.personal, study.train
    kept = train.scaffold or train.moon_mu or train.moments == "kept"
    return bool(kept or own.keep or own.ditto_lambda or own.apfl_alpha is not None)


def check_strategy(study: "Study") -> None:
    """Raises ValueError for tables that are sound each and not together."""
    strategy, train, rounds = study.strategy, study.train, study.rounds
    if rounds.quorum < strategy.fewest_updates:
        raise ValueError(
            f'strategy.robust = "{strategy.robust}" with malicious = {strategy.malicious} needs '
            f"{strategy.fewest_updates} sites in every round, rounds.quorum is {rounds.quorum}; raise it, or choose "
            f"a rule that needs fewer"
        )
    if train.scaffold:
        wrong = {
            'train.optimizer = "sgd" and train.momentum = 0': train.optimizer == "sgd" and train.momentum == 0,
            'strategy.name = "fedavg"': strategy.name == "fedavg",
            'strategy.weighting = "uniform"': strategy.weighting == "uniform",
            'strategy.robust = "none"': strategy.robust == "none",
            "strategy.normalise_steps = false": not strategy.normalise_steps,
            'rounds.late = "drop"': rounds.late == "drop",
        }
        if missing := [words for words, kept in wrong.items() if not kept]:
            raise ValueError(
                f"train.scaffold needs {', '.join(missing)}: its control variates are means of plain gradients, and "
                f"the server's is the mean of the sites'"
            )
    if train.moon_mu and study.plan == "given" and study.model.name not in FEATURES:
        raise ValueError(
            f'train.moon_mu with model.name = "{study.model.name}", of which no feature layer is known; use one of '
            f"{', '.join(FEATURES)}"
        )
    if train.moments == "kept" and train.optimizer == "sgd" and not train.momentum:
        raise ValueError(
            'train.moments = "kept" with train.optimizer = "sgd" and momentum = 0, which has none; give it '
            'momentum, or leave moments at "restart"'
        )
    if strategy.normalise_steps and (
        train.optimizer != "sgd" or train.proximal_mu or train.sharpness_rho or train.moments == "kept"
    ):
        raise ValueError(
            'strategy.normalise_steps needs train.optimizer = "sgd", moments = "restart", proximal_mu = 0 and '
            "sharpness_rho = 0: only then is it known how far so many steps go"
        )
    if study.model.norm == "batch" and "norm" not in study.personal.keep:
        raise ValueError(
            'model.norm = "batch" needs personal.keep = ["norm"] (FedBN): batch statistics must not leave a site. '
            'Or use "group" or "instance"'
        )
    if study.plan == "given" and study.model.norm == "none" and "norm" in study.personal.keep:
        raise ValueError('personal.keep = ["norm"] with model.norm = "none": there is no norm layer that could stay')
