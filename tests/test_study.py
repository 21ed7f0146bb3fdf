"""Study files: what is wrong is named with file, key, what was found and what is allowed; equal studies, one digest."""

import json
import tomllib
from dataclasses import asdict, fields, is_dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_models.errors import StudyInvalid
from shared_models.study import (
    Augment,
    Evaluate,
    Model,
    Personal,
    Preprocess,
    Rounds,
    Strategy,
    Study,
    Task,
    Train,
    Transfer,
    Unlabelled,
    canonical,
    from_json,
    load_study,
    ready_studies,
    sha256,
)
from shared_models.task_table import Region

# One key after another of a sound study, changed to something that is wrong: (table, key, value, words about it)
WRONG = [
    ("", "name", "Lung", r"`name` is 'Lung'; allowed: .*\^\[a-z0-9\]"),
    ("", "name", "a/../b", r"`name` is 'a/\.\./b'"),
    ("", "name", "a\n", r"`name` is 'a\\n'"),
    ("", "name", 7, "`name` is 7; allowed: a valid string"),
    ("", "title", "x" * 201, "`title` is 'x*.*; allowed: .*at most 200"),
    ("", "title", "Lung\x1b[2K", r"`title` is 'Lung\\x1b\[2K'; allowed: visible characters on one line"),
    ("task", "none", "a\nb", "`task.none` is .*; allowed: visible characters on one line"),
    ("task", "column", "\u202eegnul", "`task.column` is .*; allowed: visible characters on one line"),
    ("", "seed", -1, "`seed` is -1; allowed: greater than or equal to 0"),
    ("", "seed", 2**32, "`seed` is 4294967296; allowed: less than 4294967296"),
    ("", "seed", "5", "`seed` is '5'; allowed: a valid integer"),
    ("", "seed", 5.0, "`seed` is 5.0; allowed: a valid integer"),
    ("", "seed", True, "`seed` is True; allowed: a valid integer"),
    ("", "modality", "pet", "`modality` is 'pet'; allowed: 'ct', 'xray', 'mr' or 'photo'"),
    ("", "taks", {}, "`taks` is not a key here. Did you mean `task`?"),
    ("", "task", 3, "`task` is 3; allowed: an object"),
    ("", "task", [], r"`task` is \[\]; allowed: an object"),
    ("task", "kind", "tracking", "`task.kind` is 'tracking'; allowed: 'segmentation', 'cl"),
    ("task", "kind", "classification", 'model.name = "unet" is not for a classification; use one of resnet18'),
    ("task", "labels", [], r"`task.labels` is \[\]; allowed: .*at least 1"),
    ("task", "labels", "lung", "`task.labels` is 'lung'; allowed: a valid array"),
    ("task", "labels", ["lung", "Heart"], "`task.labels.1` is 'Heart'"),
    ("task", "labels", ["lung", "lung"], r"`task`: labels \['lung', 'lung'\] must differ"),
    ("task", "labels", [f"l{n}" for n in range(33)], "`task.labels` is .*; allowed: .*at most 32"),
    ("task", "loss", "hinge", "`task.loss` is 'hinge'; allowed: 'bce', 'dice_bce', 'ce'"),
    ("task", "loss", "hazard", 'loss = "hazard" is not for a segmentation; allowed: bce, dice_bce, ce'),
    ("task", "class_weights", [2.0], 'class_weights is for kind = "classification", this is a segmentation'),
    ("task", "tversky_beta", 0.5, 'tversky_beta is for loss = "tversky"'),
    ("task", "regions", [{"name": "whole", "parts": ["core"]}], "region 'whole' has the part 'core'; labels are"),
    ("model", "name", "resnet", "`model.name` is 'resnet'; allowed: 'unet'"),
    ("model", "spatial_dims", 4, "`model.spatial_dims` is 4; allowed: 2 or 3"),
    ("model", "spatial_dims", True, "`model.spatial_dims` is True; allowed: 2 or 3"),
    ("model", "features", [32] * 5, r"`model`: features \[32.* must be 6 numbers"),
    ("model", "features", [32] * 5 + [3], "`model.features.5` is 3; allowed: greater than or equal to 4"),
    ("model", "features", [32] * 5 + [4096], "`model.features.5` is 4096; allowed: less than or equal to 2048"),
    ("model", "features", [32] * 5 + [12], r"`model`: features \[.*12\] must all be multiples of groups = 8"),
    ("model", "norm", "batch", r'model.norm = "batch" needs personal.keep = \["norm"\] \(FedBN\)'),
    ("model", "groups", 0, "`model.groups` is 0; allowed: greater than or equal to 1"),
    ("model", "dropout", 1.0, "`model.dropout` is 1.0; allowed: less than 1"),
    ("model", "weights", "model.pt", "`model.weights` is not a key here.*Allowed: dropout, features, groups"),
    ("preprocess", "size", [100, 96], r"preprocess.size \[100, 96\] must be multiples of 16, the U-Net"),
    ("preprocess", "size", [96], r"`preprocess.size` is \[96\]; allowed: .*at least 2"),
    ("preprocess", "size", [0, 96], "`preprocess.size.0` is 0; allowed: greater than or equal to 1"),
    ("preprocess", "size", [2048, 96], "`preprocess.size.0` is 2048; allowed: less than or equal to 1024"),
    ("preprocess", "size", [96, 96, 96], "preprocess.size has 3 numbers, model.spatial_dims is 2; they must agree"),
    ("preprocess", "window_hu", [400.0, -1000.0], r"`preprocess`: window_hu must rise, it is \[400.0, -1000.0\]"),
    ("preprocess", "window_hu", [-1000.0, float("inf")], "`preprocess.window_hu.1` is inf; allowed: a finite number"),
    ("preprocess", "window_hu", [float("nan"), 400.0], "`preprocess.window_hu.0` is nan; allowed: a finite number"),
    ("preprocess", "spacing_mm", [1.0, 1.0], 'spacing_mm is .* with fit = "letterbox"; it needs fit = "crop_pad"'),
    ("preprocess", "spacing_mm", [1.0, 0.0], "`preprocess.spacing_mm.1` is 0.0; allowed: greater than 0"),
    ("preprocess", "fit", "stretch", "`preprocess.fit` is 'stretch'; allowed: 'letterbox', 'crop_pad' or 'patches'"),
    ("train", "foreground", 0.5, 'train.foreground is 0.5; it is for preprocess.fit = "patches"'),
    ("evaluate", "overlap", 0.5, 'evaluate.overlap is 0.5; it is for preprocess.fit = "patches"'),
    ("augment", "scale", 1.0, "`augment.scale` is 1.0; allowed: less than 1"),
    ("augment", "rotate_deg", 181, "`augment.rotate_deg` is 181; allowed: less than or equal to 180"),
    ("augment", "noise", float("inf"), "`augment.noise` is inf; allowed: a finite number"),
    ("augment", "flip_left_right", 1, "`augment.flip_left_right` is 1; allowed: a valid boolean"),
    ("train", "lerning_rate", 0.1, "`train.lerning_rate` is not a key here. Did you mean `learning_rate`?"),
    ("train", "learning_rate", 0, "`train.learning_rate` is 0; allowed: greater than 0"),
    ("train", "learning_rate", "1e-3", "`train.learning_rate` is '1e-3'; allowed: a valid number"),
    ("train", "learning_rate", float("nan"), "`train.learning_rate` is nan; allowed: a finite number"),
    ("train", "local_epochs", 0, "`train.local_epochs` is 0; allowed: greater than or equal to 1"),
    ("train", "local_epochs", 1.5, "`train.local_epochs` is 1.5; allowed: a valid integer"),
    ("train", "batch_size", 10**9, "`train.batch_size` is 1000000000; allowed: less than or equal to 4096"),
    ("train", "proximal_mu", -0.1, "`train.proximal_mu` is -0.1; allowed: greater than or equal to 0"),
    ("train", "clip_gradient", 0.0, "`train.clip_gradient` is 0.0; allowed: greater than 0"),
    ("train", "deterministic", "yes", "`train.deterministic` is 'yes'; allowed: a valid boolean"),
    ("train", "optimizer", "lion", "`train.optimizer` is 'lion'; allowed: 'adam', 'adamw' or 'sgd'"),
    ("train", "schedule", "linear", "`train.schedule` is 'linear'; allowed: 'constant' or 'cosine'"),
    ("rounds", "count", 0, "`rounds.count` is 0; allowed: greater than or equal to 1"),
    ("rounds", "count", 10_001, "`rounds.count` is 10001; allowed: less than or equal to 10000"),
    ("rounds", "quorum", 0, "`rounds.quorum` is 0; allowed: greater than or equal to 1"),
    ("rounds", "deadline_s", 0, "`rounds.deadline_s` is 0; allowed: greater than 0"),
    ("rounds", "deadline_s", float("nan"), "`rounds.deadline_s` is nan; allowed: "),
    ("rounds", "late", "wait", "`rounds.late` is 'wait'; allowed: 'drop' or 'next'"),
    ("rounds", "late_weight", 1.5, "`rounds.late_weight` is 1.5; allowed: less than or equal to 1"),
    ("rounds", "cohort", 0.0, "`rounds.cohort` is 0.0; allowed: greater than 0"),
    ("strategy", "name", "scaffold", "`strategy.name` is 'scaffold'; allowed: 'fedavg', 'fedavgm', 'fedadam'"),
    ("strategy", "robust", "median", 'robust = "median" needs weighting = "uniform": a site that claims many'),
    ("strategy", "norm_bound", 1.0, 'norm_bound is for robust = "norm_bound" or "centred_clip", and it is'),
    ("strategy", "malicious", 1, 'malicious = 1 with robust = "none", which promises nothing'),
    ("strategy", "normalise_steps", True, 'strategy.normalise_steps needs train.optimizer = "sgd"'),
    ("strategy", "weighting", "votes", "'examples', 'uniform' or 'inverse_variance'"),
    ("strategy", "tau", 0.0, "`strategy.tau` is 0.0; allowed: greater than 0"),
    ("train", "scaffold", True, 'train.scaffold needs train.optimizer = "sgd" and train.momentum = 0, strategy.weight'),
    ("train", "moon_temperature", 0.0, "`train.moon_temperature` is 0.0; allowed: greater than 0"),
    ("personal", "keep", ["head", "head"], r"keep \['head', 'head'\] names a kind of layer twice"),
    ("personal", "keep", ["body"], "`personal.keep.0` is 'body'; allowed: 'norm' or 'head'"),
    ("personal", "head_epochs", 1, r'head_epochs = 1 needs keep = \["head"\]'),
    ("personal", "apfl_adaptive", True, "apfl_adaptive needs apfl_alpha, the share to begin with"),
    ("personal", "apfl_alpha", 0.0, "`personal.apfl_alpha` is 0.0; allowed: greater than 0"),
    ("strategy", "momentum", 1.0, "`strategy.momentum` is 1.0; allowed: less than 1"),
    ("evaluate", "threshold", 1, "`evaluate.threshold` is 1; allowed: less than 1"),
    ("evaluate", "every", -1, "`evaluate.every` is -1; allowed: greater than or equal to 0"),
]  # fmt: skip


