#!/usr/bin/env bash
# Writes infra/local (which git ignores): settings, secrets and a self-signed certificate. Existing files stay, so that
# removing one and running this again renews it.
#   init.sh [HOST]      the name by which the team reaches the servers; localhost by default
#   init.sh rotate      replaces all secrets but the certificate; run `make team-up` afterwards
# TEAM_LOCAL names another folder than infra/local.
set -euo pipefail
umask 077
local=${TEAM_LOCAL:-$(dirname "$0")/../local}
mkdir -p "$local"
cd "$local"
mkdir -p secrets source
host=localhost
[ -f settings.env ] && host=$(sed -n 's/^TEAM_HOST=//p' settings.env)
if [ "${1:-}" = rotate ]; then
    rm -f login secrets/*.env secrets/htpasswd
elif [ -n "${1:-}" ]; then
    [[ $1 =~ ^[A-Za-z0-9.-]+$ ]] || { echo "error: $1 is not a host name" >&2; exit 1; }
    host=$1
fi
new() { openssl rand -hex 24; }
# writes standard input to a file that does not exist yet
keep() { [ -s "$1" ] || cat >"$1"; }

keep settings.env <<SETTINGS
TEAM_HOST=$host
TEAM_BIND=127.0.0.1
TEAM_VERSION=0.1.0
TEAM_SOURCE=/srv/source
TEAM_BRANCH=main
TEAM_BACKUPS_KEPT=14
TEAM_MLFLOW_WORKERS=2
SETTINGS
keep login <<<"team:$(new)"
login=$(<login)
if [ ! -s secrets/postgres.env ]; then
    prefect=$(new) mlflow=$(new) redis=$(new) admin=$(new) dvc=$(new) artifacts=$(new) flask=$(new)
    cat >secrets/postgres.env <<VALUES
PREFECT_DB_PASSWORD=$prefect
MLFLOW_DB_PASSWORD=$mlflow
VALUES
    cat >secrets/redis.env <<VALUES
REDISCLI_AUTH=$redis
VALUES
    cat >secrets/seaweedfs.env <<VALUES
S3_ADMIN_SECRET=$admin
S3_DVC_SECRET=$dvc
S3_MLFLOW_SECRET=$artifacts
VALUES
    cat >secrets/buckets.env <<VALUES
AWS_ACCESS_KEY_ID=admin
AWS_SECRET_ACCESS_KEY=$admin
VALUES
    cat >secrets/prefect.env <<VALUES
PGPASSWORD=$prefect
PREFECT_SERVER_API_AUTH_STRING=$login
PREFECT_API_AUTH_STRING=$login
PREFECT_REDIS_MESSAGING_PASSWORD=$redis
PREFECT_SERVER_DOCKET_URL=redis://:$redis@redis:6379/1
VALUES
    cat >secrets/mlflow.env <<VALUES
PGPASSWORD=$mlflow
AWS_ACCESS_KEY_ID=mlflow
AWS_SECRET_ACCESS_KEY=$artifacts
MLFLOW_AUTH_ADMIN_USERNAME=${login%%:*}
MLFLOW_AUTH_ADMIN_PASSWORD=${login#*:}
MLFLOW_FLASK_SERVER_SECRET_KEY=$flask
VALUES
    cat >secrets/worker.env <<VALUES
PREFECT_API_AUTH_STRING=$login
MLFLOW_TRACKING_USERNAME=${login%%:*}
MLFLOW_TRACKING_PASSWORD=${login#*:}
AWS_ACCESS_KEY_ID=dvc
AWS_SECRET_ACCESS_KEY=$dvc
VALUES
fi
[ -s secrets/htpasswd ] || printf '%s:%s\n' "${login%%:*}" "$(openssl passwd -6 -stdin <<<"${login#*:}")" >secrets/htpasswd
keep secrets/hosts.map <<<"$host 1;"
if [ ! -s secrets/tls.crt ]; then
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 825 -subj "/CN=$host" \
        -addext "subjectAltName=DNS:$host" -keyout secrets/tls.key -out secrets/tls.crt 2>/dev/null
fi
# The containers' user must read these. No other user of this machine can: the folder above them is closed.
chmod 0700 .
chmod 0755 secrets source
chmod 0644 secrets/*
echo "$PWD has the settings of https://$host:8443; the login is in $PWD/login"
