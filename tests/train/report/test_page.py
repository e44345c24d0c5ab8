"""The report of a run: whole, offline, of what the folder says, whatever its length and however it ended."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from base.figures import seconds
from base.refusal import ConfigError
from launch.config.folder import write_run_folder
from launch.redraw import main as redraw
from tests.covering import exhaustive
from tests.documents import browse, check_policy
from tests.tiny import tiny_config, write_text
from train.config import TrainConfig
from train.files.run_files import ExitReason, RankFiles, State, Status, write_error, write_status
from train.report.charts import palette, png, relative_shades
from train.report.page import COMPARISON_NAME, REPORT_NAME, Report, compare, differing_settings
from train.report.source import History, RunSource, read_loads

VOID = {"meta", "img", "input"}
LOSS = "Loss"


class Page(HTMLParser):
    """Checks that elements close in order; gathers links and the charts by title."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.charts: dict[str, dict[str, Any]] = {}
        self.runs: list[dict[str, Any]] = []
        self._is_data = False
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.links += [found[key] or "" for key in ("src", "href", "xlink:href", "data") if key in found]
        self._is_data = tag == "script" and found.get("type") == "application/json"
        if tag not in VOID:
            self.open.append(tag)

    def handle_data(self, data: str) -> None:
        if self._is_data:
            values = json.loads(data)
            if isinstance(values, list):
                self.runs = values
            else:
                self.charts[values["title"]] = values
            self._is_data = False

    def numbers(self, title: str, run: int = 0) -> dict[str, dict[str, list[float]]]:
        """Numbers of a chart's lines in each bucket, by name."""
        numbers = self.runs[run]["numbers"]
        lines = self.charts[title]["lines"]
        return {line["name"]: numbers[line["key"]] for line in lines if line["key"] in numbers}

    def reading(self, title: str, step: int) -> dict[str, float]:
        """Values of a chart's lines at a step, by name."""
        spans = self.runs[0]["spans"]
        bucket = next(bucket for bucket, (first, last) in enumerate(spans) if first <= step <= last)
        return {name: values["mean"][bucket] for name, values in self.numbers(title).items()}

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, self.getpos()


def records(steps: range, num_layers: int = 2) -> Iterator[dict[str, Any]]:
    """Lines of `metrics.jsonl`."""
    for step in steps:
        router = {"max_violation": 1 / step, "bias_least": -0.01 * step, "bias_most": 0.02 * step, "bias_std": 0.01}
        yield {
            **{"step": step, "tokens": step * 64, "loss": 9 - step / 100, "main_loss": 8.0, "mtp_loss": 8.5},
            **{"grad_norm": 1.0, "lr": 1e-3, "tokens_per_second": 10.0 + step, "mfu": 0.31, "max_violation": 1 / step},
            **{"peak_memory_bytes": 5_000_000, "mean_peak_memory_bytes": 4e6, "pipeline_bubble": 0.1},
            **{"inter_node_bytes": 1000 * step, "intra_node_bytes": 10, "nodes_per_token": 1.5},
            "router": {f"layer_{layer}": router for layer in range(1, num_layers + 1)},
            "exchange": {"layer_1": {"rows_within_nodes": 77123, "nodes_per_token": 1.5, "lower_bound_share": None}},
        }


def place_run(folder: Path, steps: range, num_layers: int = 2, num_experts: int = 4) -> TrainConfig:
    """A run's folder as far as a report reads it."""
    write_text(folder, 20)
    config = write_run_folder(replace(tiny_config(folder), name="tried"), now=None)  # type: ignore[arg-type]
    run = Path(config.out_dir)
    with (run / "metrics.jsonl").open("a") as metrics, (run / "loads.jsonl").open("a") as loads:
        for record in records(steps, num_layers):
            metrics.write(json.dumps(record) + "\n")
            rows = {f"layer_{layer}": list(range(num_experts)) for layer in range(1, num_layers + 1)}
            loads.write(json.dumps({"step": record["step"], **rows}) + "\n")
    return config