def toml(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {toml(v)}" for k, v in value.items()) + "}"
    return repr(value) if isinstance(value, float) else json.dumps(value)


@pytest.mark.parametrize(("table", "key", "value", "words"), WRONG, ids=[f"{t}.{k}={v!r:.20}" for t, k, v, _ in WRONG])
def test_what_is_wrong_is_told_with_file_key_what_was_found_and_what_is_allowed(tmp_path, table, key, value, words):
    path = tmp_path / "study.toml"
    name = "" if (table, key) == ("", "name") else 'name = "s"\n'
    path.write_text(f"{name}{f'[{table}]' if table else ''}\n{key} = {toml(value)}\n")
    with pytest.raises(StudyInvalid, match=words) as refused:
        load_study(str(path))
    assert str(refused.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "`name` is missing. Add it"),
        ('[task]\nloss = "bce"', "`name` is missing"),
        ('name = "s"\nseed = \n', "not TOML: .*line 2.*Mend that line"),
        ('name = "s"\nname = "t"\n[task]', "not TOML: Cannot overwrite a value .*line 2"),
        ('name = "s', "not TOML: Unterminated string"),
        ("name = 2024-10-01", r"`name` is \['date', '2024-10-01'\]; allowed: a valid string"),
        ('name = "s"\nmodality = "xray"', '"window" is for modality = "ct", which is "xray"; use "percentile"'),
        ('name = "s"\n[model]\nnorm = "instance"\n[preprocess]\nsize = [16, 16]', "leaves one value at the bottom"),
        ('name = "s"\n[model]\ngroups = 1\nspatial_dims = 3', "2 numbers, model.spatial_dims is 3"),
        (
            'name = "s"\n[task]\nkind = "classification"\nlabels = ["a"]\nloss = "bce"\n[model]\nname = "vgg11"\n'
            'norm = "none"\n[personal]\nkeep = ["norm"]',
            r'personal.keep = \["norm"\] with model.norm = "none": there is no norm layer that could stay',
        ),
        (
            'name = "s"\n[task]\nkind = "classification"\nlabels = ["a"]\nloss = "bce"\n[model]\nname = "densenet121"\n'
            'norm = "batch"\n[preprocess]\nintensity = "window"\nsize = [32, 63]\n'
            '[train]\nbatch_size = 1\n[personal]\nkeep = ["norm"]',
            r'one value at the end of .* for model.norm = "batch" .* make train.batch_size 2 or more, or an edge 64',
        ),
        (
            'name = "s"\n[task]\nlabels = ["heart", "left-lung", "right-lung"]\n[augment]\nflip_left_right = true',
            "flip_left_right mirrors images, and 'left-lung' names a side: .* Set it to false",
        ),
        (
            'name = "s"\nmodality = "photo"\n[task]\nkind = "classification"\nlabels = ["eye-right"]\n[model]\n'
            'name = "resnet18"\n[preprocess]\nintensity = "percentile"\n[augment]\nflip_left_right = true',
            "'eye-right' names a side",
        ),
        (f"name = {'[' * 100_000}", "not TOML"),
    ],
)
def test_a_file_or_combination_that_makes_no_study_is_refused(tmp_path, text, words):
    path = tmp_path / "study.toml"
    path.write_text(text)
    with pytest.raises(StudyInvalid, match=words) as refused:
        load_study(str(path))
    assert str(refused.value).startswith(f"{path}: ")


