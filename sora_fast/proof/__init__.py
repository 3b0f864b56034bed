"""Proving kernels on this machine: cases, the error rule, the processes that judge, the report."""

from sora_fast.proof.proving import Found, Report, prove

__all__ = ["Found", "Report", "prove"]
