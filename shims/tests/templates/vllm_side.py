"""vLLM's side of `make test-templates`: its own classes, from the request to the text of the prompt."""

import copy
import json
import logging
import types
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.renderers.chat_utils import parse_chat_messages
from vllm.renderers.hf import resolve_chat_template_content_format, safe_apply_chat_template

# The engine tells of every request that it refuses.
logging.disable(logging.CRITICAL)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def write_tokenizer(folder):
    """A model's files, but for the template: texts are compared, so any tokens will do."""
    alphabet = {character: at for at, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL.values()))
    Path(folder).mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False, **SPECIAL}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_model(folder, template):
    write_tokenizer(folder)
    with open(folder / "chat_template.jinja", "w", encoding="utf-8", newline="") as file:
        file.write(template)


class Engine:
    """A model of one folder, as the server would have it."""

    def __init__(self, folder):
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
        self.config = types.SimpleNamespace(
            multimodal_config=None,
            enable_prompt_embeds=False,
            hf_config=types.SimpleNamespace(model_type="llama"),
            tokenizer=str(folder),
            model=str(folder),
            revision=None,
            tokenizer_revision=None,
            code_revision=None,
            trust_remote_code=False,
        )

    def prompt(self, body):
        """The prompt, or None and why the engine refuses the request."""
        try:
            return self.rendered(copy.deepcopy(body)), None
        except Exception as error:  # All of them become an answer of 400 or 500.
            return None, f"{type(error).__name__}: {error}"

    def rendered(self, body):
        request = ChatCompletionRequest.model_validate(body)
        tools = None if request.tools is None else [tool.model_dump() for tool in request.tools]
        params = request.build_chat_params(None, "auto").with_defaults({"tools": tools, "tokenize": False})
        form = resolve_chat_template_content_format(None, tools, "auto", self.tokenizer, model_config=self.config)
        conversation, _, _ = parse_chat_messages(request.messages, self.config, form)
        return safe_apply_chat_template(self.config, self.tokenizer, conversation, **params.get_apply_chat_template_kwargs())
