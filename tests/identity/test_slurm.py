"""Which SLURM job, step and rank."""

from __future__ import annotations

import pytest

FULL = {
    "SLURM_CLUSTER_NAME": "alps",
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NAME": "eval",
    "SLURM_JOB_ACCOUNT": "proj7",
    "SLURM_JOB_PARTITION": "gpu",
    "SLURM_ARRAY_JOB_ID": "4700",
    "SLURM_ARRAY_TASK_ID": "11",
    "SLURM_STEP_ID": "0",
    "SLURMD_NODENAME": "nid0001",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "8",
}


def test_the_environment_of_a_step(machine):
    """Everything that srun hands to a task; rank and count are numbers, ids are text."""
    assert machine.env(**FULL).attributes("slurm.") == {
        "slurm.cluster.name": "alps",
        "slurm.job.id": "4711",
        "slurm.job.name": "eval",
        "slurm.job.account": "proj7",
        "slurm.job.partition": "gpu",
        "slurm.array.job.id": "4700",
        "slurm.array.task.id": "11",
        "slurm.step.id": "0",
        "slurm.node.name": "nid0001",
        "slurm.task.rank": 3,
        "slurm.task.count": 8,
    }


def test_ranks_of_others(machine):
    """RANK and WORLD_SIZE are torchrun's; a rank that is no number is none."""
    machine.env(RANK="5", WORLD_SIZE="16", SLURM_JOB_ID="1", SLURM_PROCID="x", SLURM_NTASKS="")
    assert machine.attributes("slurm.") == {"slurm.job.id": "1"}


@pytest.mark.parametrize(
    ("cgroup", "expected"),
    [
        ("9:memory:/slurm/uid_1000/job_123/step_0/task_0\n", {"job": "123", "step": "0"}),
        (
            "10:devices:/slurm_nid0001/uid_2101171/job_280678/step_interactive\n",
            {"job": "280678", "step": "interactive"},
        ),
        ("0::/system.slice/slurmstepd.scope/job_123/step_0/user/task_0\n", {"job": "123", "step": "0"}),
        (
            "0::/system.slice/nid0001_slurmstepd.scope/job_9/step_batch/user/task_special\n",
            {"job": "9", "step": "batch"},
        ),
        ("0::/system.slice/slurmstepd.scope/job_42\n", {"job": "42"}),
        ("0::/system.slice/slurmstepd.scope/system\n", {}),
        ("0::/system.slice/slurmd.service\n", {}),
        ("0::/user.slice/job_1/step_2\n", {}),
    ],
)
def test_the_control_group(machine, cgroup, expected):
    """Job and step stand in the path where the environment is gone; a local task number is no rank."""
    machine.cgroup(cgroup)
    assert machine.attributes("slurm.") == {f"slurm.{name}.id": value for name, value in expected.items()}


def test_a_batch_script(machine):
    """The batch step has no variable: the group adds it, if it is of the same job."""
    machine.cgroup("0::/system.slice/slurmstepd.scope/job_7/step_batch/user/task_special\n")
    assert machine.env(SLURM_JOB_ID="7").attributes("slurm.step") == {"slurm.step.id": "batch"}
    assert machine.env(SLURM_JOB_ID="8").attributes("slurm.step") == {}


def test_a_login_node(machine):
    """A variable in a profile makes no job."""
    assert machine.env(SLURM_CLUSTER_NAME="alps").attributes("slurm.") == {}
