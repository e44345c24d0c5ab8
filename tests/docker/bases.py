"""Builds base images from parts of this machine, for tests that cannot pull an image."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from tests.docker import images
from tests.docker.images import Images

_PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
_STDLIB = Path(sysconfig.get_path("stdlib"))
_SYSTEM = ("/usr/bin", "/usr/sbin", "/usr/lib", "/usr/lib64")
_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
PACKAGES = f"{sysconfig.get_path('purelib')}:/usr/local/lib/{_PYTHON}/site-packages:ro"
"""Volume: this environment's packages, where a base's Python looks for its own. pip finds them and installs none."""

SYSTEM = tuple(f"{folder}:{folder}:ro" for folder in _SYSTEM if Path(folder).is_dir())
"""Volumes: this machine's programs and libraries."""

CERTIFICATES = f"{_CERTIFICATES}:{_CERTIFICATES}:ro"
"""Volume: whom this machine trusts, for a pip that reaches its index through a proxy."""


def missing() -> str | None:
    """Returns why no image can be built here on a base of this machine's parts; None if one can."""
    if not Path("/bin").is_symlink():
        return "a base is made of a system with all programs in /usr, as Debian since 12 has it"
    if _STDLIB.is_relative_to("/usr/lib"):
        return "a base is made of a Python that can be moved; this one is the distribution's"
    return images.missing()


def add_mounted_base(into: Images) -> None:
    """Builds a base in seconds without a network: this interpreter, with `SYSTEM` and `PACKAGES` as volumes.

    There is no apt.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in ("etc", "home", "root", "tmp", "usr", "var"):
            (folder / name).mkdir()
        (folder / "tmp").chmod(0o1777)
        for name in ("bin", "lib", "lib64", "sbin"):
            (folder / name).symlink_to(f"usr/{name}")
        (folder / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
        (folder / "etc/group").write_text("root:x:0:\n")
        _copy_python(folder)
        into.import_base(folder, (f"--env={_PATH}", "--env=LD_LIBRARY_PATH=/usr/local/lib"))


def add_debian_base(into: Images) -> None:
    """Builds a base like `python:3.11-slim`: minimal Debian, and this interpreter with pip and no other package.

    Takes about a minute, and a network that reaches Debian's archive.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "base"
        folder.mkdir()
        archive = Path(scratch) / "debian.tar"
        # Debian's Python is not used: it stands for the libraries that ours needs.
        subprocess.run(
            [
                "mmdebstrap",
                "--quiet",
                "--variant=minbase",
                "--include=ca-certificates,python3",
                _release(),
                str(archive),
            ],
            check=True,
        )
        subprocess.run(["tar", "--extract", f"--file={archive}", f"--directory={folder}"], check=True)
        archive.unlink()
        _copy_python(folder)
        for command in (["ldconfig"], [f"/usr/local/bin/{_PYTHON}", "-m", "ensurepip"]):
            subprocess.run(["chroot", str(folder), *command], check=True, stdout=subprocess.DEVNULL)
        into.import_base(folder, (f"--env={_PATH}", f"--env=PIP_CERT={_CERTIFICATES}"))


def _release() -> str:
    lines = Path("/etc/os-release").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)["VERSION_CODENAME"].strip('"')


def _copy_python(folder: Path) -> None:
    local = folder / "usr/local"
    (local / "bin").mkdir(parents=True, exist_ok=True)
    shutil.copy2(Path(sys.executable).resolve(), local / "bin" / _PYTHON)
    (local / "bin/python3").symlink_to(_PYTHON)
    skipped = shutil.ignore_patterns("site-packages", "test", "config-*", "__pycache__")
    shutil.copytree(_STDLIB, local / "lib" / _PYTHON, ignore=skipped, symlinks=True)
    (local / "lib" / _PYTHON / "site-packages").mkdir()
    for library in Path(sysconfig.get_config_var("LIBDIR")).glob(f"lib{_PYTHON}.so*"):
        shutil.copy2(library, local / "lib" / library.name)


def local_torch_index(folder: Path) -> str | None:
    """Builds a package index for `PIP_FIND_LINKS` with this machine's wheel of torch; None if there is no wheel."""
    for given in os.environ.get("PIP_FIND_LINKS", "").split():
        wheels = sorted(Path(given).glob(f"torch-*-cp{sys.version_info.major}{sys.version_info.minor}-*.whl"))
        if wheels:
            (folder / "torch").mkdir()
            shutil.copy2(wheels[-1], folder / "torch")
            (folder / "torch/index.html").write_text(f'<a href="{wheels[-1].name}">{wheels[-1].name}</a>\n')
            return f"file://{folder}"
    return None
