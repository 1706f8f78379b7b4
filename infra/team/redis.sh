#!/usr/bin/env bash
# Starts Redis. `printf` is part of the shell, so the password is on no command line.
set -euo pipefail
exec redis-server - < <(cat /etc/lotlip/redis.conf && printf 'requirepass %s\n' "$REDISCLI_AUTH")
