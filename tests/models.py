"""Tiny models of every architecture, built from the config classes of transformers (nothing is downloaded).

    case = causal_lm("llama")             a Case is a name and a recipe: building it is lazy and cheap
    model = case.build(torch.float32)     seeded weights, eval mode, a few hundred thousand parameters
    model(**case.inputs(batch=2, length=11)).logits

`causal_lm_cases()` covers MODEL_FOR_CAUSAL_LM_MAPPING but for the rows of `EXCLUDED`, each with its reason.
One shrinker serves all: each attribute of the default config that `SMALL` names gets its small value, and
lists with one entry per layer keep each kind of layer; `SPECIAL` holds what single architectures need beyond.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import cast

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB = 150
HIDDEN = 64
INNER = 112
HEADS = 4
HEAD = HIDDEN // HEADS
MELS = 20

Settings = Mapping[str, object]

# Sizes are unequal and not all powers of two, so that a swapped pair of them fails.
SIZES = (
    (VOCAB, "vocab_size vocab_size_per_layer_input decoder_vocab_size"),
    (HIDDEN, "hidden_size d_model n_embd emb_dim embedding_dim dim hidden_size_global"),
    (HIDDEN, "embedding_size word_embed_proj_dim attention_hidden_size lru_width"),
    (INNER, "intermediate_size ffn_dim ffn_hidden_size n_inner dff dim_ff d_inner d_ff hidden_dim"),
    (INNER, "decoder_ffn_dim encoder_ffn_dim feed_forward_size"),
    (INNER, "intermediate_size_mlp dense_intermediate_size shared_intermediate_size"),
    (48, "moe_intermediate_size expert_ffn_hidden_size"),
    (48, "shared_expert_intermediate_size moe_shared_expert_intermediate_size"),
    (48, "shared_experts_intermediate_size"),
    (2, "num_hidden_layers n_layer n_layers num_layers num_blocks"),
    (2, "decoder_layers encoder_layers num_decoder_layers num_encoder_layers"),
    (HEADS, "num_attention_heads n_head n_heads num_heads attention_heads"),
    (HEADS, "decoder_attention_heads encoder_attention_heads"),
    (HEADS, "num_decoder_attention_heads num_encoder_attention_heads"),
    (2, "num_key_value_heads num_kv_heads kv_n_heads"),
    (HEAD, "head_dim d_head dim_head attention_head_size kv_channels d_kv v_head_dim qk_nope_head_dim"),
    (8, "qk_rope_head_dim rotary_dim"),
    (HEAD + 8, "qk_head_dim"),
    (24, "kv_lora_rank q_lora_rank o_lora_rank"),
    (4, "num_experts n_routed_experts num_local_experts moe_num_experts"),
    (2, "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k"),
    (1, "n_shared_experts num_shared_experts moe_num_shared_experts"),
    (1, "n_group topk_group num_expert_group n_groups mamba_n_groups"),
    (1, "first_k_dense_replace num_dense_layers moe_layer_start_index"),
    (128, "max_position_embeddings n_positions n_ctx max_seq_len context_length"),
    (64, "max_source_positions max_target_positions model_max_length"),
    (8, "sliding_window sliding_window_size attention_window_size window_size"),
    (8, "mamba_d_state state_size ssm_state_size"),
    (4, "mamba_n_heads mamba_num_heads n_mamba_heads mamba_dt_rank time_step_rank"),
    (32, "mamba_d_head mamba_head_dim"),
    (8, "mamba_chunk_size chunk_size"),
    (2, "linear_num_key_heads index_n_heads"),
    (4, "linear_num_value_heads linear_num_heads"),
    (HEAD, "linear_key_head_dim linear_value_head_dim linear_head_dim index_head_dim"),
    (6, "index_topk"),
    (8, "hidden_size_per_layer_input"),
    (2, "type_vocab_size"),
    (MELS, "num_mel_bins"),
    (True, "is_decoder"),
)
SMALL: Settings = {name: size for size, names in SIZES for name in names.split()}
TOKENS: Settings = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")

ROPE: Settings = {"rope_type": "default", "rope_theta": 1e4}
DOTS_WINDOW: Settings = {
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "q_lora_rank": 24,
    "kv_lora_rank": 24,
    "head_dim": HEAD + 8,
    "qk_nope_head_dim": HEAD,
    "qk_rope_head_dim": 8,
    "v_head_dim": HEAD,
}

# What single architectures need beyond SMALL.
SPECIAL: Mapping[str, Settings] = {
    "bamba": {"attn_layer_indices": [1]},
    # Its top config has no number of layers, which its cache asks for.
    "blt": {"num_hidden_layers": 2, "encoder_hash_byte_group_vocab": 50},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "dots3_note_text": {"num_key_value_heads": HEADS, "per_layer_config": {1: DOTS_WINDOW}},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": INNER,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "laurel_rank": 8,
    },
    "gemma4": {"text_config": {"global_head_dim": 32}},
    "gemma4_text": {"global_head_dim": 32},
    "gemma4_unified": {"text_config": {"global_head_dim": 32}},
    "gemma4_unified_text": {"global_head_dim": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": HEAD},
    "hunyuan_v1_moe": {"head_dim": HEAD},
    "inkling2_text": {"rel_extent": 32, "swa_num_attention_heads": HEADS, "swa_num_key_value_heads": 2},
    "inkling_text": {"rel_extent": 32, "swa_num_attention_heads": HEADS, "swa_num_key_value_heads": 2},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"head_dim": 32},
    "ministral": {"head_dim": HEAD},
    "nemotron": {"head_dim": HEAD, "num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 8,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "num_hidden_layers": 2,
        "attn_layers": ["local", "local"],
        "axial_pos_embds": False,
        "local_attn_chunk_length": 8,
    },
    "roc_bert": {"shape_vocab_size": 50, "shape_embed_dim": 32, "pronunciation_embed_dim": 32},
    "xlstm": {"chunk_size": 8, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": 2 * HEAD,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": 2 * HEAD,
    },
    "zaya": {"num_experts_per_tok": 1},
}

ENCODER: Settings = {"is_decoder": False, "forced_eos_token_id": None}
T5: Settings = {"is_decoder": False, "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}
WHISPER: Settings = {"is_decoder": False, "begin_suppress_tokens": None}

# Architectures that are not swept, each with the reason.
EXCLUDED: Mapping[str, str] = {
    "dots3_note": "the class takes the config of dots3_note_text, which is swept",
    "emu3": "the class takes a config that the mapping does not name (Emu3TextConfig)",
    "gemma3n": "needs timm and pillow for its vision tower; gemma3n_text is swept",
    "gemma4_assistant": "a draft model: it reads the cache of the model that it drafts for",
    "gemma4_unified_assistant": "a draft model: it reads the cache of the model that it drafts for",
    "llama4": "the class takes the config of llama4_text, which is swept",
    "musicgen": "the class takes the decoder's config and audio codebooks for input",
    "musicgen_melody": "the class takes the decoder's config and audio codebooks for input",
    "qwen3_5": "the class takes the config of qwen3_5_text, which is swept",
    "qwen3_5_moe": "the class takes the config of qwen3_5_moe_text, which is swept",
    "qwen4_exp": "the class takes the config of qwen4_exp_text, which is swept",
}


class Kind(Enum):
    """What goes into a model, and whether it generates."""

    CAUSAL = "token ids, padded on the left; generates"
    ENCODER = "token ids, padded on the right"
    SEQ2SEQ = "token ids for the encoder and for the decoder; generates"
    SPEECH = "mel features for the encoder, token ids for the decoder; generates"


@dataclass(frozen=True)
class Case:
    """A recipe for one tiny model: `name` is what reports and test ids show."""

    name: str
    class_name: str
    model_type: str
    kind: Kind
    settings: Callable[[], Settings]

    def config(self) -> PretrainedConfig:
        """The small config."""
        return shrunk(self.model_type, self.settings())

    def build(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
        """The model with seeded weights, in eval mode."""
        torch.manual_seed(seed)
        model = cast(PreTrainedModel, getattr(transformers, self.class_name)(self.config()))
        stir(model, torch.Generator().manual_seed(seed))
        return model.to(dtype).eval()

    def inputs(self, batch: int = 1, length: int = 11, padding: int = 0, seed: int = 0) -> dict[str, Tensor]:
        """What `forward` takes: `prompt` and, for an encoder-decoder, the ids of the decoder."""
        inputs = self.prompt(batch, length, padding, seed)
        if self.kind in (Kind.SEQ2SEQ, Kind.SPEECH):
            inputs["decoder_input_ids"] = token_ids(batch, 5, seed + 1)
        return inputs

    def prompt(self, batch: int = 1, length: int = 11, padding: int = 0, seed: int = 0) -> dict[str, Tensor]:
        """What `generate` takes: ids (batch, length); a mask hides 0 to `padding` tokens of the rows."""
        if self.kind is Kind.SPEECH:
            generator = torch.Generator().manual_seed(seed)
            frames = 2 * self.config().max_source_positions
            return {"input_features": torch.randn(batch, MELS, frames, generator=generator)}
        ids = token_ids(batch, length, seed)
        if not padding:
            return {"input_ids": ids}
        hidden = torch.arange(batch)[:, None] * padding // max(batch - 1, 1)
        mask = torch.arange(length)[None, :] >= hidden
        mask = mask if self.kind is Kind.CAUSAL else mask.flip(1)
        return {"input_ids": ids.where(mask, 0), "attention_mask": mask.long()}

    @property
    def generates(self) -> bool:
        """Whether the model has `generate`."""
        return self.kind is not Kind.ENCODER


def token_ids(batch: int, length: int, seed: int) -> Tensor:
    """Random ids (batch, length) without the special ones."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def stir(model: nn.Module, generator: torch.Generator) -> None:
    """Give every parameter values that matter.

    As initialised, norm weights are 1, biases 0 and matrices so small that attention is almost uniform: a
    kernel that drops any of them would still agree with eager.
    """
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise * p.shape[-1] ** -0.5 if p.ndim > 1 else p + 0.1 * noise)


