"""Private names of Flower that we call or replace, by module: a test and `doctor` look whether they are there."""

from collections.abc import Mapping, Sequence

NAMES: Mapping[str, Sequence[str]] = {
    "flwr.supercore.constant": ["SQLITE_PRAGMAS", "TaskType"],
    "flwr.supercore.sql_mixin": ["SQLITE_PRAGMAS", "_set_sqlite_pragmas"],
    "flwr.supercore.corestate.sql_corestate": ["OBJECT_PUSH_SESSION_TTL_SECONDS"],
    "flwr.supercore.retry": ["RetryInvoker", "exponential"],
    "flwr.supercore.retry.http_retry": ["MAX_RETRY_DELAY"],
    "flwr.supercore.inflatable.inflatable_utils": [
        "pull_objects",
        "pull_and_inflate_object_from_tree",
        "ObjectPullError",
    ],
    "flwr.supercore.inflatable.inflatable_object": ["get_all_nested_objects", "get_object_tree"],
    "flwr.supercore.interceptors": [
        "RuntimeTokenHttpInterceptor",
        "RuntimeVersionHttpInterceptor",
        "SuperExecAuthHttpInterceptor",
    ],
    "flwr.supercore.superexec.run_superexec": ["_SUPEREXEC_AUTH_METHODS"],
    "flwr.supercore.runtime": ["RuntimeHttpClient"],
    "flwr.supercore.control": ["ControlHttpClient"],
    "flwr.supercore.heartbeat": ["HeartbeatSender"],
    "flwr.supercore.logger": ["FLOWER_LOGGER", "console_handler"],
    "flwr.supercore.object_store": ["ObjectStoreFactory"],
    "flwr.supercore.error": ["ApiErrorCode", "FlowerError"],
    "flwr.supercore.run": ["Run", "RunNotRunningException"],
    "flwr.common.serde": ["message_to_proto", "message_from_proto", "user_config_to_proto"],
    "flwr.app.message": ["remove_content_from_message"],
    "flwr.superlink.cli.flower_superlink": ["_parse_superlink_lifespan_config", "SuperLinkLifespan"],
    "flwr.superlink.main": ["create_app"],
    "flwr.superlink.runtime.run_serverapp": [
        "run_serverapp",
        "install_from_fab",
        "get_project_config",
        "get_fused_config_from_dir",
        "start_log_uploader",
        "run_",
    ],
    "flwr.supernode.start_client_internal": ["start_client_internal", "time", "http_request_response"],
    "flwr.supernode.fleet_http_connection": ["FleetHttpClient", "http_request_response"],
    "flwr.supernode.fleet_http_client": ["FleetHttpClient"],
    "flwr.supernode.cli.flower_supernode": ["_try_setup_client_authentication"],
    "flwr.supernode.main": ["create_app"],
    "flwr.supernode.nodestate": ["NodeStateFactory"],
    "flwr.supernode.runtime.run_clientapp": ["pull_task_input", "push_message", "push_task_output"],
}
