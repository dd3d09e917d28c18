from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["esper", "esper.*"]), "esper.triton_kernels"],
    package_dir={"esper.triton_kernels": "triton_kernels"},
)
