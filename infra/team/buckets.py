"""Creates the buckets of DVC and MLflow, with versions, unless they exist."""

from __future__ import annotations

import boto3

BUCKETS = ("dvc", "mlflow")


def main() -> None:
    """Creates what is missing."""
    s3 = boto3.client("s3")
    existing = {bucket["Name"] for bucket in s3.list_buckets()["Buckets"]}
    for name in BUCKETS:
        if name not in existing:
            s3.create_bucket(Bucket=name)
        s3.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})
        print(f"bucket {name}: versioning {s3.get_bucket_versioning(Bucket=name).get('Status')}")


if __name__ == "__main__":
    main()
