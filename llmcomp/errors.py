"""Errors for users: each says what was expected, what was found and what to do."""


class LlmcompError(RuntimeError):
    """Base of every error that llmcomp raises on purpose."""


class OptionError(LlmcompError):
    """An option key or value that does not exist; the message lists the valid ones."""


class CaptureError(LlmcompError):
    """The captured graph holds something that cannot be compiled."""


class PassError(LlmcompError):
    """A pass was misplaced in the pipeline, or broke a fact that an earlier pass established."""


class VerifyError(LlmcompError):
    """`verify=True` found a pass that changed the result; the message names the pass and the node."""


class BuildError(LlmcompError):
    """Generated source did not compile; the message shows the excerpt and the graph nodes it came from."""


class CacheError(LlmcompError):
    """The folder of build artefacts cannot be used."""


class GenerationError(LlmcompError):
    """Something that `llmcomp.generate` was asked for, or was given, that it cannot work with."""


class MemoryFullError(LlmcompError):
    """A KV cache, or another tensor of a program, does not fit into the memory of its device; the message names its
    size and what lowers it.
    """


class FormatError(LlmcompError):
    """A weight that a storage format can't hold, or packed data that does not fit together."""


class PruneError(LlmcompError):
    """Something that can't be pruned in the way that was asked for, or not without data."""
