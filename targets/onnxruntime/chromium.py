"""Headless Chromium with one worker of ours in it, to be asked from Python.

The worker is ``page/worker.js``. A server of this process, which no other machine can reach, gives it onnxruntime-web
and the model, and what it is to do by long polling; so neither a driver nor a protocol of the browser's is needed. The
browser is started with a profile that is thrown away, and can reach nothing else.
"""

from __future__ import annotations

import functools
import json
import os
import queue
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

import platformdirs

from exporter.errors import HostError, LoweringError, MissingToolError

WEB_VERSION = "1.30.0"
"""Of onnxruntime-web, as in samples/web/package.json."""

VARIABLE = "CHROMIUM"
"""The environment's word for which Chromium to run."""

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_MAC = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
_WORKER = Path(__file__).with_name("page") / "worker.js"
_PAGE = """<!doctype html><title>llama-export</title><script>
  const worker = new Worker("/worker.js", { type: "module" });
  worker.onerror = async ({ message }) => {
    await fetch("/next", { method: "POST", body: `${JSON.stringify({ error: `the worker: ${message}` })}\\n` });
  };
</script>"""

_FLAGS = (
    "--headless=new",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-renderer-backgrounding",
    "--disable-component-update",
    "--disable-extensions",
    "--disable-sync",
    "--disable-dev-shm-usage",  # containers give a few MB of it
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
SOFTWARE_GPU = ("--enable-unsafe-webgpu", "--enable-features=Vulkan", "--use-webgpu-adapter=swiftshader")
"""WebGPU on a host without a GPU, and the same on every host."""

_ISOLATED = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}
"""Only a page that is isolated so has exact clocks, and memory that threads share."""

_KINDS = {".html": "text/html", ".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm"}
_POLL_S, _LOOK_S = 10.0, 0.5
ANSWER_TIMEOUT_S = 1800.0
"""For one request: a prompt of a model of a billion parameters, on a GPU in software, takes minutes."""

_END_TIMEOUT_S = 20.0


def web_folder() -> Path:
    """Where onnxruntime-web lies: below the user's cache."""
    return platformdirs.user_cache_path("llama-export") / f"onnxruntime-web-{WEB_VERSION}"


def distribution() -> Path:
    return web_folder() / "node_modules" / "onnxruntime-web" / "dist"


def missing() -> str | None:
    """What this host lacks to run a browser, with the command that installs it; None if it has all."""
    if not executable():
        return f"there is no Chromium: apt-get install chromium, or set {VARIABLE} to where it is"
    if not distribution().is_dir():
        where = shlex.quote(str(web_folder()))
        command = f"npm install --ignore-scripts --no-audit --no-fund --prefix {where} onnxruntime-web@{WEB_VERSION}"
        return f"onnxruntime-web {WEB_VERSION} is not installed: {command}"
    return None


def executable() -> str | None:
    """The path of a Chromium, or of a Chrome; None if there is none."""
    chosen = os.environ.get(VARIABLE)
    if chosen is not None:
        return shutil.which(chosen)
    found = next((path for path in map(shutil.which, _NAMES) if path), None)
    return found or (str(_MAC) if _MAC.exists() else None)


@functools.cache
def version() -> str:
    """``Chromium 156.0.8078.79``. Raises MissingToolError."""
    _require_tools()
    told = subprocess.run([executable() or "", "--version"], capture_output=True, text=True, check=False, timeout=60)
    return " ".join(told.stdout.split()[:2]) or "Chromium"


def _require_tools() -> None:
    if reason := missing():
        raise MissingToolError(reason, hint="the last words of the sentence are the command")


