"""Check and measure everything on a machine with a GPU: tests, kernels, decoding, prefill, compile times, and peers.

    python examples/gpu_check.py                              all parts, about an hour
    python examples/gpu_check.py --part tests,kernels,steps   some of them, each under ten minutes
    python examples/gpu_check.py --device cpu --tiny          the program itself, tried out without a GPU

Installs nothing. Results are written after each part: examples/results/DATE-GPU/gpu.md and gpu.json.
"""

import sys

from llmcomp.bench_gpu import main

if __name__ == "__main__":
    sys.exit(main())
