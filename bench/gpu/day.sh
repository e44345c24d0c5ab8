#!/usr/bin/env bash
# The first hours on a GPU, in three parts of at most ten minutes: PART=1|2|3 bash bench/gpu/day.sh (make gpu-day PART=1)
#   1  are kernels right: versions, every kernel compiled and held against its reference, races (compute-sanitizer)
#   2  is training right: launch.verify and many ranks on one GPU over gloo, the same on the CPU, resume to the bit, NCCL, bf16, FP8
#   3  how fast: attention's kernels, one V3 layer by phases with a trace, every kernel next to torch's
# Each step has its own limit, and its failure does not end the part; the exit code is 1 if any step failed.
# The log has what a step prints as it prints it, and part*.tsv a line for each step that has ended: name, code, seconds.
# Without a GPU it is a dry run: the same steps on the smallest shapes, on the CPU; multi-rank runs are only checked.
#   OUT     results, a log for each part          WHEELS  wheels that the machine lacks, without a network
#   PYTHON  the interpreter                       LAST    seconds that the part may take
set -u
cd "$(dirname "$0")/../.." || exit 2
SELF=$PWD/bench/gpu/day.sh
PART=${PART:-1} OUT=${OUT:-outputs/gpu_day} WHEELS=${WHEELS:-.wheels} PYTHON=${PYTHON:-python3} LAST=${LAST:-570}
SITE=${SITE:-${TMPDIR:-/tmp}/gpu_day_site} BEGUN=$SECONDS FAILED=0
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false WANDB_MODE=disabled HYDRA_FULL_ERROR=1
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
case $PART in 1 | 2 | 3) ;; *) echo "PART: must be 1, 2 or 3, is $PART; nearest valid: 1" >&2; exit 2 ;; esac
LOG=$OUT/part$PART.log TABLE=$OUT/part$PART.tsv

if ls "$WHEELS"/*.whl > /dev/null 2>&1 && [ ! -d "$SITE" ]; then
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$SITE" "$WHEELS"/*.whl ||
        echo "wheels: not installed"
fi
[ -d "$SITE" ] && export PYTHONPATH=$SITE${PYTHONPATH:+:$PYTHONPATH}
if [ -z "${DRY+set}" ]; then
    if "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then DRY=; else DRY=1; fi
fi
export PART OUT PYTHON DRY

# step NAME SECONDS COMMAND...: runs it within its limit and the part's, logs it, and counts a failure.
step() {
    local name=$1 limit=$2 rest=$((LAST - (SECONDS - BEGUN))) from=$SECONDS rc
    shift 2
    if [ "$rest" -lt 15 ]; then
        echo "## $name: skipped, no time left" | tee -a "$LOG"
        FAILED=$((FAILED + 1))
        return
    fi
    if [ -n "$DRY" ] || [ "$limit" -gt "$rest" ]; then limit=$rest; fi
    echo "## $name ($limit s)" | tee -a "$LOG"
    timeout -k 5 "$limit" "$@" 2>&1 | tee -a "$LOG" > "$OUT/.step"
    rc=${PIPESTATUS[0]}
    [ "$rc" = 0 ] || FAILED=$((FAILED + 1))
    printf '%s\t%s\t%s\n' "$name" "$rc" "$((SECONDS - from))" >> "$TABLE"
    tail -n "${TAIL:-12}" "$OUT/.step"
    echo "## $name: rc $rc, $((SECONDS - from)) s" | tee -a "$LOG"
}

# A short run from scratch: train NAME OVERRIDES...
COMMON=(name=gpu_day validation.sequences=0 samples.tokens=0)
SIX_STEPS=(task.steps=6 checkpointing.every_steps=3)
ONE_RANK=(parallelism=one_rank schedule=1f1b model.mtp_depth=0 dispatch=local)
TINY=(model=tiny task.steps=2 checkpointing.every_steps=2 batch.sequence_length_tokens=32
    batch.micro_sequences=1 batch.global_sequences=2 data.tokenizer_vocab_size=320 data=files
    "data.paths=[kernels]" "data.cache_dir=$OUT/cache")
train() {
    local name=$1
    shift
    rm -rf "${OUT:?}/runs/$name"
    "$PYTHON" -m launch.train "${COMMON[@]}" "out_dir=$OUT/runs/$name" "$@"
}
train_one_rank() {
    local name=$1
    shift
    if [ -n "$DRY" ]; then
        train "$name" "${ONE_RANK[@]}" "$@" cluster=laptop "${TINY[@]}"
    else
        train "$name" "${ONE_RANK[@]}" "${SIX_STEPS[@]}" cluster=one_gpu "$@"
    fi
}
# Several ranks: a dry run only composes and checks the configuration.
train_ranks() {
    local name=$1
    shift
    if [ -n "$DRY" ]; then
        "$PYTHON" -m launch.train "${COMMON[@]}" "${SIX_STEPS[@]}" "out_dir=$OUT/runs/$name" "$@" config_only=true
    else
        train "$name" "${SIX_STEPS[@]}" "$@"
    fi
}
# Losses of runs side by side; a dry run has none of several ranks.
losses() {
    [ -n "$DRY" ] || "$PYTHON" -m bench.gpu.day.losses "$@"
}

FOUR=(parallelism=four_ranks precision=float32)
ON_GPU=(cluster=one_gpu cluster.ranks_per_node=2)
verified() {
    "$PYTHON" -m launch.verify "out_dir=$OUT/runs/verify" "${ON_GPU[@]}" "${FOUR[@]}" ${DRY:+config_only=true}
}
nccl() {
    train_ranks nccl cluster=h100 cluster.ranks_per_node=1 "${ONE_RANK[@]}" precision=bf16 && losses "$OUT/runs/nccl"
}
on_gpu() {
    train_ranks gpu4 "${ON_GPU[@]}" "${FOUR[@]}"
}
on_cpu() {
    train_ranks cpu4 cluster=laptop "${FOUR[@]}" && losses "$OUT"/runs/{gpu4,cpu4}
}
resumed() {
    local first=$OUT/runs/gpu4 again=$OUT/runs/again file
    if [ -z "$DRY" ]; then
        train again "${SIX_STEPS[@]}" "${ON_GPU[@]}" "${FOUR[@]}" "resume=$first/checkpoints/step-00000003" &&
            losses "$first" "$again" --at-most 0 || return
        for file in "$first"/checkpoints/step-00000006/*.safetensors; do
            cmp "$file" "$again/checkpoints/step-00000006/${file##*/}" || return
        done
    fi
}
sanitize() { # TOOL TEST: with compute-sanitizer of the CUDA toolkit
    if [ -n "$DRY" ]; then echo "needs a GPU"; return; fi
    if ! command -v compute-sanitizer; then echo "needs compute-sanitizer, of the CUDA toolkit"; return 1; fi
    compute-sanitizer --tool "$1" --error-exitcode 1 --print-limit 5 "$PYTHON" -m pytest -q -x -p no:cacheprovider "$2"
}

