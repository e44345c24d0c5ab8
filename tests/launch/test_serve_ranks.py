"""Tests of `launch.serve` on several ranks: the texts of `launch.generate`, signals, and a lost rank."""

import http.client
import json
import os
import random
import re
import shutil
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from base.refusal import ConfigError
from comm.exits import EXIT_LOST
from infer.placement import PlacementError
from launch.config.folder import write_run_folder
from launch.config.run import compose_run
from launch.generate import main as run_generate
from launch.place import main as run_place
from launch.serve import _check, _decode, describe_model, preview
from launch.serve import main as run_serve
from tests.commands import StartedCommand
from tests.ports import reserved_port
from tests.refusals import assert_refused


@contextmanager
def started(run: Path, *overrides: str) -> Iterator[tuple[StartedCommand, str]]:
    """Starts a server and yields it with its URL when it answers."""
    with reserved_port() as port:
        sizes = [f"port={port}", "max_sequences=8", "cached_tokens=512"]
        server = StartedCommand(["python", "-m", "launch.serve", f"ckpt={run}", "name=tiny", *sizes, *overrides])
        url = f"http://127.0.0.1:{port}"
        try:
            until = time.monotonic() + 120
            while status(f"{url}/health") != 200:
                assert time.monotonic() < until
                time.sleep(0.1)
            yield server, url
        finally:
            server.kill()


def status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def complete(url: str, **body: Any) -> tuple[int, Any]:
    content = json.dumps({"model": "tiny", "temperature": 0, **body}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", content, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def ranks_of(server: StartedCommand) -> list[int]:
    """Returns the processes of a server's ranks, by rank: the children of its fork server."""
    parents = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    forks = {process for process, parent in parents.items() if parent == server.pid}
    return sorted(process for process, parent in parents.items() if parent in forks)


@pytest.mark.long
def test_concurrent_requests_get_the_texts_of_generate_and_a_lost_rank_is_named(run: Path, tmp_path: Path) -> None:
    rng = random.Random(2)
    words = ["def f(x):", "naïve", " café", "return x + 1\n", "日本", " x", "a"]
    prompts = ["".join(rng.choices(words, k=rng.randrange(1, 5))) for _ in range(50)]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts), encoding="utf-8")
    made = tmp_path / "made.jsonl"
    assert run_generate([f"ckpt={run}", f"prompts={file}", "temperature=0", "max_new_tokens=8", f"out={made}"]) == 0
    expected = [json.loads(line)["text"] for line in made.read_text(encoding="utf-8").splitlines()]
    placement = tmp_path / "placement.json"
    loads = tmp_path / "loads.jsonl"
    rows = {f"layer_{layer}": [90, 1, 1, 2, 50, 3, 2, layer] for layer in (1, 2)}  # the second one is an MTP module
    loads.write_text(json.dumps({"step": 1, **rows}) + "\n")
    sizes = ["ranks=4", "ranks_per_node=4", "redundant=4", "groups=4", "layers=2", "format=json"]
    assert run_place([f"loads={loads}", *sizes, f"out={placement}"]) == 0
    with started(run, "ranks=4", "dispatch=two_hop", f"placement={placement}", "rebalance_seconds=0.2") as (
        server,
        url,
    ):
        order = rng.sample(range(50), 50)
        with ThreadPoolExecutor(16) as threads:
            answers = dict(
                zip(order, threads.map(lambda at: complete(url, prompt=prompts[at], max_tokens=8), order), strict=True)
            )
        assert [answers[at][1]["choices"][0]["text"] for at in range(50)] == expected
        os.kill(ranks_of(server)[2], signal.SIGKILL)
        code, body = complete(url, prompt="a", max_tokens=40)
        assert (code, body["error"]["code"]) == (503, "engine_died"), body
        ended = server.wait(30)
    assert ended.returncode == EXIT_LOST, ended.stderr
    assert "rank 2 was ended by SIGKILL" in ended.stderr


@pytest.mark.long
@pytest.mark.parametrize(
    ("rank", "number", "line"),
    [
        (1, signal.SIGSTOP, "ranks: rank 1 is stopped and does not continue"),
        (0, signal.SIGSTOP, "ranks: rank 0 is stopped and does not continue"),
        (1, signal.SIGKILL, "ranks: rank 1 was ended by SIGKILL"),
        (0, signal.SIGKILL, "ranks: rank 0 was ended by SIGKILL"),
    ],
)
def test_rank_that_a_signal_stops_or_ends_is_named_in_one_line(
    run: Path, rank: int, number: signal.Signals, line: str
) -> None:
    """Clients get 503 without the words of a library, or, of rank 0, the end of their connection."""
    with started(run, "ranks=2") as (server, url), ThreadPoolExecutor(1) as threads:
        answer = threads.submit(complete, url, prompt="a", max_tokens=60, ignore_eos=True)
        time.sleep(0.05)
        os.kill(ranks_of(server)[rank], number)
        ended = server.wait(40)
        if rank == 0:
            assert isinstance(answer.exception(), OSError | http.client.HTTPException)
        else:
            code, body = answer.result()
            message = r"the engine has ended; the server's log has the reason of error [0-9a-f]{8}"
            assert code == 503
            assert re.fullmatch(message, body["error"]["message"])
    assert ended.returncode == EXIT_LOST, ended.stderr
    assert line in ended.stderr.splitlines()
    assert "Traceback" not in ended.stderr
    assert len(ended.stderr.splitlines()) < 10, ended.stderr


