"""Sizes of downloads, from `uv.lock`: `python -m tests.install_sizes` prints those of docs/install.md."""

import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

from packaging.markers import Marker
from packaging.tags import compatible_tags, cpython_tags
from packaging.utils import parse_wheel_filename

from tests import ROOT

PROJECT = "dualpipe-trainer"
CPU_TORCH_BYTES = 160_289_084
"""Size of torch-2.13.0+cpu-cp311-cp311-linux_x86_64.whl, which is on torch's own index alone."""
EXTRAS = (
    "score",
    "serve",
    "structured",
    "tensorboard",
    "reasoning",
    "triton",
    "dev",
    "lm-eval",
    "datatrove",
    "docs",
    "bench",
)
_PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(40, 4, -1)]
_PLATFORMS += ["manylinux2014_x86_64", "manylinux1_x86_64", "linux_x86_64"]
_TAGS = {*cpython_tags((3, 11), platforms=_PLATFORMS), *compatible_tags((3, 11), "cp311", _PLATFORMS)}
_LINUX = {
    "python_version": "3.11",
    "python_full_version": "3.11.9",
    "sys_platform": "linux",
    "platform_system": "Linux",
    "platform_machine": "x86_64",
    "platform_python_implementation": "CPython",
    "implementation_name": "cpython",
    "os_name": "posix",
    "extra": "",
}


def locked() -> list[dict[str, Any]]:
    packages: list[dict[str, Any]] = tomllib.loads((ROOT / "uv.lock").read_text("utf-8"))["package"]
    return packages


def sizes(*extras: str) -> dict[str, int]:
    """Returns the bytes of each package that running and the extras need, on Linux x86_64 with Python 3.11 and CUDA."""
    versions: dict[str, list[dict[str, Any]]] = {}
    for package in locked():
        versions.setdefault(package["name"], []).append(package)
    found: dict[str, int] = {}
    waiting = [(PROJECT, "", extra) for extra in ("", *extras)]
    seen = set()
    while waiting:
        name, version, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        (package,) = [one for one in versions[name] if version in ("", one["version"])]
        if name != PROJECT:
            found[name] = _size(package)
        waiting += _dependencies(package, extra)
        waiting += _dependencies(package, "")
    return found


def of_cpu(found: Mapping[str, int]) -> dict[str, int]:
    """Returns the sizes with torch for CPUs in place of torch with CUDA and what that brings."""
    kept = {
        name: size for name, size in found.items() if not name.startswith(("nvidia-", "cuda-")) and name != "triton"
    }
    return {**kept, "torch": CPU_TORCH_BYTES}


def _dependencies(package: Mapping[str, Any], extra: str) -> Iterator[tuple[str, str, str]]:
    listed = package.get("optional-dependencies", {}).get(extra, []) if extra else package.get("dependencies", [])
    for entry in listed:
        if "marker" not in entry or Marker(entry["marker"]).evaluate(_LINUX):
            for inner in ("", *entry.get("extra", ())):
                yield entry["name"], entry.get("version", ""), inner


def _size(package: Mapping[str, Any]) -> int:
    """Returns the size of the wheel for this system, or of the sources if there is none."""
    fitting = [
        wheel["size"]
        for wheel in package.get("wheels", ())
        if parse_wheel_filename(wheel["url"].rpartition("/")[2])[3] & _TAGS
    ]
    return min(fitting) if fitting else package["sdist"]["size"]


def table() -> dict[str, tuple[float, int]]:
    """Returns megabytes and number of packages, for running and, beyond that, for each extra."""
    cuda = sizes()
    rows = {"CPUs": of_cpu(cuda), "CUDA": cuda}
    for extra in EXTRAS:
        more = sizes(extra)
        rows[extra] = {
            name: size
            for name, size in more.items()
            if name not in of_cpu(cuda) and not name.startswith(("nvidia-", "cuda-"))
        }
        if extra not in ("triton", "dev"):
            rows[extra].pop("triton", None)
    return {name: (sum(found.values()) / 1e6, len(found)) for name, found in rows.items()}


if __name__ == "__main__":
    for name, (megabytes, number) in table().items():
        print(f"{name:10} {megabytes:8,.1f} MB {number:4} packages")
