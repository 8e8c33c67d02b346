"""The border to llama.cpp: the C functions of its library (``llama.h``) that are used here, and nothing else of it.

The library is the one inside of the wheel ``xllamacpp``, whose own Python knows a server but no logits.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from exporter.errors import CapacityError, HostError, LoweringError, MissingToolError

PACKAGE, VERSION = "xllamacpp", "2026.10.11549"
INSTALL = f"install it with: pip install {PACKAGE}=={VERSION}"

F32, F16 = 0, 1
"""``ggml_type``, of a cache."""
_INDICES = 26
"""``GGML_TYPE_I32``"""
FLASH_AUTO, FLASH_OFF, FLASH_ON = -1, 0, 1
"""``llama_flash_attn_type``"""

_I32, _U32, _FLOAT, _POINTER = ctypes.c_int32, ctypes.c_uint32, ctypes.c_float, ctypes.c_void_p


class _ModelParams(ctypes.Structure):
    """``llama_model_params`` as far as it is set here; the rest is passed on as it came."""

    _fields_ = (
        ("devices", _POINTER),
        ("buffer_overrides", _POINTER),
        ("n_gpu_layers", _I32),
        ("split_mode", _I32),
        ("rest", ctypes.c_uint64 * 7),
    )


class _ContextParams(ctypes.Structure):
    """``llama_context_params``, likewise."""

    _fields_ = (
        *((name, _U32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq")),
        *((name, _U32) for name in ("n_outputs_max", "n_outputs_max_per_seq")),
        *((name, _I32) for name in ("n_threads", "n_threads_batch", "ctx_type", "rope_scaling_type")),
        *((name, _I32) for name in ("pooling_type", "attention_type", "flash_attn_type")),
        *((name, _FLOAT) for name in ("rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor")),
        *((name, _FLOAT) for name in ("yarn_beta_fast", "yarn_beta_slow")),
        ("yarn_orig_ctx", _U32),
        ("defrag_thold", _FLOAT),
        ("cb_eval", _POINTER),
        ("cb_eval_user_data", _POINTER),
        *((name, _I32) for name in ("type_k", "type_v")),
        ("rest", ctypes.c_uint64 * 8),
    )


class TensorStruct(ctypes.Structure):
    """``ggml_tensor`` up to its name."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", _POINTER),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", _I32 * 16),
        ("flags", _I32),
        ("src", _POINTER * 10),
        ("view_src", _POINTER),
        ("view_offs", ctypes.c_size_t),
        ("data", _POINTER),
        ("name", ctypes.c_char * 64),
    )


