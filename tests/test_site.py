"""`site.toml` comes back as it was written whatever its paths are called; the secret is made once and private."""

import os
import subprocess
import sys
import threading
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedclient.limits import Limits
from fedclient.policy import Policy
from fedclient.release_policy import Releases
from fedclient.site import (
    UNIT,
    Cache,
    Compute,
    Data,
    SiteFile,
    check_data,
    open_site,
    read_site_file,
    secret,
    site_toml,
)
from shared_models.errors import StateInvalid, StudyInvalid
from shared_models.files import write_atomic

FILE = SiteFile("north", "fed.example.org:8443", "Lung federation", Data("/srv/images"))
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def site_folder(folder: Path, file: SiteFile = FILE) -> Path:
    write_atomic(folder / "site.toml", site_toml(file).encode())
    return folder


# The file


@given(names, st.none() | names, names)
@example("C:\\images\\neu\\x", 'a "b"', "'''")
@example('/srv/"\n[policy]\nsmallest_count = 1\n#', "x\ry", '"""')
@example("/srv/\x00\x07\x1f\x7f\x85\u2028", "\\u0041", "\\")
@example("/srv/Bilder für Ärzte/画像/😀", "é", "x = 1 # y")
def test_a_site_file_comes_back_whatever_its_names_hold(tmp_path_factory, folder, manifest_site, federation):
    file = replace(FILE, data=Data(folder, manifest_site), federation=federation)
    assert read_site_file(site_folder(tmp_path_factory.mktemp("site"), file)) == file


def test_every_setting_comes_back(tmp_path):
    file = SiteFile("a-1_b", "[::1]:1", "f", Data("d", "s"), Compute("cuda:3", 7, 2), Policy(25), Cache(12.5))
    file = replace(file, limits=Limits(memory_gib=12.5, gpu_memory_share=0.5, order_s=7200.0))
    file = replace(file, releases=Releases(("theirs.pem",), ("before.pem",), status_required=True))
    assert read_site_file(site_folder(tmp_path, file)) == file


def test_every_value_that_a_hospital_may_change_stands_in_the_file():
    table, stand = "", set()
    for line in site_toml(FILE).splitlines():
        table = line.strip("[]") if line.startswith("[") else table
        stand.add((table, line.removeprefix("# ").partition(" = ")[0]))
    assert stand >= keys()


def test_a_key_that_is_not_set_stands_in_the_file_as_a_comment_that_can_be_used(tmp_path):
    (tmp_path / "site.toml").write_text(site_toml(FILE).replace("\n# ", "\n"))
    file = read_site_file(tmp_path)
    assert (file.data.manifest_site, file.privacy.most_epsilon) == ("NAME", 8.0)
    assert file.limits == Limits(memory_gib=16.0, order_s=3600.0)


def test_the_readme_lists_every_key_of_the_file():
    text = (Path(__file__).parents[1] / "README.md").read_text()
    told = text[text.index("\n`site/site.toml` belongs") : text.index("\nEach command has `--help`")]
    rows = {line.split("|")[1].strip(" `[]"): line for line in told.splitlines() if line.startswith("| ")}
    assert {(table, key) for table, key in keys() if f"`{key}`" not in rows[table]} == set()


def keys() -> set[tuple[str, str]]:
    """Every (table, key) that a site file may hold; the table of the first keys is empty."""
    found: set[tuple[str, str]] = set()
    for part in fields(SiteFile):
        inner = fields(part.type) if is_dataclass(part.type) else ()
        found |= {(part.name, each.name) for each in inner} or {("", part.name)}
    return found