def test_images_may_be_mirrored_where_no_answer_names_a_side():
    sides, flip = ("left-lung", "right-lung"), Augment(flip_left_right=True)
    both = Task(labels=sides, regions=(Region("lungs", sides),))
    assert Study("s", task=both, augment=flip).augment.flip_left_right
    assert Study("s", task=Task(labels=("upright", "cleft")), augment=flip).augment.flip_left_right
    assert Study("s", task=Task(labels=sides)).task.labels == sides


def test_several_complaints_come_together_and_not_more_than_three(tmp_path):
    path = tmp_path / "study.toml"
    path.write_text('name = "s"\nseed = -1\nmodality = "pet"\n[rounds]\ncount = 0\nquorum = 0\n')
    with pytest.raises(StudyInvalid) as refused:
        load_study(str(path))
    lines = str(refused.value).splitlines()
    assert [line.startswith(f"{path}: `") for line in lines] == [True] * 3


@pytest.mark.parametrize("name", ["no-such-study", "no-such-study.toml", "", ".", "/", "a\0b", "a\0b.toml"])
def test_a_name_that_is_no_study_is_refused_in_words(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StudyInvalid, match=r"ready study|cannot be read"):
        load_study(name)


def test_a_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "study.toml").write_bytes(b"name = \xff\xfe")
    with pytest.raises(StudyInvalid, match="not TOML"):
        load_study(str(tmp_path / "study.toml"))


