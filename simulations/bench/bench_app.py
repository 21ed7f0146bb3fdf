"""The client app of the deployed benchmark: everything of a real one but the training."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedclient.client import client_app
from fedclient.site import Site
from fedclient.work import Holding, Learned
from shared_models.scores import Score
from shared_models.study import Study
from shared_models.weights import Arrays
from shared_models.wire import Split

MOVE = np.float32(0.001)


@dataclass(frozen=True, slots=True)
class ConstantLearner:
    """Moves every weight by the same small number: as many changed bytes as training leaves, and no time spent."""

    def learn(self, site: Site, study: Study, round_number: int, weights: Arrays) -> Learned:
        return Learned({name: array + MOVE for name, array in weights.items()}, examples=100, steps=1)

    def score(self, site: Site, study: Study, weights: Arrays, split: Split) -> Mapping[str, Score]:
        return {}

    def holding(self, site: Site, study: Study) -> Holding:
        return Holding()


app = client_app(ConstantLearner())
