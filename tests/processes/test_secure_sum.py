"""Five hospitals, one killed after it has masked: the mean of the rest, and no byte of one site at the coordinator.

Nor does any byte that they send name a patient, in secure sums, plain rounds or the counts of a plan: their data are
full of identifiers, and all that leaves them is read on the wire.
"""

import csv
import json
import sqlite3
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedclient.consent import decide, read_decision
from fedclient.site import open_site
from fedserver.checkpoint import read_state
from shared_models.files import read_json, read_lines
from shared_models.protect.ring import encode, encoding
from shared_models.protect.secure import layout_of
from shared_models.study import load_study, sha256
from shared_models.weights import Arrays, InMemory, load
from simulations.phantoms import PhantomPlan, phantom
from tests.processes.deployment import Deployment, deployed, until
from tests.processes.record import holding, recorded
from tests.processes.test_kills import stop_site
from tests.processes.wiretap import Wiretap
from tests.test_egress import CANARIES, planted

PLAIN = """
name = "sums"
[model]
features = [8, 8, 16, 32, 64, 8]
[preprocess]
size = [64, 64]
[train]
local_steps = 2
batch_size = 4
precision = "float32"
deterministic = true
[rounds]
count = 1
quorum = 3
gather_s = 5
deadline_s = {deadline}
"""
PLANNED = """
name = "planned"
plan = "federated"
[planning]
memory_gib = 0.1
batch_most = 4
[train]
local_steps = 2
precision = "float32"
[rounds]
count = 1
quorum = 3
gather_s = 5
deadline_s = {deadline}
"""
MOST = 64  # examples that a site weighs at most
SECURE = PLAIN + f"[protect.secure_aggregation]\nstep_s = {{step}}\nmost_examples = {MOST}\n"


@pytest.mark.process
def test_five_hospitals_one_killed_after_masking_and_the_coordinator_holds_no_byte_of_one(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "secrets"))
    images = phantom(tmp_path / "data", PhantomPlan(sites=5, train=4, val=1, test=2, slices=2, size=64))
    data = planted(images, tmp_path)
    with (data / "manifest.csv").open() as file:
        names = sorted({row["site"] for row in csv.DictReader(file)})
    logs, secure, kept = tmp_path / "d", tmp_path / "secure.toml", tmp_path / "kept"
    victim = names[2]
    there = [site for site in names if site != victim]
    began, taps = time.monotonic(), list[Wiretap]()
    with deployed(logs, data, names, taps=taps) as here:
        deadline = max(90.0, 3 * (time.monotonic() - began))  # a busy machine takes longer over everything
        secure.write_text(SECURE.format(deadline=deadline, step=deadline / 11))
        (tmp_path / "plain.toml").write_text(PLAIN.format(deadline=deadline))
        folders = {site: here.site(site) for site in names}
        with recorded(here.federation, tmp_path / "secure", folders, kept):
            here.fedserver("run", str(secure), "--name", "secure", "--no-wait")
            until(lambda: step_of(here, victim) in ("Masked", "Confirmed"), 400, f"{victim} has masked", logs)
            stop_site(here, victim)
            assert step_of(here, victim) != "Revealed"
            until(lambda: read_state(here.run_folder("secure")).round == 1, deadline, "the round is closed", logs)
            until(lambda: here.run("secure")["state"] == "finished", 2 * deadline, "the run is finished", logs)
        line, final = read_lines(here.run_folder("secure").metrics)
        counted = line["together"]["sites"]
        assert set(there) <= set(counted)
        assert (line["sites"], final["sites"]) == ({}, {})
        assert final["together"]["sites"] == there
        facts = {site: told(kept / site, "update") for site in names}
        deltas = {site: load(path.with_suffix(".safetensors")) for site, (_, path) in facts.items()}

        before, after = (load(here.run_folder("secure").weights(n)) for n in (0, 1))
        examples = {site: reply["examples"] for site, (reply, _) in facts.items()}
        whole = sum(examples[s] for s in counted)
        for tensor, weights in before.items():
            mean = sum(deltas[s][tensor].astype(np.float64) * examples[s] for s in counted) / whole
            np.testing.assert_allclose(after[tensor], weights + mean, atol=1e-6, rtol=0)

        # The record is whole: it holds the vector of every site that was counted, and the keys of all
        vectors = {s: next((kept / s).glob("sum-*-mask-*.vector")).read_bytes() for s in there}
        assert holding(tmp_path / "secure", vectors).keys() == set(there)
        adverts = {s: read_json(next((kept / s).glob("sum-*-advertise-*.json")))["advert"] for s in names}
        assert holding(tmp_path / "secure", {s: a["mask"].encode() for s, a in adverts.items()}).keys() == set(names)

        secrets = secrets_of(deltas, {s: reply for s, (reply, _) in facts.items()}, secure)
        scores = {s: told(kept / s, "evaluation")[0]["scores"]["lung"]["sum_micro"] for s in there}
        assert {name.split()[0] for name in secrets} == set(names)
        secrets |= {f"{s} score": f'"sum_micro":{n}'.encode() for s, n in scores.items()}
        assert holding(tmp_path / "secure", secrets) == {}

        # The same search finds them all where the same updates come without masks
        with recorded(here.federation, tmp_path / "plain", {}, kept):
            here.fedserver("run", str(tmp_path / "plain.toml"), "--name", "plain", "--no-wait")
            accept(here, there, tmp_path / "plain.toml", logs)
            until(lambda: here.run("plain")["state"] == "finished", 2 * deadline, "the plain run is finished", logs)
        sent = {name: secret for name, secret in secrets.items() if name.split()[0] in there and " ring" not in name}
        assert holding(tmp_path / "plain", mostly(sent, "score")).keys() == mostly(sent, "score").keys()

        for site in there:  # or the counts of so few cases stay where they are
            path = here.site(site) / "site.toml"
            path.write_text(path.read_text().replace("smallest_count = 11", "smallest_count = 1"))
        (tmp_path / "planned.toml").write_text(PLANNED.format(deadline=deadline))
        here.fedserver("run", str(tmp_path / "planned.toml"), "--name", "planned", "--no-wait")
        accept(here, there, tmp_path / "planned.toml", logs)
        until(lambda: here.run("planned")["state"] == "finished", 2 * deadline, "the planned run is finished", logs)
        names_nobody(taps[0].sent(tmp_path / "secrets"), here, {s: vectors[s][:64] for s in there}, data, logs)


