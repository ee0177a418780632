"""Names, as data: every span attribute, resource attribute and closed list of values of the contract.

Code, tests, docs and dashboards read them here and nowhere else; the metrics stand in :mod:`melodi_otel.semconv_metrics`.
``gen_ai.*`` and ``hw.*`` are OpenTelemetry's own names, ``melodi.*`` are ours. Pure data: this module imports nothing of
the house, and a test compares its lists with the types in ``attribution``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

ENERGY_SCHEMA: Final = 1
"""Version of what ``melodi.energy.*`` on a span means; written as ``melodi.energy.schema``."""

ANY_MODEL: Final = "*"
"""In a budget: all models that are not named."""

AttributeType = Literal["double", "int", "string", "boolean", "string[]"]


@dataclass(frozen=True, slots=True)
class Attribute:
    """One attribute.

    Attributes:
        name: the full name.
        type: OpenTelemetry's type of the value.
        unit: UCUM unit of a number; empty for text and for pure numbers.
        brief: what it says, in one sentence.
        values: the closed list of values; empty where any value may stand.
    """

    name: str
    type: AttributeType
    unit: str
    brief: str
    values: tuple[str, ...] = ()


# --- closed lists -----------------------------------------------------------------------------------------------------

METHODS: Final = ("exclusive", "step", "slice", "process", "phase", "window", "equal")
"""Tiers of evidence, the most exact first."""
QUALITIES: Final = ("measured", "interpolated", "estimated", "partial", "unavailable")
"""From the best to the worst."""
SCOPES: Final = ("gpu", "gpu+cpu", "gpu+cpu+memory", "cpu+memory", "cpu", "gpu+memory", "memory")
"""Device types that a total contains. The first five are what machines have; the last two are where a meter is lost."""
REASONS: Final = (
    "no_source",
    "permission_denied",
    "no_samples",
    "late",
    "counter_reset",
    "device_lost",
    "devices_assumed",
    "devices_elsewhere",
    "phase_elsewhere",
    "shutdown",
    "forked",
    "overflow",
    "disabled",
)
BUCKETS: Final = ("idle", "tail", "loading", "foreign", "unsampled")
PHASES: Final = ("prefill", "decode", "static", "unsplit")
OUTCOMES: Final = ("stop", "length", "abort", "error")
SPAN_OUTCOMES: Final = (*QUALITIES, "late", "overflow", "flush", "shutdown", "dropped")
"""How a span stopped waiting: with joules of that quality, or why without (``dropped``: the exporter was blocked for so
long that the queue behind it was full)."""
SPAN_EXPORTS: Final = ("sent", "failed")
"""What became of a span that was handed to an exporter of ours."""
HW_TYPES: Final = ("gpu", "cpu", "memory")
TOKEN_TYPES: Final = ("input", "output")

# --- OpenTelemetry's names that we use --------------------------------------------------------------------------------

GEN_AI_OPERATION: Final = "gen_ai.operation.name"
GEN_AI_PROVIDER: Final = "gen_ai.provider.name"
GEN_AI_REQUEST_MODEL: Final = "gen_ai.request.model"
GEN_AI_REQUEST_STREAM: Final = "gen_ai.request.stream"
GEN_AI_RESPONSE_ID: Final = "gen_ai.response.id"
GEN_AI_FINISH_REASONS: Final = "gen_ai.response.finish_reasons"
GEN_AI_TIME_TO_FIRST_CHUNK: Final = "gen_ai.response.time_to_first_chunk"
GEN_AI_INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
GEN_AI_OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
GEN_AI_CACHED_TOKENS: Final = "gen_ai.usage.cache_read.input_tokens"
GEN_AI_TOKEN_TYPE: Final = "gen_ai.token.type"  # noqa: S105 - a kind of token, no secret
GEN_AI_INPUT_MESSAGES: Final = "gen_ai.input.messages"
GEN_AI_OUTPUT_MESSAGES: Final = "gen_ai.output.messages"
ERROR_TYPE: Final = "error.type"
SERVICE_NAME: Final = "service.name"
SERVICE_NAMESPACE: Final = "service.namespace"
HOST_ID: Final = "host.id"
HOST_NAME: Final = "host.name"
HOST_ARCH: Final = "host.arch"
HOST_CPU_MODEL_NAME: Final = "host.cpu.model.name"
HOST_CPU_VENDOR_ID: Final = "host.cpu.vendor.id"
HOST_CPU_FAMILY: Final = "host.cpu.family"
HOST_CPU_MODEL_ID: Final = "host.cpu.model.id"
HOST_CPU_STEPPING: Final = "host.cpu.stepping"
CONTAINER_ID: Final = "container.id"
CONTAINER_NAME: Final = "container.name"
K8S_CLUSTER_NAME: Final = "k8s.cluster.name"
K8S_NAMESPACE_NAME: Final = "k8s.namespace.name"
K8S_NODE_NAME: Final = "k8s.node.name"
K8S_POD_NAME: Final = "k8s.pod.name"
K8S_POD_UID: Final = "k8s.pod.uid"
K8S_CONTAINER_NAME: Final = "k8s.container.name"
HW_ID: Final = "hw.id"
HW_TYPE: Final = "hw.type"
HW_NAME: Final = "hw.name"

# --- ours -------------------------------------------------------------------------------------------------------------

TOTAL: Final = "melodi.energy.total"
GPU: Final = "melodi.energy.gpu"
CPU: Final = "melodi.energy.cpu"
MEMORY: Final = "melodi.energy.memory"
DYNAMIC: Final = "melodi.energy.dynamic"
STATIC: Final = "melodi.energy.static"
PREFILL: Final = "melodi.energy.prefill"
DECODE: Final = "melodi.energy.decode"
PER_OUTPUT_TOKEN: Final = "melodi.energy.per_output_token"  # noqa: S105 - tokens of text
METHOD: Final = "melodi.energy.method"
SOURCE: Final = "melodi.energy.source"
SCOPE: Final = "melodi.energy.scope"
QUALITY: Final = "melodi.energy.quality"
UNCERTAINTY: Final = "melodi.energy.uncertainty"
COVERAGE: Final = "melodi.energy.coverage"
CONCURRENCY: Final = "melodi.energy.concurrency"
EXCLUSIVE: Final = "melodi.energy.exclusive"
DEVICES: Final = "melodi.energy.devices"
REASON: Final = "melodi.energy.reason"
ROLLUP: Final = "melodi.energy.rollup"
SCHEMA: Final = "melodi.energy.schema"

PHASE: Final = "melodi.energy.phase"
BUCKET: Final = "melodi.energy.bucket"
HOLDER_SERVICE: Final = "melodi.energy.holder.service"
HOLDER_MODEL: Final = "melodi.energy.holder.model"
REQUEST_OUTCOME: Final = "melodi.request.outcome"
COMPILE_WARMUP: Final = "melodi.request.compile_warmup"
RANK: Final = "melodi.parallel.rank"
WORLD_SIZE: Final = "melodi.parallel.world_size"
SPAN_OUTCOME: Final = "melodi.span.outcome"
SPAN_EXPORT: Final = "melodi.span.export.outcome"
METER_SOURCE: Final = "melodi.source.name"

GPU_MODEL: Final = "melodi.gpu.model"
GPU_DRIVER_VERSION: Final = "melodi.gpu.driver_version"
SLURM_CLUSTER_NAME: Final = "slurm.cluster.name"
SLURM_JOB_ID: Final = "slurm.job.id"
SLURM_JOB_NAME: Final = "slurm.job.name"
SLURM_JOB_ACCOUNT: Final = "slurm.job.account"
SLURM_JOB_PARTITION: Final = "slurm.job.partition"
SLURM_ARRAY_JOB_ID: Final = "slurm.array.job.id"
SLURM_ARRAY_TASK_ID: Final = "slurm.array.task.id"
SLURM_STEP_ID: Final = "slurm.step.id"
SLURM_NODE_NAME: Final = "slurm.node.name"
SLURM_TASK_RANK: Final = "slurm.task.rank"
SLURM_TASK_COUNT: Final = "slurm.task.count"

SPAN_ATTRIBUTES: Final = (
    Attribute(TOTAL, "double", "J", "Energy of this request on all metered devices."),
    Attribute(GPU, "double", "J", "Its part on GPUs; absent = not measured."),
    Attribute(CPU, "double", "J", "Its part on CPU packages; absent = not measured."),
    Attribute(MEMORY, "double", "J", "Its part on memory; absent = not measured."),
    Attribute(DYNAMIC, "double", "J", "Energy above the idle power of the devices."),
    Attribute(STATIC, "double", "J", "The request's part of the idle energy; dynamic + static = total."),
    Attribute(PREFILL, "double", "J", "Dynamic energy of computing the prompt."),
    Attribute(DECODE, "double", "J", "Dynamic energy of producing tokens; prefill + decode = dynamic."),
    Attribute(PER_OUTPUT_TOKEN, "double", "J", "Total divided by the output tokens."),
    Attribute(METHOD, "string", "", "Evidence by which shared energy was divided.", METHODS),
    Attribute(SOURCE, "string[]", "", "Meters behind the joules, e.g. nvml.energy_counter."),
    Attribute(SCOPE, "string", "", "Device types that total contains.", SCOPES),
    Attribute(QUALITY, "string", "", "How good the figure is; the worst condition wins.", QUALITIES),
    Attribute(UNCERTAINTY, "double", "J", "1 sigma of total."),
    Attribute(COVERAGE, "double", "1", "Part of the time with usable samples, 0 to 1."),
    Attribute(CONCURRENCY, "double", "", "Mean number of requests in flight on the devices, this one included."),
    Attribute(EXCLUSIVE, "boolean", "", "No other process computed on the devices; absent = not known."),
    Attribute(DEVICES, "string[]", "", "The devices, by hw.id."),
    Attribute(REASON, "string", "", "Why the figure is partial, assumed or unavailable.", REASONS),
    Attribute(ROLLUP, "double", "J", "Energy of this call and all nested ones, on spans that do not own the request."),
    Attribute(SCHEMA, "int", "", "Version of these attributes."),
)
"""``melodi.energy.*`` on the span of a request."""

REQUEST_ATTRIBUTES: Final = (
    Attribute(COMPILE_WARMUP, "boolean", "", "torch.compile worked in this process meanwhile; only where it is true."),
    Attribute(RANK, "int", "", "Which of several processes of one program this is, where that is known."),
    Attribute(WORLD_SIZE, "int", "{process}", "How many processes those are."),
)
"""What else a span of ours says of its request."""

GEN_AI_ATTRIBUTES: Final = (
    Attribute(GEN_AI_OPERATION, "string", "", "What was asked: chat, text_completion, …"),
    Attribute(GEN_AI_PROVIDER, "string", "", "Who computed: transformers, vllm, …"),
    Attribute(GEN_AI_REQUEST_MODEL, "string", "", "The model that was asked for."),
    Attribute(GEN_AI_REQUEST_STREAM, "boolean", "", "Present and true where the answer was streamed."),
    Attribute(GEN_AI_RESPONSE_ID, "string", "", "The server's id of the answer, where it has one."),
    Attribute(GEN_AI_INPUT_TOKENS, "int", "{token}", "Prompt tokens, cached ones included."),
    Attribute(GEN_AI_CACHED_TOKENS, "int", "{token}", "Prompt tokens that a cache already held."),
    Attribute(GEN_AI_OUTPUT_TOKENS, "int", "{token}", "Tokens produced."),
    Attribute(GEN_AI_FINISH_REASONS, "string[]", "", "Why each sequence ended."),
    Attribute(GEN_AI_TIME_TO_FIRST_CHUNK, "double", "s", "From the start to the first token."),
    Attribute(GEN_AI_INPUT_MESSAGES, "string", "", "The prompt; only where content capture is on."),
    Attribute(GEN_AI_OUTPUT_MESSAGES, "string", "", "The answer; only where content capture is on."),
    Attribute(ERROR_TYPE, "string", "", "Class of what the call raised."),
)
"""Names of the GenAI conventions that our spans carry."""

RESOURCE_ATTRIBUTES: Final = (
    Attribute(HOST_ID, "string", "", "The host: its machine id, or MELODI_HOST_ID."),
    Attribute(HOST_NAME, "string", "", "The host's name; in a pod the node's, where that is known."),
    Attribute(HOST_ARCH, "string", "", "Its architecture: amd64, arm64, …"),
    Attribute(HOST_CPU_MODEL_NAME, "string", "", "The CPU's model name."),
    Attribute(HOST_CPU_VENDOR_ID, "string", "", "Who made the CPU: GenuineIntel, AuthenticAMD, ARM, …"),
    Attribute(HOST_CPU_FAMILY, "string", "", "The CPU's family; on ARM its architecture."),
    Attribute(HOST_CPU_MODEL_ID, "string", "", "The CPU's model within the family; on ARM its part."),
    Attribute(HOST_CPU_STEPPING, "string", "", "The CPU's stepping; on ARM its revision, e.g. r1p1."),
    Attribute(GPU_MODEL, "string[]", "", "Model names of the GPUs, each once."),
    Attribute(GPU_DRIVER_VERSION, "string", "", "Version of the GPU driver."),
    Attribute(CONTAINER_ID, "string", "", "The container, where present."),
    Attribute(CONTAINER_NAME, "string", "", "The container's name, where its runtime tells it."),
    Attribute(K8S_CLUSTER_NAME, "string", "", "Kubernetes cluster, where present."),
    Attribute(K8S_NAMESPACE_NAME, "string", "", "Kubernetes namespace, where present."),
    Attribute(K8S_NODE_NAME, "string", "", "Kubernetes node, where present."),
    Attribute(K8S_POD_NAME, "string", "", "Kubernetes pod, where present."),
    Attribute(K8S_POD_UID, "string", "", "Kubernetes pod UID, where present."),
    Attribute(K8S_CONTAINER_NAME, "string", "", "Kubernetes container, where present."),
    Attribute(SLURM_CLUSTER_NAME, "string", "", "SLURM cluster, where present."),
    Attribute(SLURM_JOB_ID, "string", "", "SLURM job, where present."),
    Attribute(SLURM_JOB_NAME, "string", "", "Its name, where present."),
    Attribute(SLURM_JOB_ACCOUNT, "string", "", "SLURM account, where present."),
    Attribute(SLURM_JOB_PARTITION, "string", "", "SLURM partition, where present."),
    Attribute(SLURM_ARRAY_JOB_ID, "string", "", "The job array, where the job is of one."),
    Attribute(SLURM_ARRAY_TASK_ID, "string", "", "Which job of the array, where it is of one."),
    Attribute(SLURM_STEP_ID, "string", "", "SLURM step, where present: a number, batch, interactive, …"),
    Attribute(SLURM_NODE_NAME, "string", "", "SLURM's name of the node, where present."),
    Attribute(SLURM_TASK_RANK, "int", "", "Rank of this task in its step, from 0, where present."),
    Attribute(SLURM_TASK_COUNT, "int", "", "Tasks of the step (or of the job), where present."),
)
"""Of our own providers' resource, and what the resource detector ``melodi_otel`` finds."""