# The bytes that a study is known by

ready = sorted(ready_studies())
positive = st.floats(1e-9, 1e9)
names = st.from_regex(r"[a-z0-9][a-z0-9-]{0,47}", fullmatch=True)
shown = st.characters(exclude_categories=["C", "Zl", "Zp", "Mn"], exclude_characters="\u115f\u1160\u3164\uffa0")
sizes = st.integers(2, 64).map(lambda n: 16 * n)
studies = st.integers(2, 3).flatmap(
    lambda dims: st.builds(
        Study,
        name=names,
        title=st.text(shown, max_size=200),
        seed=st.integers(0, 2**32 - 1),
        task=st.builds(Task, labels=st.lists(names, min_size=1, max_size=5, unique=True).map(tuple)),
        model=st.builds(
            Model,
            spatial_dims=st.just(dims),
            features=st.tuples(*[st.integers(1, 256).map(lambda n: 8 * n)] * 6),
            norm=st.sampled_from(["group", "instance"]),
            dropout=st.floats(0, 0.9),
        ),
        preprocess=st.builds(
            Preprocess,
            size=st.tuples(*[sizes] * dims),
            fit=st.just("crop_pad"),
            window_hu=st.tuples(st.floats(-3000, -1), st.floats(0, 3000)),
            spacing_mm=st.none() | st.tuples(*[positive] * dims),
        ),
        augment=st.builds(Augment, rotate_deg=st.floats(0, 180), flip_left_right=st.booleans()),
        train=st.builds(
            Train,
            local_steps=st.none() | st.integers(1, 1_000_000),
            learning_rate=positive,
            clip_gradient=st.none() | positive,
            deterministic=st.booleans(),
        ),
        rounds=st.builds(Rounds, count=st.integers(1, 10_000), deadline_s=st.integers(1, 86400) | st.floats(1, 86400)),
        strategy=st.builds(Strategy, momentum=st.floats(0, 0.99), weighting=st.sampled_from(["examples", "uniform"])),
        evaluate=st.builds(Evaluate, every=st.integers(0, 100), threshold=st.floats(0.01, 0.99)),
    )
)


