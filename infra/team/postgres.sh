#!/usr/bin/env bash
# Starts Postgres with the roles and passwords of postgres.env. A changed password holds from the next start.
set -euo pipefail
umask 077
socket=/tmp/postgres
mkdir -p "$socket"
if [ ! -s "$PGDATA/PG_VERSION" ]; then
    initdb --pgdata "$PGDATA" --username postgres --auth trust --encoding UTF8 --locale C.UTF-8 --data-checksums
fi
options="-c unix_socket_directories=$socket -c hba_file=/etc/lotlip/pg_hba.conf"
# listens only on a socket that no other container reaches, until the roles exist
pg_ctl start --pgdata "$PGDATA" --wait --options "$options -c listen_addresses=''" --log /dev/stderr
psql --host "$socket" --username postgres --dbname postgres --no-psqlrc --quiet --set ON_ERROR_STOP=1 \
    --file /etc/lotlip/roles.sql
pg_ctl stop --pgdata "$PGDATA" --wait --mode fast
unset PREFECT_DB_PASSWORD MLFLOW_DB_PASSWORD
# shellcheck disable=SC2086  # several words
exec postgres -D "$PGDATA" $options -c listen_addresses=0.0.0.0 -c password_encryption=scram-sha-256