class Chromium:
    """One browser, asked by ``ask``. Close it when done, or open it in a ``with``.

    ``files``: what it can fetch under ``/files/<name>``, bytes or a path. Raises MissingToolError where there is no
    browser, HostError where it does not start.
    """

    def __init__(self, files: dict[str, bytes | Path], *, flags: tuple[str, ...] = ()) -> None:
        _require_tools()
        self._requests: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._answers: queue.Queue[tuple[dict[str, Any], bytes]] = queue.Queue()
        self._server = _Server(files, self._requests, self._answers)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (closed in close)
        self._profile = tempfile.TemporaryDirectory(prefix="llama-export-", ignore_cleanup_errors=True)
        # Chromium refuses its sandbox to root, which containers run as.
        unboxed = ("--no-sandbox",) if hasattr(os, "geteuid") and os.geteuid() == 0 else ()
        command = [executable() or "", *_FLAGS, *unboxed, *flags, f"--user-data-dir={self._profile.name}"]
        self._process = subprocess.Popen(
            [*command, self.url],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,  # so that its children can be ended with it
        )
        # It ends the browser at the end of its input: where this process is killed, and nobody calls close.
        self._watcher = subprocess.Popen(
            ["/bin/sh", "-c", f"read _; kill -s TERM -- -{self._process.pid} 2>/dev/null"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/"

    def ask(self, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        """What the worker answers: figures, and bytes. Raises LoweringError with the reason it tells, or HostError
        where the browser is gone."""
        self._requests.put(request)
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        while True:
            try:
                told, content = self._answers.get(timeout=_LOOK_S)
                break
            except queue.Empty:
                if self._process.poll() is not None:
                    raise HostError(
                        f"Chromium ended with {self._process.returncode}: {self._last_words()}",
                        hint=f"try {executable()} --headless=new about:blank",
                    ) from None
                if time.monotonic() > deadline:
                    raise LoweringError(
                        f"the browser did not answer within {ANSWER_TIMEOUT_S:.0f} s",
                        hint="take a smaller model, or another backend",
                    ) from None
        if "error" in told:
            raise LoweringError(f"onnxruntime-web failed: {told['error']}", hint="export the model again")
        return told, content

    def close(self) -> None:
        self._requests.put(None)
        self._watcher.communicate()  # it sees the end of its input
        try:
            self._process.wait(timeout=_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._server.shutdown()
        self._server.server_close()
        self._log.close()
        self._profile.cleanup()

    def __enter__(self) -> Chromium:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = [line for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-1].strip() if lines else "it said nothing"


class _Server(ThreadingHTTPServer):
    """The page's only world."""

    daemon_threads = True

    def __init__(
        self,
        files: dict[str, bytes | Path],
        requests: queue.Queue[dict[str, Any] | None],
        answers: queue.Queue[tuple[dict[str, Any], bytes]],
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests, self.answers = requests, answers
        self.given: dict[str, bytes | Path] = {"/": _PAGE.encode(), "/worker.js": _WORKER}
        self.given |= {f"/files/{name}": content for name, content in files.items()}
        self.given |= {f"/ort/{path.name}": path for path in distribution().iterdir()}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that is ended in the middle of a request is no news."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body leave together, and at once
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        content = self.server.given.get(self.path)
        self._reply(b"" if content is None else content, status=404 if content is None else 200)

    def do_POST(self) -> None:
        """The answer to the request before, for the next request."""
        answer = self.rfile.read(int(self.headers["Content-Length"]))
        if answer:
            head, _, content = answer.partition(b"\n")
            self.server.answers.put((json.loads(head), content))
        try:
            request = self.server.requests.get(timeout=_POLL_S)
        except queue.Empty:
            request = None
        self._reply(b"" if request is None else json.dumps(request).encode(), status=204 if request is None else 200)

    def _reply(self, content: bytes | Path, *, status: int) -> None:
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        kind = _KINDS.get(Path(self.path).suffix, "text/html" if self.path == "/" else "application/octet-stream")
        self.send_response(status)
        for name, value in {**_ISOLATED, "Content-Type": kind, "Content-Length": str(size)}.items():
            self.send_header(name, value)
        self.end_headers()
        if isinstance(content, bytes):
            self.wfile.write(content)
        else:
            with content.open("rb") as file:
                shutil.copyfileobj(file, self.wfile)
        self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the browser's requests are no news."""