class _Batch(ctypes.Structure):
    """``llama_batch``"""

    _fields_ = (
        ("n_tokens", _I32),
        ("token", ctypes.POINTER(_I32)),
        ("embd", _POINTER),
        ("pos", ctypes.POINTER(_I32)),
        ("n_seq_id", ctypes.POINTER(_I32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(_I32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (_POINTER, _POINTER)),
    "llama_model_default_params": (_ModelParams, ()),
    "llama_context_default_params": (_ContextParams, ()),
    "llama_model_load_from_file": (_POINTER, (ctypes.c_char_p, _ModelParams)),
    "llama_model_free": (None, (_POINTER,)),
    "llama_model_get_vocab": (_POINTER, (_POINTER,)),
    "llama_init_from_model": (_POINTER, (_POINTER, _ContextParams)),
    "llama_free": (None, (_POINTER,)),
    "llama_set_embeddings": (None, (_POINTER, ctypes.c_bool)),
    "llama_get_memory": (_POINTER, (_POINTER,)),
    "llama_memory_seq_rm": (ctypes.c_bool, (_POINTER, _I32, _I32, _I32)),
    "llama_decode": (_I32, (_POINTER, _Batch)),
    "llama_get_logits_ith": (ctypes.POINTER(_FLOAT), (_POINTER, _I32)),
    "llama_get_embeddings_ith": (ctypes.POINTER(_FLOAT), (_POINTER, _I32)),
    "llama_tokenize": (
        _I32,
        (_POINTER, ctypes.c_char_p, _I32, ctypes.POINTER(_I32), _I32, ctypes.c_bool, ctypes.c_bool),
    ),
    "ggml_op_desc": (ctypes.c_char_p, (_POINTER,)),
    "llama_vocab_is_eog": (ctypes.c_bool, (_POINTER, _I32)),
}
"""Result and arguments of each function."""

_DEFAULTS: dict[str, float] = {"n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1}
_DEFAULTS |= {"flash_attn_type": FLASH_AUTO, "yarn_ext_factor": -1.0, "defrag_thold": -1.0}
_DEFAULTS |= {"type_k": F16, "type_v": F16}
"""What tells that the fields above lie where the library has them: it tells its version to no caller."""


CPUINFO = Path("/proc/cpuinfo")
_BUILT_FOR = {"avx2", "bmi2", "f16c", "fma"}
"""What the wheel for x86-64 takes for granted (``llama_print_system_info``): elsewhere it ends the process."""


def missing() -> str | None:
    """What is not installed, and the command that installs it, or what the processor lacks; None if llama.cpp can be
    run. Imports nothing."""
    if not importlib.util.find_spec(PACKAGE):
        return f"{PACKAGE}, which is llama.cpp as a wheel, is not installed; {INSTALL}"
    if platform.machine() != "x86_64" or not CPUINFO.exists():
        return None
    flags = next((line for line in CPUINFO.read_text().splitlines() if line.startswith("flags")), "").split()
    if absent := sorted(_BUILT_FOR.difference(flags)):
        return f"the wheel of llama.cpp is built for processors with {', '.join(absent)}, which this one has not"
    return None


def installed_version() -> str:
    """Of the wheel, whose last part is llama.cpp's build number. Raises MissingToolError."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError as error:
        raise MissingToolError(f"{PACKAGE} is not installed", hint=INSTALL) from error


@functools.cache
def _library() -> ctypes.CDLL:
    """Raises MissingToolError, and HostError for a library that cannot be loaded or has other structures."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise MissingToolError(f"{PACKAGE} is not installed", hint=INSTALL)
    files = sorted(Path(found.submodule_search_locations[0]).glob(f"{PACKAGE}*.so"))
    try:
        library = ctypes.CDLL(str(files[0]))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError, IndexError) as error:
        raise HostError(f"the library of {PACKAGE} cannot be loaded: {error}", hint=INSTALL) from error
    library.llama_log_set(ctypes.cast(_QUIET, _POINTER), None)
    library.llama_backend_init()
    defaults = library.llama_context_default_params()
    found_defaults = {name: getattr(defaults, name) for name in _DEFAULTS}
    if found_defaults != _DEFAULTS:
        raise HostError(
            f"{PACKAGE} {installed_version()} has other parameters than {VERSION}: {found_defaults}", hint=INSTALL
        )
    return library


_Log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, _POINTER)
_LAST_ERROR: list[str] = []
_ERROR = 4
"""``GGML_LOG_LEVEL_ERROR``"""


def _keep_errors(level: int, text: bytes, _: object) -> None:
    if level == _ERROR:
        _LAST_ERROR[:] = [text.decode(errors="replace").strip()]


_QUIET = _Log(_keep_errors)  # kept, as long as the library may call it


def _told() -> str:
    return f": {_LAST_ERROR[0]}" if _LAST_ERROR else ""


class Model:
    """One GGUF file, loaded to be computed on the CPU. Close it when done."""

    def __init__(self, path: Path) -> None:
        self._library = _library()
        _LAST_ERROR.clear()
        params = self._library.llama_model_default_params()
        params.n_gpu_layers = 0
        self.pointer = self._library.llama_model_load_from_file(str(path).encode(), params)
        if not self.pointer:
            raise LoweringError(f"llama.cpp cannot load {path.name}{_told()}", hint="export the model again")

    def tokenize(self, text: str, *, begin: bool) -> list[int]:
        """Token ids of ``text``, in which the spelling of a special token is that token; ``begin``: with what the file
        says is to be put in front and behind."""
        vocabulary = self._library.llama_model_get_vocab(self.pointer)
        content = text.encode()
        ids = (_I32 * (len(content) + 8))()
        count = self._library.llama_tokenize(vocabulary, content, len(content), ids, len(ids), begin, True)
        if count < 0:
            raise LoweringError(f"llama.cpp gives {-count} tokens for {len(content)} bytes", hint="export it again")
        return list(ids[:count])

    def ends(self, token: int) -> bool:
        """Whether llama.cpp ends an answer at this token."""
        ended: bool = self._library.llama_vocab_is_eog(self._library.llama_model_get_vocab(self.pointer), token)
        return ended

    def close(self) -> None:
        self._library.llama_model_free(self.pointer)


_Eval = ctypes.CFUNCTYPE(ctypes.c_bool, _POINTER, ctypes.c_bool, _POINTER)
_DTYPES: dict[int, np.dtype[Any]] = {F32: np.dtype(np.float32), F16: np.dtype(np.float16), _INDICES: np.dtype(np.int32)}


@dataclass(frozen=True, slots=True)
class Computed:
    """One tensor of llama.cpp's own graph, right after it was computed."""

    name: str
    op: str
    """As ``ggml_op_desc`` tells it."""
    struct: TensorStruct

    def read(self, source: int | None = None) -> np.ndarray[Any, np.dtype[np.float32]]:
        """A copy of it, or of one of its sources, as float32, the slowest dimension first."""
        struct = self.struct if source is None else TensorStruct.from_address(self.struct.src[source])
        dtype = _DTYPES[struct.type]
        shape, strides = tuple(struct.ne)[::-1], tuple(struct.nb)[::-1]
        size = sum((count - 1) * stride for count, stride in zip(shape, strides, strict=True)) + dtype.itemsize
        memory = (ctypes.c_char * size).from_address(struct.data)
        return np.ndarray(shape, dtype, memory, strides=strides).astype(np.float32)


class Context:
    """A key-value cache of one model, and what computes with it. Close it before its model."""

    def __init__(
        self,
        model: Model,
        *,
        positions: int,
        threads: int,
        cache: int,
        flash: int,
        hidden: bool = False,
        observe: Callable[[Computed], None] | None = None,
    ) -> None:
        """``cache``: ``ggml_type`` of keys and values. ``hidden``: give what the head reads, not logits. ``observe`` is
        called with each tensor that is computed."""
        self._library = _library()
        _LAST_ERROR.clear()
        params = self._library.llama_context_default_params()
        params.n_ctx = params.n_batch = positions
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = cache
        params.flash_attn_type = flash
        if observe:
            self._callback = _Eval(self._tell(observe))  # kept, as long as the library may call it
            params.cb_eval = ctypes.cast(self._callback, _POINTER)
        self._pointer = self._library.llama_init_from_model(model.pointer, params)
        if not self._pointer:
            raise CapacityError(
                f"llama.cpp cannot make a context of {positions} positions{_told()}", hint="free memory, or --context"
            )
        self._read: Callable[[Any, int], Any] = self._library.llama_get_logits_ith
        if hidden:
            self._library.llama_set_embeddings(self._pointer, True)
            self._read = self._library.llama_get_embeddings_ith

    def _tell(self, observe: Callable[[Computed], None]) -> Callable[[int, bool, object], bool]:
        describe = self._library.ggml_op_desc

        def tell(pointer: int, asked: bool, _: object) -> bool:
            if not asked:
                struct = TensorStruct.from_address(pointer)
                observe(Computed(struct.name.decode(), describe(pointer).decode(), struct))
            return True

        return tell

    def decode(self, ids: Sequence[int], *, first: int, rows: int, width: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Append ``ids`` to the cache from position ``first`` on; float32 ``[rows, width]`` of the last of them. Raises
        LoweringError."""
        count = len(ids)
        sequence = _I32(0)
        batch = _Batch(
            n_tokens=count,
            token=(_I32 * count)(*ids),
            pos=(_I32 * count)(*range(first, first + count)),
            n_seq_id=(_I32 * count)(*[1] * count),
            seq_id=(ctypes.POINTER(_I32) * count)(*[ctypes.pointer(sequence)] * count),
            logits=(ctypes.c_int8 * count)(*[int(index >= count - rows) for index in range(count)]),
        )
        _LAST_ERROR.clear()
        if status := self._library.llama_decode(self._pointer, batch):
            raise LoweringError(
                f"llama.cpp failed while running, status {status}{_told()}", hint="export the model again"
            )
        found = np.empty((rows, width), dtype=np.float32)
        for row in range(rows):
            found[row] = np.ctypeslib.as_array(self._read(self._pointer, count - rows + row), (width,))
        return found

    def forget(self, position: int) -> None:
        """What lies in the cache from ``position`` on."""
        self._library.llama_memory_seq_rm(self._library.llama_get_memory(self._pointer), 0, position, -1)

    def close(self) -> None:
        self._library.llama_free(self._pointer)
