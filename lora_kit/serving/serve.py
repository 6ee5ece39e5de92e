"""`serve`: answer requests over HTTP until the process is to stop."""

from __future__ import annotations

from collections.abc import Callable

from lora_kit.errors import ConfigError, StorageError
from lora_kit.serving.served_model import ServedModel, ServerSettings


def serve(settings: ServerSettings, *, on_ready: Callable[[str], None] | None = None) -> None:
    """Serve the base and every adapter of a store, each under its name, until SIGINT or SIGTERM.

    Args:
        on_ready: called with the address before the first request is taken.

    Raises:
        ConfigError: the packages of the extra `serve` are missing, or a setting is wrong.
        BaseModelError: the base cannot be loaded.
        StorageError: the port cannot be used.
    """
    try:
        import uvicorn

        from lora_kit.serving.http_app import build_app
    except ImportError as error:
        raise ConfigError(f"{error.name} is not installed", hint="pip install 'lora-kit[serve]'") from error
    served = ServedModel(settings)
    try:
        config = uvicorn.Config(
            build_app(served), host=settings.host, port=settings.port, log_level="warning", access_log=False
        )
        if on_ready is not None:
            on_ready(f"http://{settings.host}:{settings.port}")
        uvicorn.Server(config).run()
    except SystemExit as error:  # uvicorn ends the process where it cannot listen
        raise StorageError(
            f"port {settings.port} of {settings.host} cannot be used", hint="give another --port"
        ) from error
    finally:
        served.close()
