"""How the emulated machine is put together, as far as that can be seen without one."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.arm64 import machine, stubs
from benchmarks.arm64.machine import find_mirror, made, refuse_host
from exporter.errors import CapacityError, MissingToolError

PINNED = re.compile(r"^([\w-]+)==(\S+) --hash=sha256:[0-9a-f]{64}$", re.MULTILINE)


@pytest.mark.parametrize("runtime", ["onnxruntime", "executorch"])
def test_wheels_are_of_the_releases_that_this_host_has(runtime: str) -> None:
    pinned = dict(PINNED.findall((machine.HERE / f"{runtime}.txt").read_text()))
    assert runtime in pinned
    assert pinned == {name: version(name).split("+")[0] for name in pinned}


def test_every_wheel_has_its_hash() -> None:
    for path in machine.HERE.glob("*.txt"):
        lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
        assert len(lines) == len(PINNED.findall(path.read_text())) > 2


# --- folders -----------------------------------------------------------------------------------------------------


def test_a_folder_is_made_once_for_each_recipe(tmp_path: Path) -> None:
    calls = []

    def make(folder: Path) -> dict[str, Any]:
        calls.append(folder)
        (folder / "content").write_text(str(len(calls)))
        return {"packages": {"a": "1"}}

    for recipe, times in (({"a": 1}, 1), ({"a": 1}, 1), ({"a": 2}, 2), ({"a": 2}, 2)):
        folder = made(tmp_path / "made", recipe, make, free=0)
        assert len(calls) == times
        assert (folder / "content").read_text() == str(times)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_what_was_not_finished_is_not_there(tmp_path: Path) -> None:
    def fail(folder: Path) -> dict[str, Any]:
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "made", {}, fail, free=0)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_before_anything_is_fetched(tmp_path: Path) -> None:
    with pytest.raises(CapacityError, match=r"MB of disk free, [\d,]+ MB are needed"):
        made(tmp_path / "made", {}, lambda _: {}, free=1 << 60)


# --- the host ----------------------------------------------------------------------------------------------------


def test_another_host_is_told_what_was_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.platform, "machine", lambda: "arm64")
    with pytest.raises(MissingToolError, match=r"arm64, Linux x86_64 was expected"):
        refuse_host()


def test_a_host_without_apt_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.platform, "system", lambda: "Linux")
    monkeypatch.setattr(machine.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(machine.shutil, "which", lambda name: None if name == "apt-get" else name)
    with pytest.raises(MissingToolError, match="apt-get not found"):
        refuse_host()


def test_the_mirror_is_the_hosts_own_or_the_one_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEBIAN_MIRROR", raising=False)
    known = "Ubuntu|main|Packages|u://a\nDebian|main|Sources|d://b\nDebian|main|Packages|d://c-security\n"
    monkeypatch.setattr(machine, "run", lambda *_: known + "Debian|main|Packages|d://d\n")
    assert find_mirror() == "d://d"
    monkeypatch.setattr(machine, "run", lambda *_: known)
    with pytest.raises(MissingToolError, match="knows no mirror of Debian") as caught:
        find_mirror()
    assert "DEBIAN_MIRROR" in caught.value.hint
    monkeypatch.setenv("DEBIAN_MIRROR", "d://e")
    assert find_mirror() == "d://e"


def test_a_tool_that_fails_says_what_it_said() -> None:
    with pytest.raises(MissingToolError, match=r"sh -c .* ended with 3: no such suite"):
        machine.run("sh", "-c", "echo no such suite >&2; exit 3")


# --- stand-ins ---------------------------------------------------------------------------------------------------


def wanted(*names: str, version: str | None = None) -> list[stubs.Wanted]:
    return [stubs.Wanted(name=name, library="libabsent.so.1" if version else None, version=version) for name in names]


@pytest.mark.skipif(shutil.which("readelf") is None, reason="no binutils")
def test_the_linkage_of_a_library_is_what_readelf_says() -> None:
    path = Path(torch.__file__).parent / "lib" / "libshm.so"
    found = stubs.read_linkage(path)
    told = subprocess.run(["readelf", "-dW", path], capture_output=True, text=True, check=True).stdout
    assert list(found.needed) == re.findall(r"\(NEEDED\).*\[(.+)\]", told)
    told = subprocess.run(["readelf", "--dyn-syms", "-W", path], capture_output=True, text=True, check=True).stdout
    rows = re.findall(r" (\w+) +(?:DEFAULT|PROTECTED|HIDDEN) +(\w+) ([^@\s]+)(?:@+(\S+))?", told)
    assert found.defined == {name for _, section, name, _ in rows if section != "UND"}
    assert {(one.name, one.version) for one in found.wanted} == {
        (name, version or None) for bind, section, name, version in rows if section == "UND" and bind == "GLOBAL"
    }


def test_a_stand_in_is_loaded_by_the_systems_loader_and_has_its_symbols(tmp_path: Path) -> None:
    """Loaded here, its machine's number changed: nothing in it is called."""
    symbols = wanted("first", "second", version="ABSENT_1") + wanted("_ZTV5Table", "plain")
    content = bytearray(stubs.stand_in("libabsent.so.1", symbols))
    content[18:20] = (62).to_bytes(2, "little")  # x86-64
    path = tmp_path / "libabsent.so.1"
    path.write_bytes(content)
    loaded = ctypes.CDLL(str(path))
    assert all(hasattr(loaded, symbol.name) for symbol in symbols)
    assert not hasattr(loaded, "third")
    dlvsym = ctypes.CDLL(None).dlvsym
    dlvsym.restype, dlvsym.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p]
    assert dlvsym(loaded._handle, b"first", b"ABSENT_1")
    assert not dlvsym(loaded._handle, b"first", b"ABSENT_2")
    table = (ctypes.c_char * 64).in_dll(loaded, "_ZTV5Table")
    assert bytes(table) == bytes(64)


def test_only_what_nobody_defines_gets_a_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = stubs.Wanted(name="old", library="absent.so", version="V1")
    linkages = {
        "a.so": stubs.Linkage(
            needed=("b.so", "libc.so", "absent.so"),
            defined=frozenset({"mine"}),
            wanted=frozenset([*wanted("theirs", "nobodys"), old]),
        ),
        "b.so": stubs.Linkage(needed=("libc.so",), defined=frozenset({"theirs"}), wanted=frozenset()),
        "libc.so": stubs.Linkage(needed=(), defined=frozenset({"printf"}), wanted=frozenset()),
    }
    monkeypatch.setattr(stubs, "read_linkage", lambda path: linkages[path.name])
    made_of: dict[str, set[str]] = {}

    def stand_in(name: str, symbols: set[stubs.Wanted]) -> bytes:
        made_of[name] = {symbol.name for symbol in symbols}
        return b""

    monkeypatch.setattr(stubs, "stand_in", stand_in)
    made_names = stubs.write_missing([Path("a.so"), Path("b.so")], tmp_path, provided=[Path("libc.so")])
    assert made_names == [path.name for path in tmp_path.iterdir()] == ["absent.so"]
    assert made_of == {"absent.so": {"nobodys", "old"}}


def test_what_is_no_library_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.so").write_text("INPUT ( libm.so.6 )" + " " * 100)
    with pytest.raises(ValueError, match=r"text\.so is no 64-bit"):
        stubs.read_linkage(tmp_path / "text.so")
