"""A network of a release in onnxruntime on the CPU; no PyTorch in here, whose import takes seconds."""

import onnxruntime


def cpu_session(network: bytes | str, threads: int) -> onnxruntime.InferenceSession:
    """From the bytes of an ONNX graph, or its path; 0 threads are as many as there are cores.

    Raises what onnxruntime raises for a graph that it cannot read: its exceptions have no common base.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(network, options, providers=["CPUExecutionProvider"])
