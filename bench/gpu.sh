#!/usr/bin/env bash
# Builds, tests and measures the CUDA kernels on a machine with a GPU, without network and without pip:
#   bench/gpu.sh              all of it, within nine minutes; CSV rows go to bench/results.csv
#   bench/gpu.sh divergence   one family
#   bench/gpu.sh --needs      what it needs beyond this tree
# STEPS="test measure" takes some of the steps test, sanitize, measure; the build is always looked after.
# What is done stays done: a second call builds what has changed and measures the families that are left.
# FRESH=1 measures them again.  PYTHON=… names the interpreter, SCRATCH=… the folder (build/gpu).
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
SCRATCH=${SCRATCH:-build/gpu}
STEPS=${STEPS:-test sanitize measure}
FAMILIES=(divergence kinds sparse linear transport rvq fdb tree)
SHAPES=(--shape 512x49152 --shape 256x151936 --shape 512x32000 --shape 65536x256 --shape 8192x4096)

if [ "${1:-}" = --needs ]; then
  cat <<'NEEDS'
a GPU, and a driver that knows the CUDA version of nvcc (580 or newer for CUDA 13)
nvcc and a C++17 compiler on PATH (g++ or clang++ as c++)
python >= 3.10 with a CUDA build of torch >= 2.10, numpy and pytest
if there: compute-sanitizer (memory and race checks), triton (the torch.compile column),
transformers and its friends (their tests run, too)
NEEDS
  exit 0
