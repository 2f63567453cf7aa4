"""Requests of `make test-templates`: a table by construct, each of which every template gets."""

import json

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": 'A city, e.g. "Łódź"'},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
                "days": {"type": "integer", "minimum": 1, "default": None},
            },
            "required": ["city"],
        },
    },
}
# Keys in an order of its own, nulls, and keys that the engine drops.
ODD = {
    "function": {
        "strict": True,
        "parameters": {
            "required": ["path", "limit"],
            "additionalProperties": False,
            "type": "object",
            "properties": {
                "path": {"description": "It's a <path> & more", "type": "string"},
                "limit": {"type": ["number", "null"], "minimum": 0.5, "maximum": 1e3},
                "tree": {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "boolean"}}}},
            },
        },
        "name": "list_files",
        "description": None,
        "more": 1,
    },
    "type": "function",
}
BARE = {"type": "function", "function": {"name": "now"}}


def user(content, **more):
    return {"role": "user", "content": content, **more}


def system(content, **more):
    return {"role": "system", "content": content, **more}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def result(content, call="call_00001", **more):
    return {"role": "tool", "tool_call_id": call, "content": content, **more}


def call(arguments='{"city": "Paris", "days": 2}', name="get_weather", id="call_00001"):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def text(words):
    return {"type": "text", "text": words}


def request(*messages, **more):
    return {"model": "m", "messages": list(messages), **more}


HELLO = user("Hello, who are you?")
ASKED = user("What is the weather in Paris?")
CALLED = assistant(None, tool_calls=[call()])
FOUND = result('{"temperature": 21.5, "sky": "clear"}')
TURNS = [HELLO, assistant("I am a program."), user("And now?")]
UNICODE = "Zażółć 你好 🙂\u200b\u00a0'q' \"d\" \\n \t<b>&amp;</b>\u2028 {{ x }} {% y %}"


def plain():
    return {
        "one message": [request(HELLO)],
        "system": [request(system("You help."), HELLO), request(system(""), HELLO), request(system(" You help.\n"), HELLO)],
        "several systems": [
            request(system("You help."), system("Be brief."), HELLO),
            request(*TURNS, system("Be brief."), HELLO),
        ],
        "developer": [
            request({"role": "developer", "content": "Be brief."}, HELLO),
            request(system("You help."), {"role": "developer", "content": [text("Be brief.")]}, *TURNS),
        ],
        "several turns": [request(*TURNS), request(system("You help."), *TURNS, assistant("As before."), user("Thanks"))],
        "two users in a row": [request(HELLO, user("Hello?"))],
        "assistant last": [request(HELLO, assistant("I am")), request(*TURNS[:2])],
        "assistant first": [request(assistant("Welcome."), HELLO)],
        "white space": [request(user("  a\n\n b \n")), request(HELLO, assistant("\n\n I \n"), user("\n"))],
        "empty texts": [request(user("")), request(HELLO, assistant(""), user("Hm"))],
        "unicode and escapes": [request(system(UNICODE), user(UNICODE)), request(HELLO, assistant(UNICODE), user(UNICODE))],
        "marks of templates": [
            request(user("<|im_end|>\n<|im_start|>system\n<s>[INST] </s>"), assistant("<think>\n</think>"), HELLO)
        ],
        "names": [
            request(system("You help.", name="s"), user("Hi", name="ann"), assistant("Yes", name="bot"), user("So", name="ann"))
        ],
    }


def of_content():
    return {
        "content absent": [request(HELLO, {"role": "assistant"}, user("Hm"))],
        "content null": [request(HELLO, assistant(None), user("Hm"))],
        "a part": [request(user([text("Hello, who are you?")])), request(system([text("You help.")]), HELLO)],
        "several parts": [
            request(user([text("one"), text("two")]), assistant([text("three"), text("four")]), user([text("five"), text("")])),
            request(system([text("a"), text("b")]), user([text("c")]), assistant("d"), user("e")),
        ],
        "no parts": [request(user([]), assistant([]), HELLO)],
        "refusals": [
            request(HELLO, {**assistant(None), "refusal": "I must not."}, user("Why?")),
            request(HELLO, assistant([text("No: "), {"type": "refusal", "refusal": "I must not."}]), user("Why?")),
        ],
        "keys that are dropped": [
            request(
                user([{**text("Hi"), "cache_control": {"type": "ephemeral"}}]),
                assistant("x", audio=None, function_call=None),
                HELLO,
            )
        ],
    }


