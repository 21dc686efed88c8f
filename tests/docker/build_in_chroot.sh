#!/bin/bash
# Every step of the Dockerfile's CPU image without a Docker engine and without pulling an image: buildah runs the RUN
# lines in a chroot of a minimal Debian that debootstrap makes and that is tagged with the base image's name.
#
#   sudo tests/docker/build_in_chroot.sh WORK_FOLDER            (make test-docker)
#
# Needs root, the Debian packages buildah and debootstrap, 20 GB and about ten minutes. From the environment:
#   PYTHON_PREFIX   a Python 3.12 that runs from /usr/local after copying (default: what .ci/find_python finds)
#   MIRROR, SUITE   of Debian
#   PIP_CONF        pip's configuration on this machine, mounted while building and never part of the image
#   PIP_MOUNTS      further folders it refers to, separated by colons
#   APT_CONF        a file for the base image's /etc/apt/apt.conf.d
set -euo pipefail
REPO="$(cd "$(dirname "$0")/../.." && pwd)"
WORK="${1:?usage: $0 WORK_FOLDER}"
PYTHON_PREFIX="${PYTHON_PREFIX:-$("$("$REPO/.ci/find_python")" -c 'import sys; print(sys.base_prefix)')}"
MIRROR="${MIRROR:-http://deb.debian.org/debian}"
SUITE="${SUITE:-bookworm}"
PIP_CONF="${PIP_CONF:-}"
PIP_MOUNTS="${PIP_MOUNTS:-}"
APT_CONF="${APT_CONF:-}"
# What python:3.12-slim has beside Python itself: the libraries that its modules are linked with.
LIBRARIES=ca-certificates,libssl3,libffi8,libsqlite3-0,libreadline8,libbz2-1.0,liblzma5,zlib1g,libuuid1,libncursesw6
BASE="$(sed -n 's/^FROM \(python:[^ ]*\) AS cpu$/\1/p' "$REPO/Dockerfile")"
TAG=megatron-moellava:cpu

for program in buildah debootstrap; do
    command -v "$program" >/dev/null || { echo "$program is missing: apt-get install buildah debootstrap" >&2 && exit 2; }
done
[ -x "$PYTHON_PREFIX/bin/python3.12" ] || { echo "PYTHON_PREFIX=$PYTHON_PREFIX has no bin/python3.12" >&2 && exit 2; }

# buildah with its storage in the work folder, so that nothing is left elsewhere
in_work() {
    local command="$1"
    shift
    buildah --root "$WORK/storage" --runroot "$WORK/run" --storage-driver vfs "$command" "$@"
}

make_base() {
    local container mount
    [ -f "$WORK/rootfs/.complete" ] || {
        rm -rf "$WORK/rootfs"
        debootstrap --variant=minbase --include="$LIBRARIES" "$SUITE" "$WORK/rootfs" "$MIRROR"
        touch "$WORK/rootfs/.complete"
    }
    container=$(in_work from scratch)
    mount=$(in_work mount "$container")
    cp -a "$WORK/rootfs/." "$mount/"
    cp -a "$PYTHON_PREFIX/bin" "$PYTHON_PREFIX/lib" "$mount/usr/local/"
    # Only the interpreter and its standard library, as in the real image; scripts of other packages name other paths.
    find "$mount/usr/local/bin" -maxdepth 1 ! -name 'python*' -type f -delete
    find "$mount/usr/local/lib/python3.12/site-packages" -mindepth 1 -maxdepth 1 ! -name 'pip*' -exec rm -rf {} +
    ln -sf python3.12 "$mount/usr/local/bin/python"
    ln -sf python3.12 "$mount/usr/local/bin/python3"
    [ -z "$APT_CONF" ] || cp "$APT_CONF" "$mount/etc/apt/apt.conf.d/99build"
    chroot "$mount" /sbin/ldconfig
    in_work umount "$container" >/dev/null
    in_work commit --quiet "$container" "docker.io/library/$BASE"
    in_work rm "$container" >/dev/null
}

build() {
    local options=(--isolation chroot --pull-never --target cpu --tag "$TAG" --build-arg PIP_EXTRA_INDEX_URL=) path
    [ -z "$PIP_CONF" ] || options+=(--volume "$PIP_CONF:/etc/pip.conf:ro")
    for path in ${PIP_MOUNTS//:/ }; do options+=(--volume "$path:$path:ro"); done
    in_work bud "${options[@]}" --file "$REPO/Dockerfile" "$REPO"
}

# The image's own user, in its own folder: the package, the targets, and a test that trains nothing.
try() {
    local container
    container=$(in_work from --pull-never "localhost/$TAG")
    # shellcheck disable=SC2016  # for the shell inside
    in_work run --isolation chroot "$container" -- sh -c '
        set -e
        test "$(id -u)" = 1000 && test "$(pwd)" = /opt/megatron-moellava && test -w runs
        make > /dev/null
        python -c "import torch, megatron_moellava.platform, megatron.core, megatron.energon, transformers"
        python tools/train.py --help > /dev/null
        OMP_NUM_THREADS=1 python -m pytest -q -p no:cacheprovider tests/unit/backbones
        make --dry-run quickstart | grep -q examples/quickstart/run.py'
    in_work rm "$container" >/dev/null
}

mkdir -p "$WORK"
started=$SECONDS
make_base
echo "base image: $((SECONDS - started)) s"
build
echo "all steps of the CPU image: $((SECONDS - started)) s"
try
echo "the image works: $((SECONDS - started)) s, $(du -sh "$WORK/storage" | cut -f1) with its base and both stages"
