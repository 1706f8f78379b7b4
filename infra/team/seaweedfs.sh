#!/usr/bin/env bash
# Starts SeaweedFS. Only S3 listens for other containers: master, volume and filer require no password.
set -euo pipefail
umask 077
cat >/tmp/s3.json <<JSON
{"identities": [
  {"name": "admin", "actions": ["Admin", "Read", "Write", "List", "Tagging"],
   "credentials": [{"accessKey": "admin", "secretKey": "$S3_ADMIN_SECRET"}]},
  {"name": "dvc", "actions": ["Read:dvc", "Write:dvc", "List:dvc", "Tagging:dvc"],
   "credentials": [{"accessKey": "dvc", "secretKey": "$S3_DVC_SECRET"}]},
  {"name": "mlflow", "actions": ["Read:mlflow", "Write:mlflow", "List:mlflow", "Tagging:mlflow"],
   "credentials": [{"accessKey": "mlflow", "secretKey": "$S3_MLFLOW_SECRET"}]}
]}
JSON
unset S3_ADMIN_SECRET S3_DVC_SECRET S3_MLFLOW_SECRET
exec weed -logtostderr server -dir /var/lib/lotlip -ip 127.0.0.1 -ip.bind 127.0.0.1 \
    -master.volumeSizeLimitMB 1024 -volume.max 0 -volume.port 8334 \
    -s3 -s3.port 8333 -s3.ip.bind 0.0.0.0 -s3.config /tmp/s3.json -s3.iam=false -s3.port.iceberg 0 -s3.port.lance 0
