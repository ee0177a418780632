"""vLLM: every request and every engine step, with no flag and no code.

================ =========================================================================================================
``awaken``       the first engine of a program: until then nothing of ours runs
``instrumentor`` what is patched, and when
``front``        requests as they come in and answers as they go out of a server (``AsyncLLM``)
``offline``      the same of a script (``LLM``, ``LLMEngine``)
``served``       one request from begin to end: tokens, reasons, times
``cores``        engine cores: loading, ready, gone
``scheduler``    a scheduler, watched: steps with their times
``work``         a scheduler's output as the work of a step
``facts``        what vLLM's configuration says of an engine
``complaints``   failures of our own, told once
================ =========================================================================================================

vLLM is never imported from here. Its front end (an API server) and its engine cores are processes of their own: the first
know requests, the second know who computes what, and the hub joins them by the engine's ids.
"""

from __future__ import annotations

from melodi_otel.instrumentation.vllm.instrumentor import VllmInstrumentor

__all__ = ["VllmInstrumentor"]