@settings(max_examples=60, deadline=None)
@given(studies)
def test_a_study_comes_back_from_its_canonical_json(study):
    back = from_json(canonical(study), "here")
    assert back == study
    assert canonical(back) == canonical(study)


@pytest.mark.parametrize("name", ready)
def test_the_digest_knows_no_order_of_keys_and_no_spelled_out_default(tmp_path, name):
    study = load_study(name)
    raw = tomllib.loads(ready_studies()[name].read_text())
    backwards = json.dumps({key: raw[key] for key in reversed(raw)}, indent=3)
    spelled_out = json.dumps(asdict(study))
    assert sha256(from_json(backwards, "here")) == sha256(from_json(spelled_out, "here")) == sha256(study)


@pytest.mark.parametrize(
    ("rule", "malicious", "fewest"),
    [("median", 2, 5), ("trimmed_mean", 2, 5), ("krum", 2, 7), ("multi_krum", 1, 5), ("bulyan", 2, 11)],
)
def test_a_robust_rule_needs_a_quorum_that_it_can_keep_its_promise_with(rule, malicious, fewest):
    strategy = Strategy(robust=rule, malicious=malicious, weighting="uniform")
    assert Study(name="s", strategy=strategy, rounds=Rounds(quorum=fewest)).rounds.quorum == fewest
    with pytest.raises(ValueError, match=f"needs {fewest} sites in every round, rounds.quorum is {fewest - 1}; raise"):
        Study(name="s", strategy=strategy, rounds=Rounds(quorum=fewest - 1))


@pytest.mark.parametrize("rule", ["trimmed_mean", "krum", "multi_krum", "bulyan"])
def test_a_rule_against_nobody_is_refused(rule):
    with pytest.raises(ValueError, match="needs malicious, how many sites it is to bear"):
        Strategy(robust=rule, weighting="uniform")