def accept(here: Deployment, sites: Iterable[str], study_file: Path, logs: Path) -> None:
    """A person at each site approves, once it has come, a study that would show what the secure sums have hidden."""
    digest = sha256(load_study(str(study_file)))
    for site in sites:
        folder = here.site(site)
        until((folder / "studies" / digest / "study.json").exists, 120, f"the study has come to {site}", logs)
        assert read_decision(folder, digest) is None, "the policy lets in what it allows, and not this"
        decide(open_site({"site-dir": str(folder)}), digest, "approved", also_alike=True)


def names_nobody(
    sent: tuple[list[bytes], list[int]], here: Deployment, known: dict[str, bytes], data: Path, logs: Path
):
    """Every connection was read but those that ask whose authority it is; what was sent is found, and no identifier."""
    clear, closed = sent
    assert len(closed) >= len(here.sites)
    assert max(closed) < 2500, "a handshake and a question"
    whole = b"".join(clear)
    assert b"POST /v1/fleet/push-object" in whole
    assert b"POST /enrol" in whole
    for words in (b'"kind":"statistics"', b'"kind":"evaluation"', *known.values()):
        assert words in whole
    kept = [path for path in here.federation.rglob("*") if path.is_file()]
    kept += [path for site in here.sites for path in here.site(site).glob("audit*.jsonl")]
    kept += [path for path in logs.rglob("*.log*") if path.is_file()]
    shown = [json.dumps(here.status()).encode(), here.fedserver("logs", "--last", "0").encode()]
    everything = [whole, *(path.read_bytes() for path in kept), *shown]
    there = str(data) + (data / "manifest.csv").read_text()
    for canary in CANARIES:
        assert canary in there
        for content in everything:
            assert canary.lower().encode() not in content.lower()
            assert canary.lower().encode("utf-16-le") not in content.lower()


def mostly(secrets: Mapping[str, bytes], but: str) -> dict[str, bytes]:
    """Without the scores: they are of other weights in a run with one site less."""
    return {name: secret for name, secret in secrets.items() if not name.endswith(but)}


def secrets_of(deltas: Mapping[str, Arrays], facts: Mapping[str, Any], study_file: Path) -> dict[str, bytes]:
    """Bytes that only a site's own update and numbers have: "SITE what" -> bytes."""
    study, found, sites = load_study(str(study_file)), dict[str, bytes](), len(deltas)
    for site, delta in deltas.items():
        for tensor, array in delta.items():
            if array.nbytes >= 256:  # a window that no other tensor has
                found[f"{site} {tensor}"] = array.tobytes()[128:160]
        layout = layout_of(study, InMemory(delta).schema, True, False)
        share, counts = facts[site]["examples"] / (sites * MOST), dict.fromkeys(layout.counts, 0)
        unmasked = encode(InMemory(delta), share, 1, counts, layout, encoding(1.0, 32), 0)
        found |= windows(site, (block.tobytes() for block in unmasked))
        found[f"{site} examples"] = f'"examples":{facts[site]["examples"]},'.encode()
        found |= {f"{site} loss {i}": repr(loss).encode() for i, loss in enumerate(facts[site]["losses"])}
    return {name: secret for name, secret in found.items() if len(set(secret)) > 8}  # a run of zeros is nobody's


def windows(site: str, blocks: Iterable[bytes]) -> dict[str, bytes]:
    """The numbers of the ring as they would travel without masks."""
    return {f"{site} ring {i}": block[64:96] for i, block in enumerate(blocks) if len(block) >= 256}


def told(folder: Path, kind: str) -> tuple[Any, Path]:
    """What a site would have sent in a plain run, as it lies at the site, and where."""
    kept = [(read_json(path), path) for path in folder.glob("round-*.json")]
    return next((reply, path) for reply, path in kept if reply["kind"] == kind)


def step_of(here: Deployment, site: str) -> str | None:
    """Where the site's last secure sum is."""
    path = here.site(site) / "sums.db"
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as db:
            row = db.execute("SELECT step FROM sums ORDER BY rowid DESC LIMIT 1").fetchone()
    except sqlite3.OperationalError:  # there is none yet
        return None
    return None if row is None else str(row[0])
