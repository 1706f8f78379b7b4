#!/usr/bin/env bash
# Migrates MLflow's tables and sets the team's password, then starts its API and UI. Arguments are options of its server.
set -euo pipefail
python /etc/lotlip/mlflow_migrate.py
exec mlflow server --app-name basic-auth --host 0.0.0.0 --port 5000 "$@"
