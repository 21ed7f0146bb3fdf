"""A model's answers on the cases of a site, as counts that may leave it and as scores of cases that stay."""

from collections.abc import Mapping

from fedclient.site import Site
from fedclient.training.case_scores import scored
from fedclient.training.evaluate import answers
from fedclient.training.learner import device_of, settle, to_score
from fedclient.worth import AnyScores
from shared_models import nets
from shared_models.scores import Score
from shared_models.study import Study
from shared_models.tasks.chosen import functions_of
from shared_models.weights import Arrays


def score_cases(
    site: Site, study: Study, weights: Arrays, split: str
) -> tuple[Mapping[str, Score], AnyScores, list[str]]:
    """Counts by answer that the site can tell, the scores of the first of them case by case, and the cases' keys."""
    device = device_of(site)
    settle(site, study, 0)
    net = nets.network(study)
    nets.load_arrays(net, weights)
    task, (cases, least) = functions_of(study.task, site.labelled), to_score(site, study, split)
    given = answers(net.to(device), cases, study, task, device, site.go_on)
    counts, of_cases = scored(study.task, task, given, study.evaluate.threshold, least)
    return counts, of_cases, [case.key for case in cases.cases]