def shrunk(model_type: str, settings: Settings) -> PretrainedConfig:
    """The config class of `model_type`, made small, with `settings` on top."""
    kind: Callable[..., PretrainedConfig] = CONFIG_MAPPING[model_type]
    try:
        default = kind()
    except Exception:
        # A default that its own validation refuses: the settings have to say it all.
        return kind(**{**TOKENS, **settings})
    return kind(**merged(small(default), settings))


def merged(base: Settings, extra: Settings) -> dict[str, object]:
    """`base` updated by `extra`, nested configs too."""
    both = {k for k in base.keys() & extra.keys() if isinstance(base[k], Mapping)}
    return {**base, **extra, **{k: merged(cast(Settings, base[k]), cast(Settings, extra[k])) for k in both}}


def small(default: PretrainedConfig) -> dict[str, object]:
    """Keyword arguments that shrink `default`: its own attributes that SMALL, TOKENS and PER_LAYER name."""
    present = default.to_dict()
    found = {k: v for k, v in SMALL.items() if isinstance(present.get(k), int)}
    found |= {k: v for k, v in TOKENS.items() if k in present}
    if "kv_lora_rank" in present:
        # Latent attention: as many heads of keys as of queries, and `head_dim` is the rotary part alone.
        found |= {"num_key_value_heads": HEADS, "head_dim": SMALL["qk_rope_head_dim"]}
    kinds = {k: one_of_each(present[k]) for k in PER_LAYER if isinstance(present.get(k), list)}
    depth = max([2, *map(len, kinds.values())])
    found |= {k: (v * depth)[:depth] for k, v in kinds.items()}
    found |= {k: depth for k in LAYERS if k in found}
    found |= {k: small(getattr(default, k)) for k in default.sub_configs if getattr(default, k, None) is not None}
    return found


