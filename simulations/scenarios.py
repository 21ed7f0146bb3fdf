"""Settings of published benchmarks under names: which study, which budget, which measure, and what was published.

FLamby (Ogier du Terrail et al. 2022) gives each site 100 updates a round, and as many rounds as its pooled model has
epochs (`budget`). Its published figures are means over five seeds on the test patients of all sites together, as its
repository's result tables have them; ours are means over sites, of the foreground alone where Dice is measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite, nan
from pathlib import Path
from statistics import fmean
from typing import Any

from fedclient.data.listing import list_cases
from fedclient.data.truths import has_truth
from fedclient.site import open_site
from fedserver.comparison import PARTIAL, spread, spread_text
from shared_models.errors import ManifestInvalid, StudyInvalid
from shared_models.figure_text import DASH
from shared_models.files import write_atomic, write_json
from shared_models.study import Study, load_study
from simulations.compare import Asked, compare
from simulations.compare_page import write_all
from simulations.compare_tables import is_partial
from simulations.engine import NodeConfig
from simulations.run import Machine, Say
from simulations.settings import Changes, changed, settings_named
from simulations.site_options import SiteOptions, sites_of

UPDATES = 100  # of a site in a round
STRATEGIES = ("fedavg", "fedprox", "fedadam", "fedyogi")
DICE = "Dice of the foreground, mean over regions"
BALANCED = "balanced accuracy"
FIELDS = {DICE: "dice", BALANCED: "sensitivity", "AUROC": "auroc", "C-index": "c_index"}


@dataclass(frozen=True, slots=True)
class Scenario:
    """One benchmark.

    Attributes:
        study: a ready one; `changes` are to it.
        measure: of `FIELDS`.
        layout: of the data; empty where any that the study can read will do.
        wants: what `--data` must hold, for who has not got it right.
        epochs: of the pooled model; the rounds follow from it and the data. None: the study says how many rounds.
        published: model -> its figure; empty where nobody has published one on these data.
        differs: how the published figures were come by otherwise.
    """

    title: str
    study: str
    measure: str
    wants: str
    layout: str = ""
    epochs: int | None = None
    changes: Changes = field(default_factory=dict)
    published: Mapping[str, str] = field(default_factory=dict)
    differs: str = ""


SCENARIOS: Mapping[str, Scenario] = {
    "fed-ixi": Scenario(
        "Brain on T1 MR of three hospitals (FLamby's Fed-IXI)",
        "fed-ixi",
        DICE,
        "metadata_tiny.csv of FLamby (columns Patient ID, Manufacturer, Split), and beside it IXI Tiny as it unpacks: "
        "IXI_sample/IXI002-Guys-0828/T1/*.nii.gz and .../label/*.nii.gz",
        "fed-ixi",
        published={"pooled": "0.987", "best site alone": "0.984", "FedAvg": "0.773 ± 0.019",
                   "best (Scaffold)": "0.775 ± 0.020"},
        differs="soft Dice, mean of brain and background",
    ),
    "fed-kits19": Scenario(
        "Kidney and tumour on CT of six sites (FLamby's Fed-KiTS19)",
        "fed-kits19",
        DICE,
        "thresholded_sites.csv of FLamby (columns case_ids, site_ids, train_test_split), and beside it, or in data/, "
        "case_00000/imaging.nii.gz and case_00000/segmentation.nii.gz as KiTS19 has them",
        "fed-kits19",
        published={"pooled": "0.765 ± 0.054", "best site alone": "0.580", "FedAvg": "0.590 ± 0.026",
                   "best (FedProx)": "0.656 ± 0.030"},
        differs="Dice of random patches of the test images",
    ),
    "fed-isic2019": Scenario(
        "Kinds of skin lesion on dermoscopy of six centres (FLamby's Fed-ISIC2019)",
        "fed-isic2019",
        BALANCED,
        "train_test_split of FLamby (columns image, target, center, fold), and beside it "
        "ISIC_2019_Training_Input_preprocessed/ISIC_0000000.jpg as FLamby's resize_images.py makes them",
        "fed-isic2019",
        published={"pooled": "0.762 ± 0.009", "best site alone": "0.664", "FedAvg": "0.534 ± 0.102",
                   "best (FedAdam)": "0.575 ± 0.008"},
        differs="an EfficientNet that begins from ImageNet",
    ),
    "fed-camelyon16": Scenario(
        "Metastasis in slides of two centres (FLamby's Fed-Camelyon16)",
        "fed-camelyon16",
        "AUROC",
        "metadata.csv of FLamby (columns label, hospital_corrected, slide_name), and beside it a file of ResNet-50 "
        "features for each slide, normal_001.tif.npy: real numbers [tiles, 2048], as FLamby's tiling_slides.py makes "
        "them",
        "fed-camelyon16",
        published={"pooled": "0.780 ± 0.057", "best site alone": "0.785", "FedAvg": "0.606 ± 0.021",
                   "best (Scaffold)": "0.648 ± 0.055"},
        differs="bags filled up to 10,000 tiles with zeros that get attention too",
    ),
    "flamby-brca": Scenario(
        "Survival with breast cancer by region, at the budget of FLamby's Fed-TCGA-BRCA",
        "brca-prognosis",
        "C-index",
        "manifest.csv as `fedsim tables FOLDER DIR --patient pid` makes it from a table for each region",
        epochs=30,
        changes={"train": {"batch_size": 8}},
        published={"pooled": "0.704", "best site alone": "0.728", "FedAvg": "0.735", "best (FedAdam)": "0.842"},
        differs="six regions, of which these data have four; a Cox loss",
    ),
    "flamby-chest-xray": Scenario(
        "Lungs on chest X-rays, at the budget of FLamby's Fed-KiTS19 (500 pooled epochs)",
        "chest-xray",
        DICE,
        "a manifest.csv with the columns site, patient_id, image, mask",
        epochs=500,
    ),
    "flamby-lung-nodule": Scenario(
        "Nodules in CT volumes of interest, at a budget as FLamby's (200 pooled epochs)",
        "lung-nodule",
        DICE,
        "a manifest.csv with the columns site, patient_id, image, mask",
        epochs=200,
    ),
}  # fmt: skip


def budget(cases: int, sites: int, batch: int, epochs: int, updates: int = UPDATES) -> int:
    """Rounds in which the sites together go over the data about as often as the pooled model in its epochs.

    FLamby's rule, in whole numbers; at least 1.
    """
    return max(1, cases // sites // batch * epochs // updates)


def named(name: str) -> Scenario:
    if name not in SCENARIOS:
        raise StudyInvalid(f"scenario {name!r} is not known. Known: {', '.join(SCENARIOS)}.")
    return SCENARIOS[name]


def nodes_of(
    scenario: Scenario, study: Study, data: Sequence[Path], out: Path, how: Machine, say: Say
) -> Mapping[str, NodeConfig]:
    """The sites of a scenario's data.

    Raises:
        StudyInvalid: no data, or data in another layout; the message says what is wanted.
    """
    wanted = f"Wanted in --data DIR: {scenario.wants}."
    if not data:
        raise StudyInvalid(f"scenario of study {scenario.study!r}: give its data with --data DIR. {wanted}")
    try:
        nodes = sites_of(study, out, SiteOptions(data, scenario.layout or "auto"), how, out, say)
    except ManifestInvalid as e:
        raise StudyInvalid(f"{e} {wanted}") from None
    if len(nodes) < 2:
        raise StudyInvalid(f"{data[0]}: holds one site, and a table has several. {wanted}")
    return nodes


def study_at(scenario: Scenario, study: Study, nodes: Mapping[str, NodeConfig]) -> Study:
    """The study with the scenario's budget."""
    if scenario.epochs is None:
        return study
    cases = 0
    for config in nodes.values():
        site = open_site(config)
        listed = list_cases(site.where, site.salt).cases
        cases += sum(case.split == "train" and has_truth(case, study.task) for case in listed)
    rounds = budget(cases, len(nodes), study.train.batch_size, scenario.epochs)
    train = replace(study.train, local_steps=UPDATES)
    return replace(study, train=train, rounds=replace(study.rounds, count=rounds))


