#!/usr/bin/env bash
# Brings the compose stack up without a registry, puts load on it, and asks Prometheus what it saw.
#
# The images of the service and of locust are built here; Debian's Prometheus stands in for the one
# of the compose file. Grafana cannot be had this way and stays down. `images.sh` says what else this
# needs, and
#
#   apt-get install -y dnsmasq-base golang-github-containernetworking-plugin-dnsname
#   pip install podman-compose
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=deploy/images.sh
source deploy/images.sh

work=$(mktemp -d)
up=(stepserve prometheus locust)
compose=("${PODMAN_COMPOSE:-podman-compose}" "--podman-args=--runtime=$(command -v runc)"
    -f docker-compose.yml -f "$work/limits.yml" --profile monitoring --profile load)

end() {
    "${compose[@]}" down -v >"$work/down.log" 2>&1 || true
}
trap end EXIT

# The default limits are more than a container here may have.
limit_files() {
    printf 'services:\n'
    printf '  %s: {ulimits: {nofile: 16384, nproc: 8192}}\n' "${up[@]}"
}

prometheus_stand_in() {
    cat <<END
FROM $base
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends prometheus
RUN mkdir -p /prometheus && chown 65534:65534 /prometheus
USER 65534
VOLUME /prometheus
ENTRYPOINT ["prometheus"]
CMD ["--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/prometheus"]
END
}

# wait_for SECONDS WHAT COMMAND...
wait_for() {
    local deadline=$((SECONDS + $1))
    until "${@:3}" >"$work/said" 2>&1; do
        if [ "$SECONDS" -gt "$deadline" ]; then
            echo "$2: not within $1 s" >&2
            cat "$work/said" >&2
            "${compose[@]}" logs 2>&1 | tail -40 >&2
            return 1
        fi
        sleep 1
    done
    say "$2"
}

# prometheus_says QUERY LEAST: whether the first value of a query is at least so much.
prometheus_says() {
    curl -sfG http://127.0.0.1:9090/api/v1/query --data-urlencode "query=$1" | python3 -c '
import json, sys
value = float(json.load(sys.stdin)["data"]["result"][0]["value"][1])
print(sys.argv[1], "is", value)
sys.exit(value < float(sys.argv[2]))' "$@"
}

# locust_says LEAST: whether so many requests were sent, and all were answered rightly.
locust_says() {
    curl -sf http://127.0.0.1:8089/stats/requests | python3 -c '
import json, sys
told = json.load(sys.stdin)
total = told["stats"][-1]
print(total["num_requests"], "requests,", total["num_failures"], "failures", told["errors"])
sys.exit(total["num_failures"] > 0 or total["num_requests"] < int(sys.argv[1]))' "$@"
}

make_base
build localhost/stepserve:latest --target service
build localhost/stepserve-locust:latest --target locust
prometheus_stand_in >"$work/Dockerfile.prometheus"
build "$(python3 -c "
import re
print(re.search(r'image: (\S*/prometheus:\S*)', open('docker-compose.yml').read())[1])")" \
    -f "$work/Dockerfile.prometheus"
limit_files >"$work/limits.yml"

"${compose[@]}" up -d --no-build "${up[@]}" >"$work/up.log" 2>&1 || { cat "$work/up.log" >&2; exit 1; }
wait_for "${START_TIMEOUT_S:-400}" "the service is ready" curl -sf http://127.0.0.1:8000/readyz
wait_for 60 "locust is there" curl -sf http://127.0.0.1:8089/
curl -sf http://127.0.0.1:8089/swarm -d user_count=4 -d spawn_rate=4 >/dev/null
wait_for 120 "users were served" locust_says 20
wait_for 60 "Prometheus scrapes the service" prometheus_says 'up{job="stepserve"}' 1
wait_for 60 "and knows of its images" prometheus_says 'sum(stepserve_images_total)' 10
curl -sf http://127.0.0.1:9090/api/v1/rules | grep -q '"alerting"'
say "and of its alerts"
locust_says 20

say "stopping"
"${compose[@]}" stop -t 60 stepserve >"$work/stop.log" 2>&1
exit_code=$(podman ps -a --filter 'name=stepserve[-_]stepserve' --format '{{.ExitCode}}')
test "$exit_code" = 0
say "all is well"
