"""The process of one part: `python -m elas.gpu_check.worker --part kernels …`, see `setting.Setting`."""

import importlib
import sys

from elas.gpu_check.setting import Setting

MODULES = {
    "device": "hardware",
    "kernels": "kernels",
    "kernel_cases": "kernel_cases",
    "training": "training",
    "NCCL": "nccl",
    "tests": "checkout",
    "speed": "speed",
}


def main(setting: Setting) -> None:
    """Run a part; it hands its rows over through the setting."""
    importlib.import_module(f"elas.gpu_check.{MODULES[setting.part]}").run(setting)
    sys.stdout.flush()


if __name__ == "__main__":
    main(Setting.read())