@pytest.mark.parametrize("overrides", [(), ("speculative=false",)])
def test_placement_of_mtp_modules_is_accepted(overrides: tuple[str, ...], run: Path, tmp_path: Path) -> None:
    loads = tmp_path / "loads.jsonl"
    loads.write_text('{"step": 1, "layer_1": [9, 1, 1, 2, 5, 3, 2, 1], "layer_2": [1, 1, 1, 2, 5, 3, 2, 7]}\n')
    placement = tmp_path / "placement.json"
    assert run_place([f"loads={loads}", "ranks=4", "ranks_per_node=4", "format=json", f"out={placement}"]) == 0
    assert "placement.json" in preview([f"ckpt={run}", "ranks=4", f"placement={placement}", *overrides])


@pytest.mark.long
def test_sigterm_drains_ranks_with_roles(run: Path) -> None:
    with started(run, "ranks=3", "prefill_ranks=1", "overlap=true") as (server, url), ThreadPoolExecutor(1) as threads:
        answer = threads.submit(complete, url, prompt="def f", max_tokens=40, ignore_eos=True)
        time.sleep(0.1)
        os.kill(server.pid, signal.SIGTERM)
        ended = server.wait(30)
        assert answer.result()[0] in (200, 503)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(
    ("overrides", "error", "parts"),
    [
        ("ranks=2 prefill_ranks=2", ConfigError, ["prefill_ranks", "less than ranks=2", "is 2", "valid: 1"]),
        ("dispatch=two_hop", ConfigError, ["dispatch", "ranks that share the experts", "dispatch=all_to_all"]),
        ("dispatch.payload=fp8", ConfigError, ["dispatch.payload", "ranks that share the experts", "valid: full"]),
        ("ranks=2 dispatch=local", ConfigError, ["dispatch", "needs parallelism.expert=1"]),
        ("overlap=true", ConfigError, ["overlap", "ranks that share the experts", "valid: auto"]),
        ("rebalance_seconds=5", ConfigError, ["ranks", "at least 2"]),
        ("ranks=2 placement=FILE", PlacementError, ["placement", "ranks=2 and 8 experts", "for 4 and 8"]),
        ("ranks=4 placement=FILE", PlacementError, ["placement", "must place layers from", "is of layer 99"]),
    ],
)
def test_ranks_that_cannot_serve_are_refused(
    overrides: str, error: type[ValueError], parts: list[str], run: Path, tmp_path: Path
) -> None:
    file = tmp_path / "placement.json"
    sizes = {"num_experts": 8, "num_groups": 4, "num_ranks": 4, "num_nodes": 1, "num_redundant": 4, "policy": "global"}
    experts = [[0, 1, 2], [3, 4, 5], [6, 7, 0], [1, 2, 3]]
    file.write_text(json.dumps({**sizes, "layers": {"layer_99": {"experts": experts}}}))
    assert_refused(error, parts, lambda: run_serve([f"ckpt={run}", *overrides.replace("FILE", str(file)).split()]))


def test_node_limit_holds_for_placements(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(*overrides: str) -> None:
        _check(_decode([f"ckpt={run}", "dispatch=two_hop", *overrides]))

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # each rank is a node
    loads = tmp_path / "loads.jsonl"
    loads.write_text('{"step": 1, "layer_1": [9, 1, 1, 2, 5, 3, 2, 1]}\n')
    sizes = [f"loads={loads}", "ranks=4", "ranks_per_node=1", "format=json", "redundant=0"]
    for policy in ("hierarchical", "global"):
        assert run_place([*sizes, "groups=4", f"policy={policy}", f"out={tmp_path / policy}"]) == 0
    # The router of 4 groups chooses 2 of them.
    check("ranks=4", "dispatch.max_nodes=2")
    check("ranks=4", "dispatch.max_nodes=2", f"placement={tmp_path / 'hierarchical'}", "rebalance_seconds=5")
    check("ranks=3", "dispatch.max_nodes=3")
    refused = ["dispatch.max_nodes", "may be sent to", "is 2", "dispatch.node_cap=clip"]
    for overrides in (
        ["ranks=4", "rebalance_seconds=5"],
        ["ranks=4", f"placement={tmp_path / 'global'}"],
        ["ranks=3"],
    ):
        check(*overrides, "dispatch.max_nodes=2", "dispatch.node_cap=clip")
        assert_refused(ConfigError, refused, lambda: check(*overrides, "dispatch.max_nodes=2"))  # noqa: B023
    assert_refused(ConfigError, ["dispatch.max_nodes", "2 nodes"], lambda: check("ranks=4", "dispatch.max_nodes=1"))


@pytest.mark.parametrize("origin", ["localhost:3000", "http://localhost:3000/", "http://a b"])
def test_origin_that_no_browser_sends_is_refused(run: Path, origin: str) -> None:
    assert "cors_origins" in preview([f"ckpt={run}", "cors_origins=['http://a:1','*']"])
    with pytest.raises(ConfigError, match="cors_origins: must have origins such as"):
        preview([f"ckpt={run}", f"cors_origins=['{origin}']"])


def test_model_has_the_name_of_its_run(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    checkpoint = next((copy / "checkpoints").iterdir())

    def name(*overrides: str) -> str:
        config = _decode(overrides)
        return describe_model(config, _check(config)[0]).name

    write_run_folder(compose_run(["experiment=quickstart", f"out_dir={copy}"]), datetime.now())
    assert [name(f"ckpt={folder}") for folder in (copy, checkpoint)] == ["quickstart"] * 2
    assert name(f"ckpt={copy}", "name=other") == "other"
    (copy / "config.yaml").write_text("name: [")
    assert name(f"ckpt={copy}") == "copy"