WRONG = [
    ("", "name", '"North"', "`name` is 'North'"),
    ("", "name", '"../north"', "`name` is '../north'"),
    ("", "coordinator", '"fed.example.org"', "`coordinator` is 'fed.example.org'"),
    ("", "coordinator", '"https://fed.example.org:8443"', "`coordinator` is 'https://fed"),
    ("", "coordinator", '"a b:8443"', "`coordinator` is 'a b:8443'"),
    ("", "token", '"x"', "`token` is not a key here. Allowed: cache, compute, coordinator, data"),
    ("data", "folder", "3", "`data.folder` is 3; allowed: a valid string"),
    ("data", "foldr", '"x"', "`data.foldr` is not a key here. Did you mean `folder`?"),
    ("compute", "device", '"gpu"', "`compute.device` is 'gpu'"),
    ("compute", "device", '"cuda:"', "`compute.device` is 'cuda:'"),
    ("compute", "device", '"cpu\\n"', r"`compute.device` is 'cpu\\n'"),
    ("compute", "threads", "-1", "`compute.threads` is -1; allowed: greater than or equal to 0"),
    ("compute", "threads", '"2"', "`compute.threads` is '2'; allowed: a valid integer"),
    ("compute", "threads", "true", "`compute.threads` is True; allowed: a valid integer"),
    ("compute", "processes", "-1", "`compute.processes` is -1; allowed: greater than or equal to 0"),
    ("cache", "quota_gib", "0", "`cache.quota_gib` is 0; allowed: greater than 0"),
    ("limits", "memory_gib", "0", "`limits.memory_gib` is 0; allowed: greater than 0"),
    ("limits", "gpu_memory_share", "1.5", "`limits.gpu_memory_share` is 1.5; allowed: less than or equal to 1"),
    ("limits", "order_s", "0", "`limits.order_s` is 0; allowed: greater than 0"),
    ("policy", "smallest_count", "0", "`policy.smallest_count` is 0; allowed: greater than or equal to 1"),
    (
        "policy",
        "tasks",
        '["segmentacion"]',
        "tasks has 'segmentacion', which no study has. Did you mean `segmentation`",
    ),
    ("policy", "models", '["unet", "resnet"]', "models has 'resnet', which no study has. Did you mean `resnet"),
    ("policy", "models", '["vit"]', r"models has 'vit', which no study has\. Allowed: any, unet, dynunet"),
    ("policy", "smallest_cout", "5", "`policy.smallest_cout` is not a key here. Did you mean `smallest_count`?"),
]


@pytest.mark.parametrize(("table", "key", "value", "words"), WRONG)
def test_a_wrong_setting_is_told_with_file_key_and_what_is_allowed(tmp_path, table, key, value, words):
    lines = [line for line in site_toml(FILE).splitlines() if not line.startswith(f"{key} = ")]
    at = lines.index(f"[{table}]") + 1 if table else 0
    path = tmp_path / "site.toml"
    path.write_text("\n".join([*lines[:at], f"{key} = {value}", *lines[at:]]))
    with pytest.raises(StudyInvalid, match=words) as refused:
        read_site_file(tmp_path)
    assert str(refused.value).startswith(f"{path}: ")


def test_a_path_with_backslashes_is_told_with_how_it_is_written(tmp_path):
    path = tmp_path / "site.toml"
    path.write_text('name = "n"\ncoordinator = "h:1"\nfederation = "f"\n[data]\nfolder = "C:\\Users\\x"\n')
    with pytest.raises(StudyInvalid, match=r"write paths with /, or within '...'"):
        read_site_file(tmp_path)
    path.write_text("name = n\n")
    with pytest.raises(StudyInvalid, match=r"Mend that line\.$"):
        read_site_file(tmp_path)
    path.write_text('name = "n"\ncoordinator = "h:1"\nfederation = "f"\n[data]\nfolder = "C:\\temp"\n')
    with pytest.raises(StateInvalid, match=r"write paths with /, or within '...'"):
        check_data(tmp_path, read_site_file(tmp_path).data.folder)


def test_a_missing_setting_is_told(tmp_path):
    (tmp_path / "site.toml").write_text('name = "north"\ncoordinator = "a:1"\nfederation = "f"\n')
    with pytest.raises(StudyInvalid, match="`data` is missing"):
        read_site_file(tmp_path)


def test_a_folder_that_has_not_joined_is_told_how_to(tmp_path):
    with pytest.raises(StateInvalid, match=r"is missing, so .* is no site folder. Run `fedclient join INVITE` first"):
        read_site_file(tmp_path)


