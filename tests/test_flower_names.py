"""Private names of Flower that we call or replace, and what we take for granted of the code around them.

A Flower upgrade that moves one of them fails here, with its name, before it fails in a hospital.
"""

import inspect
import re
from importlib import import_module
from importlib.metadata import version

import pytest

from fedclient import node
from fedserver import dispatch, link
from shared_models import archive
from shared_models.flower_names import NAMES


def source(module: str, name: str) -> str:
    return inspect.getsource(getattr(import_module(module), name))


@pytest.mark.parametrize(("module", "name"), [(m, n) for m, names in NAMES.items() for n in names])
def test_the_name_is_there(module: str, name: str) -> None:
    assert hasattr(archive.flower_module(module), name)


def test_this_is_the_flower_that_the_names_were_read_in() -> None:
    assert version("flwr") == "1.41.0"


def test_the_waits_of_the_node_loop_are_those_that_its_pace_tells_apart() -> None:
    loop = "flwr.supernode.start_client_internal"
    assert source(loop, "start_client_internal").count("time.sleep(3)") == 1
    assert source(loop, "_push_messages").count("time.sleep(0.5)") == 2
    assert set(re.findall(r"\btime\.(\w+)\(", inspect.getsource(import_module(loop)))) == {"sleep"}


def test_the_node_makes_its_connection_by_the_two_names_that_are_replaced() -> None:
    assert "http_request_response(" in source("flwr.supernode.start_client_internal", "_init_connection")
    connection = source("flwr.supernode.fleet_http_connection", "http_request_response")
    assert "FleetHttpClient.from_server_address(" in connection
    assert "client.ActivateNode," in connection


def test_a_run_that_ends_passes_flowers_own_clean_up_which_the_node_therefore_mends() -> None:
    exception = import_module("flwr.supercore.run").RunNotRunningException
    assert issubclass(exception, BaseException)
    assert not issubclass(exception, Exception)


def test_the_server_app_runtime_calls_what_is_replaced_in_the_way_that_is_expected() -> None:
    runtime = source("flwr.superlink.runtime.run_serverapp", "run_serverapp")
    assert "install_from_fab(fab.content, skip_prompt=True)" in runtime
    assert "get_project_config(app_path)" in runtime
    assert "Path(app_path), run.override_config" in runtime
    assert "run_(\n            grid=grid," in runtime
    assert "if log_uploader:" in runtime
    assert dispatch.FINISHED not in (0, 1)
    assert dispatch.PAUSED not in (0, 1)


def test_the_settings_that_are_changed_are_read_when_they_are_used() -> None:
    assert "in SQLITE_PRAGMAS:" in source("flwr.supercore.sql_mixin", "_set_sqlite_pragmas")
    assert "lambda: exponential(max_delay=MAX_RETRY_DELAY)" in source(
        "flwr.supercore.retry.http_retry", "make_simple_http_retry_invoker"
    )
    pragmas = dict(import_module("flwr.supercore.constant").SQLITE_PRAGMAS)
    assert "busy_timeout" in pragmas
    assert int(link.BUSY_TIMEOUT_MS) < 30_000  # Flower's HTTP timeout
    pulls = import_module("flwr.supercore.inflatable.inflatable_utils")
    for function in (pulls.pull_objects, pulls.pull_and_inflate_object_from_tree):
        assert {"initial_backoff", "backoff_cap", "max_time"} <= set(function.__kwdefaults__)


def test_the_state_of_a_node_has_what_frees_it_from_a_stranded_order() -> None:
    state = import_module("flwr.supernode.nodestate.in_memory_nodestate").InMemoryNodeState
    assert list(inspect.signature(state._store_error_replies).parameters) == ["self", "run_ids", "error"]
    assert "self.msg_store" in inspect.getsource(state.__init__)


def test_the_error_codes_are_those_on_which_the_coordinator_asks_again() -> None:
    codes = import_module("flwr.common.constant").ErrorCode
    assert (codes.NODE_UNAVAILABLE, codes.CLIENT_APP_CRASHED) == (node.NODE_LOST, node.EXECUTOR_LOST)


def test_only_acquiring_a_task_asks_for_the_secret() -> None:
    methods = import_module("flwr.supercore.superexec.run_superexec")._SUPEREXEC_AUTH_METHODS
    assert methods == {"/flwr.proto.Runtime/AcquireTask"}
