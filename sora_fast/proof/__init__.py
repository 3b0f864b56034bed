"""Proving kernels on this machine: cases, the error rule, the processes that judge, the report."""

from sora_fast.proof.proving import Found, Report, prove
from sora_fast.proof.starting import prove_at_start

__all__ = ["Found", "Report", "prove", "prove_at_start"]
