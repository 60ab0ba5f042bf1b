"""The HTTP door: routes, schemas, limits and the error table. Knows FastAPI, not Ray or torch."""

from service.api.app import create_app
from service.api.backend import Backend, ModelStatus
from service.api.settings import ApiSettings

__all__ = ["ApiSettings", "Backend", "ModelStatus", "create_app"]
