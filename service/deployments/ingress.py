"""The ingress: the FastAPI application of `api/` on Ray Serve."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from ray import serve

from service.api.app import create_app
from service.api.results import open_store
from service.api.settings import ApiSettings
from service.api.uploads import UploadLimits
from service.config import Settings
from service.deployments.remote_backend import RemoteBackend


@serve.ingress()
class Ingress:
    """Built on its replica: neither the app nor its state is pickled."""

    def __init__(self, settings: Settings, handles: dict[str, Any]) -> None:
        self.settings = settings
        self.backend = RemoteBackend(handles)
        results = settings.results
        self.store = open_store(results.address, results.expires_s, results.secret)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray Serve after the constructor."""
        http = self.settings.http
        api_settings = ApiSettings(
            default_model=self.settings.default_model,
            max_body_bytes=http.max_body_bytes,
            request_timeout_s=http.request_timeout_s,
            echo_request_id=False,
            max_upload_bytes=http.max_upload_bytes,
            public_url=self.settings.results.public_url,
            uploads=UploadLimits(**self.settings.uploads.model_dump()),
        )
        return create_app(self.backend, api_settings, self.store)
