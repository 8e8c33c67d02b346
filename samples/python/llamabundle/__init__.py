"""A bundle of ``llama-export`` for ONNX Runtime in a Python program that has not got ``llama-export``.

    from llamabundle import Assistant, Bundle, Drawing, self_test

    assistant = Assistant(Bundle.open("out/onnxruntime"))
    assert not self_test(assistant).faults
    ids = assistant.text.render([{"role": "user", "content": "What news?"}])
    for token in assistant.answer(ids, Drawing(max_tokens=40)):
        print(token.text, end="", flush=True)

Needs onnxruntime (which brings numpy), tokenizers and jinja2. Copy this folder; it is yours.
"""

from llamabundle.assistant import Answer, Assistant, Drawing
from llamabundle.bundle import Bundle, BundleError
from llamabundle.model import Model
from llamabundle.selftest import SelfTest, self_test
from llamabundle.text import Message, Text

__all__ = [
    "Answer",
    "Assistant",
    "Bundle",
    "BundleError",
    "Drawing",
    "Message",
    "Model",
    "SelfTest",
    "Text",
    "self_test",
]
