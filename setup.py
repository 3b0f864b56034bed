"""What pyproject.toml cannot say: the Triton kernels live in kernels/, installed as sora_fast.kernels."""

from setuptools import find_packages, setup

kernels = ["sora_fast.kernels", *(f"sora_fast.kernels.{name}" for name in find_packages("kernels"))]

setup(
    packages=find_packages(include=["sora_fast", "sora_fast.*"]) + kernels,
    package_dir={"sora_fast.kernels": "kernels"},
    package_data={"sora_fast.ops": ["*.json"]},
)
