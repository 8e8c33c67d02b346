"""What runs in processes of its own: compiles graphs for Qualcomm's Hexagon, or runs what was compiled.

Qualcomm's libraries print to standard output, which belongs to the user, and stay registered with a whole process.

    compile REQUEST         a JSON file: pairs of a graph and of the file to write, and the options of the provider
    run DESCRIPTOR REQUEST  serves requests on the connection of that file descriptor:

        load_s                      once, when the graphs of REQUEST are loaded
        (calls, position)           a request: the token ids of each call, and where the first one starts
        ("logits", array, seconds)  its answer: the logits of the last call, and the time of each
        ("error", message)          or what went wrong; the graphs stay loaded

A worker ends when the other end of its connection is closed.
"""

from __future__ import annotations

import json
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import onnxruntime as ort

from targets.onnxruntime.fixed_runner import FixedCalls, timed

PROVIDER = "QNNExecutionProvider"


def compile_graphs(request: dict[str, Any]) -> None:
    """Each graph becomes one with a single node that names a binary beside it.

    A binary for each: one that both share (``ep.share_ep_contexts``) is written too, half as large, but the emulator of
    onnxruntime-qnn 2.7.0 ends with a segmentation fault when it is to load it, so that nothing could be proven of it.
    """
    for source, compiled in request["graphs"]:
        options = _options(request["options"])
        for key, value in (("enable", "1"), ("file_path", compiled), ("embed_mode", "0")):
            options.add_session_config_entry(f"ep.context_{key}", value)
        ort.InferenceSession(source, options)


def serve(connection: Connection, request: dict[str, Any]) -> None:
    started = time.perf_counter()
    sessions = {
        int(length): ort.InferenceSession(path, _options(request["options"]))
        for length, path in request["graphs"].items()
    }
    fixed = FixedCalls(sessions)
    connection.send(time.perf_counter() - started)
    while True:
        try:
            calls, position = connection.recv()
        except EOFError:
            return
        try:
            logits, steps_s = timed(fixed, calls, position=position)
        except Exception as error:  # onnxruntime raises a class of its own for each status code, without a common base
            connection.send(("error", str(error)))
        else:
            connection.send(("logits", logits, steps_s))


def _options(provider_options: dict[str, str]) -> Any:
    """Of a session of which the provider takes every node, or which fails."""
    import onnxruntime_qnn

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    if PROVIDER not in {device.ep_name for device in ort.get_ep_devices()}:
        ort.register_execution_provider_library(PROVIDER, onnxruntime_qnn.get_library_path())
    (device, *_) = (device for device in ort.get_ep_devices() if device.ep_name == PROVIDER)
    backend = {"backend_path": onnxruntime_qnn.get_qnn_htp_path()}
    options.add_provider_for_devices([device], backend | provider_options)
    return options


def main(command: str, *arguments: str) -> None:
    request = json.loads(Path(arguments[-1]).read_text(encoding="utf-8"))
    if command == "compile":
        compile_graphs(request)
    else:
        serve(Connection(int(arguments[0])), request)


if __name__ == "__main__":
    main(*sys.argv[1:])
