# Your vLLM image with the meter in it. Nothing else of the image changes: melodi_otel requires no engine and no torch.
#
#   docker build -t vllm-metered -f deploy/docker/vllm.Dockerfile .          (in the root of the repository)
#   docker run --gpus all -v melodi-otel:/run/melodi-otel:ro -p 8000:8000 vllm-metered --model MODEL

ARG VLLM=vllm/vllm-openai:latest
FROM ${VLLM}
COPY pyproject.toml README.md CHANGELOG.md /tmp/melodi_otel/
COPY melodi_otel /tmp/melodi_otel/melodi_otel
COPY deploy /tmp/melodi_otel/deploy
COPY docs/runbooks /tmp/melodi_otel/docs/runbooks
RUN python3 -m pip install --no-cache-dir "/tmp/melodi_otel[vllm]" && rm -rf /tmp/melodi_otel
