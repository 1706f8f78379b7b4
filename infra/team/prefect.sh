#!/usr/bin/env bash
# Migrates Prefect's tables, then starts its API and UI.
set -euo pipefail
prefect server database upgrade -y
exec prefect server start --no-services --host 0.0.0.0 --port 4200
