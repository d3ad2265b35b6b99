#!/usr/bin/env bash
# Builds, tests and measures on the GPU of this machine, in one call.
#
#   benchmarks/device.sh                            # build, test, decode, roofline
#   benchmarks/device.sh build bandwidth            # only these parts
#   benchmarks/device.sh build test=300 decode=240  # with a limit in seconds
#
# Parts, in the order in which they are given; each has a limit, and one that fails does not stop the others:
#   build      the extension, in the environment of $PYTHON, without a network
#   test       the tests that need a GPU; $TESTS selects some
#   memory     the tests that want the device's memory for themselves
#   sanitizer  compute-sanitizer's tools on a small decode step
#   launches   kernels of a call, as CUPTI records them
#   bandwidth  how fast memory can be read
#   kernels    the packed kernels of the folder $KERNELS, in turns (benchmarks.kernel)
#   decode     every model of $MODELS at every batch size of $BATCHES, against $PEERS
#   roofline   the picture of what decode measured
#
# Logs and results go to $OUT. Set COMMIT where the checkout has no git, and DECODE for more options of
# benchmarks.decode. Clocks and other settings of the GPU are left as they are.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
MODELS=${MODELS:-llama-3.2-1b,qwen3-0.6b,qwen3-1.7b,qwen3-8b}
BATCHES=${BATCHES:-1}
PEERS=${PEERS:-jax,torch}
TESTS=${TESTS:-tests}
DECODE=${DECODE:-}
KERNELS=${KERNELS:-kernels}
commit=${COMMIT:+--commit=$COMMIT}
export PYTHONUNBUFFERED=1
mkdir -p "$OUT"

# run NAME SECONDS COMMAND...: also writes the output to a log.
run() {
  local name=$1 limit=$2 start=$SECONDS code
  shift 2
  echo "--- $name: $*"
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$OUT/$name.log"
  code=${PIPESTATUS[0]}
  [ "$code" = 124 ] && echo "$name ran past its $limit s"
  echo "--- $name: exit status $code after $((SECONDS - start)) s"
  return "$code"
}

# The options of $DECODE are separate words.
# shellcheck disable=SC2086
part() {
  case $1 in
    build) run build "${2:-240}" "$PYTHON" -m pip install --no-build-isolation --no-deps --editable . ;;
    test) run test "${2:-300}" "$PYTHON" -m pytest -m gpu $TESTS ;;
    memory) run memory "${2:-180}" "$PYTHON" -m pytest -m gpu tests/gpu/test_memory.py ;;
    sanitizer) run sanitizer "${2:-240}" "$PYTHON" -m benchmarks.sanitizer $commit --out "$OUT/sanitizer.json" ;;
    launches) run launches "${2:-60}" "$PYTHON" -m benchmarks.launches $commit --out "$OUT/launches.json" ;;
    bandwidth) run bandwidth "${2:-60}" "$PYTHON" -m benchmarks.bandwidth $commit --out "$OUT/bandwidth.json" ;;
    kernels) run kernels "${2:-180}" "$PYTHON" -m benchmarks.kernel time "$KERNELS"/*.npz ;;
    decode) run decode "${2:-540}" "$PYTHON" -m benchmarks.decode --model "$MODELS" --batch "$BATCHES" \
      --peers "$PEERS" $DECODE $commit --out "$OUT/decode.json" ;;
    roofline) run roofline "${2:-60}" "$PYTHON" -m benchmarks.roofline "$OUT/decode.json" --out "$OUT/roofline.svg" ;;
    *) echo "no part is called '$1'" >&2; return 2 ;;
  esac
}

failed=
[ $# -gt 0 ] || set -- build test decode roofline
for argument in "$@"; do
  limit=${argument#"${argument%%=*}"}
  part "${argument%%=*}" "${limit#=}" || failed+=" ${argument%%=*}"
done
[ -z "$failed" ] || { echo "failed:$failed" >&2; exit 1; }
