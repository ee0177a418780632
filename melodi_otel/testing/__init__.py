"""The public test kit: everything a test needs to have hardware, time and a backend without having them.

``clock.ManualClock`` (time by hand) · ``sources.ScriptedSource`` (a meter that follows a script) · ``powercap`` (a fake
``/sys`` with RAPL zones) · ``perf`` (the same zones as perf events) · ``cray`` (pm_counters) · ``amd``, ``apple`` (stand-ins
for those libraries) · ``nvml`` (a fake ``libnvidia-ml.so.1``, compiled on the spot) · ``telemetry`` (captured spans,
metrics and an OTLP receiver) · ``tiny_model`` (a random Llama and its tokenizer). Import the module that you need.
"""
