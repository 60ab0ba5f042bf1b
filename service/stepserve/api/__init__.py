"""The HTTP API: routes, schemas, limits and the error table. Knows FastAPI, not Ray or torch."""

from stepserve.api.app import create_app
from stepserve.api.backend import Backend

__all__ = ["Backend", "create_app"]
