"""Gives a checkout that is not installed lora-bench's options; where it is installed, its entry point has done so."""

pytest_plugins = ["lora_bench.plugin"]
