"""Agents that ask over HTTP, as files of a user's. They speak the protocol with the standard
library, which also sends what the openai package would not."""

CLIENT = '''
import json, os, socket, sys, threading, time, asyncio
import urllib.error, urllib.request


def post(url, key, body):
    """The status and the text of an answer; ``body``: JSON data, or bytes as they are."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    try:
        request = urllib.request.Request(url, data, headers)
        with urllib.request.urlopen(request, timeout=60) as found:
            return found.status, found.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def ask(base_url, key, messages, **fields):
    """The assistant's message; of a stream, put together from its chunks."""
    told = {"model": "policy", "messages": messages, **fields}
    status, text = post(base_url + "/chat/completions", key, told)
    if status != 200:
        raise RuntimeError(f"{status}: {json.loads(text)['error']['message']}")
    if not fields.get("stream"):
        return json.loads(text)["choices"][0]["message"]
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert lines.pop() == "[DONE]"
    message = {}
    for line in lines:
        chunk = json.loads(line)
        assert chunk["object"] == "chat.completion.chunk"
        for key, value in chunk["choices"][0]["delta"].items():
            message[key] = message.get(key, type(value)()) + value
    return message
'''

TALKER = (
    CLIENT
    + '''
TOOLS = [{"type": "function", "function": {"name": "look_up", "description": "looks up"}}]
SYSTEM = {"role": "system", "content": "Speak."}


def talk(base_url, key, problem, stream=False):
    """Three turns: after the first two tools answer, after the second the user."""
    messages = [SYSTEM, problem.messages[-1]]
    later = ([{"role": "tool", "tool_call_id": "1", "content": "one"},
              {"role": "tool", "tool_call_id": "2", "content": "two"}],
             [{"role": "user", "content": "Go on."}])
    for new in (*later, []):
        said = ask(base_url, key, messages, tools=TOOLS, stream=stream)
        # As clients send it back, with fields that hold nothing.
        messages = [*messages, {**said, "refusal": None, "annotations": []}, *new]
    if len(said["content"]) % 2:
        status, _ = post(f"{base_url}/sessions/{key}/reward", key, {"reward": 7})
        assert status == 200


async def talk_in_a_loop(base_url, key, problem):
    await asyncio.to_thread(talk, base_url, key, problem, stream=True)
'''
)

FAILING = (
    CLIENT
    + '''
def wait_for(path):
    limit = time.monotonic() + 30
    while not os.path.exists(path) and time.monotonic() < limit:
        time.sleep(0.01)


def fail(base_url, key, problem):
    """In the way that problem.metadata says; ``fine`` and ``over`` do not fail."""
    url, question = base_url + "/chat/completions", [{"role": "user", "content": "Say."}]
    does = problem.metadata["does"]
    if does == "never":
        return
    if does == "raise":
        raise KeyError("missing thing")
    if does == "leave":
        sys.exit(3)
    if does == "die":
        os._exit(3)
    if does == "hang":
        time.sleep(600)
    if does == "malformed":
        assert post(url, key, b"{messages")[0] == 400
        return
    if does == "image":
        question[0]["content"] = [{"type": "image_url", "image_url": {"url": "x"}}]
    if does == "long_prompt":
        question[0]["content"] = "word " * 3000
    if does in ("impatient", "broken"):
        # Closes the connection, in the middle of a request or once the turn is being generated.
        data = json.dumps({"messages": question}).encode()
        lines = ["POST /v1/chat/completions HTTP/1.1", "Host: x", f"Authorization: Bearer {key}"]
        head = "\\r\\n".join([*lines, f"Content-Length: {len(data)}", "", ""]).encode()
        address = base_url.split("/")[2].split(":")
        with socket.create_connection(address, timeout=30) as connection:
            connection.sendall(head + data[:: 1 if does == "impatient" else 2])
            if does == "impatient":
                wait_for(problem.metadata["file"])
    if does == "twice":
        threading.Thread(target=post, args=(url, key, {"messages": question}), daemon=True).start()
        time.sleep(0.2)
        # No turn is generated before.
        threading.Timer(0.5, open, (problem.metadata["file"], "w")).start()
    if does == "wait":
        wait_for(problem.metadata["file"])
    fields = {"temperature": 0.1} if does == "temperature" else {}
    fields |= {"tools": [{"type": "function"}]} if does == "tools" else {}
    said = ask(base_url, key, question, **fields)
    follow = [*question, said, {"role": "user", "content": "More."}]
    if does == "own_words":
        follow.append({"role": "assistant", "content": "I say"})
    if does == "too_long_again":
        long = [{"role": "user", "content": "word " * 3000}]
        status, text = post(url, key, {"messages": long})
        assert (status, json.loads(text)["error"]["code"]) == (400, "context_length_exceeded")
        return
    if does == "over":
        follow[-1]["content"] = "word " * 200
        for _ in range(2):
            status, text = post(url, key, {"messages": follow})
            assert (status, json.loads(text)["error"]["code"]) == (400, "context_length_exceeded")
        raise RuntimeError("no room")
    if does == "reward":
        assert post(f"{base_url}/sessions/{key}/reward", key, {"reward": "much"})[0] == 400
    else:
        ask(base_url, key, follow)
    if does == "late":
        def later():
            time.sleep(0.2)
            found = post(url, key, {"messages": follow})
            with open(problem.metadata["file"], "w") as file:
                json.dump(found, file)
        threading.Thread(target=later).start()
'''
)


CHANGING = (
    CLIENT
    + '''
def change(base_url, key, problem):
    """Seven turns in five contexts: every way in which agents change their history."""
    def turn(*messages, **fields):
        return ask(base_url, key, list(messages), **fields)

    def user(text):
        return {"role": "user", "content": text}

    question = user("Say.")
    first = turn(question)
    second = turn(question, first, user("More."))
    turn(question, first, user("Otherwise."))  # back to an earlier point
    turn(user("Said so far: " + first["content"]))  # a summary
    changed = {**second, "content": second["content"] + "!"}
    turn(question, first, user("More."), changed, user("Even more."))  # the model's words changed
    turn(question, first, user("More."), second, user("Go on."))  # the first context goes on
    turn(question, first, user("More."), second, user("Go on."), tools=[TOOL])
'''
    + """
TOOL = {"type": "function", "function": {"name": "look_up", "description": "looks up"}}
"""
)
