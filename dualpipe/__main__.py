"""Compares and draws schedules: text, pictures, pages, JSON, or CSV for torch's pipelines."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from base.registry import UnknownNameError
from dualpipe.api import ScheduleComparison, build, compare
from dualpipe.export import torch_csv
from dualpipe.ir import ScheduleError, to_json
from dualpipe.registry import ModelCosts


def main(arguments: Sequence[str] | None = None) -> int:
    """Shows one kind, or a comparison of all; returns the exit code, 2 for a schedule that cannot be made."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", nargs="?", help="a kind, or auto; without it, all kinds are compared")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--chunks", type=int)
    parser.add_argument("--slices", type=int, default=1)
    parser.add_argument("--memory-cap", type=float)
    parser.add_argument(
        "--out", type=Path, help="a file that ends in .txt, .svg, .html, .json or .csv; else the terminal"
    )
    names = [field.name for field in fields(ModelCosts) if field.name != "stages"]
    for name in names:
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, help=f"cost: {name}")
    given = vars(parser.parse_args(arguments))
    kind, out = given.pop("kind"), given.pop("out")
    costs = {name: given.pop(name) for name in names}
    values = given | {name: value for name, value in costs.items() if value is not None}
    try:
        result = compare(**values) if kind is None else build(kind, **values)
        if out is None:
            print(result if isinstance(result, ScheduleComparison) else result.draw())
        elif out.suffix in (".json", ".csv"):
            order = (result.best if isinstance(result, ScheduleComparison) else result).schedule
            out.write_text((to_json if out.suffix == ".json" else torch_csv)(order) + "\n", "utf-8")
        else:
            result.draw().save(out)
    except (ScheduleError, UnknownNameError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
