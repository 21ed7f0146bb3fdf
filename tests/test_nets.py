"""Networks: no batch statistics, weights that are a function of the study, and only the study's own arrays go in."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from shared_models import nets
from shared_models.errors import WeightsInvalid
from shared_models.model_table import ENCODERS, NORMLESS
from shared_models.nets import arrays_of, initial_weights, load_arrays, network, schema, unet
from shared_models.study import (
    Level,
    Model,
    Personal,
    Preprocess,
    Study,
    Task,
    Train,
    canonical,
    from_json,
    load_study,
    ready_studies,
)
from shared_models.weights import Arrays, schema_of, schema_sha256

TINY = Study(name="tiny", model=Model(features=(4, 4, 8, 8, 8, 4), groups=2), preprocess=Preprocess(size=(32, 32)))
MODELS = {
    "group": TINY.model,
    "instance": replace(TINY.model, norm="instance"),
    "dropout": replace(TINY.model, dropout=0.3),
    "3-D": replace(TINY.model, spatial_dims=3),
    "3-D instance": replace(TINY.model, spatial_dims=3, norm="instance"),
}


pytestmark = pytest.mark.usefixtures("one_thread")


def same(one: Arrays, two: Arrays) -> bool:
    return one.keys() == two.keys() and all(one[n].tobytes() == two[n].tobytes() for n in one)


@pytest.mark.parametrize("kind", MODELS)
def test_no_network_keeps_batch_statistics(kind):
    net = unet(MODELS[kind], 1, 2)
    assert not [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert not [name for name, _ in net.named_buffers()]  # an instance norm could keep some as well
    wanted = nn.GroupNorm if MODELS[kind].norm == "group" else nn.modules.instancenorm._InstanceNorm
    norms = [m for m in net.modules() if isinstance(m, wanted)]
    assert len(norms) == 18  # two for each of nine double convolutions
    assert all(norm.weight is not None for norm in norms)


@pytest.mark.parametrize("kind", MODELS)
def test_an_example_is_answered_alike_alone_and_in_a_batch(kind):
    net = unet(replace(MODELS[kind], dropout=0.0), 1, 1).train()
    batch = torch.rand(3, 1, *[16] * (MODELS[kind].spatial_dims - 1), 32)
    with torch.no_grad():
        torch.testing.assert_close(net(batch)[1:2], net(batch[1:2]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_there_is_a_logit_for_each_label_and_pixel(kind):
    size = [16] * (MODELS[kind].spatial_dims - 1) + [32]
    with torch.no_grad():
        assert unet(MODELS[kind], 1, 3)(torch.zeros(2, 1, *size)).shape == (2, 3, *size)


@pytest.mark.parametrize("size", [(16, 32), (32, 32)])
def test_the_smallest_size_that_a_study_may_have_trains_with_one_example(size):
    study = replace(TINY, model=replace(TINY.model, norm="instance"), preprocess=Preprocess(size=size))
    network(study).train()(torch.rand(1, 1, *size)).sum().backward()
    network(replace(TINY, preprocess=Preprocess(size=(16, 16)))).train()(torch.rand(1, 1, 16, 16)).sum().backward()


@pytest.mark.parametrize("name", ENCODERS)
def test_a_study_with_batch_norm_says_how_few_examples_its_network_trains_with(name):
    task, keep = Task(kind="classification", labels=("a",)), Personal(keep=("norm",))
    for size in [(32, 32), (32, 33), (32, 64)]:
        study = Study("s", task=task, model=Model(name, norm="batch"), preprocess=Preprocess(size), personal=keep)
        assert from_json(canonical(study), "study.json") == study
        net = network(study).train()
        net(torch.rand(study.fewest, 1, *size)).sum().backward()
        if study.fewest == 2:
            with pytest.raises(ValueError, match="more than 1 value per channel"):
                net(torch.rand(1, 1, *size))


def test_weights_are_a_function_of_the_studys_seed_and_name():
    weights = initial_weights(TINY)
    assert same(weights, initial_weights(TINY))
    assert same(weights, initial_weights(replace(TINY, title="other", train=Train(learning_rate=0.5))))
    for other in (replace(TINY, seed=1), replace(TINY, name="other")):
        assert schema_of(initial_weights(other)) == schema_of(weights)
        assert not same(weights, initial_weights(other))


def test_making_a_network_leaves_every_global_random_state_as_it_was(monkeypatch):
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    torch.manual_seed(1)
    seeded.clear()
    np.random.seed(1)
    before = torch.random.get_rng_state()
    network(TINY)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert np.random.random() == np.random.RandomState(1).random()
    assert not seeded, "a GPU would drop out alike in every round"


def test_weights_do_not_depend_on_the_random_state_that_is_found():
    torch.manual_seed(1)
    one = initial_weights(TINY)
    torch.manual_seed(2)
    assert same(one, initial_weights(TINY))


def test_arrays_come_back_as_they_went_and_are_copies():
    weights, net = initial_weights(TINY), network(replace(TINY, seed=9))
    load_arrays(net, weights)
    taken = arrays_of(net)
    assert same(taken, weights)
    first = next(iter(taken))
    taken[first].fill(7)
    weights[first].fill(8)
    assert not (arrays_of(net)[first] == 7).any()
    assert not (arrays_of(net)[first] == 8).any()


def test_read_only_arrays_may_be_loaded_and_trained_on():
    weights = {name: a.copy() for name, a in initial_weights(TINY).items()}
    for array in weights.values():
        array.flags.writeable = False
    net = network(TINY)
    load_arrays(net, weights)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1)
    assert same(weights, initial_weights(TINY))


FIRST = next(name for name, a in sorted(initial_weights(TINY).items()) if a.ndim > 1)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda w: {n: a for n, a in w.items() if n != FIRST}, f"tensor '{FIRST}' is missing"),
        (lambda w: {**w, "extra": w[FIRST]}, "tensor 'extra' is not in the model"),
        (lambda w: {("x" if n == FIRST else n): a for n, a in w.items()}, FIRST),
        (lambda w: {**w, FIRST: w[FIRST][:1]}, "the model has"),
        (lambda w: {**w, FIRST: w[FIRST].reshape(-1)}, "has shape"),
        (lambda w: {**w, FIRST: np.float32(0)}, r"has shape \[\]"),
        (lambda w: {**w, FIRST: w[FIRST].astype(np.float64)}, "is float64, the model has float32"),
        (lambda w: {**w, FIRST: w[FIRST].astype(np.int32)}, "is int32, the model has float32"),
        (lambda w: {**w, FIRST: w[FIRST].astype(">f4")}, "the model has"),
        (lambda w: {**w, FIRST: np.full_like(w[FIRST], np.nan)}, "holds NaN or infinity"),
        (lambda w: {**w, FIRST: np.full_like(w[FIRST], -np.inf)}, "holds NaN or infinity"),
        (lambda w: {}, "is missing"),
    ],
)
def test_other_arrays_than_the_networks_are_refused_and_change_nothing(spoil, words):
    net = network(TINY)
    with pytest.raises(WeightsInvalid, match=words):
        load_arrays(net, spoil({name: a + 1 for name, a in initial_weights(TINY).items()}))
    assert same(arrays_of(net), initial_weights(TINY))


def test_every_architecture_has_a_schema_of_its_own():
    others = [
        TINY,
        *(replace(TINY, model=m, preprocess=Preprocess(size=(32,) * m.spatial_dims)) for m in MODELS.values()),
    ]
    others += [replace(TINY, task=Task(labels=("lung", "heart")))]
    digests = {schema_sha256(schema(network(study))) for study in others}
    # instance and group norm, or dropout, have the same tensors: the study's digest tells those apart
    assert len(digests) == 3


@pytest.mark.parametrize("name", sorted(ready_studies()))
def test_every_ready_study_has_a_network_that_answers(name):
    study = load_study(name)
    net = network(study)
    edges, pixelwise = (32,) * study.model.spatial_dims, study.task.kind not in ("classification", "prognosis")
    outputs = study.task.outputs + (study.model.spatial_dims if study.task.kind == "detection" else 0)
    seen = torch.zeros(1, max(1, len(study.channels)), *edges)
    if study.table_only:
        seen = torch.zeros(1, len(study.task.covariates))
    elif study.of_bags:
        seen = torch.ones(1, 1, 7, study.model.features[0])
    with torch.no_grad():
        answer = net.eval()(seen)
    assert answer.shape == (1, outputs, *(edges if pixelwise else ()))
    assert torch.isfinite(answer).all()
    assert schema(net) == schema_of(initial_weights(study))


def test_runs_that_begin_at_once_begin_from_the_weights_of_their_own_seeds():
    of = [replace(TINY, seed=n % 3) for n in range(12)]
    alone = [initial_weights(study) for study in of]
    with ThreadPoolExecutor(12) as pool:
        at_once = list(pool.map(initial_weights, of))
    assert all(same(one, other) for one, other in zip(alone, at_once, strict=True))


LEVELS = (Level(8, (1, 1), (3, 3)), *(Level(8, (2, 2), (3, 3)) for _ in range(3)))
FEATURES = {"residual-unet": (8,) * 5, "segresnet": (8,), "mlp": (8, 4), "attention-mil": (8, 8, 8)}


def made(name: str) -> nn.Module:
    """A network of each kind without memory, its lower levels supervised where it has any."""
    levels = {"levels": LEVELS, "supervised": 2} if name == "dynunet" else {}
    norm = "none" if name in NORMLESS else "group"
    model = Model(name=name, norm=norm, features=FEATURES.get(name, Model().features), **levels)  # type: ignore[arg-type]
    with torch.device("meta"):
        return nets.MAKERS[name](model, 8, 2)


@pytest.mark.parametrize("name", nets.MAKERS)
def test_blocks_hold_each_parameter_once_and_end_with_the_head_alone(name):
    net = made(name)
    listed = nets.blocks(net)
    names = [name for block in listed for name in block]
    assert sorted(names) == sorted(n for n, _ in net.named_parameters())
    assert {name for name in listed[-1] if not name.startswith(nets.SUPERVISED)} == nets.head_names(net)
    assert not any(name.startswith(nets.SUPERVISED) for block in listed[:-1] for name in block)


@pytest.mark.parametrize("name", nets.MAKERS)
def test_blocks_come_in_the_order_in_which_an_image_runs_through_them(name):
    net, run = made(name).eval(), list[str]()
    for at, module in net.named_modules():
        if list(module.parameters(recurse=False)):
            module.register_forward_hook(lambda *_, at=at: run.append(at))
    net(torch.empty({"mlp": (2, 8), "attention-mil": (2, 1, 7, 8)}.get(name, (2, 8, 64, 64)), device="meta"))
    first = [min(run.index(name.rpartition(".")[0]) for name in block if not name.startswith(nets.SUPERVISED))
             for block in nets.blocks(net)]  # fmt: skip
    assert first == sorted(first)


def test_each_residual_block_counts_by_itself_however_deep_it_is_nested():
    """Five levels: five units down, then a convolution and a unit on each of four ways up."""
    assert len(nets.blocks(made("residual-unet"))) == 5 + 4 * 2
    assert (
        len(nets.blocks(made("segresnet"))) == 1 + (1 + 3 + 3 + 5) + 3 * 2 + 1
    )  # blocks down 1, 2, 2, 4, halved between
    assert len(nets.blocks(made("efficientnet-b0"))) == 1 + 16 + 1 + 1