fi
[ $# -gt 0 ] && FAMILIES=("$@")
say() { printf '\n==> %s (%d s)\n' "$1" "$SECONDS"; }
for tool in nvcc c++ nvidia-smi "$PYTHON"; do
  command -v "$tool" > /dev/null || { echo "bench/gpu.sh: $tool is not on PATH (see --needs)"; exit 1; }
done
"$PYTHON" - <<'CHECK' || exit 1
import sys
try:
    import numpy, pytest, torch
except ImportError as error:
    sys.exit(f"bench/gpu.sh: {error} (see --needs)")
if not torch.cuda.is_available():
    sys.exit(f"bench/gpu.sh: torch {torch.__version__} finds no GPU")
print(torch.cuda.get_device_name(), "· torch", torch.__version__)
CHECK

# ---- build: an object is made again when a source is newer ----
say "building in $SCRATCH"
TORCH=$("$PYTHON" -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')
ARCH=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d '.')
OBJECTS=$SCRATCH/objects PACKAGE=$SCRATCH/python/stillhouse
mkdir -p "$OBJECTS" "$SCRATCH/python"
COMMON=(-std=c++17 -O3 -DNDEBUG -DTORCH_TARGET_VERSION=0x020a000000000000 -DTORCH_STABLE_ONLY
  -isystem "$TORCH/include")
CXX=(c++ "${COMMON[@]}" -fPIC -fvisibility=hidden -fvisibility-inlines-hidden)
KERNEL=(-Wno-psabi -fopenmp-simd -ffp-contract=off -fno-math-errno -fno-trapping-math)
NEWEST=$(find csrc -type f -printf '%T@ %p\n' | sort -n | tail -1 | cut -d' ' -f2-)
JOBS=()
compile() { # object, command …
  local object=$OBJECTS/$1
  shift
  [ "$object" -nt "$NEWEST" ] && return
  ("$@" -c -o "$object.part" && mv "$object.part" "$object") & JOBS+=($!)
}
for family in csrc/*/; do
  name=$(basename "$family")
  [ -f "$family/op.cpp" ] || continue
  compile "$name-op.o" "${CXX[@]}" "$family/op.cpp"
  declare -A FLAGS=([baseline]="")
  if [ "$(uname -m)" = x86_64 ]; then
    FLAGS[avx2]="-mavx2 -mfma -mf16c"
    FLAGS[avx512]="-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mprefer-vector-width=512"
  fi
  for level in "${!FLAGS[@]}"; do
    # shellcheck disable=SC2086  # flags are words
    compile "$name-$level.o" "${CXX[@]}" "${KERNEL[@]}" ${FLAGS[$level]} "-DSTILLHOUSE_ISA=$level" \
      "$family/cpu.cpp"
  done
  compile "$name-cuda.cuda.o" nvcc "${COMMON[@]}" -gencode "arch=compute_$ARCH,code=sm_$ARCH" \
    --fmad=false --split-compile=0 -diag-suppress 20012 -DUSE_CUDA -Xcompiler -fPIC,-fvisibility=hidden \
    "$family/cuda.cu"
done
compile ops.o "${CXX[@]}" csrc/ops.cpp
compile isa.o "${CXX[@]}" csrc/core/isa.cpp
for job in ${JOBS[@]+"${JOBS[@]}"}; do wait "$job" || { echo "bench/gpu.sh: the build failed"; exit 1; }; done
for stub in torch_cpu torch_cuda; do # stands for torch's library, which is loaded when ours is
  echo | c++ -x c++ -shared -fPIC -Wl,-soname,lib$stub.so -o "$OBJECTS/lib$stub.so" -
done
rm -rf "$PACKAGE" && cp -r python/stillhouse "$PACKAGE"
c++ -shared -Wl,--no-as-needed -o "$PACKAGE/_cpu.so" $(ls "$OBJECTS"/*.o | grep -v cuda.o) \
  -L"$OBJECTS" -ltorch_cpu
nvcc -shared -Xlinker --no-as-needed -o "$PACKAGE/_cuda.so" "$OBJECTS"/*.cuda.o \
  -L"$OBJECTS" -ltorch_cpu -ltorch_cuda
VERSION=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml | head -1)
mkdir -p "$SCRATCH/python/stillhouse-$VERSION.dist-info"
printf 'Metadata-Version: 2.1\nName: stillhouse\nVersion: %s\n' "$VERSION" \
  > "$SCRATCH/python/stillhouse-$VERSION.dist-info/METADATA"
export PYTHONPATH="$PWD/$SCRATCH/python" HF_HUB_OFFLINE=1

# ---- test: against float64 ----
step() { case " $STEPS " in *" $1 "*) ;; *) return 1 ;; esac; }
ON_GPU="levelcuda or kernels-cuda or device-cuda"
if step test; then
  say "testing"
  WORKERS=()
  "$PYTHON" -c 'import xdist' 2> /dev/null && WORKERS=(-n 8)
  OMP_NUM_THREADS=2 "$PYTHON" -m pytest tests/ops tests/methods --device cuda -q --maxfail 50 \
    -p no:cacheprovider --durations 5 "${WORKERS[@]}" -k "$ON_GPU"
fi
if step sanitize && command -v compute-sanitizer > /dev/null; then
  for check in memcheck racecheck; do
    say "$check"
    compute-sanitizer --tool "$check" --error-exitcode 9 --target-processes all \
      "$PYTHON" -m pytest tests/ops/test_{parity,sinkhorn,rvq,fdb_matmul,fdb_cuda}.py --device cuda -q -x \
      -p no:cacheprovider -k "levelcuda and ((guarded or layouts) and not float64 or any_length \
        or narrow or tensor_cores or room_for or along_codes)" \
      | tail -3
  done
fi

# ---- measure ----
step measure || exit 0
for family in "${FAMILIES[@]}"; do
  stamp=$SCRATCH/measured-$family
  [ -z "${FRESH:-}" ] && [ "$stamp" -nt "$PACKAGE/_cuda.so" ] && continue
  say "measuring $family"
  options=()
  [ "$family" = divergence ] && options=("${SHAPES[@]}")
  [ "$family" = kinds ] && options=(--no-memory)
  "$PYTHON" -m bench --device cuda --family "$family" "${options[@]}" --rounds 25 \
    --provider stillhouse --provider forward_kl --provider dense --provider eager \
    --provider torch.compile --csv bench/results.csv
  touch "$stamp"
done
say "done"
