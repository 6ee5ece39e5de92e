"""The HTTP API, by FastAPI: an app is the server it belongs to, and routes."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware

from lora_kit.serving import adapters_api, completions_api, health_api, labels_api, page_api
from lora_kit.serving.api_errors import install_error_handlers
from lora_kit.serving.body_limit import BodyLimit
from lora_kit.serving.served_model import ServedModel
from lora_kit.version import __version__


def build_app(served: ServedModel) -> FastAPI:
    """Return the app of a server. It asks nothing of other machines: pages of documentation would."""
    app = FastAPI(title="lora_kit", version=__version__, docs_url=None, redoc_url=None)
    app.state.served = served
    app.add_middleware(BodyLimit, most=served.settings.body_bytes)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=served.settings.allowed_hosts)
    install_error_handlers(app)
    for router in (
        completions_api.router,
        labels_api.router,
        adapters_api.router,
        adapters_api.administration,
        health_api.router,
        page_api.router,
    ):
        app.include_router(router)
    return app
