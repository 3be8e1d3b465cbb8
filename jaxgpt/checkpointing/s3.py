"""Arrays of `s3://` checkpoints, through TensorStore's S3 driver.

Orbax 0.12 uses TensorStore's driver for `gs://` only; it would write `s3://bucket/run` to a local
folder named `s3:`. The function of Orbax's that chooses the driver is replaced.
"""

import os

from orbax.checkpoint._src.serialization import tensorstore_utils

from jaxgpt.system.errors import BadInput

CHOOSER = "_build_non_ocdbt_kvstore_tspec"
_orbax_store = getattr(tensorstore_utils, CHOOSER, None)


def store(directory: str, name: str | None = None) -> dict:
    """Returns TensorStore's description of where the array `name` of a checkpoint is.

    Endpoint and region come from the environment variables that boto3 reads.
    """
    if not directory.startswith("s3://"):
        return _orbax_store(directory, name)
    bucket, _, folder = directory.removeprefix("s3://").partition("/")
    path = "/".join(part for part in (folder.rstrip("/"), name) if part)
    spec, env = {"driver": "s3", "bucket": bucket, "path": path}, os.environ
    if "AWS_ACCESS_KEY_ID" in env:  # or TensorStore looks for files first, and prints where
        spec["aws_credentials"] = {"type": "environment"}
    if endpoint := env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL"):
        region = env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION") or "us-east-1"
        spec |= {"endpoint": endpoint, "aws_region": region}
    return spec


def use_s3() -> None:
    """Makes Orbax read and write the arrays of `s3://` checkpoints on S3. Raises `BadInput` where
    Orbax has no such function."""
    if _orbax_store is None:
        raise BadInput("s3:// needs another version of Orbax: pip install orbax-checkpoint==0.12.8")
    setattr(tensorstore_utils, CHOOSER, store)
