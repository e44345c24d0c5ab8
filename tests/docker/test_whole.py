"""Tests both Dockerfiles on a Debian base with all packages. Takes minutes, so it runs only in `make docker-test`.

Only the base is emulated: minimal Debian with this machine's Python and pip instead of `python:3.11-slim`.
`Dockerfile.cpu` installs every package. `Dockerfile` installs Debian's packages instead of Ubuntu's, and uses the
Python packages of this environment, which has torch for CPUs.
"""

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.docker.bases import CERTIFICATES, PACKAGES, add_debian_base, local_torch_index, missing
from tests.docker.context import copy_context
from tests.docker.images import Images, open_images
from tests.ports import reserved_port

JOB = ("python", "-m", "launch.train", "experiment=quickstart", "task.steps=2")

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif("DOCKER_WHOLE" not in os.environ, reason="whole images take minutes: make docker-test"),
]


@pytest.fixture(scope="module")
def images() -> Iterator[Images]:
    reason = missing()
    if shutil.which("mmdebstrap") is None:
        reason = reason or "whole images are built on a base by mmdebstrap: apt-get install mmdebstrap"
    if reason is not None:
        pytest.skip(reason)
    with open_images("overlay") as made:
        add_debian_base(made)
        yield made


def test_cpu_image_installs_all_and_trains(images: Images, tmp_path: Path) -> None:
    index = tmp_path / "index"
    index.mkdir()
    local = local_torch_index(index)
    arguments = [] if local is None else [f"TORCH_INDEX={local}"]
    volumes = [CERTIFICATES, f"{index}:{index}:ro"]
    context = copy_context(tmp_path, own_pins=False)
    printed = images.build("localhost/trainer:cpu", context, "docker/Dockerfile.cpu", arguments, volumes)
    assert printed.count("Successfully installed") == 2
    assert "No broken requirements found." in printed
    assert "triton" not in printed.lower()
    with images.container("localhost/trainer:cpu") as container:
        added = sum(bytes_below(container.root / name) for name in ("opt/venv", "app"))
        print(f"Dockerfile.cpu adds {added / 2**20:,.0f} MiB to its base")
        assert added < 1.5 * 2**30
        assert "step     2  checkpoint" in container.run(JOB, ())
    assert "step     2  checkpoint" in run_on_two_nodes(images, "localhost/trainer:cpu", tmp_path / "outputs")


def bytes_below(folder: Path) -> int:
    """Returns the size of the files in a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def run_on_two_nodes(images: Images, name: str, outputs: Path) -> str:
    """Runs the job with torchrun in two containers on the host's network. Returns the output of node 0."""
    outputs.mkdir()
    outputs.chmod(0o1777)
    command = ["-m", "launch.train", "experiment=two_nodes", "task.steps=2", "out_dir=outputs/run"]
    with (
        reserved_port() as port,
        images.container(name) as first,
        images.container(name) as second,
        ThreadPoolExecutor(2) as pool,
    ):
        meeting = ["--nnodes=2", "--nproc-per-node=4", "--master-addr=127.0.0.1", f"--master-port={port}"]
        printed = [
            pool.submit(
                node.run, ["torchrun", *meeting, f"--node-rank={number}", *command], [f"{outputs}:/app/outputs"]
            )
            for number, node in enumerate((first, second))
        ]
        texts = [one.result() for one in printed]
    assert sorted(path.name for path in (outputs / "run/log").glob("rank_*.log")) == [
        f"rank_{rank:05d}.log" for rank in range(8)
    ]
    return texts[0]


def test_cuda_image_installs_its_system_packages_and_trains_on_cpus(images: Images, tmp_path: Path) -> None:
    context = copy_context(tmp_path, own_pins=True)
    printed = images.build("localhost/trainer:cuda", context, "docker/Dockerfile", (), [CERTIFICATES, PACKAGES])
    assert "Successfully installed" not in printed
    assert "No broken requirements found." in printed
    with images.container("localhost/trainer:cuda") as container:
        compiler, verbs = container.root / "usr/bin/gcc", container.root / "usr/bin/ibv_devices"
        assert compiler.exists()
        assert verbs.exists()
        assert not any((container.root / "var/lib/apt/lists").glob("*Packages*"))
        assert "step     2  checkpoint" in container.run(JOB, [PACKAGES])
