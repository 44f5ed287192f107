"""Speed and memory as ratios to plain layers, measured side by side in one run: ``python -m benchmarks``."""
