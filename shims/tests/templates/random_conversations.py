"""Valid conversations at random, as clients and agents send them."""

import json

from conversations import BARE, ODD, UNICODE, WEATHER, text

WORDS = [
    "Hello",
    'It\'s "so".',
    "a\nb",
    " x ",
    "",
    UNICODE,
    "<think>\nwell\n</think>\n\nYes",
    "1 < 2 & 3 > 2",
    "\n\nend\n",
    "x-anthropic-billing-header: cch=1",
]
ARGUMENTS = [
    "{}",
    "",
    '{"city": "Paris"}',
    '{"b": 1, "a": [1.5, null, {"x": true}]}',
    '{"s": "it\'s \\"q\\" é \\u0001"}',
    '{"big": 123456789012, "e": 1e-7}',
]


def said(random):
    return " ".join(random.choice(WORDS) for _ in range(random.randint(1, 3)))


def content(random):
    if random.random() < 0.7:
        return said(random)
    return [text(said(random)) for _ in range(random.randint(1, 3))]


def calls(random, turn):
    def one(at):
        function = {"name": random.choice(["get_weather", "list_files", "now"]), "arguments": random.choice(ARGUMENTS)}
        return {"id": f"call{turn:02}{at:03}", "type": "function", "function": function}

    return [one(at) for at in range(random.choice([1, 1, 1, 2, 3]))]


def assistant(random, turn, has_tools):
    out = {"role": "assistant", "content": content(random)}
    if random.random() < 0.3:
        out[random.choice(["reasoning", "reasoning_content"])] = said(random)
    if has_tools and random.random() < 0.6:
        out["tool_calls"] = calls(random, turn)
        out["content"] = random.choice([None, "", out["content"]])
        if random.random() < 0.1:
            del out["content"]
    elif random.random() < 0.05:
        out["tool_calls"] = []
    if random.random() < 0.1:
        out["refusal"] = random.choice([None, "I must not."])
    return out


def messages(random, has_tools):
    out = []
    for role, chance in [("system", 0.5), ("developer", 0.1)]:
        if random.random() < chance:
            out.append({"role": role, "content": content(random)})
    for turn in range(random.randint(0, 4)):
        out.append({"role": "user", "content": content(random)})
        while True:
            out.append(assistant(random, turn, has_tools))
            made = out[-1].get("tool_calls") or []
            out += [{"role": "tool", "tool_call_id": call["id"], "content": content(random)} for call in made]
            if not made or random.random() < 0.4:
                break
    if not out or out[-1]["role"] != "tool" or random.random() < 0.3:
        out.append({"role": "user", "content": content(random)})
    if random.random() < 0.1:
        random.choice(out)["name"] = "ann"
    return out


def conversation(random):
    has_tools = random.random() < 0.5
    out = {"model": "m", "messages": messages(random, has_tools)}
    if has_tools:
        out["tools"] = random.choice([[WEATHER], [ODD], [WEATHER, BARE], [BARE, ODD, WEATHER]])
        if random.random() < 0.1:
            out["tool_choice"] = random.choice(["none", "auto", "required"])
    if random.random() < 0.15:
        out["reasoning_effort"] = random.choice(["none", "low", "medium", "high"])
    if random.random() < 0.2:
        out["chat_template_kwargs"] = {random.choice(["enable_thinking", "thinking", "other"]): random.choice([True, False])}
    if random.random() < 0.1:
        out["add_generation_prompt"] = False
        if random.random() < 0.5:
            out["continue_final_message"] = True
            out["messages"].append({"role": "assistant", "content": said(random) + "I"})
    if random.random() < 0.05:
        out["documents"] = [{"title": said(random), "text": said(random)}]
    return json.loads(json.dumps(out))
