"""An address of a store or a database is written down and printed, so it may hold no secret."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

_STORES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql", "databricks")


def check_tracking_uri(uri: str) -> None:
    """Looks at the address of an MLflow store, which is part of a run's configuration.

    Raises:
        ValueError: it is no address of a store that MLflow has, or it holds a password, a token or a query.
    """
    scheme = uri.partition("://")[0].partition("+")[0]
    if "://" not in uri or scheme not in _STORES:
        known = ", ".join(_STORES)
        raise ValueError(f"tracking_uri must be sqlite:///file or a server's address ({known}), got {masked(uri)!r}")
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise ValueError(f"tracking_uri is no address, {masked(uri)!r}: {error}") from error
    user = parts.username if scheme in ("http", "https") else None
    if scheme != "sqlite" and (parts.password is not None or user or parts.query or parts.fragment):
        raise ValueError(
            "tracking_uri holds a user, a password or a query, which would be logged with the configuration: set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, in the environment"
        )


def masked(uri: str) -> str:
    """Returns an address without what may be secret in it: user, password, query."""
    hidden = re.sub(r"(?<=://).*@", "***@", uri)
    return re.sub(r"[?#].*", "?***", hidden, flags=re.DOTALL)