METRIC_ATTRIBUTES: Final = (
    Attribute(HW_ID, "string", "", "The device: GPU UUID, intel-rapl:0, …"),
    Attribute(HW_TYPE, "string", "", "Type of the device.", HW_TYPES),
    Attribute(HW_NAME, "string", "", "Model name of the device."),
    Attribute(PHASE, "string", "", "What the joules were for.", PHASES),
    Attribute(BUCKET, "string", "", "Where joules went that no request used.", BUCKETS),
    Attribute(HOLDER_SERVICE, "string", "", "Service whose engine holds the device, where one does."),
    Attribute(HOLDER_MODEL, "string", "", "Model that holds the device, where one does."),
    Attribute(REQUEST_OUTCOME, "string", "", "How the request ended.", OUTCOMES),
    Attribute(SPAN_OUTCOME, "string", "", "How the span stopped waiting for its joules.", SPAN_OUTCOMES),
    Attribute(SPAN_EXPORT, "string", "", "What became of the span at our own exporter.", SPAN_EXPORTS),
    Attribute(METER_SOURCE, "string", "", "A meter, by its name in MELODI_SOURCES."),
    Attribute(GEN_AI_TOKEN_TYPE, "string", "", "Which tokens.", TOKEN_TYPES),
    Attribute(SERVICE_NAME, "string", "", "The service that asked for the work."),
    Attribute(SERVICE_NAMESPACE, "string", "", "The namespace of that service."),
)
"""Attributes of metrics that no span carries."""