@pytest.mark.parametrize("words", [{"keep": ("norm",), "ditto_lambda": 0.1}, {"ditto_lambda": 0.1, "apfl_alpha": 0.5}])
def test_a_site_has_one_model_of_its_own(words):
    with pytest.raises(ValueError, match="each make a site's model its own; choose one"):
        Personal(**words)


@pytest.mark.parametrize(
    ("strategy", "train", "rounds"),
    [
        (Strategy(name="fedadam", weighting="uniform"), {}, Rounds()),
        (Strategy(robust="median", weighting="uniform"), {}, Rounds()),
        (Strategy(weighting="uniform"), {"momentum": 0.9}, Rounds()),
        (Strategy(weighting="uniform"), {"optimizer": "adam"}, Rounds()),
        (Strategy(weighting="examples"), {}, Rounds()),
        (Strategy(weighting="uniform"), {}, Rounds(late="next")),
    ],
)
def test_scaffold_is_refused_where_its_control_variates_would_not_be_mean_gradients(strategy, train, rounds):
    sound: dict[str, Any] = {"optimizer": "sgd", "momentum": 0.0, "scaffold": True}
    Study(name="s", strategy=Strategy(weighting="uniform"), train=Train(**sound))
    with pytest.raises(ValueError, match=r"train\.scaffold needs"):
        Study(name="s", strategy=strategy, train=Train(**(sound | train)), rounds=rounds)