@pytest.mark.parametrize("steps", [1, 6, 100, 1000])
def test_report_is_whole_and_offline_at_every_length(tmp_path: Path, steps: int) -> None:
    config = place_run(tmp_path, range(1, steps + 1))
    text = Report(config).write().read_text()
    page = Page(text)
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert len(page.links) == 3  # an overview of the layers, and a map of each
    assert not re.search(r"(?i)https?://(?!www\.w3\.org/)|@import|url\((?!#)", text)
    shown = re.sub(r"(?s)<script>.*</script>", "", text)
    assert not re.search(r"(?i)nan[,\" ]|inf[,\" ]|\$", shown)
    check_policy(text, has_script=True)
    assert "Copyright (c) 2022 Leon Sorokin" in text  # the license of the library in it
    for heading in ("Learning", "Speed and memory", "Experts", "Exchange"):
        assert f"<h2>{heading}</h2>" in text
    for told in ("Layer 2", "77.1k", f"{steps:,}", "31 %", "5 MB", "MaxVio of the worst layer"):
        assert told in text
    assert len(text) < 2_500_000


def test_report_draws_what_was_recorded_in_its_place(tmp_path: Path) -> None:
    config = place_run(tmp_path, range(1, 101))
    page = Page(Report(config).write().read_text())
    assert page.runs[0]["steps"] == list(range(1, 101))
    assert page.runs[0]["extent"] == [0.5, 100.5]
    assert page.runs[0]["tokens"] == [64 * step for step in range(1, 101)]
    assert page.runs[0]["hours"] is None  # the records have no step_seconds
    assert list(page.numbers(LOSS)) == ["total", "main", "MTP"]
    assert page.numbers(LOSS)["total"] == {"mean": [pytest.approx(9 - step / 100) for step in range(1, 101)]}


def test_report_draws_validation_by_position_and_evaluations_in_order(tmp_path: Path) -> None:
    config = place_run(tmp_path, range(1, 3))
    found = {"512-1023": 4.0, "0-127": 5.0, "128-255": 4.5, "1024-2047": 3.5, "256-511": 4.25}
    record = {**next(records(range(3, 4))), "validation_loss_by_position": found, "validation_bits_per_byte": 1.5}
    with (Path(config.out_dir) / "metrics.jsonl").open("a") as metrics:
        measured = {"evaluation_choice_accuracy": 0.25, "evaluation_<b>": 1.0}
        metrics.write(json.dumps({**record, **measured, "long_document_share": 0.5}) + "\n")
    page = Page(Report(config).write().read_text())
    assert list(page.numbers("Validation loss by position in the document")) == [
        f"tokens {name}" for name in ("0-127", "128-255", "256-511", "512-1023", "1024-2047")
    ]
    assert page.reading("Validation loss by position in the document", 3)["tokens 512-1023"] == 4.0
    assert page.reading("Validation bits per byte, up to the base length", 3) == {"bits per byte": 1.5}
    assert page.reading("Tokens in long documents", 3) == {"long documents": 0.5}
    assert page.reading("Evaluation: choice_accuracy", 3) == {"choice_accuracy": 0.25}
    assert [title for title in page.charts if title.startswith("Evaluation")] == ["Evaluation: choice_accuracy"]


def test_report_charts_metrics_of_plugins(tmp_path: Path) -> None:
    config = place_run(tmp_path, range(1, 3))
    with (Path(config.out_dir) / "metrics.jsonl").open("a") as metrics:
        metrics.write(json.dumps({**next(records(range(3, 4))), "bits_per_token": 11.5}) + "\n")
    page = Page(Report(config).write().read_text())
    assert page.reading("bits_per_token", 3) == {"bits_per_token": 11.5}
    assert len({line["key"] for chart in page.charts.values() for line in chart["lines"]}) == sum(
        len(chart["lines"]) for chart in page.charts.values()
    )


def test_report_shows_least_and_most_of_many_steps_as_a_band(tmp_path: Path) -> None:
    config = place_run(tmp_path, range(1, 1001))
    page = Page(Report(config).write().read_text())
    total = page.numbers(LOSS)["total"]
    first, last = page.runs[0]["spans"][1]
    assert total["most"][1] == pytest.approx(9 - first / 100)
    assert total["least"][1] == pytest.approx(9 - last / 100)
    assert total["mean"][1] == pytest.approx(9 - (first + last) / 200)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", *exhaustive("dark")])
