"""Tiny models with random weights, made where they are needed: no hub, no downloads."""

import json
import pathlib

import safetensors.torch
import tokenizers
import tokenizers.decoders
import tokenizers.models
import tokenizers.pre_tokenizers
import tokenizers.trainers
import torch
import transformers

VOCABULARY = 1024

_COMMON = dict(
    vocab_size=VOCABULARY,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=4096,
    bos_token_id=1,
    eos_token_id=2,
    # Wide enough that every token of a prompt matters to what comes next.
    initializer_range=0.1,
    tie_word_embeddings=False,
)

_CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {}),
    # Every layer looks back 256 tokens.
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, dict(sliding_window=256, head_dim=32)),
    # Layers of both kinds.
    "gemma3": (
        transformers.Gemma3TextConfig,
        transformers.Gemma3ForCausalLM,
        dict(
            head_dim=32,
            sliding_window=256,
            layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        ),
    ),
}


# Llava's token for a picture, and its picture's side.
PICTURE, PICTURE_SIZE = 1020, 64


def make(folder: pathlib.Path, kind: str, seed: int = 7) -> pathlib.Path:
    """A model of this kind in a folder of its own; other seeds, other weights."""
    path = folder / f"{kind}-{seed}"
    if kind == "llava":
        return path if path.exists() else _make_llava(path, seed)
    if not path.exists():
        torch.manual_seed(seed)
        config_class, model_class, more = _CLASSES[kind]
        model = model_class(config_class(**_COMMON, **more)).to(torch.float32)
        model.save_pretrained(path, safe_serialization=True)
    return path


def make_large(folder: pathlib.Path) -> pathlib.Path:
    """A Llama of 26 million parameters: a prompt of 2,000 tokens takes some seconds on a core."""
    path = folder / "llama-large"
    if not path.exists():
        torch.manual_seed(7)
        size = dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_key_value_heads=8)
        config = transformers.LlamaConfig(**{**_COMMON, **size})
        transformers.LlamaForCausalLM(config).to(torch.float32).save_pretrained(path, safe_serialization=True)
    return path


def write_tokenizer(
    folder: pathlib.Path, template: str, settings: dict, special: list[str], added: list[str] | None = None
) -> dict[str, int]:
    """A byte-level tokenizer of the models' vocabulary, learnt from this project's documents, with a chat template. `special`: its first
    tokens; `added`: its last, which are text too. The vocabulary."""
    added = added or []
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(added),
        special_tokens=special,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    documents = pathlib.Path(__file__).parents[3] / "docs"
    tokenizer.train([str(path) for path in sorted(documents.glob("*.md"))], trainer)
    tokenizer.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in added])
    assert tokenizer.get_vocab_size() == VOCABULARY
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = dict(settings, tokenizer_class="PreTrainedTokenizerFast")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(template)
    return tokenizer.get_vocab()


def make_adapter(folder: pathlib.Path, name: str, seed: int) -> pathlib.Path:
    """A LoRA adapter for the Llama model."""
    from safetensors.torch import save_file

    path = folder / name
    path.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(_COMMON["num_hidden_layers"]):
        for module, out in (("q_proj", 256), ("v_proj", 128)):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(8, 256, generator=generator) * 0.2
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(out, 8, generator=generator) * 0.2
    save_file(tensors, path / "adapter_model.safetensors")
    config = dict(peft_type="LORA", r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], bias="none", task_type="CAUSAL_LM")
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def _make_llava(path: pathlib.Path, seed: int) -> pathlib.Path:
    """A language model that looks at pictures of 64 patches, with a tokenizer of words and a processor."""
    words = {f"t{at}": at for at in range(PICTURE)} | {"<image>": PICTURE, "<pad>": 1021, "<unk>": 1022, "<more>": 1023}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    processor = transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(
            size={"shortest_edge": PICTURE_SIZE}, crop_size={"height": PICTURE_SIZE, "width": PICTURE_SIZE}
        ),
        tokenizer=transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token="t1",
            eos_token="t2",
            pad_token="<pad>",
            unk_token="<unk>",
            additional_special_tokens=["<image>"],
        ),
        patch_size=8,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(path)
    vision = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4)
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**_COMMON),
        vision_config=transformers.CLIPVisionConfig(
            **vision, image_size=PICTURE_SIZE, patch_size=8, projection_dim=64, initializer_range=0.3
        ),
        image_token_index=PICTURE,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
    )
    torch.manual_seed(seed)
    transformers.LlavaForConditionalGeneration(config).to(torch.float32).save_pretrained(path)
    # The vision tower's weights have one more part in their names in what vLLM reads.
    (file,) = path.glob("*.safetensors")
    tower = "vision_tower."
    weights = {
        name.replace(tower, f"{tower}vision_model.") if not name.startswith(f"{tower}vision_model.") else name: tensor
        for name, tensor in safetensors.torch.load_file(file).items()
    }
    safetensors.torch.save_file(weights, file, metadata={"format": "pt"})
    return path