# A step that is a function of this script runs in its own shell, because `timeout` starts programs only.
if [ "${1:-}" = run ]; then
    shift
    "$@"
    exit
fi
mkdir -p "$OUT"
: > "$LOG"
: > "$TABLE"
[ -z "$DRY" ] || echo "no GPU: a dry run on the CPU" | tee -a "$LOG"

case $PART in
1)
    ONLY=${DRY:+adamw} WORKERS=${WORKERS:-4}
    [ -z "$DRY" ] || WORKERS=0
    step environment 30 "$PYTHON" -m bench.gpu.day.environment
    step "kernels compiled" 170 "$PYTHON" -m bench.gpu.day.compile_launches --only "$ONLY" ${DRY:+--processes 1}
    step "kernels against references" 250 "$PYTHON" -m pytest tests/gpu -q --maxfail=20 -n "$WORKERS" \
        -p no:cacheprovider
    step "races in FP8 products" 90 bash "$SELF" run sanitize racecheck tests/gpu/test_gemm_fp8.py
    step "bad accesses in grouped products" 90 bash "$SELF" run sanitize memcheck tests/gpu/test_grouped_gemm.py
    ;;
2)
    step "four ranks share the GPU, verified against one rank" 150 bash "$SELF" run verified
    step "four ranks share the GPU, float32" 100 bash "$SELF" run on_gpu
    step "the same on the CPU" 100 bash "$SELF" run on_cpu
    step "resumed to the bit" 60 bash "$SELF" run resumed
    step "one rank over NCCL" 50 bash "$SELF" run nccl
    step "one rank, bf16" 50 bash "$SELF" run train_one_rank one_bf16 precision=bf16
    step "one rank, FP8" 60 bash "$SELF" run train_one_rank one_fp8 precision=fp8
    ;;
3)
    BENCH=(--sections gemm --rounds 11 --json "$OUT/products.json")
    OTHERS=(--sections quantize permute swiglu rms_norm cross_entropy adamw --rounds 7 --json "$OUT/others.json")
    TAIL=30 step attention 60 "$PYTHON" -m bench.gpu.day.attention
    TAIL=60 step "V3 layer, bf16" 120 "$PYTHON" -m bench.gpu.day.layer bf16 --out "$OUT"
    TAIL=60 step "V3 layer, FP8" 180 "$PYTHON" -m bench.gpu.day.layer fp8 --out "$OUT"
    if [ -z "$DRY" ]; then
        TAIL=40 step "FP8 products" 150 "$PYTHON" -m bench.gpu.bench "${BENCH[@]}"
        TAIL=40 step "all other kernels" 120 "$PYTHON" -m bench.gpu.bench "${OTHERS[@]}"
    fi
    ;;
esac
rm -f "$OUT/.step"
echo "## part $PART took $((SECONDS - BEGUN)) s, $FAILED steps failed; results are in $OUT" | tee -a "$LOG"
[ "$FAILED" = 0 ]
