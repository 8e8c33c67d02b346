"""An aarch64 machine in a folder: a few packages of Debian, the runtimes' own wheels, and qemu to execute them.

Nothing is installed and nobody has to be root: apt works on lists of its own, packages are unpacked. Every folder is
made whole or not at all, from what ``RECIPE`` and the requirements name; apt checks Debian's signatures, pip hashes.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.arm64 import stubs
from exporter.errors import CapacityError, LoweringError, MissingToolError

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "arm64"
HERE = Path(__file__).parent
KEYRING = Path("usr/share/keyrings/debian-archive-keyring.gpg")

PYTHON = "3.13"
RECIPE: Mapping[str, Any] = {
    # Debian 13. Its qemu (10.0) has the three cores, and tells each one's features in /proc/cpuinfo: 7.2 shows the
    # host's, and ONNX Runtime dies of that as it loads.
    "suite": "trixie",
    "amd64": ["qemu-user"],
    "arm64": [
        *("libc6", "libgcc-s1", "libgomp1", "libstdc++6"),
        *("libbz2-1.0", "libexpat1", "libffi8", "liblzma5", "libssl3t64", "zlib1g"),
        *(f"libpython{PYTHON}-minimal", f"libpython{PYTHON}-stdlib", f"python{PYTHON}-minimal"),
    ],
}
WHEELS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
FREE_BYTES = {"system": 400 << 20, "onnxruntime": 300 << 20, "executorch": 1500 << 20}
"""While each folder is made; half of it stays."""

NOT_FOR_CPU = (
    *("torch/lib/libtorch_cuda", "torch/lib/libtorch_nvshmem", "torch/lib/libc10_cuda", "torch/lib/libcaffe2_nvrtc"),
    *("torch/include/", "torch/test/", "torch/share/", "executorch/include/", "executorch/data/"),
)
"""Left in the wheels: 500 MB of CUDA, headers and tools. What the CPU half of torch links of it has stand-ins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Core:
    """A processor that qemu knows under ``name``; ``part`` is its number in MIDR_EL1, which runtimes choose kernels
    by."""

    name: str
    part: int
    about: str


CORES = {
    core.name: core
    for core in (
        # Parts: Arm's technical reference manuals, "MIDR_EL1, Main ID Register" of each.
        Core(name="cortex-a53", part=0xD03, about="Armv8.0, 2012: no dot product"),
        Core(name="cortex-a76", part=0xD0B, about="Armv8.2, 2018: dot product, fp16"),
        Core(name="cortex-a710", part=0xD47, about="Armv9.0, 2021: int8 matrix multiply, SVE2"),
    )
}
HOST = "x86-64"

_LATER_ARM = (
    "libcustom_ops_aot_lib.so of ExecuTorch's aarch64 wheel is built for later cores than Armv8.0: it ends with an "
    "illegal instruction as it is loaded"
)
NEEDS_MORE = {("executorch", "cortex-a53"): _LATER_ARM}
"""Cores that a runtime's wheel is not built for, with what was seen; builds for Android and iOS are others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What executes a Python program with one runtime, as any of ``CORES``."""

    system: Path
    sites: tuple[Path, ...]
    """The unpacked wheels."""

    def command(self, core: Core, *words: str | Path) -> list[str]:
        root = self.system / "root"
        qemu = str(self.system / "qemu-aarch64")
        return [qemu, "-cpu", core.name, "-L", str(root), str(root / f"usr/bin/python{PYTHON}"), *map(str, words)]

    def run(self, core: Core, *words: str | Path, paths: Sequence[Path] = ()) -> str:
        """Standard output of ``python *words``, ``paths`` before the wheels. Raises LoweringError where it fails."""
        path = os.pathsep.join(map(str, (*paths, *self.sites)))
        # Nothing of the host's own Python and libraries may reach the other one.
        environment = {"PATH": os.defpath, "HOME": str(self.system), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            self.command(core, *words), env=environment, capture_output=True, text=True, errors="replace", check=False
        )
        if done.returncode:
            ended = f"by {signal.Signals(-done.returncode).name}" if done.returncode < 0 else f"with {done.returncode}"
            said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise LoweringError(
                f"on an emulated {core.name} the runtime ended {ended}: {said}",
                hint="export the bundle again; if it stays so, the artifact does not run on such a core: report it",
            )
        return done.stdout

    def packages(self) -> dict[str, str]:
        """Of Debian, with the versions that apt found."""
        found: dict[str, str] = json.loads((self.system / "made.json").read_text())["packages"]
        return found


