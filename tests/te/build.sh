#!/usr/bin/env bash
# Build Transformer Engine into an environment of its own, without a GPU (about ten minutes on two cores).
#
#   tests/te/build.sh ENVIRONMENT NEW     ENVIRONMENT: where the package and torch are installed (.venv); NEW: .te-venv
#
# The new environment holds Transformer Engine alone and sees everything else of the first one through a .pth file, so
# that nothing large is installed twice and the first one never sees Transformer Engine. Needs nvcc of CUDA 13
# (CUDA_HOME, default: where nvcc on the PATH lives) and a C++ compiler; cuDNN's and NCCL's headers come with torch's
# nvidia-* wheels.
set -euo pipefail
version=2.20.2
base=$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
new=$2

if [ -z "${CUDA_HOME:-}" ]; then
    nvcc=$(command -v nvcc) || { echo "no nvcc found: install the CUDA 13 toolkit or set CUDA_HOME" >&2; exit 1; }
    CUDA_HOME=/usr/local/cuda
    [ -x "$CUDA_HOME/bin/nvcc" ] || CUDA_HOME=$(dirname "$(dirname "$(readlink -f "$nvcc")")")
fi
"$1/bin/python" -m venv --clear "$new"
site=$("$new/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# `addsitedir` and not a bare path: editable installs of the first environment are .pth files themselves.
echo "import site; site.addsitedir('$base')" > "$site/zz_base.pth"

"$new/bin/python" -m pip install --quiet setuptools wheel ninja cmake pybind11 nvidia-mathdx==25.6.0
headers=() libraries=()
for part in nccl cudnn cu13; do
    headers+=("$base/nvidia/$part/include")
    libraries+=("$base/nvidia/$part/lib")
done
CPATH=$(IFS=:; echo "${headers[*]}")
LIBRARY_PATH=$(IFS=:; echo "${libraries[*]}")
export CUDA_HOME CPATH LIBRARY_PATH NVTE_FRAMEWORK=pytorch PATH="$new/bin:$PATH"
export MAX_JOBS=${MAX_JOBS:-$(nproc)} NVTE_BUILD_THREADS_PER_JOB=1
"$new/bin/python" -m pip install --no-build-isolation "transformer-engine[core_cu13,pytorch]==$version"
# Transformer Engine looks for cuDNN, NVRTC and the like in this environment's own packages only.
mkdir -p "$site/nvidia"
for part in "$base"/nvidia/*; do
    [ -e "$site/nvidia/$(basename "$part")" ] || ln -s "$part" "$site/nvidia/"
done
touch "$new/.installed"
