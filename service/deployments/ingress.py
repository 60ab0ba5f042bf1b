"""The ingress: the FastAPI application of `api/` on Ray Serve."""

from __future__ import annotations

import time
from typing import Any

from fastapi import FastAPI
from ray import serve

from service.api.access import Access
from service.api.app import create_app
from service.api.keys import KeyRing
from service.api.results import open_store
from service.api.settings import ApiSettings
from service.api.uploads import UploadLimits
from service.api.usage import LocalUsage
from service.config import Settings
from service.deployments.observing import count_retries, observe
from service.deployments.remote_backend import RemoteBackend
from service.deployments.shared_usage import SharedUsage


@serve.ingress()
class Ingress:
    """Built on its replica: neither the app nor its state is pickled.

    Args:
        settings: everything that an operator may set.
        keys: who may call; read by whoever starts the service, as their file may be there only.
        counter: handle of what counts the use of keys, where there are several ingress replicas.
    """

    def __init__(self, settings: Settings, keys: KeyRing, counter: Any = None) -> None:
        self.settings = settings
        self.observation = observe(settings.telemetry)
        self.backend = RemoteBackend(count_retries())
        usage = LocalUsage(time.monotonic) if counter is None else SharedUsage(counter)
        self.access = Access(keys, usage)
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
            cors_origins=http.cors_origins,
            public_url=self.settings.results.public_url,
            uploads=UploadLimits(**self.settings.uploads.model_dump()),
        )
        return create_app(self.backend, api_settings, self.store, self.access, self.observation)