def leaves(value: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    if not is_dataclass(value):
        return [(path, value)]
    return [leaf for f in fields(value) for leaf in leaves(getattr(value, f.name), (*path, f.name))]


def changed(value: Any, path: tuple[str, ...], to: Any) -> Any:
    inner = to if len(path) == 1 else changed(getattr(value, path[0]), path[1:], to)
    return replace(value, **{path[0]: inner})


OTHER: dict[tuple[str, ...], Any] = {
    ("transfer", "sha256"): "0" * 64,
    ("modality",): "mr", ("task", "labels"): ("heart",), ("task", "loss"): "dice_bce", ("model", "norm"): "instance",
    ("model", "features"): (32, 32, 64, 128, 256, 64), ("preprocess", "size"): (256, 272),
    ("preprocess", "intensity"): "window", ("preprocess", "spacing_mm"): (1.0, 2.0),
    ("preprocess", "window_hu"): (-1000.0, 401.0), ("train", "optimizer"): "sgd", ("train", "precision"): "float32",
    ("train", "schedule"): "cosine",
    ("rounds", "late"): "next", ("strategy", "name"): "fedavgm", ("strategy", "weighting"): "uniform",
    ("plan",): "federated", ("channels",): ("t1ce", "flair"), ("strategy", "robust"): "norm_bound",
    ("strategy", "server_learning_rate"): 0.5, ("strategy", "norm_bound"): 2.0, ("personal", "keep"): ("norm",),
    ("personal", "apfl_alpha"): 0.25, ("protect", "compression"): "int8", ("protect", "top_k"): 0.25,
}  # fmt: skip
PAIRED: dict[tuple[str, ...], dict[tuple[str, ...], Any]] = {  # what another value cannot stand without
    ("strategy", "malicious"): {("strategy", "weighting"): "uniform", ("strategy", "robust"): "median",
                                ("rounds", "quorum"): 20},
    ("strategy", "norm_bound"): {("strategy", "robust"): "norm_bound"},
    ("strategy", "normalise_steps"): {("train", "optimizer"): "sgd"},
    ("train", "scaffold"): {("train", "optimizer"): "sgd", ("train", "momentum"): 0.0,
                            ("strategy", "weighting"): "uniform"},
    ("personal", "head_epochs"): {("personal", "keep"): ("head",)},
    ("personal", "apfl_adaptive"): {("personal", "apfl_alpha"): 0.5},
    ("personal", "fine_tune_rate"): {("personal", "fine_tune_steps"): 2},
    ("protect", "top_k"): {("protect", "compression"): "top_k"},
}  # fmt: skip
OF_SEGMENTS: list[dict[str, Any]] = [
    {"loss": "focal"}, {"loss": "tversky"}, {"loss": "ce"}, {"loss": "dice_ce"}, {"tolerance_mm": 1.0},
    {"loss": "focal", "focal_gamma": 1.0}, {"loss": "tversky", "tversky_beta": 0.5},
    {"regions": (Region("whole", ("lung",)),)},
]  # fmt: skip
OF_CLASSES: list[dict[str, Any]] = [
    {}, {"class_weights": (2.0,)}, {"column": "finding"}, {"none": "no-finding"}, {"specificity": 0.95},
    {"labels": ("a", "b"), "loss": "ce"},
]  # fmt: skip
OF_UNLABELLED: list[dict[str, Any]] = [
    {}, {"weight": 2.0}, {"ramp_rounds": 1}, {"decay": 0.5}, {"mix": True}, {"example_weight": 1.0},
    {"method": "pseudo"}, {"method": "pseudo", "threshold": 0.9},
]  # fmt: skip
OF_HIDDEN: list[dict[str, Any]] = [{}, {"mask_share": 0.5}, {"mask_size": 8}]


def test_keys_of_one_kind_of_task_show_in_the_digest_as_well():
    segmentation = Study(name="s")
    classes = Study(name="s", task=Task(kind="classification"), model=Model(name="resnet18"))
    others = [replace(segmentation, task=replace(segmentation.task, **change)) for change in OF_SEGMENTS]
    others += [replace(classes, task=replace(classes.task, **change)) for change in OF_CLASSES]
    others += [
        replace(segmentation, augment=Augment(noise=0.1), unlabelled=Unlabelled(**{"method": "mean_teacher", **change}))
        for change in OF_UNLABELLED
    ]
    masked = Task(kind="reconstruction", labels=("image",), loss="masked_l1")
    others += [replace(segmentation, task=replace(masked, **change)) for change in OF_HIDDEN]
    begun = Transfer(sha256="0" * 64)
    others += [
        replace(segmentation, transfer=t)
        for t in (
            begun,
            replace(begun, freeze=1),
            replace(begun, rate_decay=0.5),
            replace(begun, head_rounds=1),
            replace(begun, fresh_head=True),
        )
    ]
    assert len({sha256(other) for other in [segmentation, *others]}) == len(others) + 1


ONLY_ONE = {
    *(("task", key) for key in (
        "regions", "focal_gamma", "tversky_beta", "tolerance_mm", "class_weights", "column", "none", "specificity",
        "intervals_days", "time_column", "event_column", "covariates", "mask_share", "mask_size")),
    *(("unlabelled", f.name) for f in fields(Unlabelled)), ("transfer", "fresh_head"),
    ("model", "head"), ("model", "width"),
    ("transfer", "freeze"), ("transfer", "rate_decay"), ("transfer", "head_rounds"),
    ("task", "kind"), ("model", "name"), ("model", "spatial_dims"), ("model", "levels"), ("model", "supervised"),
    ("preprocess", "fit"),
    ("preprocess", "mean"), ("preprocess", "deviation"), ("preprocess", "nonzero"),
    ("train", "foreground"), ("evaluate", "overlap"), ("protect", "privacy"),
    ("protect", "secure_aggregation"),
}  # fmt: skip


def test_every_value_shows_in_the_digest():
    study = Study(name="s", modality="mr", preprocess=Preprocess(intensity="percentile", fit="crop_pad"))
    study = replace(study, modality="xray")
    digests = {sha256(study)}
    keys = [(path, value) for path, value in leaves(study) if path not in ONLY_ONE]
    for path, value in keys:
        if path == ("preprocess", "intensity"):
            continue  # checked with ct, below
        if path in OTHER:
            other = OTHER[path]
        elif isinstance(value, bool):
            other = not value
        elif isinstance(value, str):
            other = value + "x"
        elif isinstance(value, float):
            other = value / 2 + 0.0625
        else:
            other = (value or 0) + 8
        base = study
        for companion, beside in PAIRED.get(path, {}).items():
            base = changed(base, companion, beside)
        assert sha256(changed(base, path, other)) != sha256(base)
        digests.add(sha256(changed(base, path, other)))
    assert len(digests) == len(keys)
    patches = replace(study, preprocess=replace(study.preprocess, fit="patches"))
    for path in (("train", "foreground"), ("evaluate", "overlap")):
        assert sha256(changed(patches, path, 0.25)) != sha256(patches)
    ct = replace(study, modality="ct")
    assert sha256(changed(ct, ("preprocess", "intensity"), "window")) != sha256(ct)


# What is inside an order comes from another machine


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "is no JSON"),
        (b'{"name":"s"', "is no JSON"),
        (b"\xff", "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b"null", "is None; allowed: an object"),
        (b'{"name":"s","name":"t"}', "`name` stands there twice"),
        (b'{"name":"s","train":{"batch_size":1,"batch_size":2}}', "`batch_size` stands there twice"),
        (b'{"name":"s","seed":1e400}', "`seed` is inf"),
        (b'{"name":"s","seed":"1"}', "`seed` is '1'"),
        (b'{"name":"s","train":{"learning_rate":NaN}}', "is nan; allowed: a finite number"),
        (b'{"name":"s","__class__":"os"}', "`__class__` is not a key here"),
    ],
)
def test_a_study_from_the_wire_is_doubted(text, words):
    with pytest.raises(StudyInvalid, match=words):
        from_json(text, "study of run x")