def test_report_is_drawn_by_a_browser_from_a_file(tmp_path: Path, scheme: str) -> None:
    """Its script runs under its own content policy, draws every chart and maps, and logs no error."""
    page = Report(place_run(tmp_path, range(1, 40))).write().read_text()
    dark = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    drawn = browse(page, tmp_path, *dark)
    assert drawn.count("<canvas") == len(re.findall(r'class="plot"', page))
    # The recorded value of the last step, although lines are smoothed.
    assert "8.61" in re.findall(r'class="u-value">([^<]*)<', drawn)


def test_report_follows_a_run_that_resumes_is_rolled_back_and_rewritten(tmp_path: Path) -> None:
    config = place_run(tmp_path, range(1, 11))
    run, report = Path(config.out_dir), Report(config)
    report.write()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "loss": 4')
        file.flush()
        report.write()
        file.write(".25}\n")
        file.flush()
        followed = report.write().read_text()
        assert Page(followed).reading(LOSS, 11) == {"total": 4.25, "main": None, "MTP": None}
        assert followed == Report(config).write().read_text()
        file.write('{"step": 9, "loss": 3.125}\n')
    rolled_back = Page(report.write().read_text())
    assert rolled_back.reading(LOSS, 9)["total"] == 3.125
    assert rolled_back.runs[0]["steps"] == list(range(1, 10))
    (run / "new").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.25}\n')
    (run / "new").replace(run / "metrics.jsonl")
    again = Page(report.write().read_text())
    assert again.reading(LOSS, 2)["total"] == 2.25
    assert again.runs[0]["steps"] == [1, 2]


def test_report_shows_events_and_whole_checkpoints_as_text(tmp_path: Path) -> None:
    config = place_run(tmp_path, range(1, 7))
    run = Path(config.out_dir)
    event = {"step": 3, "kind": "skip", "text": "loss <script>alert(1)</script> & more"}
    (run / "events.jsonl").write_text(json.dumps(event) + "\nnot json\n[1]\n")
    for step, name in ((4, "manifest.json"), (6, "unfinished")):
        folder = run / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / name).write_text("{}")
    text = Report(config).write().read_text()
    page = Page(text)
    assert "loss &lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in text
    assert "checkpoints/step-00000004" in text
    assert "step-00000006" not in text
    assert page.runs[0]["marks"] == [[3, "skip"], [4, "checkpoint"]]
    assert page.reading(LOSS, 3) == {"total": 8.97, "main": 8.0, "MTP": 8.5}


@pytest.mark.parametrize(("state", "code"), [("stopped", 77), ("lost", 78), ("stopped", 1)])
def test_report_of_a_failed_run_says_so_at_the_top(tmp_path: Path, state: State, code: int) -> None:
    configs = [place_run(tmp_path / name, range(1, 4)) for name in ("a", "b")]
    folder = Path(configs[0].out_dir)
    before = Report(configs[0]).write().read_text()
    assert 'class="failed"' not in before
    write_status(folder, Status(state=state, step=3, checkpoint="checkpoints/step-3", exit_code=code, reason="<b>why"))
    files = RankFiles(0, configs[0].parallelism.world_size, configs[0].cluster.ranks_per_node)
    write_error(folder, files, ExitReason("why", code), "details")
    pages = {"This run": Report(configs[0]).write(), "tried run (1)": compare(configs)}
    for name, page in ((name, path.read_text()) for name, path in pages.items()):
        check_policy(page, has_script=True)
        top = page.partition("</h1>")[2].partition("</p>")[0]
        assert f"{name} failed with exit code {code} after step 3, 20" in top
        assert "&lt;b&gt;why" in top
        assert f"See log/{files.stem}.error.log. Newest checkpoint: checkpoints/step-3." in top
        assert page.count('class="failed"') == 1


def test_report_shows_where_and_how_each_run_was_started(tmp_path: Path) -> None:
    configs = [place_run(tmp_path / name, range(1, 4)) for name in ("a", "b")]
    here = Status(
        state="running", host="node<7>", started=1.8e9, commit="67fb3a3f5f80-dirty", command="python -m x <y>"
    )
    write_status(Path(configs[0].out_dir), here)
    for path in (Report(configs[0]).write(), compare(configs)):
        top = path.read_text().partition("</h1>")[2].partition("<dl>")[0]
        assert "on node&lt;7&gt;, commit 67fb3a3f5f80-dirty<br><code>python -m x &lt;y&gt;</code></p>" in top
        assert top.count("<code>") == 1


