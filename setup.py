"""What setup.cfg cannot say: the wheel holds configs/ as jaxgpt/configs."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["jaxgpt*"]), "jaxgpt.configs"],
    package_dir={"jaxgpt.configs": "configs"},
)