def carry_out(
    name: str,
    data: Sequence[Path],
    strategies: Sequence[str],
    sets: Sequence[str],
    seeds: int,
    out: Path,
    how: Machine,
    say: Say,
    rounds: Any,
) -> dict[str, Any]:
    """Trains what is not trained yet, and writes `scenario.md` and `scenario.json` beside a comparison's files.

    Raises:
        StudyInvalid: see `named` and `nodes_of`; a setting that the study cannot have.
    """
    scenario = named(name)
    settings, for_all = settings_named(strategies or STRATEGIES, [], sets)
    study = changed(load_study(scenario.study), name, scenario.changes)
    nodes = nodes_of(scenario, study, data, out, how, say)
    study = changed(study_at(scenario, study, nodes), "--set", for_all)
    say(f"{len(nodes)} sites, {study.rounds.count} rounds of {study.train.local_steps} updates")
    results = compare([Asked(study, nodes)], settings, seeds, out, how, say, rounds)
    results |= {"partition": "natural", "shift": "both", "test_labels": "site", "labelled": 1.0}
    files = write_all(results, out)
    rows = table(results["studies"][study.name], scenario.measure)
    text = in_words(name, scenario, study, rows, list(nodes), seeds)
    told = {
        "scenario": name,
        "measure": scenario.measure,
        "rounds": study.rounds.count,
        "updates": study.train.local_steps,
        "rows": rows,
        "published": dict(scenario.published),
    }
    write_json(out / "scenario.json", told)
    write_atomic(out / "scenario.md", text.encode())
    files |= {"scenario": str(out / "scenario.md")}
    return {**told, "text": text, "files": files}


