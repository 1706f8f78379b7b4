#!/usr/bin/env bash
# Runs a command with the settings of this service's secret files, which contain lines NAME=VALUE. Values are taken as they
# are: nothing in them is evaluated, and none of them is on a command line.
set -euo pipefail
shopt -s nullglob
for file in /run/secrets/*.env; do
    while IFS= read -r line; do
        [[ $line =~ ^[A-Z_0-9]+= ]] && export "${line?}"
    done <"$file"
done
exec "$@"