def one_of_each(kinds: Sequence[str]) -> list[str]:
    """The distinct entries in order of first appearance."""
    return list(dict.fromkeys(kinds))


def causal_lm(model_type: str) -> Case:
    """The case of one row of MODEL_FOR_CAUSAL_LM_MAPPING."""
    class_name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    return Case(model_type, class_name, model_type, Kind.CAUSAL, lambda: SPECIAL.get(model_type, {}))


def causal_lm_cases() -> tuple[Case, ...]:
    """Every causal-LM architecture but the excluded ones, in order of name."""
    return tuple(causal_lm(t) for t in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) if t not in EXCLUDED)


def encoder_cases() -> tuple[Case, ...]:
    """Sequence and token classification with four encoders."""
    families = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert", "modernbert": "ModernBert"}
    tasks = {"sequence": "ForSequenceClassification", "token": "ForTokenClassification"}
    return tuple(
        Case(f"{model_type}-{task}", family + suffix, model_type, Kind.ENCODER, lambda: ENCODER)
        for model_type, family in families.items()
        for task, suffix in tasks.items()
    )


def encoder_decoder_cases() -> tuple[Case, ...]:
    """T5, BART and Whisper."""
    return (
        Case("t5", "T5ForConditionalGeneration", "t5", Kind.SEQ2SEQ, lambda: T5),
        Case("bart-seq2seq", "BartForConditionalGeneration", "bart", Kind.SEQ2SEQ, lambda: ENCODER),
        Case("whisper-speech", "WhisperForConditionalGeneration", "whisper", Kind.SPEECH, lambda: WHISPER),
    )


def all_cases() -> tuple[Case, ...]:
    """The sweep."""
    return causal_lm_cases() + encoder_cases() + encoder_decoder_cases()


def case_named(name: str) -> Case:
    """The case called `name`; KeyError if there is none."""
    return {case.name: case for case in all_cases()}[name]
