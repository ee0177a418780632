# Simulated servers on the real path, see examples/simulated_fleet.py; the boards are a fake NVML library, built by gcc.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml README.md CHANGELOG.md ./
COPY melodi_otel melodi_otel
COPY deploy deploy
COPY docs/runbooks docs/runbooks
COPY examples examples
RUN pip install --no-cache-dir ".[nvidia]"
ENV PYTHONUNBUFFERED=1
USER 65532:65532
ENTRYPOINT ["python", "examples/simulated_fleet.py"]