def test_a_message_does_not_repeat_a_long_value():
    with pytest.raises(StudyInvalid) as refused:
        from_json(json.dumps({"name": "x" * 10_000}), "here")
    assert len(str(refused.value)) < 300


# The studies that come with the package


def test_the_ready_studies_load_and_are_called_what_they_are():
    assert ready[:6] == ["brats-tumour", "brca-prognosis", "chest-xray", "chest-xray-masked", "ct-lesion", "ct-nodule"]
    assert ready[6:] == [
        "fed-camelyon16",
        "fed-isic2019",
        "fed-ixi",
        "fed-kits19",
        "hippocampus",
        "lung-ct",
        "lung-ct-private",
        "lung-ct-private-secure",
        "lung-ct-quick",
        "lung-ct-secure",
        "lung-detect",
        "lung-nodule",
        "nodule-malignancy",
        "nodule-presence",
    ]
    for name in ready:
        assert load_study(name).name == name
        assert load_study(str(ready_studies()[name])) == load_study(name)
        assert load_study(name).title


def test_lung_ct_is_the_worked_example():
    study = load_study("lung-ct")
    assert (study.modality, study.model.name, study.model.spatial_dims) == ("ct", "unet", 2)
    assert study.preprocess.size == (256, 256)
    assert (study.task.labels, study.task.loss) == (("lung",), "bce")
    assert (study.train.optimizer, study.train.batch_size) == ("adam", 16)
    assert (study.rounds.count, study.train.local_epochs, study.train.local_steps) == (10, 5, None)


def test_lung_ct_quick_is_the_worked_example_made_smaller():
    big, quick = load_study("lung-ct"), load_study("lung-ct-quick")
    assert quick.task == big.task
    assert (quick.train.optimizer, quick.train.batch_size) == (big.train.optimizer, big.train.batch_size)
    assert quick.preprocess.size < big.preprocess.size
    assert quick.preprocess.window_hu == big.preprocess.window_hu
    assert quick.train.deterministic


def test_the_other_ready_studies_are_of_their_kind():
    xray, nodule = load_study("chest-xray"), load_study("lung-nodule")
    assert (xray.modality, xray.task.labels, xray.preprocess.intensity) == ("xray", ("lung",), "percentile")
    assert (nodule.modality, nodule.task.labels) == ("ct", ("nodule",))
    assert not xray.augment.flip_left_right
