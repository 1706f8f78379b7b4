#!/usr/bin/env bash
# `backup.sh once` dumps both databases, `backup.sh daily` does so every day, `backup.sh check` fails without a dump of the
# last 25 hours, `backup.sh restore NAME` restores a dump into empty databases.
set -euo pipefail
folder=/var/lib/lotlip
umask 077

# dump or restore of one database with its role's password
run() {
    case $1 in
    prefect) PGPASSWORD=$PREFECT_DB_PASSWORD "${@:2}" --host postgres --username prefect --dbname prefect ;;
    mlflow) PGPASSWORD=$MLFLOW_DB_PASSWORD "${@:2}" --host postgres --username mlflow --dbname mlflow ;;
    esac
}

once() {
    local name part
    name=$(date --utc +%Y%m%dT%H%M%SZ)
    part=$folder/.$name.part
    rm -rf "$folder"/.*.part
    mkdir "$part"
    for database in prefect mlflow; do
        run $database pg_dump --format custom --file "$part/$database.dump"
        pg_restore --list "$part/$database.dump" >/dev/null # a damaged dump fails here
    done
    mv "$part" "$folder/$name"
    echo "backup $name"
    find "$folder" -mindepth 1 -maxdepth 1 -name '20*Z' | sort | head -n "-${TEAM_BACKUPS_KEPT:-14}" |
        while IFS= read -r old; do rm -rf "$old"; done
}

case $1 in
once) once ;;
daily) while true; do once || echo "the backup failed" >&2; sleep 86400 & wait $!; done ;;
check) [ -n "$(find "$folder" -mindepth 1 -maxdepth 1 -name '20*Z' -mmin -1500)" ] ;;
list) find "$folder" -mindepth 1 -maxdepth 1 -name '20*Z' -printf '%f\n' | sort ;;
restore)
    [[ ${2:-} =~ ^[0-9TZ]+$ && -d $folder/$2 ]] || { echo "error: no backup ${2:-}; see backup.sh list" >&2; exit 1; }
    for database in prefect mlflow; do
        tables=$(run $database psql --no-psqlrc --tuples-only --no-align \
            --command "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'")
        [ "$tables" = 0 ] || { echo "error: database $database has $tables tables; restore needs an empty one" >&2; exit 1; }
    done
    for database in prefect mlflow; do
        run $database pg_restore --exit-on-error --no-owner --no-acl --single-transaction \
            --use-list <(pg_restore --list "$folder/$2/$database.dump" | grep -v ' EXTENSION ') \
            "$folder/$2/$database.dump"
    done
    echo "restored $2"
    ;;
esac
