"""Builds and runs images without a daemon, with buildah in a chroot and a temporary storage.

`tests.docker.bases` builds the replacement of the base that a Dockerfile names.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BASE = "localhost/base:test"
_BUILD_SECONDS = 1800.0
_NETAVARK = ("/usr/lib/podman/netavark", "/usr/libexec/podman/netavark", "/usr/local/libexec/podman/netavark")


class ImageError(RuntimeError):
    """buildah, or what it ran, failed."""


def missing() -> str | None:
    """Returns why no image can be built here; None if one can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "images are built with Linux and root"
    if shutil.which("buildah") is None or not any(Path(place).exists() for place in _NETAVARK):
        return "images are built by buildah, which needs netavark: apt-get install buildah netavark"
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        return "images are built where file systems may be mounted, not here"
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Images:
    """A storage of images, empty at first."""

    folder: Path
    driver: str

    def call(self, *arguments: str) -> str:
        command = ["buildah", f"--root={self.folder}/storage", f"--runroot={self.folder}/run"]
        command += [f"--storage-driver={self.driver}", *arguments]
        done = subprocess.run(
            command,
            env={**os.environ, "BUILDAH_ISOLATION": "chroot", "CONTAINERS_CONF": f"{self.folder}/containers.conf"},
            capture_output=True,
            text=True,
            timeout=_BUILD_SECONDS,
        )
        if done.returncode:
            raise ImageError(
                f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
            )
        return done.stdout.strip()

    def build(self, name: str, context: Path, dockerfile: str, values: Sequence[str], volumes: Sequence[str]) -> str:
        """Builds an image on `BASE`. Returns the output of its instructions."""
        options = [f"--build-arg={value}" for value in (f"BASE_IMAGE={BASE}", *values)]
        options += [f"--volume={volume}" for volume in volumes]
        options += ["--format=docker", "--pull=never", f"--file={context / dockerfile}", f"--tag={name}"]
        return self.call("build", *options, str(context))

    def config(self, name: str) -> dict[str, Any]:
        """Returns the image's run configuration: `User`, `Cmd`, `Env` and so on."""
        return dict(json.loads(self.call("inspect", "--type=image", name))["Docker"]["config"])

    @contextmanager
    def container(self, name: str) -> Iterator["Container"]:
        """A container of an image, and its file system as a folder here."""
        number = self.call("from", "--pull=never", name)
        try:
            yield Container(images=self, number=number, root=Path(self.call("mount", number)))
        finally:
            self.call("rm", number)

    def import_base(self, source: Path, settings: Sequence[str]) -> None:
        """Creates `BASE` from a folder or an archive."""
        number = self.call("from", "scratch")
        self.call("add", "--quiet", number, str(source), "/")
        self.call("config", *settings, number)
        self.call("commit", "--quiet", "--rm", number, BASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Container:
    """Creates a handle to a container; `root` is its file system."""

    images: Images
    number: str
    root: Path

    def run(self, command: Sequence[str], volumes: Sequence[str], user: str | None = None) -> str:
        """Runs a command as the image's user or another one. Returns its output. `volumes` are as in `Images.build`."""
        options = [f"--volume={volume}" for volume in volumes]
        options += [] if user is None else [f"--user={user}"]
        return self.images.call("run", *options, self.number, "--", *command)


@contextmanager
def open_images(driver: str) -> Iterator[Images]:
    """Yields an empty storage, and removes it with its containers, images and mounts afterwards.

    Args:
        driver: storage driver: `vfs` copies each layer and works everywhere, `overlay` is faster with large layers.
    """
    folder = Path(tempfile.mkdtemp(prefix="images-"))
    # buildah would raise limits above those of this process, which is not allowed everywhere, even for root.
    limits = [
        f'"{name}={":".join(map(str, resource.getrlimit(number)))}"'
        for name, number in (("nofile", resource.RLIMIT_NOFILE), ("nproc", resource.RLIMIT_NPROC))
    ]
    (folder / "containers.conf").write_text(f"[containers]\ndefault_ulimits = [{', '.join(limits)}]\n")
    images = Images(folder=folder, driver=driver)
    try:
        yield images
    finally:
        try:
            images.call("rm", "--all")
            images.call("rmi", "--all", "--force")
        finally:
            mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
            for mount in sorted((mount for mount in mounts if Path(mount).is_relative_to(folder)), reverse=True):
                subprocess.run(["umount", mount], check=True)
            shutil.rmtree(folder)
