"""The arrows and doors of the design, kept."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "shared_models": {"shared_models"},
    "fedclient": {"shared_models", "fedclient"},
    "fedserver": {"shared_models", "fedserver"},
    "simulations": {"shared_models", "fedclient", "fedserver", "simulations"},
}
DATA = ("fedclient/data/", "simulations/phantoms.py")
RESULTS = "fedclient/predict/"  # which are files in the formats of images
DOORS: dict[str, tuple[str, ...]] = {
    "flwr": (
        "shared_models/wire.py",
        "fedclient/client.py", "fedclient/node.py", "fedclient/executor.py",
        "fedserver/app.py", "fedserver/rounds.py", "fedserver/conversation.py", "fedserver/secure_round.py",
        "fedserver/setting.py", "fedserver/answers.py",
        "fedserver/courier.py", "fedserver/link.py",
        "fedserver/dispatch.py", "fedserver/fleet.py",
        "simulations/engine.py", "simulations/worker.py", "simulations/ray_engine.py", "simulations/bench/",
    ),
    "pydantic": (
        "shared_models/parse.py", "shared_models/study.py", "shared_models/strategy.py", "shared_models/wire.py",
        "shared_models/envelope.py", "shared_models/answers.py",
        "shared_models/metrics.py", "shared_models/audit.py", "shared_models/audit_check.py",
        "fedclient/policy.py", "fedclient/consent.py",
        "shared_models/roster.py", "fedclient/limits.py", "fedserver/backup.py",
        "shared_models/invite.py", "fedclient/site.py", "fedclient/ledger.py", "shared_models/protect/context.py",
        "shared_models/protect/messages.py", "shared_models/protect/accounting.py", "shared_models/protect/privacy.py",
        "shared_models/protect/secure.py",
        "shared_models/task_table.py", "shared_models/model_table.py", "shared_models/class_counts.py",
        "shared_models/surface_counts.py", "shared_models/scores.py", "shared_models/survival_counts.py",
        "shared_models/detection_counts.py",
        "shared_models/release_facts.py", "shared_models/provenance.py", "fedserver/registry.py",
        "fedserver/publish/card.py",
        "fedclient/serving/settings.py", "fedclient/release_policy.py", "shared_models/standing.py",
        "shared_models/unlabelled_table.py", "shared_models/restored_counts.py",
    ),
    "cryptography": (
        "shared_models/identity.py", "shared_models/protect/prg.py", "shared_models/protect/masking.py",
        "fedserver/enrol.py", "fedclient/enrol.py", "fedserver/backup.py", "fedserver/passphrase.py",
        "shared_models/authority.py", "fedserver/root.py",
    ),
    "prometheus_client": ("fedserver/gauges.py", "fedclient/gauges.py", "fedclient/page/web.py"),
    "dp_accounting": ("shared_models/protect/accounting.py",),
    "nibabel": (*DATA, RESULTS),
    "PIL": (*DATA, RESULTS),
    "pydicom": (
        *DATA, RESULTS, "simulations/fixtures", "fedclient/serving/intake.py", "fedclient/serving/receiver.py",
        "fedclient/serving/back.py",
    ),
    "pynetdicom": ("fedclient/serving/receiver.py", "fedclient/serving/back.py"),
    "fastapi": (
        "fedclient/serving/web.py", "fedclient/serving/dicomweb.py", "fedclient/page/web.py", "fedserver/gauges.py",
        "fedserver/dashboard/web.py", "shared_models/loopback.py",
    ),
    "highdicom": (RESULTS,),
    "SimpleITK": (),  # a second opinion in tests, not installed at a hospital
    "onnxruntime": ("shared_models/onnx_session.py", "fedclient/predict/model.py"),
    "mlflow": ("fedserver/publish/to_mlflow.py",),
    "gdcm": ("fedclient/data/dicom_pixels.py",),
    "torch": (
        "shared_models/nets.py", "shared_models/mil.py", "shared_models/vgg.py", "shared_models/pretrained.py",
        "shared_models/tasks/", "shared_models/runtimes.py", "shared_models/parity.py", "fedserver/publish/exports.py",
        "fedserver/publish/bundle.py", "shared_models/bundle_steps.py",
        "fedclient/training/", "fedclient/data/augment.py", "fedclient/predict/torch_network.py",
        "fedclient/predict/explained.py",
        "simulations/bench/", "simulations/attacks/",  # an attacker inverts and trains networks
    ),
    "monai": (
        "shared_models/nets.py", "shared_models/tasks/surfaces.py", "fedclient/training/maps.py",
        "simulations/bench/pipeline.py",
        "fedserver/publish/bundle.py", "shared_models/bundle_steps.py",
    ),
}  # fmt: skip
FILES = sorted(p for package in MAY_IMPORT for p in (ROOT / package).rglob("*.py"))


@cache
def nodes_of(path: Path) -> tuple[ast.AST, ...]:
    """Everything that stands in a file; hundreds of files are asked many times."""
    return tuple(ast.walk(ast.parse(path.read_text())))


@cache
def imported(path: Path, only_at_the_top: bool = False) -> frozenset[str]:
    """Top-level packages that `path` imports, anywhere or as it is imported itself."""
    module = nodes_of(path)[0]
    assert isinstance(module, ast.Module)
    nodes = module.body if only_at_the_top else nodes_of(path)
    names = [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)]
    names += [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
    return frozenset(name.partition(".")[0] for name in names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_only_what_its_arrows_and_doors_allow(path):
    here = path.relative_to(ROOT).as_posix()
    against = imported(path) & MAY_IMPORT.keys() - MAY_IMPORT[here.partition("/")[0]]
    assert not against, f"{here} imports against the arrows: {against}"
    for library, doors in DOORS.items():
        assert library not in imported(path) or here.startswith(doors), f"{here} is no door to {library}"


@pytest.mark.parametrize("package", ["fedserver", "fedclient", "simulations"])
def test_a_command_line_starts_without_torch_and_without_flower(package):
    heavy = {"torch", "monai", "flwr", "matplotlib", "scipy", "nibabel"}
    assert not imported(ROOT / package / "cli.py", only_at_the_top=True) & heavy


def test_nothing_is_unpickled_and_no_text_is_run():
    banned = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
    for path in FILES:
        assert not imported(path) & banned, f"{path.name} imports {imported(path) & banned}"
        calls = [n for n in nodes_of(path) if isinstance(n, ast.Call)]
        names = {n.func.id for n in calls if isinstance(n.func, ast.Name)}
        assert not names & {"eval", "exec"}, f"{path.name} calls eval or exec"
        for call in (n for n in calls if ast.unparse(n.func) in ("torch.load", "np.load", "numpy.load")):
            words = {k.arg: ast.unparse(k.value) for k in call.keywords}
            assert words.get("weights_only") == "True" or words.get("allow_pickle") == "False", ast.unparse(call)
