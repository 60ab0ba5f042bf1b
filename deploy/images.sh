# Building images on a machine without a registry; sourced by the scripts beside it, as root.
#
# The base image is made from Debian's own packages under the name of the real one. ROOTFS is a
# folder to keep (or take) it, KEEP_IMAGE=1 takes images of the last time, and BUILD_OPTIONS adds to
# `buildah build`, such as `-v /etc/pip.conf:/etc/pip.conf:ro`.
#
#   apt-get install -y buildah podman conmon runc debootstrap
# shellcheck shell=bash

rootfs=${ROOTFS:-$(mktemp -d)/rootfs}
base=docker.io/library/python:3.11-slim-bookworm
# shellcheck disable=SC2206 # several options
options=(${BUILD_OPTIONS:-})

say() { printf '%s\n' "== $*"; }

make_base() {
    if buildah inspect "$base" >/dev/null 2>&1; then return; fi
    say "making the base image"
    if [ ! -d "$rootfs/usr" ]; then
        debootstrap --variant=minbase \
            --include=ca-certificates,python3,python3-venv,python3-pip,netbase,tzdata \
            bookworm "$rootfs" >/dev/null
    fi
    local from mounted
    from=$(buildah from scratch)
    buildah add -q "$from" "$rootfs" / >/dev/null
    mounted=$(buildah mount "$from")
    ln -sf /usr/bin/python3 "$mounted/usr/local/bin/python"
    buildah umount "$from" >/dev/null
    buildah config --env PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin "$from"
    buildah commit -q "$from" "$base" >/dev/null
    buildah rm "$from" >/dev/null
}

# build IMAGE [OPTION...]: the Dockerfile here, or another that the options name.
build() {
    local image=$1
    if [ -n "${KEEP_IMAGE:-}" ] && buildah inspect "$image" >/dev/null 2>&1; then return; fi
    say "building $image"
    build_target -t "$image" "${@:2}"
}

# build_target OPTION...: whatever the options say is made of it, an image or files.
build_target() {
    buildah build --layers --isolation chroot --pull-never --format docker --quiet \
        "${options[@]}" "$@" . >/dev/null
}
