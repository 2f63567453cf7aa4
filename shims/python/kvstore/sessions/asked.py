"""What a generation is asked, in a form that another process can be asked again; and what must be equal there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, StoppingCriteriaList, StopStringCriteria

import kvstore
from kvstore.transformers import _SAYS_NOTHING

__all__ = ["Prepared", "check", "facts_of", "prepare", "sampling_of", "stored"]

# Of a configuration, what says nothing about which tokens come.
_IGNORED = {
    "transformers_version",
    "_from_model_config",
    "_commit_hash",
    "return_dict_in_generate",
    "compile_config",
    "disable_compile",
}
# Values of parameters with which a generation cannot go on exactly elsewhere, each with why.
_REFUSED: dict[str, tuple[Any, str]] = {
    "num_return_sequences": (lambda value: value not in (None, 1), "a session is one sequence"),
    "max_time": (lambda value: value is not None, "a clock decides when it stops"),
    "guidance_scale": (lambda value: value not in (None, 1, 1.0), "its second cache is not kept"),
    "watermarking_config": (lambda value: value is not None, "its state is not kept"),
    "cache_implementation": (lambda value: value not in (None, "dynamic"), "only a DynamicCache is kept"),
    "use_cache": (lambda value: value is False, "a session is kept by its cache"),
    "token_healing": (lambda value: bool(value), "it changes the prompt"),
    "prefill_chunk_size": (lambda value: value is not None, "prompts are computed in one pass"),
    **{
        name: (lambda value: bool(value), "only tokens are kept")
        for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
    },
}


@dataclass
class Prepared:
    """What `generate` makes of its arguments for a prompt: processors, criteria, and the configuration that is in force."""

    processors: Any
    criteria: Any
    config: GenerationConfig
    effective: dict[str, str] = field(default_factory=dict)

    @property
    def max_length(self) -> int:
        """Tokens of the whole sequence, its prompt included, at most."""
        return self.config.max_length


def _prepared(model, input_ids, logits_processor, stopping_criteria, generation_config, **_more) -> Prepared:
    return Prepared(logits_processor, stopping_criteria, generation_config)


def stored(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns arguments of `generate` as values of JSON. Raises Unsupported, naming it, for one that cannot be kept."""
    known = set(GenerationConfig().to_dict()) | set(vars(GenerationConfig()))
    arguments = dict(arguments)
    config = arguments.pop("generation_config", None)
    mask = arguments.pop("attention_mask", None)
    if mask is not None and not bool(mask.all()):
        raise kvstore.Unsupported("attention_mask: a prompt with padding cannot be kept; leave the padding out")
    asked = {} if config is None else {key: value for key, value in config.to_dict().items() if value is not None}
    asked.update(arguments)
    kept = {}
    for name, value in asked.items():
        if name in _IGNORED:
            continue
        if name not in known or name.startswith("_"):
            if value is None:
                continue
            raise kvstore.Unsupported(f"{name}: it cannot be kept in a session, which goes on exactly; leave it out")
        try:
            kept[name] = json.loads(json.dumps(value))
        except (TypeError, ValueError) as error:
            raise kvstore.Unsupported(f"{name}: a value of type {type(value).__name__} cannot be kept in a session") from error
    return kept


def prepare(model, prompt: torch.Tensor, asked: Mapping[str, Any], tokenizer) -> Prepared:
    """Has `generate` prepare itself for a prompt of shape (1, tokens): everything is counted from it, wherever the generation goes on.

    Raises Unsupported, naming it, for what cannot go on exactly elsewhere, and Invalid if stop strings come without a tokenizer."""
    asked = dict(asked)
    stop = asked.pop("stop_strings", None) or getattr(model.generation_config, "stop_strings", None)
    criteria = StoppingCriteriaList()
    if stop:
        if tokenizer is None:
            raise kvstore.Invalid("tokenizer: stop strings need it; give the model's")
        criteria.append(StopStringCriteria(tokenizer, stop))
    beams = asked.get("num_beams", getattr(model.generation_config, "num_beams", None))
    if beams not in (None, 1):
        raise kvstore.Unsupported(f"num_beams: {beams}: beam search cannot be kept in a session; use 1")
    made = model.generate(prompt, custom_generate=_prepared, stopping_criteria=criteria, **asked, stop_strings=None)
    if not isinstance(made, Prepared):
        raise kvstore.Unsupported(f"{type(model).__name__} generates in a way of its own")
    mode = made.config.get_generation_mode().value
    if mode not in ("greedy_search", "sample"):
        raise kvstore.Unsupported(f"{mode}: only greedy search and sampling can be kept in a session")
    for name, (is_refused, why) in _REFUSED.items():
        value = getattr(made.config, name, None)
        if is_refused(value):
            raise kvstore.Unsupported(f"{name}: {value!r} cannot be kept in a session: {why}")
    told = {key: value for key, value in made.config.to_dict().items() if key not in _IGNORED and value is not None}
    told["stop_strings"] = stop
    made.effective = {key: json.dumps(value, sort_keys=True, default=str) for key, value in told.items() if value is not None}
    return made


def sampling_of(asked: Mapping[str, Any], prepared: Prepared) -> dict[str, str]:
    """Returns both what was asked and what is in force, as a session's record has it."""
    texts = {f"asked.{name}": json.dumps(value) for name, value in asked.items()}
    return texts | {f"is.{name}": value for name, value in prepared.effective.items()}


def asked_of(sampling: Mapping[str, str]) -> dict[str, Any]:
    """Returns what was asked."""
    return {name.removeprefix("asked."): json.loads(text) for name, text in sampling.items() if name.startswith("asked.")}


def check_effective(sampling: Mapping[str, str], prepared: Prepared) -> None:
    """Raises Invalid if something else is in force here: the model's own configuration of generation says otherwise, say."""
    was = {name.removeprefix("is."): text for name, text in sampling.items() if name.startswith("is.")}
    for name in sorted(was.keys() | prepared.effective.keys()):
        if was.get(name) != prepared.effective.get(name):
            raise kvstore.Invalid(f"{name}: it was {was.get(name)} for this session, and is {prepared.effective.get(name)} here")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def facts_of(model, weights: str, tokenizer) -> dict[str, str]:
    """Returns what must be equal where a session of this model goes on: with anything else, other numbers come."""
    device = torch.device(model.device)
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    told = {key: value for key, value in model.config.to_dict().items() if key not in _SAYS_NOTHING}
    facts = dict(
        model=type(model).__name__,
        config=_digest(told),
        weights=weights,
        dtype=str(model.dtype).removeprefix("torch."),
        attention=str(getattr(model.config, "_attn_implementation", "")),
        device=on,
        torch=torch.__version__,
        transformers=transformers.__version__,
    )
    if device.type == "cpu":
        facts.update(cpu=torch.backends.cpu.get_cpu_capability(), threads=str(torch.get_num_threads()))
    if tokenizer is not None:
        facts["tokenizer"] = _digest(sorted(tokenizer.get_vocab().items()))
    return facts


def check(session: str, was: Mapping[str, str], here: Mapping[str, str], allow: Iterable[str]) -> None:
    """Raises Invalid, naming them, if facts differ that are not allowed to."""
    allow = set(allow)
    names = [name for name in sorted(was.keys() - {"kv"}) if was[name] != here.get(name) and name not in allow]
    if names:
        told = "; ".join(f"{name} was {was[name]!r} and is {here.get(name)!r}" for name in names)
        raise kvstore.Invalid(f"the session {session} cannot go on here exactly: {told}. allow={names} takes it nevertheless")