def of_tools():
    loose = [call('{"path": "/", "limit": 2.0}', "list_files", "call_00002"), call("{}", "now", "call_00003")]
    both = assistant("", tool_calls=[call(), call('{"city": "Rome"}', id="call_00002")])
    results = [result("21"), result("25 <&> 'é'", "call_00002")]
    return {
        "tools": [request(ASKED, tools=[WEATHER]), request(system("You help."), ASKED, tools=[WEATHER, BARE])],
        "tools in an odd order": [request(ASKED, tools=[ODD]), request(system("You help."), ASKED, tools=[ODD, WEATHER])],
        "tool_choice none": [request(ASKED, tools=[WEATHER], tool_choice="none")],
        "tool_choice required": [request(ASKED, tools=[WEATHER, BARE], tool_choice="required")],
        "tools after turns": [request(*TURNS, tools=[WEATHER]), request(system("You help."), *TURNS, tools=[ODD])],
        "agent's second turn": [
            request(ASKED, CALLED, FOUND, tools=[WEATHER]),
            request(system("You help."), ASKED, assistant("", tool_calls=[call()]), FOUND, tools=[WEATHER]),
            request(ASKED, assistant("I look.", tool_calls=[call()]), FOUND, tools=[WEATHER, ODD]),
        ],
        "agent's second turn, with reasoning": [
            request(ASKED, {**CALLED, "reasoning_content": "They ask."}, FOUND, tools=[WEATHER]),
            request(ASKED, assistant("", reasoning="They ask.", tool_calls=[call()]), FOUND, tools=[WEATHER]),
        ],
        "agent's third turn": [
            request(
                ASKED, CALLED, FOUND, assistant(None, tool_calls=[loose[0]]), result("[]", "call_00002"), tools=[WEATHER, ODD]
            ),
            request(ASKED, CALLED, FOUND, assistant("It is clear."), user("And in Rome?"), tools=[WEATHER]),
        ],
        "parallel calls": [
            request(ASKED, both, *results, tools=[WEATHER]),
            request(ASKED, {**both, "content": None}, *results, tools=[WEATHER]),
        ],
        "calls without tools": [
            request(ASKED, CALLED, FOUND),
            request(ASKED, assistant(None, tool_calls=loose), result("x", "call_00002")),
        ],
        "call last": [request(ASKED, CALLED, tools=[WEATHER])],
        "arguments": [
            request(ASKED, assistant(None, tool_calls=[call(arguments)]), FOUND, tools=[WEATHER])
            for arguments in [
                "{}",
                "",
                '{"b": [1, null, true], "a": {"c": 1.5, "é": "\\u00e9"}}',
                '{"n": 12345678901, "f": 2e5, "g": 1.0}',
            ]
        ],
        "empty lists of calls": [request(HELLO, assistant("I am.", tool_calls=[]), user("Hm"))],
        "results": [
            request(ASKED, CALLED, result([text("21"), text(" degrees")]), tools=[WEATHER]),
            request(ASKED, CALLED, result("", name="get_weather"), tools=[WEATHER]),
            request(ASKED, CALLED, FOUND, user("Thanks"), tools=[WEATHER]),
        ],
    }


def of_thought():
    thought = {"reasoning_content": "A greeting."}
    return {
        "reasoning_content": [
            request(HELLO, assistant("I am.", **thought), user("Hm")),
            request(HELLO, assistant("I am.", **thought)),
        ],
        "reasoning": [
            request(HELLO, assistant("I am.", reasoning="A greeting."), user("Hm")),
            request(HELLO, assistant("", reasoning="So")),
        ],
        "thought within the text": [request(HELLO, assistant("<think>\nA greeting.\n</think>\n\nI am."), user("Hm"))],
        "reasoning_effort": [
            *[request(HELLO, reasoning_effort=effort) for effort in ["none", "low", "medium", "high"]],
            *[
                request(HELLO, reasoning_effort="high", chat_template_kwargs={"reasoning_effort": effort})
                for effort in [None, "low"]
            ],
        ],
        "enable_thinking": [
            request(*TURNS, chat_template_kwargs={"enable_thinking": False}),
            request(*TURNS, chat_template_kwargs={"enable_thinking": True}),
            request(*TURNS, chat_template_kwargs={"thinking": True, "thinking_budget": 512}),
            request(ASKED, tools=[WEATHER], chat_template_kwargs={"enable_thinking": False}),
        ],
        "other arguments of templates": [
            request(
                HELLO, chat_template_kwargs={"date_string": "1 Jan 2026", "custom_tools": None, "tools_in_user_message": False}
            ),
            request(
                HELLO,
                chat_template_kwargs={"reasoning_effort": "high", "model_identity": "You are X.", "builtin_tools": ["browser"]},
            ),
            request(HELLO, chat_template_kwargs={"bos_token": "<mine>", "eos_token": ""}),
        ],
    }


def of_prompt():
    document = {"title": "A title", "text": "Some text."}
    return {
        "no generation prompt": [request(*TURNS, add_generation_prompt=False), request(*TURNS[:2], add_generation_prompt=False)],
        "the last message goes on": [
            request(*messages, continue_final_message=True, add_generation_prompt=False)
            for messages in [TURNS[:2], [HELLO, assistant("I am a ")], [HELLO, assistant([text("I am")])], TURNS]
        ],
        "documents": [
            request(HELLO, documents=[document]),
            request(HELLO, documents=[]),
            request(HELLO, chat_template_kwargs={"documents": [document]}),
        ],
        "cache_salt": [request(HELLO, cache_salt="salt")],
        "numbers of sampling": [request(HELLO, temperature=0.5, max_tokens=10, stream=True, stop=["x"], seed=1)],
    }


def table():
    """All of them: the construct, and a request that has it."""
    groups = plain() | of_content() | of_tools() | of_thought() | of_prompt()
    # As an engine would read them: no object is shared, and nothing is there that JSON has not.
    return [(name, json.loads(json.dumps(body))) for name, bodies in groups.items() for body in bodies]
