"""`serve`: answer requests over HTTP until the process is to stop."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from typing import Final

from lora_kit.errors import ConfigError, StorageError
from lora_kit.serving.adapter_tasks import describe_not_offered
from lora_kit.serving.server_settings import ServerSettings

logger = logging.getLogger(__name__)

_GRACE_SECONDS: Final = 30
"""How long answers that have begun may take when the server is to stop."""


def serve(settings: ServerSettings, *, on_ready: Callable[[str], None] | None = None) -> None:
    """Serve the base and the adapters of a store that are for its task, each under its name, until SIGINT or SIGTERM.

    Args:
        on_ready: called with the address once the base is loaded.

    Raises:
        ConfigError: the packages of the extra `serve` are missing, or a setting is wrong.
        BaseModelError: the base cannot be loaded.
        StorageError: the port cannot be used.
    """
    try:
        import uvicorn

        from lora_kit.serving.http_app import build_app
        from lora_kit.serving.served_model import ServedModel
    except ImportError as error:
        raise ConfigError(f"{error.name} is not installed", hint="pip install 'lora-kit[serve]'") from error
    with _listen(settings.host, settings.port) as listener:  # before the base is loaded, which takes long
        served = ServedModel(settings)
        for line in describe_not_offered(served.labels.list_not_offered()):
            logger.warning("not offered: %s", line)
        try:
            config = uvicorn.Config(
                build_app(served), log_level="warning", access_log=False, timeout_graceful_shutdown=_GRACE_SECONDS
            )
            if on_ready is not None:
                host = f"[{settings.host}]" if ":" in settings.host else settings.host
                on_ready(f"http://{host}:{listener.getsockname()[1]}")
            uvicorn.Server(config).run(sockets=[listener])
        finally:
            served.close()


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; clients that come early wait.

    Raises:
        ConfigError: there is no such port.
        StorageError: it is in use, or not allowed, or the address is not of this machine.
    """
    if not 0 <= port < 2**16:
        raise ConfigError(f"port {port} is not one", hint="0 to 65535; 0 for any that is free")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise StorageError(f"port {port} of {host} cannot be used: {error}", hint="give another --port") from error
