"""`[unlabelled]` of a study: what is learned from cases that nobody has labelled, and what it does not go with."""

from dataclasses import dataclass, fields
from math import exp
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from shared_models.parse import STRICT

if TYPE_CHECKING:
    from shared_models.study import Study

Share = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True, slots=True)
class Unlabelled:
    """`[unlabelled]`: what is learned from training cases without a label, beside the loss of those with one.

    The network sees a case twice, once as `[augment]` has it, and once changed again; its answers are to agree.

    Attributes:
        method: `none` leaves such cases out. `mean_teacher`: the first answer is that of a teacher, a running mean of
            the network's weights since the round began, and the square of the difference is the loss (Tarvainen &
            Valpola 2017, equations 1 and 2). `pseudo`: it is the network's own, taken for the truth where it is sure
            (Lee 2013; with two views as FixMatch, Sohn et al. 2020, equations 3 and 4).
        weight: of this loss, beside 1 for that of the labelled cases.
        ramp_rounds: over so many first rounds the weight rises as exp(-5 (1 - t)^2) (Tarvainen & Valpola 2017,
            section 3.1); 0 has it whole from the beginning.
        decay: share of itself that the teacher keeps in a step.
        threshold: least probability that `pseudo` takes for the truth.
        mix: of a segmentation: half of each image is a rectangle of another one (French et al. 2020, section 3.3).
        example_weight: how much an example without a label counts beside one with, where updates are weighed by
            examples; it rises with the weight, and so does the learning rate of a site without any label: in the first
            rounds it has little say.
    """

    __pydantic_config__ = STRICT
    method: Literal["none", "mean_teacher", "pseudo"] = "none"
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    ramp_rounds: Annotated[int, Field(ge=0, le=10_000)] = 5
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    threshold: Annotated[float, Field(ge=0.5, lt=1)] = 0.95
    mix: bool = False
    example_weight: Share = 0.1

    def __post_init__(self) -> None:
        defaults = {f.name: f.default for f in fields(Unlabelled)}
        of = {"mean_teacher": {"decay"}, "pseudo": {"threshold"}}
        for key in defaults.keys() - {"method"}:
            elsewhere = [method for method, keys in of.items() if key in keys and method != self.method]
            if getattr(self, key) != defaults[key] and (self.method == "none" or elsewhere):
                raise ValueError(f'{key} is not read with method = "{self.method}"; leave it out')

    def ramp(self, round_number: int) -> float:
        """Which share of the weight a round has, from 1 on."""
        if round_number >= self.ramp_rounds:
            return 1.0
        return exp(-5 * (1 - round_number / self.ramp_rounds) ** 2)


def check_unlabelled(study: "Study") -> None:
    """Raises ValueError for tables that are sound each and not together."""
    table = study.unlabelled
    if table.method == "none":
        return
    personal = study.personal
    for broken, words in (
        (
            study.protect.privacy is not None,
            "[protect.privacy] must be left out: the accountant counts lots of labelled patients, and what is learned "
            "from the others would be neither clipped nor accounted",
        ),
        (
            study.task.kind not in ("segmentation", "classification"),
            f"the task must be a segmentation or a classification, it is a {study.task.kind}",
        ),
        (table.mix and study.task.kind != "segmentation", "mix is for a segmentation: a mixed image has no one class"),
        (study.plan == "federated", 'plan must be "given": a federated one counts labelled cases alone'),
        (bool(study.model.supervised), "model.supervised must be off: answers of unlike sizes are not compared"),
        (
            study.strategy.normalise_steps and study.train.local_steps is None,
            "strategy.normalise_steps needs train.local_steps: an epoch's steps do not follow from the examples that "
            "an update counts as",
        ),
        (study.train.sharpness_rho > 0, "train.sharpness_rho must be 0: its two gradients would be of unlike images"),
        (
            bool(personal.head_epochs or personal.fine_tunes or personal.ditto_lambda)
            or personal.apfl_alpha is not None,
            "[personal] may only keep layers: a model of its own would learn from labels that a site may not have",
        ),
    ):
        if broken:
            raise ValueError(f'with unlabelled.method = "{table.method}" {words}')
    if not table.mix and not study.augment.changes:
        raise ValueError(
            f'unlabelled.method = "{table.method}" needs [augment] or mix: answers to equal images agree already'
        )
