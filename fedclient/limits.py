"""What a hospital lets its node take of a machine: `[limits]` of site.toml; more limits stand where they belong.

The cache's share of the disk is `[cache] quota_gib`, threads and processes are in `[compute]`, hours in `[policy]`.
"""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from shared_models.parse import STRICT


@dataclass(frozen=True, slots=True)
class Limits:
    """`[limits]`; what does not fit in is answered by smaller parts of a batch with the same gradient.

    Attributes:
        memory_gib: of main memory, for each process that trains or prepares images; left out, none is set.
        gpu_memory_share: of the GPU's memory that training may take, where others use it too.
        order_s: longest that one order may take, from its arrival to its answer, in seconds; left out, a minute less
            than the coordinator's message lives (twice the round's deadline, at least ten minutes): later nobody takes
            the answer. What takes longer is ended, also where it hangs, and answered as TRAIN_TIMEOUT.
    """

    __pydantic_config__ = STRICT
    memory_gib: Annotated[float, Field(gt=0, le=1e5, allow_inf_nan=False)] | None = None
    gpu_memory_share: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    order_s: Annotated[float, Field(gt=0, le=30 * 86400, allow_inf_nan=False)] | None = None
