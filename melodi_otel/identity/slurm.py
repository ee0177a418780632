"""Which SLURM job: its environment, and its control group where the environment is gone (``env -i``, a container, sudo)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from melodi_otel import semconv as names
from melodi_otel.identity.containers import Surroundings
from melodi_otel.identity.facts import Facts

VARIABLES: Final[Mapping[str, tuple[str, ...]]] = {
    names.SLURM_CLUSTER_NAME: ("SLURM_CLUSTER_NAME",),
    names.SLURM_JOB_ID: ("SLURM_JOB_ID", "SLURM_JOBID"),
    names.SLURM_JOB_NAME: ("SLURM_JOB_NAME",),
    names.SLURM_JOB_ACCOUNT: ("SLURM_JOB_ACCOUNT",),
    names.SLURM_JOB_PARTITION: ("SLURM_JOB_PARTITION",),
    names.SLURM_ARRAY_JOB_ID: ("SLURM_ARRAY_JOB_ID",),
    names.SLURM_ARRAY_TASK_ID: ("SLURM_ARRAY_TASK_ID",),
    names.SLURM_STEP_ID: ("SLURM_STEP_ID", "SLURM_STEPID"),
    names.SLURM_NODE_NAME: ("SLURMD_NODENAME",),
}
_NUMBERS: Final[Mapping[str, tuple[str, ...]]] = {
    names.SLURM_TASK_RANK: ("SLURM_PROCID",),
    names.SLURM_TASK_COUNT: ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"),
}
# v1: /slurm/uid_1000/job_7/step_0/task_0, with several slurmd per node /slurm_node1/…;
# v2: /system.slice/slurmstepd.scope/job_7/step_batch/user/task_0, or node1_slurmstepd.scope.
_GROUP: Final = re.compile(r"/(?:slurm[^/]*/uid_\d+|(?:[^/]+_)?slurmstepd\.scope)/job_(\d+)(?:/step_([^/]+))?(?=/|$)")


def job(facts: Facts, environ: Mapping[str, str], around: Surroundings) -> None:
    """The ``slurm.*`` attributes; nothing outside a job."""
    seen = next((found for group in around.groups if (found := _GROUP.search(group)) is not None), None)
    if seen is None and not any(environ.get(name) for name in VARIABLES[names.SLURM_JOB_ID]):
        return  # variables such as SLURM_CLUSTER_NAME stand in the profile of some login nodes
    for name, variables in VARIABLES.items():
        for variable in variables:
            facts.say(name, environ.get(variable, "").strip(), variable)
    for name, variables in _NUMBERS.items():
        for variable in variables:
            text = environ.get(variable, "").strip()
            facts.say(name, int(text) if text.isdecimal() else None, variable)
    if seen is not None:
        facts.say(names.SLURM_JOB_ID, seen[1], "/proc/self/cgroup")
        if facts.values[names.SLURM_JOB_ID] == seen[1]:
            facts.say(names.SLURM_STEP_ID, seen[2], "/proc/self/cgroup")
