"""transformers: every ``generate()`` of the process, whoever calls it, as one activity; so every batched request.

======================= ================================================================================================
``instrumentor``        what is patched and what the patched functions do
``overrides``           model classes with a ``generate`` of their own
``streams``             where a streamer was made: the request that its thread forgets
``serving``             the context of a request in ``transformers serve``, and its client leaving
``call``                one call from begin to end: the only place that talks to ``Calls``
``loops``               one run of transformers' own generation inside a call
``request``             a run as it was asked for
``arguments``           what the caller asked for: settings, limits, ``gen_ai.request.*``
``counts``              exact prompt and completion tokens
``steps``               the step clock, and its times as engine steps
``compiling``           whether torch compiled something meanwhile
``engines``             a model object as an engine: devices, size, bytes per token
``parallel``            this process among several, and over how many a model is spread
``complaints``          failures of our own, told once
``adapters``            which LoRA or other adapter computes
``continuous``          continuous batching: what is patched in its manager and its loop
``continuous_loops``    the loops of the managers, and their lanes
``continuous_requests`` a batched request from begin to end, and the loop that serves it
``continuous_steps``    batches of a loop as engine steps
======================= ================================================================================================

Neither transformers nor torch is ever imported from here: models and tensors are used through what the caller hands in,
so ``instrument()`` costs nothing in a program that never loads them. A further way to generate gets its own patch in
``instrumentor`` and reports through ``call``.
"""

from __future__ import annotations

from melodi_otel.instrumentation.transformers.instrumentor import TransformersInstrumentor

__all__ = ["TransformersInstrumentor"]
