"""Speed and memory as ratios to plain layers, measured side by side in one run: ``python -m benchmarks``."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # before torch is there, or its profiler tells the screen of every use
