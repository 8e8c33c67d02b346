"""Serves one bundle as OpenAI's interface does, streamed: python serve.py out/onnxruntime

Every byte of the bundle is checked, then its own questions are asked; a bundle that answers otherwise than its model
does is not served. Nothing of llama-export is needed: see README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from llamabundle import Answer, Assistant, Bundle, BundleError, Drawing, Message, SelfTest, self_test

NOT_WHOLE, OTHERWISE = 3, 7
"""Exit codes, those of llama-export."""
LARGEST_BODY = 8 << 20
"""Bytes: more than any context holds."""
UNKNOWN = (
    *("stop", "tools", "tool_choice", "functions", "response_format", "logit_bias", "logprobs", "echo", "suffix"),
    *("frequency_penalty", "presence_penalty", "best_of"),
)
"""What would change an answer and is not done here: refused, unless it asks for nothing."""


class BadRequestError(Exception):
    """What is wrong with a request, for who sent it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a client asks for, all of it understood."""

    chat: bool
    """A message to answer, else a text to go on from."""
    ids: list[int]
    drawing: Drawing
    streams: bool
    tells_usage: bool
    tells_ids: bool


class Server(ThreadingHTTPServer):
    """One model, and one cache: answers are made one after the other, while other requests wait."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], assistant: Assistant) -> None:
        super().__init__(address, Handler)
        self.assistant = assistant
        self.name = str(assistant.bundle.manifest["model"]["name"])
        self.answering = threading.Lock()
        self.started = int(time.time())
        self.advised = _advised(assistant.bundle)

    def understand(self, asked: Any, *, chat: bool) -> Request:
        """Raises BadRequestError for what is not understood, ValueError for what is out of range."""
        if not isinstance(asked, dict):
            raise BadRequestError("the body is not a JSON object")
        refused = [name for name in UNKNOWN if asked.get(name)]
        if refused or asked.get("n") not in (None, 1):
            raise BadRequestError(f"{refused[0] if refused else 'n'} is not done by this server: leave it out")
        text = self.assistant.text
        if chat:
            ids = text.render(_messages(asked.get("messages")))
        elif isinstance(asked.get("prompt"), str):
            ids = text.encode(asked["prompt"])
        else:
            raise BadRequestError("prompt is not a text")
        drawing = Drawing(
            temperature=_number(asked, "temperature", self.advised["temperature"]),
            top_p=_number(asked, "top_p", self.advised["top_p"]),
            seed=_count(asked, "seed"),
            max_tokens=_count(asked, "max_completion_tokens") or _count(asked, "max_tokens"),
        )
        return Request(
            chat=chat,
            ids=ids,
            drawing=drawing,
            streams=bool(asked.get("stream")),
            tells_usage=bool((asked.get("stream_options") or {}).get("include_usage")),
            tells_ids=bool(asked.get("return_token_ids")),
        )


class Handler(BaseHTTPRequestHandler):
    """One request. HTTP/1.0: an answer ends where its connection does."""

    server: Server
    timeout = 60  # seconds: who does not read its answer must not keep the others waiting
    server_version = "llamabundle"

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            model = {"id": self.server.name, "object": "model", "created": self.server.started, "owned_by": "bundle"}
            self._send(HTTPStatus.OK, {"object": "list", "data": [model]})
        else:
            self._refuse(HTTPStatus.NOT_FOUND, f"there is no {self.path} here")

    def do_POST(self) -> None:
        if self.path not in ("/v1/chat/completions", "/v1/completions"):
            self._refuse(HTTPStatus.NOT_FOUND, f"there is no {self.path} here")
            return
        try:
            request = self.server.understand(self._body(), chat=self.path == "/v1/chat/completions")
            answers = self.server.assistant.answer(request.ids, request.drawing)
        except (BadRequestError, ValueError, OverflowError) as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))
            return
        try:
            with self.server.answering:
                (self._stream if request.streams else self._answer)(request, answers)
        except (ConnectionError, TimeoutError):
            self.log_message("the client has gone")

    def _body(self) -> Any:
        length = int(self.headers.get("Content-Length") or 0)
        if not 0 < length <= LARGEST_BODY:
            raise BadRequestError(f"the body has {length:,} bytes, 1 to {LARGEST_BODY:,} were expected")
        try:
            return json.loads(self.rfile.read(length))
        except ValueError as error:
            raise BadRequestError(f"the body is not JSON: {error}") from error

    def _answer(self, request: Request, answers: Iterator[Answer]) -> None:
        whole = list(answers)
        text = "".join(answer.text for answer in whole)
        ids = [answer.id for answer in whole if answer.id is not None]
        said = {"message": {"role": "assistant", "content": text}} if request.chat else {"text": text}
        choice = _choice(said, ended=whole[-1].ended, ids=ids if request.tells_ids else None)
        self._send(
            HTTPStatus.OK,
            {**self._frame(request), "choices": [choice], "usage": _usage(request, tokens=len(ids))},
        )

    def _stream(self, request: Request, answers: Iterator[Answer]) -> None:
        """Server-sent events: a chunk for each token that has something to tell, the end, and [DONE]."""
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Cache-Control", "no-cache")
        self.end_headers()
        frame, tokens = self._frame(request, streamed=True), 0
        if request.chat:
            self._event({**frame, "choices": [_choice({"delta": {"role": "assistant", "content": ""}})]})
        for answer in answers:
            tokens += answer.id is not None
            if not (answer.text or answer.ended or request.tells_ids):
                continue
            said = {"delta": {"content": answer.text} if answer.text else {}} if request.chat else {"text": answer.text}
            ids = [answer.id] if answer.id is not None else []
            choice = _choice(said, ended=answer.ended, ids=ids if request.tells_ids else None)
            self._event({**frame, "choices": [choice]})
        if request.tells_usage:
            self._event({**frame, "choices": [], "usage": _usage(request, tokens=tokens)})
        self.wfile.write(b"data: [DONE]\n\n")

    def _frame(self, request: Request, *, streamed: bool = False) -> dict[str, Any]:
        kind = f"chat.completion{'.chunk' if streamed else ''}" if request.chat else "text_completion"
        name = f"{'chatcmpl' if request.chat else 'cmpl'}-{uuid.uuid4().hex}"
        return {"id": name, "object": kind, "created": int(time.time()), "model": self.server.name}

    def _event(self, content: Any) -> None:
        self.wfile.write(f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode())

    def _send(self, status: HTTPStatus, content: Any) -> None:
        body = json.dumps(content, ensure_ascii=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        kind = "invalid_request_error" if status == HTTPStatus.BAD_REQUEST else "not_found_error"
        self._send(status, {"error": {"message": message, "type": kind, "param": None, "code": None}})


def _choice(said: dict[str, Any], *, ended: str | None = None, ids: list[int] | None = None) -> dict[str, Any]:
    return {"index": 0, **said, "finish_reason": ended, **({} if ids is None else {"token_ids": ids})}


def _usage(request: Request, *, tokens: int) -> dict[str, int]:
    prompt = len(request.ids)
    return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}


