#!/usr/bin/env bash
# `worker.sh deploy` creates the pools and deployments; `worker.sh POOL` runs a worker of a pool.
set -euo pipefail
mkdir -p "$TMPDIR"
case $1 in
deploy) cd /opt/lotlip && exec python -m flows.deploy "$TEAM_SOURCE" "$TEAM_BRANCH" ;;
*)
    cd /var/lib/lotlip
    until problem=$(prefect work-pool inspect "$1" 2>&1); do
        echo "waiting for the pool $1: $(tail -n 2 <<<"$problem")" >&2
        sleep 5
    done
    # TEAM_WORKER_RUNS: the number of flow runs that this worker runs at a time
    exec prefect worker start --pool "$1" --type process --no-create-pool-if-not-found --with-healthcheck \
        ${TEAM_WORKER_RUNS:+--limit "$TEAM_WORKER_RUNS"} --install-policy never --name "${TEAM_WORKER:-$1-$(uname -n)}"
    ;;
esac