@pytest.mark.parametrize(("state", "code"), [("running", None), ("done", 0), ("preempted", 75)])
def test_report_of_a_run_that_did_not_fail_has_no_warning(tmp_path: Path, state: State, code: int | None) -> None:
    config = place_run(tmp_path, range(1, 4))
    write_status(Path(config.out_dir), Status(state=state, step=3, exit_code=code))
    assert 'class="failed"' not in Report(config).write().read_text()


def test_report_data_cannot_end_its_script(tmp_path: Path) -> None:
    config = place_run(tmp_path, range(1, 7))
    event = {"step": 3, "kind": "</script><script>alert(1)</script><!--", "text": "more"}
    (Path(config.out_dir) / "events.jsonl").write_text(json.dumps(event) + "\n")
    text = Report(config).write().read_text()
    assert "<script>alert" not in text
    assert Page(text).runs[0]["marks"] == [[3, event["kind"]]]


def test_report_leaves_out_numbers_that_are_none(tmp_path: Path) -> None:
    config = place_run(tmp_path, range(0))
    run = Path(config.out_dir)
    empty = Report(config).write().read_text()
    Page(empty)
    assert "<h2>" not in empty
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": NaN, "grad_norm": Infinity, "lr": 0.0}\n')
    text = Report(config).write().read_text()
    Page(text)
    assert "Learning rate" in text
    assert "Gradient norm" not in text


def test_report_that_cannot_be_drawn_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = place_run(tmp_path, range(1, 3))
    (Path(config.out_dir) / REPORT_NAME).mkdir()
    Report(config).try_to_write()
    assert "cannot be drawn" in caplog.text


def test_redraw_makes_the_report_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = place_run(tmp_path, range(1, 3))
    assert redraw([f"run={config.out_dir}"]) == 0
    assert capsys.readouterr().out == f"{config.out_dir}/{REPORT_NAME}\n"
    assert "tried" in (Path(config.out_dir) / REPORT_NAME).read_text()
    with pytest.raises(ConfigError, match=r"run: must be a run's folder, .* holds no config.yaml"):
        redraw([f"run={tmp_path}"])


def test_history_keeps_means_extremes_and_sums_when_buckets_are_joined() -> None:
    history, values = History(8), np.random.default_rng(3).normal(size=203)
    for step, value in enumerate(values.tolist(), 1):
        history.add(step, {"a": value, **({"rare": value} if step % 50 == 0 else {}), "never": math.nan})
        history.add_loads(step, {"layer_1": np.array([step, 1.0])})
    assert history.width == 32
    assert history.firsts == list(range(1, 204, 32))
    numbers = history.statistics("a")
    assert numbers is not None
    for bucket, (first, last) in enumerate(zip(history.firsts, history.lasts, strict=True)):
        part = values[first - 1 : last]
        assert (numbers.least_N[bucket], numbers.most_N[bucket]) == (part.min(), part.max())
        assert numbers.count_N[bucket] == len(part)
        assert numbers.mean_N[bucket] == pytest.approx(part.mean())
        assert history.loads[bucket]["layer_1"].tolist() == [sum(range(first, last + 1)), len(part)]
    assert history.latest("a") == values[-1]
    assert history.latest("rare") == values[199]
    assert history.keys == ["a", "rare"]
    assert history.latest("never") is None


def test_heat_map_is_a_png_of_its_shades() -> None:
    shades = relative_shades(np.array([[0.0, 0.25, 1.0], [4.0, 100.0, np.nan]]))
    assert shades.tolist() == [[0, 0, 32], [64, 64, 32]]
    content = png(shades, palette())
    import io

    matplotlib = pytest.importorskip("matplotlib.image", reason="reads the PNG back; matplotlib is not installed")
    pixels = np.rint(matplotlib.imread(io.BytesIO(content))[:, :, :3] * 255).astype(int)
    assert pixels.tolist() == [[list(palette()[shade]) for shade in row] for row in shades.tolist()]


