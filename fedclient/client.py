"""The client as Flower sees it, around any learner: a shell of a few lines around `fedclient.work`, without PyTorch."""

import logging

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedclient.consent import admitted
from fedclient.egress import leave
from fedclient.overdue import limited
from fedclient.own_log import log_of
from fedclient.parcels import answered
from fedclient.site import Site, open_site
from fedclient.summing import is_summed, summed
from fedclient.work import Gate, Learner, carry_out, no_gate, refusal
from shared_models.envelope import signed
from shared_models.errors import FederationError, OrderRefused, WeightsInvalid
from shared_models.wire import VECTOR, Order, pack, read_order, tensors_of, write_reply

log = logging.getLogger("fedclient")


def client_app(learner: Learner, gate: Gate = no_gate) -> ClientApp:
    """A ClientApp whose orders `learner` carries out, if `gate` lets them touch the data."""
    app = ClientApp()

    def answer(message: Message, context: Context) -> Message:
        order, site = read_order(message), open_site(context.node_config)
        try:
            if site.deployed:
                here = limited(admitted(order, site), message.metadata.ttl)
                reply = answered(order, here, learner, gate=gate)
                here.go_on()  # an upload may take long, and without the reply nothing of it is counted
                return write_reply(leave(reply, order, site), message)
            weights = tensors_of(message, f"order of round {order.round}") or {}
            if is_summed(order):
                reply, vector = summed(order, site, lambda: weights, learner, gate)
                tensors = None if vector is None else pack({VECTOR: np.fromfile(vector, np.uint8)})
                return write_reply(signed(reply, order, None), message, tensors)
            done = carry_out(order, weights, site, learner, gate)
            return write_reply(signed(done.reply, order, None), message, pack(done.delta) if done.delta else None)
        except FederationError as e:
            return _refused(order, site, e, message)

    app.train()(answer)
    app.evaluate()(answer)
    app.query()(answer)
    return app


def _refused(order: Order, site: Site, error: FederationError, message: Message) -> Message:
    """Tells the coordinator a code and the site's own log the words."""
    code = error.code if isinstance(error, OrderRefused) else CODES.get(type(error).__name__, "SITE_ERROR")
    log.error("order of run %s, round %s refused as %s: %s", order.run, order.round, code, error)
    told = (error.keys, error.accused) if isinstance(error, OrderRefused) else ()
    reply = refusal(order, site, code, *told)
    if site.deployed:
        log_of(site.folder, site.name).add(
            "order-refused", run=order.run, round=order.round, kind=order.kind, study=order.study_sha256, code=code
        )
        return write_reply(leave(reply, order, site), message)
    return write_reply(signed(reply, order, None), message)


CODES = {
    "ManifestInvalid": "DATA_INVALID",
    "ImageUnreadable": "DATA_INVALID",
    WeightsInvalid.__name__: "WEIGHTS_MISMATCH",
    "TransferFailed": "TRANSFER_FAILED",
    "StudyInvalid": "STUDY_INVALID",
}
