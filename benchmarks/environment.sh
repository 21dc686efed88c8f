#!/usr/bin/env bash
# The environment of the benchmarks: the package's own, seen through a .pth file, and what only the rivals need.
#
#   benchmarks/environment.sh ENVIRONMENT NEW     ENVIRONMENT: where the package is installed (.venv); NEW: .bench-venv
#
# Two DeepSpeed releases: the newest, and beside it (NEW/deepspeed-einsum) one that dispatches by an einsum, as MoE-LLaVA's
# 0.9.5 does; 0.9.5 itself cannot be imported with today's pydantic.
set -euo pipefail
newest=0.19.8 einsum=0.18.9
export DS_BUILD_OPS=0  # no compiled operations: only the Python of its MoE layer runs
base=$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$1/bin/python" -m venv --clear "$2"
site=$("$2/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# `addsitedir` and not a bare path: editable installs of the first environment are .pth files themselves.
echo "import site; site.addsitedir('$base')" > "$site/zz_base.pth"
install=("$2/bin/python" -m pip install --quiet --disable-pip-version-check --no-build-isolation)
"${install[@]}" setuptools wheel
"${install[@]}" "deepspeed==$newest"
"${install[@]}" --no-deps --target "$2/deepspeed-einsum" "deepspeed==$einsum"
touch "$2/.installed"
