"""llmcomp: a torch.compile backend that lowers language models to generated Triton and C++ kernels."""

__version__ = "0.1.0"