@pytest.mark.parametrize(
    "row", [["a"], [], [[1]], [1e30], [2**60], [2**80], [1, [2]], None, 3, {"a": 1}, [None], [float("nan")]]
)
def test_row_of_loads_that_is_not_numbers_is_left_out(row: object) -> None:
    loads = read_loads({"step": 1, "layer_1": row, "layer_2": [1, 2.5]})
    assert {layer: numbers.tolist() for layer, numbers in loads.items()} == {"layer_2": [1.0, 2.5]}


def test_loads_of_a_long_run_are_sampled_and_do_not_depend_on_when_they_are_read(tmp_path: Path) -> None:
    config = place_run(tmp_path, range(1, 4001), num_layers=1, num_experts=2)
    whole = RunSource(Path(config.out_dir))
    whole.follow()
    parts = RunSource(tmp_path / "parts")
    parts.folder.mkdir()
    for name in ("metrics.jsonl", "loads.jsonl"):
        lines = (whole.folder / name).read_bytes().splitlines(keepends=True)
        (parts.folder / name).write_bytes(b"".join(lines[:1700]))
    parts.follow()
    for name in ("metrics.jsonl", "loads.jsonl"):
        lines = (whole.folder / name).read_bytes().splitlines(keepends=True)
        with (parts.folder / name).open("ab") as file:
            file.write(b"".join(lines[1700:]))
    parts.follow()
    assert (whole.history.firsts, whole.history.lasts) == (parts.history.firsts, parts.history.lasts)
    for loads, loads_of_parts in zip(whole.history.loads, parts.history.loads, strict=True):
        assert loads["layer_1"].tolist() == loads_of_parts["layer_1"].tolist()
        assert loads["layer_1"][1] >= 4


STEP_TIME = {"compute": 6.0, "exposed_exchange": 1.0, "bubble": 2.0, "optimizer": 0.5, "other": 0.25, "saving": 0.25}


