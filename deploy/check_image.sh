#!/usr/bin/env bash
# Builds the image and runs it as it is meant to run: read-only, without capabilities, as nobody in
# particular. `images.sh` says what it needs.
#
#   deploy/check_image.sh [ROOTFS]
#
# DEVICE=cuda checks the image for GPUs (6 GB), which serves on the CPU where there is none.
set -euo pipefail
cd "$(dirname "$0")/.."
ROOTFS=${1:-${ROOTFS:-}}
# shellcheck source=deploy/images.sh
source deploy/images.sh

device=${DEVICE:-cpu}
image=localhost/stepserve:check-$device
options+=(--build-arg "DEVICE=$device")
port=${PORT:-18000}
run=(podman --runtime "$(command -v runc)")
container=

end() {
    if [ -n "$container" ]; then
        "${run[@]}" rm -f -t 5 "$container" >/dev/null
    fi
}
trap end EXIT

check_contents() {
    say "looking at what is in it"
    local from mounted found
    from=$(buildah from --pull-never "$image")
    mounted=$(buildah mount "$from")
    found=$(find "$mounted/opt/stepserve" -name 'libcud*.so*' -o -name 'libcublas*.so*' \
        -o -name 'libnvrtc*.so*' -o -path '*/site-packages/nvidia')
    du -sm "$mounted" | awk '{print "size of the root filesystem: " $1 " MB"}'
    if [ -d "$rootfs" ]; then
        du -sm "$rootfs" | awk '{print "of that the Debian base: " $1 " MB"}'
    fi
    buildah umount "$from" >/dev/null
    buildah rm "$from" >/dev/null
    if [ "$device" = cpu ] && [ -n "$found" ]; then
        echo "CUDA libraries in the CPU image: $found" >&2
        return 1
    fi
    if [ "$device" = cuda ] && [ -z "$found" ]; then
        echo "no CUDA libraries in the image for GPUs" >&2
        return 1
    fi
}

check_sbom() {
    say "what it is made of"
    local out
    out=$(mktemp -d)
    build_target --target sbom --output "$out"
    python3 - "$out/sbom.json" <<'END'
import json, sys
told = json.load(open(sys.argv[1]))
versions = {part["name"].lower(): part["version"] for part in told["components"]}
assert told["bomFormat"] == "CycloneDX" and {"torch", "diffusers", "ray"} <= set(versions), versions
print(f"CycloneDX {told['specVersion']}: {len(versions)} components, torch {versions['torch']}")
END
}

start() {
    say "starting, read-only and without capabilities"
    container=$("${run[@]}" run -d --read-only --tmpfs /tmp:rw,mode=1777 --shm-size 512m \
        --cap-drop ALL --security-opt no-new-privileges --network host \
        --ulimit nofile=16384:16384 --ulimit nproc=8192:8192 \
        -e STEPSERVE_HTTP__ALLOW_ANONYMOUS=true -e "STEPSERVE_HTTP__PORT=$port" "$image")
    for _ in $(seq "${START_TIMEOUT_S:-400}"); do
        if curl -sf "http://127.0.0.1:$port/readyz" >/dev/null; then return; fi
        if [ "$("${run[@]}" inspect -f '{{.State.Running}}' "$container")" != true ]; then break; fi
        sleep 1
    done
    curl -s "http://127.0.0.1:$port/readyz" && return
    "${run[@]}" logs "$container" >&2
    return 1
}

check_running() {
    say "who it runs as, and what it can write"
    # shellcheck disable=SC2016 # expanded inside
    "${run[@]}" exec "$container" sh -c 'test "$(id -u)" = 10001 && ! touch /opt/x 2>/dev/null'
    say "an image"
    curl -sf "http://127.0.0.1:$port/v1/images/generations" -H 'Content-Type: application/json' \
        -d '{"prompt": "red heart", "seed": 3}' | grep -o '"b64_json": *"iVBOR' | head -1
    say "metrics"
    sleep 8
    curl -sf "http://127.0.0.1:$port/metrics" | grep '^stepserve_images_total'
}

check_stop() {
    say "SIGTERM while an image is being made"
    local answer
    answer=$(mktemp)
    curl -s -o "$answer" -w '%{http_code}' "http://127.0.0.1:$port/v1/images/generations" \
        -H 'Content-Type: application/json' \
        -d '{"prompt": "house", "num_inference_steps": 60}' >"$answer.status" &
    local client=$!
    sleep 1
    "${run[@]}" stop -t 60 "$container" >/dev/null
    wait "$client"
    test "$(cat "$answer.status")" = 200
    test "$("${run[@]}" inspect -f '{{.State.ExitCode}}' "$container")" = 0
    "${run[@]}" logs "$container" 2>/dev/null | tail -1 | grep stopped
}

make_base
build "$image" --target service
check_contents
check_sbom
start
check_running
check_stop
say "all is well"