def set_up(runtime: str, *, cache: Path = CACHE) -> Machine:
    """The machine with that runtime (``onnxruntime``, ``executorch``), made where ``cache`` has none of this recipe.

    Raises MissingToolError where something to make it with is not there or not to be had, CapacityError for want of
    disk.
    """
    refuse_host()
    system = made(cache / "system", {"recipe": RECIPE}, make_system, free=FREE_BYTES["system"])
    sites = [
        made(
            cache / name,
            {"requirements": (HERE / f"{name}.txt").read_text(), "left out": NOT_FOR_CPU, "system": RECIPE},
            partial(make_site, runtime=name, system=system),
            free=FREE_BYTES[name],
        )
        for name in dict.fromkeys(("onnxruntime", runtime))  # the Python sample needs the first in any case
    ]
    machine = Machine(system=system, sites=tuple(sites))
    for core in CORES.values():
        check_core(machine, core)
    return machine


def refuse_host() -> None:
    """Raises MissingToolError where this cannot work."""
    found = f"{platform.system()} {platform.machine()}"
    if found != "Linux x86_64":
        raise MissingToolError(
            f"this host is {found}, Linux x86_64 was expected", hint="run it on a Debian or Ubuntu machine, or in CI"
        )
    missing = [name for name in ("apt-get", "apt-cache", "dpkg-deb") if shutil.which(name) is None]
    if missing:
        raise MissingToolError(
            f"{', '.join(missing)} not found: packages of Debian are unpacked with it",
            hint="run it on Debian or Ubuntu, or in a container of one",
        )


def made(folder: Path, recipe: Mapping[str, Any], make: Callable[[Path], Mapping[str, Any]], *, free: int) -> Path:
    """``folder`` as ``make`` fills it, unless it was made by this recipe: then as it is. Whole or not at all."""
    wanted = json.loads(json.dumps(recipe))
    record = folder / "made.json"
    if record.is_file() and json.loads(record.read_text())["recipe"] == wanted:
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    if (found := shutil.disk_usage(folder.parent).free) < free:
        raise CapacityError(
            f"{folder} has {found / 1e6:,.0f} MB of disk free, {free / 1e6:,.0f} MB are needed to make it",
            hint="free some, or make .cache a link to another disk",
        )
    part = folder.with_name(f".{folder.name}.part")
    for old in (part, folder):
        shutil.rmtree(old, ignore_errors=True)
    part.mkdir()
    print(f"arm64: making {folder.name}, some minutes the first time", file=sys.stderr)
    try:
        got = make(part)
        (part / "made.json").write_text(json.dumps({"recipe": wanted, **got}, indent=2) + "\n")
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def make_system(folder: Path) -> dict[str, Any]:
    """qemu and the root of an aarch64 Debian with Python in it, under ``folder``; the packages' versions."""
    mirror, scratch = find_mirror(), folder / "apt"
    keyring = find_keyring(scratch)
    packages = {}
    for architecture in ("amd64", "arm64"):
        apt = Apt(scratch / architecture, architecture, mirror=mirror, keyring=keyring)
        for package in apt.download(RECIPE[architecture]):
            name, version, _ = package.name.split("_")
            packages[name] = version.replace("%3a", ":")
            if name == "qemu-user":  # 465 MB unpacked, 17 of them are wanted
                archive = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE)
                run("tar", "x", "-C", folder, "--strip-components=3", "./usr/bin/qemu-aarch64", stdin=archive.stdout)
                archive.communicate()
            else:
                run("dpkg-deb", "--extract", package, folder / "root")
            package.unlink()
    (folder / "root" / "lib").symlink_to("usr/lib")  # as every installed Debian has it
    shutil.rmtree(scratch)
    return {"packages": packages}


def find_mirror() -> str:
    """Where this host gets Debian from, or what DEBIAN_MIRROR says."""
    if named := os.environ.get("DEBIAN_MIRROR"):
        return named
    form = "$(ORIGIN)|$(COMPONENT)|$(CREATED_BY)|$(SITE)"
    for line in run("apt-get", "indextargets", "--format", form).splitlines():
        origin, component, kind, site = line.split("|")
        if (origin, component, kind) == ("Debian", "main", "Packages") and "security" not in site:
            return site
    raise MissingToolError(
        "apt knows no mirror of Debian on this host",
        hint="run apt-get update on Debian; elsewhere set DEBIAN_MIRROR to the URL of one, which ends in /debian",
    )


