"""Compares a trainer's results with this folder: python check.py RESULTS [SECTION ...].

It needs numpy alone. RESULTS has files of the same names; a section is the start of tensors' names: gradient/.
Exit codes: 0 everything compared is equal, 1 something differs, is missing or is unknown, 2 nothing can be compared.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "BF16": "<u2"}
# Largest norm of a difference, as a share of the tensor's norm; of whole numbers, the share that differs.
TOLERANCES = {"<f8": 1e-9, "<f4": 1e-4, "<i8": 0.0, "fp8/step_1": 0.02, "fp8/step_2": 0.05, "bf16/step_1": 0.05}


def read(path: Path) -> dict[str, Any]:
    """Returns the tensors of a safetensors file by name, in the order of its header."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    tensors = {}
    for name, entry in json.loads(content[8:start]).items():
        if name != "__metadata__":
            begin, end = (start + offset for offset in entry["data_offsets"])
            values = np.frombuffer(content[begin:end], DTYPES[entry["dtype"]]).reshape(entry["shape"])
            # A bf16 is the upper half of a float32.
            tensors[name] = (values.astype("<u4") << 16).view("<f4") if entry["dtype"] == "BF16" else values
    return tensors


def difference(ours: Any, reference: Any) -> tuple[float, str]:
    """Returns how far a tensor is from the reference, and a text that says where most."""
    if ours.shape != reference.shape:
        return np.inf, f": has shape {list(ours.shape)}, must have {list(reference.shape)}"
    distance = (ours != reference).astype(float)
    share = float(distance.mean())
    if reference.dtype.kind == "f":
        distance = np.nan_to_num(abs(ours.astype(float) - reference), nan=np.inf, posinf=np.inf)
        share = float(np.linalg.norm(distance)) / max(float(np.linalg.norm(reference.astype(float))), 1e-300)
    index = np.unravel_index(distance.argmax(), distance.shape)
    return share, f"{list(map(int, index)) or ''}: is {ours[index]:.9g}, must be {reference[index]:.9g}"


def compare(name: str, ours: dict[str, Any], reference: dict[str, Any], sections: tuple[str, ...]) -> bool:
    """Prints how a file differs, the first tensor in the order of execution, and returns whether it does."""
    wanted = [key for key in reference if key.startswith(sections)]
    missing = [key for key in wanted if key not in ours and not key.startswith("rank_")]
    unknown = [key for key in ours if key not in reference and key.startswith(sections)]
    lines: dict[str, list[str]] = {"differ": [], "are missing": missing}
    # These have some of the results, and a trainer may write all.
    lines["are not compared" if name.startswith(("axes/", "bf16/")) else "are unknown"] = unknown
    largest = 0.0
    for key in (key for key in wanted if key in ours):
        tolerance = TOLERANCES.get(name[:-12], TOLERANCES[reference[key].dtype.str])
        share, text = difference(ours[key], reference[key])
        if share <= tolerance:
            largest = max(largest, share)
        else:
            lines["differ"].append(f"{key}{text}; error {share:.2g}, tolerance {tolerance:.2g}")
    print(f"{name}: {len(wanted)} tensors, largest error within tolerance {largest:.2g}")
    print("".join(f"  {len(items)} {kind}, first {items[0]}\n" for kind, items in lines.items() if items), end="")
    return bool(lines["differ"] or missing or lines.get("are unknown"))


def main(folder: Path, *sections: str) -> int:
    """Compares all files that the results have, precisions before axes, and returns the exit code."""
    paths = [*sorted(HERE.glob("[bf]*/step_*")), *sorted(HERE.glob("axes/*/step_*"))]
    names = [name for name in (path.relative_to(HERE).as_posix() for path in paths) if (folder / name).is_file()]
    if not any(key.startswith(sections) for name in names for key in read(HERE / name)):
        raise ValueError(f"{folder} has no files of the reference's names, or no tensors {' or '.join(sections)}")
    failed = [name for name in names if compare(name, read(folder / name), read(HERE / name), sections)]
    print(f"{len(failed)} of {len(names)} files differ{', first ' if failed else ''}{''.join(failed[:1])}")
    return int(bool(failed))


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1]), *(sys.argv[2:] or [""])))
    except (AttributeError, IndexError, KeyError, OSError, TypeError, ValueError) as error:
        sys.stderr.write(f"{__doc__}\nerror: RESULTS must hold safetensors files of {', '.join(DTYPES)}: {error!r}\n")
        sys.exit(2)
