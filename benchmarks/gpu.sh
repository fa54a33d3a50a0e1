#!/bin/bash
# All that trine has to show on a GPU, on the one that is here: one run, under ten minutes, no network.
#
#     bash benchmarks/gpu.sh
#     PYTHON=/path/to/python bash benchmarks/gpu.sh
#
# Needs a python with torch (a CUDA build), pybind11 and pytest, nvcc, cmake and a C++ compiler; ninja,
# pytest-xdist, Triton and compute-sanitizer are used where they are. Steps:
#
#   build       compiles in place, for this GPU alone
#   device      the tests of every op with CUDA kernels, on the GPU
#   probes      what each lane holds of a matrix fragment or tile, against the emulation
#   suite       the rest of the test suite, but for what needs no GPU
#   memcheck, racecheck, initcheck      compute-sanitizer over a call of every kernel
#   benchmarks  against PyTorch and other peers; alone, when all that is above has ended
#   goals       which of the goals that run reached
#
# Each step has a limit of time and a log in out/gpu/; a step that fails does not stop the others. The
# figures are in benchmarks/results/<GPU>.json. Exit status: 1 where a step failed, 2 without a GPU.

set -u
cd "$(dirname "$0")/.." || exit 1
readonly OUT=out/gpu TOTAL=585 # seconds of the whole run

case ${1:-} in
'') ;;
-h | --help)
  sed -n '2,/^$/s/^# \{0,1\}//p' "benchmarks/$(basename "$0")"
  exit
  ;;
*)
  echo "gpu.sh: unknown argument '$1'; it takes none but --help" >&2
  exit 2
  ;;
esac

PYTHON=$(command -v "${PYTHON:-python3}") || {
  echo "gpu.sh: no python was found; name one with PYTHON=" >&2
  exit 2
}
ARCHITECTURE=$("$PYTHON" -c 'import torch
if torch.cuda.is_available(): print("%d%d" % torch.cuda.get_device_capability())' 2>/dev/null)
if [ -z "$ARCHITECTURE" ]; then
  echo "gpu.sh: the torch of $PYTHON sees no CUDA device, and there is nothing to do without one" >&2
  exit 2
fi
# Tools may stand beside the python, and nvcc's beside it.
PATH=$(dirname "$PYTHON"):$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
export PYTHON ARCHITECTURE PATH PYTHONPATH=python PYTHONUNBUFFERED=1
rm -rf $OUT && mkdir -p $OUT

# step NAME LIMIT COMMAND...: runs it, its words in a log; what became of it in NAME.state.
step() {
  local name=$1 limit=$2 begun=$SECONDS what=ok status
  shift 2
  timeout --kill-after=5 "$limit" "$@" >"$OUT/$name.log" 2>&1
  status=$?
  case $status in
  0) ;;
  124 | 137) what="FAILED: stopped at its limit of $limit s" ;;
  *) what="FAILED: exit status $status" ;;
  esac
  printf '%-11s %4d s  %s\n' "$name" $((SECONDS - begun)) "$what" | tee "$OUT/$name.state"
}

skip() {
  printf '%-11s         skipped: %s\n' "$1" "$2" | tee "$OUT/$1.state"
}

build() { # TRINE_CUDA's value
  local generator=()
  command -v ninja >/dev/null && generator=(-G Ninja)
  cmake -S . -B build/gpu "${generator[@]}" -DPython_EXECUTABLE="$PYTHON" -DTRINE_CUDA="$1" \
    -DTRINE_CUDA_ARCHITECTURE="$ARCHITECTURE" -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$PWD/python/trine" &&
    cmake --build build/gpu --parallel "$(nproc)" &&
    "$PYTHON" -c 'import trine; print(trine.backends.describe())'
}
export -f build

step build 180 bash -c 'build ON && "$PYTHON" -c "
from trine._library import cuda_library
raise SystemExit(None if cuda_library.loaded else cuda_library.status)"'
# Without compiled CUDA kernels there are still those of Triton.
grep -q FAILED $OUT/build.state && step build_cpu 120 bash -c 'build OFF'
NVCC=$(sed -n 's/^TRINE_NVCC:FILEPATH=//p' build/gpu/CMakeCache.txt 2>/dev/null)
export PATH=$PATH:$(dirname "$(readlink -f "${NVCC:-/}")")

# None of these is timed, so they run side by side.
ON_DEVICE=(tests/test_{cuda_device,cuda_softmax_kl_device,triton}.py)
for kernels in csrc/*/cuda.cu; do
  tests=tests/test_$(basename "$(dirname "$kernels")").py
  [ -e "$tests" ] && ON_DEVICE+=("$tests")
done
PROBES=(tests/test_cuda_probes.py)
# They prove the kernels where no GPU is, and that their bugs would be found there: minutes.
NO_GPU=(tests/test_cuda_{int8_conv2d,int8_embedding,int8_weight_linear,linear,norm}_on_cpu.py
  tests/test_cuda_{softmax_kl,sparse24,ternary24}_on_cpu.py tests/test_cuda_{on_cpu,sass}.py)
PYTEST=("$PYTHON" -m pytest -q -p no:cacheprovider)
workers=()
if "$PYTHON" -c 'import xdist' 2>/dev/null; then
  workers=(-n $(($(nproc) / 4 + 1)) --dist worksteal)
  export OMP_NUM_THREADS=2
fi
echo "left out: ${NO_GPU[*]}, which need no GPU"
step device 240 "${PYTEST[@]}" "${workers[@]}" "${ON_DEVICE[@]}" &
step probes 120 "${PYTEST[@]}" "${PROBES[@]}" &
step suite 240 "${PYTEST[@]}" "${workers[@]}" tests \
  $(printf -- '--ignore %s ' "${ON_DEVICE[@]}" "${PROBES[@]}" "${NO_GPU[@]}") &
for tool in memcheck racecheck initcheck; do
  if command -v compute-sanitizer >/dev/null; then
    # Each tensor in memory of its own: one step beyond it is then seen.
    step $tool 120 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
      compute-sanitizer --tool $tool --error-exitcode 9 "$PYTHON" tests/device_calls.py &
  else
    skip $tool 'compute-sanitizer was not found'
  fi
done
wait
unset OMP_NUM_THREADS

# The benchmarks begin nothing new in their last 45 seconds: what compiles may take that long.
left=$((TOTAL - SECONDS - 15))
touch $OUT/begun
step benchmarks $left "$PYTHON" -m benchmarks.run gpu --seconds $((left - 45))
RESULT=$(find benchmarks/results out/gpu -name '*.json' -newer $OUT/begun | head -n 1)
if [ -n "$RESULT" ]; then
  step goals 15 "$PYTHON" -m benchmarks.run goals "$RESULT"
else
  skip goals 'there is no result'
fi

cat $OUT/benchmarks.log
for log in $OUT/*.state; do
  name=$(basename "$log" .state)
  if grep -q FAILED "$log"; then
    printf '\n--- the end of %s/%s.log\n' $OUT "$name"
    tail -n 15 "$OUT/$name.log"
  fi
done
echo
[ -n "$RESULT" ] && cat $OUT/goals.log
printf '\n%s s in all; logs in %s; result: %s\n' $SECONDS $OUT "${RESULT:-none}"
cat $(ls -tr $OUT/*.state)
! grep -q FAILED $OUT/*.state
