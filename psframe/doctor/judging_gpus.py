"""Judges GPUs: whether CuPy can use those that there are, and how many workers share each."""

from __future__ import annotations

from collections import Counter

from psframe.doctor.case import Case, Finding, Verdict

__all__ = ["judge_gpu_sharing", "judge_gpus"]


def judge_gpus(case: Case) -> Finding:
    """Judge whether CuPy works on the GPUs that the machines have."""
    facts = case.every("gpus")
    for rank, one in enumerate(facts):
        if one["error"]:
            return Finding(
                Verdict.ERROR,
                f"rank {rank}: a kernel does not run: {one['error']}",
                "see that CuPy is for this driver's CUDA (psframe[cuda12] or psframe[cuda13]), or"
                " take --device cpu",
            )
        if one["hardware"] and not one["cupy"]:
            return Finding(
                Verdict.WARNING,
                f"rank {rank} is on a machine with {one['hardware']} GPUs, and CuPy is not"
                " installed: its worker computes on the CPU",
                "pip install 'psframe[cuda12]' or 'psframe[cuda13]'",
            )
        if one["hardware"] and not one["devices"]:
            return Finding(
                Verdict.WARNING,
                f"rank {rank} is on a machine with {one['hardware']} GPUs, and CuPy sees none",
                "see CUDA_VISIBLE_DEVICES, the driver, and what the batch system or the container"
                " gives (srun --gpus, docker run --gpus)",
            )
    names = Counter(
        device["name"]
        for device in {d["uuid"]: d for one in facts for d in one["devices"]}.values()
    )
    if not names:
        return Finding(Verdict.OK, "none; workers compute on CPUs")
    return Finding(Verdict.OK, ", ".join(f"{count} x {name}" for name, count in names.items()))


def judge_gpu_sharing(case: Case) -> Finding | None:
    """Judge how many workers each GPU gets, if the first rank is the only server."""
    users: Counter[str] = Counter()
    without: list[int] = []
    for node in case.nodes():
        workers = [rank for rank in node.ranks if rank or len(case.ranks) == 1]
        for i, rank in enumerate(workers):
            devices = case.of(rank, "gpus")["devices"]
            if devices:
                users[f"{node.host} {devices[i % len(devices)]['uuid']}"] += 1
            else:
                without.append(rank)
    if not users:
        return None
    if without:
        return Finding(
            Verdict.WARNING,
            f"{sum(users.values())} workers have a GPU, {len(without)} have none (rank"
            f" {without[0]}, ...) and set the pace of BSP and SSP",
            "start workers only where there are GPUs, or all with --device cpu",
        )
    most = max(users.values())
    found = f"{sum(users.values())} workers on {len(users)} GPUs"
    if most == 1:
        return Finding(Verdict.OK, found)
    found += f", up to {most} on one"
    if all(one["mps"] for one in case.every("gpus") if one["devices"]):
        return Finding(Verdict.OK, f"{found}, with MPS")
    return Finding(
        Verdict.WARNING,
        f"{found}, which take turns",
        "start NVIDIA's MPS on each node (nvidia-cuda-mps-control -d), or one worker a GPU",
    )
