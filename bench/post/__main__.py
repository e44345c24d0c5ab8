"""Trains recipes of post-training for several seeds, and checks a law: `python -m bench.post LAW`.

Returns 1 if the law does not hold for one of the seeds.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from bench.post.comparison import check_comparison
from bench.post.policies import check_distill, check_grpo, check_rejection, check_sft, check_votes
from bench.post.reward_model import check_reward_model

LAWS = {
    "sft": check_sft,
    "distill": check_distill,
    "rejection": check_rejection,
    "grpo": check_grpo,
    "votes": check_votes,
    "reward_model": check_reward_model,
    "comparison": check_comparison,
}
"""Each prints what it measures in a folder with a seed, and returns what the law lacks."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.post", description=__doc__)
    parser.add_argument("law", choices=LAWS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    num_broken = 0
    for seed in arguments.seeds:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            problems = LAWS[arguments.law](Path(folder), seed)
        num_broken += bool(problems)
        print(f"seed {seed}: {time.perf_counter() - began:.0f} s  {'; '.join(problems) or 'holds'}", flush=True)
    return int(num_broken > 0)


if __name__ == "__main__":
    sys.exit(main())
