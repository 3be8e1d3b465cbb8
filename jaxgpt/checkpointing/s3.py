"""Arrays of `s3://` checkpoints, through TensorStore's S3 driver.

Orbax 0.12 knows TensorStore's driver for `gs://` alone: it takes `s3://bucket/run` for a local
folder named `s3:`, and would write the arrays there. Its one function that names the driver is
replaced.
"""

import os

from orbax.checkpoint._src.serialization import tensorstore_utils

_orbax_store = tensorstore_utils._build_non_ocdbt_kvstore_tspec


def store(directory: str, name: str | None = None) -> dict:
    """Returns TensorStore's description of where the array `name` of a checkpoint is.

    The endpoint and the region come from the environment variables that boto3 reads, too.
    """
    if not directory.startswith("s3://"):
        return _orbax_store(directory, name)
    bucket, _, folder = directory.removeprefix("s3://").partition("/")
    path = "/".join(part for part in (folder.rstrip("/"), name) if part)
    found = {"driver": "s3", "bucket": bucket, "path": path}
    env = os.environ
    if "AWS_ACCESS_KEY_ID" in env:  # TensorStore would look for files first, and print where
        found["aws_credentials"] = {"type": "environment"}
    if endpoint := env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL"):
        region = env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION") or "us-east-1"
        found |= {"endpoint": endpoint, "aws_region": region}
    return found


def use_s3() -> None:
    """Has Orbax read and write the arrays of `s3://` checkpoints where they belong."""
    tensorstore_utils._build_non_ocdbt_kvstore_tspec = store