def table(study: Mapping[str, Any], measure: str) -> list[dict[str, Any]]:
    """Pooled, each site alone, each setting: the measure on the test patients of each site, by seed.

    Returns rows of `model`, `sites` (site -> value by seed) and `mean` (by seed); None for no value.
    """
    of_labels: dict[tuple[str, int, str], list[Mapping[str, Any]]] = {}
    for line in study["rows"]:
        if line["split"] == "test" and line["kind"] != "left out":
            model = {
                "pooled": "pooled",
                "local": f"{line['trained']} alone",
                "federated": line["setting"] + PARTIAL * is_partial(study, "federated", line["setting"]),
            }.get(line["kind"], f"{line['setting']}, each site's own")
            of_labels.setdefault((model, line["seed"], line["site"]), []).append(line["row"])
    seeds = sorted({seed for _, seed, _ in of_labels})
    rows = []
    for model in dict.fromkeys(model for model, _, _ in of_labels):
        at = {site: [value_of(of_labels.get((model, seed, site), []), measure) for seed in seeds]
              for site in study["sites"]}  # fmt: skip
        mean = [fmean(values[n] for values in at.values()) for n in range(len(seeds))]
        rows.append({
            "model": model,
            "sites": {site: [_number(v) for v in values] for site, values in at.items()},
            "mean": [_number(v) for v in mean],
        })  # fmt: skip
    return sorted(rows, key=lambda row: row["model"] != "pooled")


def value_of(rows: Sequence[Mapping[str, Any]], measure: str) -> float:
    """The measure of one model at one site, from its rows of scores by label; NaN without one.

    Balanced accuracy is the mean of the sensitivities of the labels that are there, each called where it is the most
    probable.
    """
    if measure in ("AUROC", "C-index"):
        rows = rows[:1]
    values = [row[FIELDS[measure]] for row in rows]
    known = [value for value in values if value is not None]
    return fmean(known) if known else nan


def _number(value: float) -> float | None:
    return round(value, 6) if isfinite(value) else None


def in_words(
    name: str, scenario: Scenario, study: Study, rows: Sequence[Mapping[str, Any]], sites: Sequence[str], seeds: int
) -> str:
    """Markdown: the table, then what was published."""

    def cell(values: Sequence[float | None]) -> str:
        return spread_text(spread(nan if v is None else v for v in values))

    heading = ["trained on, tested at", *sites, "mean over sites"]
    lines = [
        f"**{name}**: {scenario.title}. {scenario.measure}, test, mean ± standard deviation over {seeds} seed(s); "
        f"{study.rounds.count} rounds of {study.train.local_steps} updates.",
        "",
        f"| {' | '.join(heading)} |",
        "|---" + "|---:" * (len(heading) - 1) + "|",
        *(
            f"| {' | '.join([row['model'], *(cell(row['sites'][site]) for site in sites), cell(row['mean'])])} |"
            for row in rows
        ),
    ]
    if scenario.published:
        told = "; ".join(f"{model} {value}" for model, value in scenario.published.items())
        lines += [
            "",
            f"FLamby's own (test patients of all sites together, five seeds): {told}. They were come by otherwise: "
            f"{scenario.differs}.",
        ]
    else:
        lines += ["", f"Published on these data: nothing ({DASH})."]
    return "\n".join(lines) + "\n"
