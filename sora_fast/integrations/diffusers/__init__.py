"""Models of diffusers on our ops, in place: `apply` and `revert`. diffusers itself is not imported.

One file for each family of models: what is replaced in it, and the fingerprints of the source it was written for.
"""

from sora_fast.integrations.diffusers.applying import applied, apply, revert
from sora_fast.integrations.diffusers.report import ModuleReport, Report

__all__ = ["ModuleReport", "Report", "applied", "apply", "revert"]
