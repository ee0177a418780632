"""vLLM's plug-in: what ``vllm.general_plugins`` loads in every process of vLLM, with no flag and no code.

vLLM does not catch what a plug-in raises: nothing is raised here, whatever fails.
"""

from __future__ import annotations

import logging

log = logging.getLogger("melodi_otel")


def register() -> None:
    """Meter the engines that this process makes; again: nothing. Nothing starts before there is one."""
    try:
        from melodi_otel import program
        from melodi_otel.errors import ConfigError

        try:
            program.prepare()
            program.instrument_libraries(["vllm", "asgi"])
        except ConfigError as error:
            log.error("melodi_otel is off: %s", error)
    except Exception:
        log.exception("melodi_otel is off: it could not be prepared")
