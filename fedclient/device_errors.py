"""What the errors of a GPU mean: less work at once helps, or its process is of no more use; told without PyTorch."""

from collections.abc import Iterator
from contextlib import contextmanager

from shared_models.errors import DeviceFailed, OrderRefused

# what PyTorch raises, mostly as a bare RuntimeError, when an allocator or a library of NVIDIA's gets no memory
WANT_OF_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",  # of the driver, where PyTorch's own allocator has no part in it
    "_ALLOC_FAILED",  # cuDNN 8, cuBLAS, cuSOLVER, cuFFT
    "ALLOCATION_FAILED",  # cuDNN 9
    "CUDNN_STATUS_NOT_SUPPORTED",  # also of too many elements at once
    "unable to find an engine to execute",  # none of cuDNN's has room to work in, or knows so old a GPU
)
DEVICE_FAILED = "DEVICE_FAILED"
OF_A_DEVICE = ("CUDA error", "CUDA driver error", "cuDNN error", "CUDNN_STATUS_", "CUBLAS_STATUS_", "HIP error")

LESS = "End other programs that compute here, or use --device cpu."


def is_out_of_memory(error: BaseException) -> bool:
    """Whether less work at once may help."""
    if isinstance(error, MemoryError) or _is_a(error, "OutOfMemoryError"):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in WANT_OF_MEMORY)


def is_device_fault(error: BaseException) -> bool:
    """Whether a GPU has failed otherwise; after most such faults it computes nothing more for this process."""
    if not isinstance(error, RuntimeError) or is_out_of_memory(error):
        return False
    return _is_a(error, "AcceleratorError") or any(words in str(error) for words in OF_A_DEVICE)


@contextmanager
def predicting() -> Iterator[None]:
    """Says in words what PyTorch raises in the block, of a GPU or for want of memory.

    Raises:
        OrderRefused: `OUT_OF_MEMORY`; another case may fare better.
        DeviceFailed: none would.
    """
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise OrderRefused("OUT_OF_MEMORY", f"memory ran out ({first_words(error)}). {LESS}") from None
        if is_device_fault(error):
            raise DeviceFailed(
                f"the GPU failed ({first_words(error)}). Try again; if it fails again, look for Xid in `dmesg`, or use "
                "--device cpu."
            ) from None
        raise


def first_words(error: BaseException) -> str:
    """What it says, without the lines that PyTorch adds for its own debugging."""
    return str(error).partition("\n")[0].rstrip(".") or type(error).__name__


def _is_a(error: BaseException, name: str) -> bool:
    return any(kind.__name__ == name for kind in type(error).__mro__)