def find_keyring(scratch: Path) -> Path:
    """What Debian's lists are signed with: the host's, or that of its package, which Ubuntu has too."""
    if (installed := Path("/") / KEYRING).is_file():
        return installed
    scratch.mkdir(parents=True, exist_ok=True)
    run("apt-get", "download", "debian-archive-keyring", cwd=scratch)
    (package,) = scratch.glob("debian-archive-keyring_*.deb")
    run("dpkg-deb", "--extract", package, scratch / "keyring")
    return scratch / "keyring" / KEYRING


class Apt:
    """apt for one architecture, on a folder of its own."""

    def __init__(self, folder: Path, architecture: str, *, mirror: str, keyring: Path) -> None:
        self._folder = folder
        for name in ("lists/partial", "archives/partial", "empty", "got"):
            (folder / name).mkdir(parents=True)
        (folder / "status").touch()
        source = f"deb [arch={architecture} signed-by={keyring}] {mirror} {RECIPE['suite']} main\n"
        (folder / "sources.list").write_text(source)
        settings = {
            "APT::Architecture": architecture,
            "APT::Architectures": architecture,
            "APT::Sandbox::User": "root",
            "Acquire::Languages": "none",
            "Dir::Cache": folder,
            "Dir::State::Lists": folder / "lists",
            "Dir::State::Status": folder / "status",
            "Dir::Etc::SourceList": folder / "sources.list",
            "Dir::Etc::SourceParts": folder / "empty",
            "Dir::Etc::PreferencesParts": folder / "empty",
        }
        self._options = [f"-o{name}={value}" for name, value in settings.items()]

    def download(self, names: Sequence[str]) -> list[Path]:
        """The packages of those names, no other; apt has checked them. Raises MissingToolError."""
        run("apt-get", "-qq", *self._options, "-oAPT::Update::Error-Mode=any", "update")
        run("apt-get", "-qq", *self._options, "download", *names, cwd=self._folder / "got")
        got = sorted((self._folder / "got").glob("*.deb"))
        missing = set(names) - {path.name.split("_")[0] for path in got}
        if missing:
            raise MissingToolError(f"apt did not bring {', '.join(sorted(missing))}", hint=_AGAIN)
        return got


def make_site(folder: Path, *, runtime: str, system: Path) -> dict[str, Any]:
    """The wheels of ``runtime``'s requirements, unpacked into ``folder``."""
    wheels = folder / "wheels"
    platforms = [word for name in WHEELS for word in ("--platform", name)]
    abis = [word for name in (f"cp{PYTHON.replace('.', '')}", "abi3", "none") for word in ("--abi", name)]
    options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--no-cache-dir"]
    words = ["--python-version", PYTHON, "--implementation", "cp", *abis, *platforms, "--dest", wheels]
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download")
    # In the folder rather than in /tmp, which may be small: pip writes a wheel twice.
    run(*pip, *options, *words, "--requirement", HERE / f"{runtime}.txt", TMPDIR=str(folder))
    for wheel in sorted(wheels.iterdir()):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if not name.startswith(NOT_FOR_CPU)])
        wheel.unlink()
    wheels.rmdir()
    if runtime != "executorch":
        return {}
    torch = folder / "torch"
    native = [*torch.glob("lib/*.so*"), *torch.glob("_C.*.so"), *(folder / "executorch").rglob("_portable_lib.*.so")]
    native += (folder / "executorch").rglob("lib*_ops_aot_lib.so")
    there = [path for path in (system / "root/usr/lib/aarch64-linux-gnu").glob("*.so*") if path.is_file()]
    there.append(system / f"root/usr/bin/python{PYTHON}")
    return {"stand-ins": stubs.write_missing(native, torch / "lib", provided=there)}


def check_core(machine: Machine, core: Core) -> None:
    """That qemu shows the programs in it that core. Raises MissingToolError."""
    program = "import platform; print(platform.machine(), open('/proc/cpuinfo').read())"
    said = machine.run(core, "-I", "-c", program)
    if not said.startswith("aarch64") or f"CPU part\t: {core.part:#05x}" not in said:
        raise MissingToolError(
            f"an emulated {core.name} does not say that its part is {core.part:#05x}", hint=f"remove {machine.system}"
        )


_AGAIN = "see that the network is there, and run it again"


def run(*words: str | Path, cwd: Path | None = None, stdin: Any = None, **environment: str) -> str:
    """Standard output of a tool of the host. Raises MissingToolError with the last that it said."""
    done = subprocess.run(
        list(map(str, words)),
        cwd=cwd,
        stdin=stdin or subprocess.DEVNULL,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        said = "; ".join((done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-2:])
        name = " ".join(Path(word).name for word in map(str, words[:3]))
        raise MissingToolError(f"{name} ended with {done.returncode}: {said}", hint=_AGAIN)
    return done.stdout