def place_timed_run(folder: Path, name: str, steps: int, loss: float, **changes: Any) -> TrainConfig:
    """A run whose records have the time of a step and its parts."""
    folder.mkdir()
    config = replace(place_run(folder, range(0)), name=name, **changes)
    with (Path(config.out_dir) / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            parts = {f"{part}_seconds": value for part, value in STEP_TIME.items()}
            record = {"step": step, "tokens": 100 * step, "main_loss": loss, "lr": 1e-3, "step_time": parts}
            file.write(json.dumps({**record, "step_seconds": 9.75, "tokens_per_second": 12345.6}) + "\n")
    return config


def test_report_shows_hours_and_where_the_time_of_a_step_goes(tmp_path: Path) -> None:
    text = Report(place_timed_run(tmp_path / "a", "timed", 4, 2.0)).write().read_text()
    page = Page(text)
    assert page.runs[0]["hours"] == pytest.approx([9.75 * (step + 0.5) / 3600 for step in range(4)], rel=1e-5)
    assert "<h2>Where the time of a step goes</h2>" in text
    for part, value in STEP_TIME.items():
        assert f"</i>{part.replace('_', ' ')}<small>" in text
        assert f"<td>{seconds(value)}</td><td>{value * 10:.3g} %</td>" in text
    parts = page.numbers("Parts of a step's time")
    assert [values["mean"][0] for values in parts.values()] == list(STEP_TIME.values())


def test_report_says_what_its_axes_are(tmp_path: Path) -> None:
    page = Page(Report(place_run(tmp_path, range(1, 10))).write().read_text())
    assert all(chart["y"] for chart in page.charts.values())
    assert page.charts[LOSS]["y"] == "nats per token"


def test_report_of_two_runs_shows_them_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = place_timed_run(tmp_path / "a", "first", 4, 2.0, seed=1)
    other = place_timed_run(tmp_path / "b", "second", 6, 3.0, seed=2)
    path = compare([one, other])
    assert path == Path(one.out_dir) / COMPARISON_NAME
    page = Page(path.read_text())
    assert [run["name"] for run in page.runs] == ["first", "second"]
    assert [len(run["steps"]) for run in page.runs] == [4, 6]
    assert [page.numbers(LOSS, run)["main"]["mean"] for run in (0, 1)] == [[2.0] * 4, [3.0] * 6]
    text = path.read_text()
    assert "<td>last loss, main head</td><td>2</td><td>3</td><td>+50.0 %</td>" in text
    assert "<td>seed</td><td>1</td><td>2</td>" in text
    assert differing_settings([one, replace(one, name="other")]) == []
    assert redraw([f"run={one.out_dir},{other.out_dir}"]) == 0
    assert redraw([f"run=[{one.out_dir},{other.out_dir}]"]) == 0
    assert capsys.readouterr().out == 2 * f"{one.out_dir}/{COMPARISON_NAME}\n"
    with pytest.raises(ConfigError, match="run: must be one to 6 folders, is 0 of them"):
        redraw(["run=[]"])


def test_comparison_has_the_last_evaluations_of_all_runs(tmp_path: Path) -> None:
    configs = [place_run(tmp_path / name, range(1, 3)) for name in ("a", "b")]
    for config, accuracy in zip(configs, (0.25, None), strict=True):
        measured = {} if accuracy is None else {"evaluation_choice_accuracy": accuracy, "evaluation_<b>": 1.0}
        with (Path(config.out_dir) / "metrics.jsonl").open("a") as metrics:
            metrics.write(json.dumps({**next(records(range(3, 4))), **measured}) + "\n")
    text = compare(configs).read_text()
    assert "<td>last evaluation choice accuracy</td><td>0.25</td><td>none</td>" in text
    assert "last evaluation <b>" not in text


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    config = place_timed_run(tmp_path / "a", "same", 2, 2.0)
    page = Page(compare([config, config]).read_text())
    assert len({run["name"] for run in page.runs}) == 2


CHECKS = """
addEventListener("load", () => setTimeout(() => {
  const shown = [], key = (target, key, shift) => target.dispatchEvent(
    new KeyboardEvent("keydown", {key, shiftKey: !!shift, bubbles: true, cancelable: true}));
  const plot = document.querySelector(".uplot"), button = id => document.getElementById(id);
  const choose = (input, value) => { input.value = value; input.dispatchEvent(new Event("change")); };
  plot.focus();
  shown.push("focus " + (document.activeElement === plot));
  key(plot, "ArrowRight");
  key(plot, "ArrowRight");
  setTimeout(() => {
    shown.push("reads " + button("reading").textContent);
    key(plot, "+");
    shown.push("zoomed " + !button("whole").disabled);
    key(plot, "0");
    shown.push("whole " + button("whole").disabled);
    button("in").click();
    const over = document.querySelector(".u-over");
    over.dispatchEvent(new MouseEvent("dblclick", {bubbles: true}));
    shown.push("reset " + button("whole").disabled);
    const label = document.querySelector(".u-series:not(.edge) th[role=button]");
    label.dispatchEvent(new KeyboardEvent("keydown", {key: "Enter", bubbles: true}));
    shown.push("hidden " + label.parentElement.classList.contains("u-off"));
    button("log").click();
    choose(button("smooth"), "0.9");
    for (const kind of ["tokens", "hours"]) {
      const input = document.querySelector(`input[value=${kind}]`);
      shown.push(kind + " " + !input.disabled);
      input.click();
      shown.push(document.querySelector(".uplot .u-series .u-label").textContent);
    }
    shown.push("narrow " + (document.documentElement.scrollWidth <= innerWidth));
    document.title = shown.join("|");
  }, 50);
}, 50));
"""


@pytest.mark.slow
@pytest.mark.parametrize("num_runs", [2, *exhaustive(1)])
def test_report_is_usable_by_keyboard_and_narrow(tmp_path: Path, num_runs: int) -> None:
    configs = [place_timed_run(tmp_path / str(run), f"run {run}", 30 + run, 2.0) for run in range(num_runs)]
    path = Report(configs[0]).write() if num_runs == 1 else compare(configs)
    page = path.read_text()
    check_policy(page, has_script=True)
    title = re.search(r"<title>(.*?)</title>", browse(page, tmp_path, "--window-size=400,900", script=CHECKS))
    assert title is not None
    found = title[1].split("|")
    assert found[0] == "focus true"
    assert found[1].startswith("reads Loss: step")
    assert found[1].endswith("2")
    assert found[2:6] == ["zoomed true", "whole true", "reset true", "hidden true"]
    assert found[6:] == ["tokens true", "tokens", "hours true", "hours of training steps", "narrow true"]
