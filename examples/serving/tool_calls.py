"""A model that calls functions: the loop, with nothing but Python's standard library.

Use: python examples/serving/tool_calls.py http://127.0.0.1:9000/v1 "What is the weather in Oslo?"

GEMMA_API_KEY is the key, where the server has one. Serve a Gemma 4 or a FunctionGemma with `gemma-deploy serve`.
"""

import json
import os
import sys
import urllib.error
import urllib.request

ROUNDS = 4  # of calls, at most
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city in the next days.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "maxLength": 40},
                    "days": {"type": "integer", "minimum": 1, "maximum": 7},
                },
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]


def get_weather(city: str, days: int = 1) -> str:
    """What a real program would look up."""
    return json.dumps({"city": city, "forecast": ["rain", "sun"][: min(days, 2)]})


FUNCTIONS = {"get_weather": get_weather}


def ask(url: str, body: dict) -> dict:
    """One request; an error of the server ends the program with its words."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('GEMMA_API_KEY', 'none')}"}
    request = urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        sys.exit(json.load(error)["error"]["message"])


def called(call: dict) -> str:
    """What a function gives; what is wrong with a call is told to the model, which may mend it."""
    try:
        return FUNCTIONS[call["function"]["name"]](**json.loads(call["function"]["arguments"]))
    except (KeyError, TypeError, ValueError) as error:
        return json.dumps({"error": f"{type(error).__name__}: {error}"})


def converse(url: str, question: str, **more: object) -> list[dict]:
    """All messages, the answer last. The first answer has to be a call (`tool_choice`); later ones may be text."""
    messages: list[dict] = [{"role": "user", "content": question}]
    for number in range(ROUNDS):
        choice = "auto" if number else "required"
        body = {"messages": messages, "tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False, **more}
        message = ask(url, body)["choices"][0]["message"]
        messages.append(message)
        calls = message.get("tool_calls")
        if not calls:
            break
        for call in calls:
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": called(call)})
    return messages


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    for said in converse(sys.argv[1], sys.argv[2], temperature=0, max_tokens=500):
        for one in said.get("tool_calls") or ():
            print(f"calls {one['function']['name']}({one['function']['arguments']})")
        if said.get("content"):
            print(f"{said['role']}: {said['content']}")
