"""SGLang's side of `make test-templates`: its own classes, from the request to the text of the prompt."""

import json
import logging
import types

import orjson
from sglang.srt.entrypoints.openai import serving_chat
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
from sglang.srt.parser import template_manager
from transformers import PreTrainedTokenizerFast

# The engine tells of every request that it refuses.
logging.disable(logging.CRITICAL)

# As a server is that was started without options.
SERVING = types.SimpleNamespace(
    default_chat_template_kwargs=None,
    trust_request_chat_template=False,
    allow_auto_truncate=False,
    hf_chat_template_name=None,
)
MODEL = types.SimpleNamespace(context_length=None, revision=None)
HF_CONFIG = types.SimpleNamespace(model_type="llama", architectures=["LlamaForCausalLM"])


class Done(Exception):
    """Raised with what became of a request's messages: what follows is the engine's own business."""


class ModelConfig(types.SimpleNamespace):
    def get_default_sampling_params(self):
        return {}


class TokenizerManager(types.SimpleNamespace):
    def config_value(self, _name):
        return None


class Engine:
    """A model of one folder, as the server would have it."""

    def __init__(self, folder):
        for module in (serving_chat, template_manager):
            module.get_serving = lambda: SERVING
        serving_chat.get_model = lambda: MODEL
        self.texts = []
        serving_chat.parallel_prompt_encode = self.keep
        config = ModelConfig(hf_config=HF_CONFIG, is_multimodal=False)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
        manager = TokenizerManager(
            tokenizer=tokenizer,
            processor=None,
            server_args=None,
            model_config=config,
            model_path=str(folder),
            served_model_name="model",
        )
        templates = template_manager.TemplateManager()
        templates.load_chat_template(manager, None, str(folder))
        self.serving = serving_chat.OpenAIServingChat(manager, templates)
        process = self.serving._process_messages

        def processed(*given, **named):
            raise Done(process(*given, **named))

        self.serving._process_messages = processed

    def keep(self, _tokenizer, text, _arguments=None):
        self.texts.append(text)
        return [0]

    def prompt(self, body):
        """The prompt, or None and why the engine refuses the request."""
        try:
            return self.rendered(orjson.loads(json.dumps(body))), None
        except Exception as error:  # All of them become an answer of 400 or 500.
            return None, f"{type(error).__name__}: {error}"

    def rendered(self, body):
        self.texts.clear()
        request = ChatCompletionRequest.model_validate(body)
        refused = self.serving._validate_request(request)
        if refused:
            raise ValueError(refused)
        try:
            self.serving._convert_to_internal_request(request)
        except Done as done:
            (made,) = done.args
        # The beginning of an answer that is to be gone on with comes in tokens of its own.
        if made.prompt_ids != [0]:
            raise NotImplementedError("more than a text")
        return self.texts[-1]
