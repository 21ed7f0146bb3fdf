"""How fast each block of a network may learn, when its weights come from elsewhere."""

from collections.abc import Mapping

from torch import nn

from shared_models.errors import OrderRefused
from shared_models.nets import blocks
from shared_models.study import Transfer


def rates_of(net: nn.Module, transfer: Transfer, round_number: int) -> Mapping[str, float] | None:
    """Share of the learning rate by parameter, 0 for what is frozen; None where all learn alike.

    Raises:
        OrderRefused: nothing is left to learn.
    """
    if not transfer.sha256:
        return None
    listed = blocks(net)
    first = len(listed) - 1 if round_number <= transfer.head_rounds else transfer.freeze
    if first >= len(listed):
        raise OrderRefused(
            "ALL_FROZEN", f"transfer.freeze is {transfer.freeze}, the network has {len(listed)} blocks. Freeze fewer."
        )
    return {
        name: 0.0 if n < first else transfer.rate_decay ** (len(listed) - 1 - n)
        for n, names in enumerate(listed)
        for name in names
    }
