"""The executor answers orders of its own release alone, and failures leave as a code without words."""

import errno
import time
import weakref
from pathlib import Path
from typing import cast

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, Metadata, RecordDict
from flwr.app.message import make_message
from flwr.common.constant import ErrorCode

from fedclient.egress import sent
from fedclient.executor import Work, answer, code_of
from fedclient.site import Data, SiteFile, site_toml
from shared_models.archive import app_archive, digest
from shared_models.errors import FederationError, ManifestInvalid, OrderRefused
from shared_models.files import write_atomic
from shared_models.identity import new_site_keys, save_secret

CONTEXT = Context(1, 2, {}, RecordDict(), {})


def order() -> Message:
    metadata = Metadata(1, "0" * 64, 1, 7, "", "3", time.time(), 60.0, "train")
    return make_message(metadata=metadata, content=RecordDict({"order": ConfigRecord({"round": 3})}))


def echo(message: Message, context: Context) -> Message:
    number = cast(ConfigRecord, message.content["order"])["round"]
    return Message(RecordDict({"answer": ConfigRecord({"round": number})}), reply_to=message)


def work(app: object = echo) -> Work:
    return Work("127.0.0.1:1", Path("none"), app, digest(app_archive()))  # type: ignore[arg-type]


def test_the_installed_app_answers_an_order_of_the_same_release() -> None:
    reply, failed = answer(work(), order(), CONTEXT, app_archive())
    assert failed == ""
    assert cast(ConfigRecord, reply.content["answer"])["round"] == 3


def test_another_archive_is_refused_with_its_digest_and_no_app_is_called() -> None:
    def tripwire(message: Message, context: Context) -> Message:
        raise AssertionError("was called")

    reply, failed = answer(work(tripwire), order(), CONTEXT, app_archive() + b"x")
    assert (reply.error.code, reply.error.reason) == (ErrorCode.INVALID_FAB, failed)
    assert failed == f"APP_NOT_APPROVED {digest(app_archive() + b'x')[:12]}"


def test_another_archive_is_written_down_at_the_site(tmp_path: Path) -> None:
    save_secret(tmp_path / "keys/identity.key", new_site_keys().identity)
    write_atomic(tmp_path / "site.toml", site_toml(SiteFile("north", "a:1", "Test", Data(str(tmp_path)))).encode())
    answer(Work("127.0.0.1:1", tmp_path / "secrets/task", echo, "0" * 64), order(), CONTEXT, app_archive())
    assert [line["code"] for line in sent(tmp_path)] == [f"APP_NOT_APPROVED {digest(app_archive())[:12]}"]


def test_an_exception_leaves_as_a_code_and_stays_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    def app(message: Message, context: Context) -> Message:
        raise ValueError("/data/4711.nii.gz")

    reply, _ = answer(work(app), order(), CONTEXT, app_archive())
    assert (reply.error.code, reply.error.reason) == (ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "APP_FAILED")
    assert "/data/4711.nii.gz" in caplog.text


@pytest.mark.parametrize("fails", [False, True])
def test_between_orders_a_gpu_is_left_to_others(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    class Activations:
        """What an order computes; an error's frames would hold it, and so does a cycle."""

        def __init__(self) -> None:
            self.own = self

    made: list[weakref.ref[Activations]] = []
    held: list[bool] = []

    def app(message: Message, context: Context) -> Message:
        activations = Activations()
        made.append(weakref.ref(activations))
        if fails:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
        return echo(message, context)

    monkeypatch.setattr("fedclient.executor.log.exception", lambda *_: None)  # pytest keeps what is logged
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: held.append(made[0]() is not None))
    _, failed = answer(work(app), order(), CONTEXT, app_archive())
    assert (bool(failed), held) == (fails, [False])


def test_an_order_is_answered_where_a_gpu_that_has_failed_takes_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    fault = torch.AcceleratorError("CUDA error: unspecified launch failure")

    def broken(*_: object) -> Message:
        raise fault

    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.empty_cache", broken)
    reply, failed = answer(work(broken), order(), CONTEXT, app_archive())
    assert (reply.error.reason, failed) == ("DEVICE_FAILED", "DEVICE_FAILED")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OrderRefused("POLICY_VIOLATION", "epsilon is spent"), "POLICY_VIOLATION"),
        (OrderRefused("patient 4711", "not a code"), "ORDER_REFUSED"),
        (ManifestInvalid("/data/manifest.csv"), "MANIFEST_INVALID"),
        (FederationError("x"), "FEDERATION_ERROR"),
        (MemoryError(), "OUT_OF_MEMORY"),
        (torch.OutOfMemoryError("CUDA out of memory"), "OUT_OF_MEMORY"),
        (torch.AcceleratorError("CUDA error: out of memory"), "OUT_OF_MEMORY"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "OUT_OF_MEMORY"),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), "DEVICE_FAILED"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`"), "DEVICE_FAILED"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "APP_FAILED"),
        (OSError(errno.ENOSPC, "/data"), "DISK_FULL"),
        (OSError(errno.EACCES, "/data"), "APP_FAILED"),
        (ZeroDivisionError("division by zero"), "APP_FAILED"),
    ],
)
def test_a_code_is_one_word_without_the_text_of_the_exception(error: Exception, code: str) -> None:
    assert code_of(error) == code
