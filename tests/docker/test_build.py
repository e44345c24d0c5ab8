"""Tests that `docker/Dockerfile.cpu`, built on a base from parts of this machine, trains as the user that it names.

The base is emulated: it is this interpreter, with this machine's `/usr` and this environment's packages mounted. So pip
checks the versions and installs nothing. `make docker-test` builds without these mounts.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docker.bases import PACKAGES, SYSTEM, add_mounted_base, missing
from tests.docker.context import DECOYS, copy_context
from tests.docker.images import Container, ImageError, Images, open_images
from tests.docker.pins import ROOT

NAME = "localhost/trainer:cpu"
UID = 10001
VOLUMES = (*SYSTEM, PACKAGES)
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Images]:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    context = copy_context(tmp_path_factory.mktemp("docker"), own_pins=True)
    with open_images("vfs") as made:
        add_mounted_base(made)
        printed = made.build(NAME, context, "docker/Dockerfile.cpu", (), VOLUMES)
        assert "Successfully installed" not in printed
        yield made


@pytest.fixture(scope="module")
def container(images: Images) -> Iterator[Container]:
    with images.container(NAME) as made:
        yield made


def files_of(folder: Path) -> set[str]:
    """Returns the files below a folder, without compiled files."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(path) for path in found if "__pycache__" not in path.parts}


def test_image_holds_the_sources_and_nothing_else(container: Container) -> None:
    sources = (
        "base",
        "comm",
        "conf",
        "data",
        "dualpipe",
        "evaluation",
        "infer",
        "kernels",
        "launch",
        "model",
        "planner",
        "score",
        "train",
        "verify",
    )
    expected = {f"{name}/{file}" for name in sources for file in files_of(ROOT / name)}
    assert files_of(container.root / "app") == expected | {"LICENSE", "docker/requirements.txt"}
    assert not any((container.root / "app" / decoy).exists() and "__pycache__" not in decoy for decoy in DECOYS)
    assert not (container.root / "app/data/__pycache__/mix.pyc").exists()


def test_image_is_writable_only_in_the_folder_of_runs(container: Container) -> None:
    places = [Path(folder) / name for folder, inner, files in os.walk(container.root) for name in (*inner, *files)]
    of_user = [place for place in places if place.lstat().st_uid == UID]
    assert of_user == []
    open_to_all = {
        f"/{place.relative_to(container.root)}" for place in places if place.is_dir() and place.stat().st_mode & 2
    }
    assert (
        {"/app/outputs", "/home/trainer"}
        <= open_to_all
        <= {"/app/outputs", "/home/trainer", "/tmp", "/var/tmp", "/dev/shm"}
    )


def test_image_trains_the_quickstart_as_its_user(images: Images, container: Container, tmp_path: Path) -> None:
    config = images.config(NAME)
    assert config["User"] == str(UID)
    assert config["WorkingDir"] == "/app"
    assert config["Volumes"] == {"/app/outputs": {}}
    assert config["Cmd"] == ["python", "-m", "launch.train", "experiment=quickstart"]
    tmp_path.chmod(0o1777)
    printed = container.run(
        [*config["Cmd"], "task.steps=2", "parallelism=two_ranks"], [*VOLUMES, f"{tmp_path}:/app/outputs"]
    )
    assert "step     2  checkpoint outputs/quickstart/" in printed
    (folder,) = (tmp_path / "quickstart").iterdir()
    assert folder.stat().st_uid == UID
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]


def test_image_runs_other_commands_as_any_user(container: Container) -> None:
    command = [
        "python",
        "-m",
        "launch.schedule",
        "schedule=dualpipe",
        "num_ranks=4",
        "num_micro_batches=8",
        "format=json",
    ]
    schedule = json.loads(container.run(command, VOLUMES, user="4242:4242"))
    assert (schedule["kind"], schedule["num_ranks"], schedule["num_micro_batches"]) == ("dualpipe", 4, 8)
    with pytest.raises(ImageError, match=r"exit code 2\n.*did you mean optim\.learning_rate"):
        container.run(["python", "-m", "launch.train", "optim.learning_rat=1"], VOLUMES, user="4242:4242")