def _advised(bundle: Bundle) -> dict[str, float]:
    """What the model's makers advise, for requests that do not say."""
    config = bundle.read_json("generation_config.json") if bundle.find("generation_config.json") else {}
    if not config.get("do_sample"):
        return {"temperature": 0.0, "top_p": 1.0}
    return {"temperature": config.get("temperature", 1.0), "top_p": config.get("top_p", 1.0)}


def _messages(asked: Any) -> list[Message]:
    if not isinstance(asked, list) or not asked or not all(isinstance(one, dict) for one in asked):
        raise BadRequestError("messages is not a list of objects")
    return [Message(role=_role(one), content=_content(one.get("content"))) for one in asked]


def _role(message: dict[str, Any]) -> str:
    if message.get("role") not in ("system", "user", "assistant"):
        raise BadRequestError(f"the role {message.get('role')!r} is not known; known: system, user, assistant")
    return str(message["role"])


def _content(content: Any) -> str:
    """A text, or parts of which each is one."""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return "".join(str(part.get("text")) for part in content)
    if not isinstance(content, str):
        raise BadRequestError("the content of a message is not text")
    return content


def _number(asked: dict[str, Any], name: str, default: float) -> float:
    value = asked.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRequestError(f"{name} is {value!r}, a number was expected")
    return float(value)


def _count(asked: dict[str, Any], name: str) -> int | None:
    value = asked.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise BadRequestError(f"{name} is {value!r}, a whole number was expected")
    return value


def main() -> int:
    parser = argparse.ArgumentParser(description="Serve an ONNX bundle that passes its own test.")
    parser.add_argument("bundle", type=Path, help="a folder that llama-export has made for onnxruntime")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (%(default)s: for this machine)")
    parser.add_argument("--port", type=int, default=8000, help="0: one that is free (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of the runtime (%(default)s)")
    parser.add_argument(
        "--report",
        type=Path,
        default=Path("device-report.json"),
        help="where the report of the self-test goes, outside the bundle (%(default)s)",
    )
    words = parser.parse_args()
    try:
        assistant = Assistant(Bundle.open(words.bundle), threads=words.threads)
        tested = self_test(assistant)
    except BundleError as error:
        print(f"error: {error}", file=sys.stderr)
        return NOT_WHOLE
    tested.write(words.report)
    print(_told(tested, words.report), file=sys.stderr)
    if tested.faults:
        print(f"error: not served: {'; '.join(tested.faults)}", file=sys.stderr)
        return OTHERWISE
    with Server((words.host, words.port), assistant) as server:
        host, port = server.server_address[:2]
        print(f"{server.name} at http://{host!s}:{port}/v1", file=sys.stderr, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    return 0


def _told(tested: SelfTest, path: Path) -> str:
    parity, greedy, latency = (tested.report[name] for name in ("parity", "greedy", "latency"))
    return (
        f"self-test {'failed' if tested.faults else 'passed'}: mean KL {parity['mean_kl_nats']:.1e} nats over "
        f"{parity['positions']} positions, {greedy['agreeing']} of {greedy['compared']} greedy tokens, "
        f"prefill {latency['prefill_tokens_per_s']:,.0f} tokens/s; in {path}"
    )


if __name__ == "__main__":
    sys.exit(main())