# The secret


def test_the_secret_is_made_once_is_private_and_stays(tmp_path):
    path = tmp_path / "a" / "secrets" / "case-keys"
    made = secret(path)
    assert len(made) == 64
    assert int(made, 16) > 0
    assert [secret(path) for _ in range(3)] == [made] * 3
    assert path.stat().st_mode & 0o777 == 0o600
    assert {p.stat().st_mode & 0o777 for p in (path.parent, path.parent.parent)} == {0o700}
    assert [p.name for p in path.parent.iterdir()] == ["case-keys"]
    assert secret(tmp_path / "b" / "case-keys") != made


def test_a_process_that_dies_while_it_makes_the_secret_leaves_none_that_is_cut_short(tmp_path, monkeypatch):
    def die(size: int) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "urandom", die)
        with pytest.raises(KeyboardInterrupt):
            secret(tmp_path / "case-keys")
    assert not (tmp_path / "case-keys").exists()
    code = (
        "import os, sys, pathlib\nfrom fedclient import site\n"
        "os.fsync = lambda handle: os.kill(os.getpid(), 9)\nsite.secret(pathlib.Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "case-keys")], timeout=30, check=False)
    assert not (tmp_path / "case-keys").exists()
    assert len(secret(tmp_path / "case-keys")) == 64


def test_threads_that_make_the_secret_at_once_get_the_same_one(tmp_path):
    barrier, made = threading.Barrier(8), list[str]()

    def make() -> None:
        barrier.wait(10)
        made.append(secret(tmp_path / "case-keys"))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 8
    assert set(made) == {(tmp_path / "case-keys").read_text()}


@pytest.mark.parametrize("content", [b"", b"ab" * 31, b"zz" * 32, b"\xff" * 64, b"ab" * 32 + b"\n"])
def test_a_secret_that_was_cut_or_overwritten_is_not_used(tmp_path, content):
    write_atomic(tmp_path / "case-keys", content)
    with pytest.raises(StateInvalid, match="Restore it from your backup") as refused:
        secret(tmp_path / "case-keys")
    assert "abab" not in str(refused.value)


# The site behind a node


def test_a_deployed_site_is_what_its_file_says(tmp_path):
    file = replace(FILE, data=Data("/srv/images", "north"), compute=Compute("cpu", 2, 3), policy=Policy(20))
    file = replace(file, cache=Cache(0.5))
    site = open_site({"site-dir": str(site_folder(tmp_path, file))})
    assert (site.name, site.folder, site.data) == ("north", tmp_path, Path("/srv/images"))
    assert (site.manifest_sites, site.device, site.threads, site.smallest_count) == (("north",), "cpu", 2, 20)
    assert (site.deployed, site.coordinator) == (True, "fed.example.org:8443")
    assert (site.processes, site.quota_bytes) == (3, 2**29)
    assert site.salt == (tmp_path / "secrets" / "case-keys").read_text()


def test_a_manifest_of_one_site_needs_no_name(tmp_path):
    assert open_site({"site-dir": str(site_folder(tmp_path))}).manifest_sites == ()


def test_nothing_that_the_coordinator_says_changes_a_deployed_site(tmp_path):
    folder = site_folder(tmp_path)
    claims = {"site": "south", "data": "/etc", "work": "/tmp", "device": "cuda", "smallest-count": 1, "threads": 9}
    assert open_site({**claims, "site-dir": str(folder)}) == open_site({"site-dir": str(folder)})


def test_a_simulated_site_is_what_the_engine_says(tmp_path):
    site = open_site({"site": "a", "data": "d", "work": str(tmp_path), "manifest-site": f"x, z{UNIT}y", "threads": 2})
    assert (site.name, site.manifest_sites, site.threads, site.device) == ("a", ("x, z", "y"), 2, "auto")
    assert (site.deployed, site.smallest_count) == (False, 1)
    assert open_site({"site": "a", "data": "d", "work": "w"}).manifest_sites == ()
    assert not list(tmp_path.iterdir())
