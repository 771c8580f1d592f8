#!/usr/bin/env python3
"""The Messages API as far as an agent in a sandbox needs it, without a model: what it answers stands in the prompt.

    messages_api.py PORT

A prompt's lines that begin with "step: " are done one after the other, one in each answer:

    step: say TEXT             text
    step: count N MS           N words, one every MS milliseconds: long enough to be interrupted
    step: write PATH TEXT      the tool Write
    step: run COMMAND          the tool Bash
    step: recall               text: the steps of all prompts of the conversation, this one included
    step: fail STATUS TYPE     an error of the API

Text ends the turn, as the API has it, so it stands last; a prompt whose last step is a tool is answered "done" then.
"""
import http.server
import json
import sys
import time

MARK = "step: "


def blocks(message):
    """The content blocks of a message, which the API also takes as one text."""
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def steps_of(block):
    lines = block.get("text", "").splitlines() if block["type"] == "text" else []
    return [line.removeprefix(MARK).strip() for line in lines if line.startswith(MARK)]


def next_step(messages):
    """The step that this request asks for, and the steps of all prompts. Each tool's result is one step that is done."""
    prompts, done = [], 0
    for message in messages:
        if message["role"] != "user":
            continue
        for block in blocks(message):
            if steps_of(block):
                prompts.append(steps_of(block))
                done = 0
            elif block["type"] == "tool_result":
                done += 1
    steps = prompts[-1] if prompts else []
    return (steps[done] if done < len(steps) else "say done"), sum(prompts, [])


class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.reply(200, {})

    def do_GET(self):
        self.reply(404, error("not_found_error", f"{self.path} is not there"))

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or "{}")
        path = self.path.partition("?")[0]
        if path == "/v1/messages/count_tokens":
            return self.reply(200, {"input_tokens": 1})
        if path != "/v1/messages":
            return self.reply(404, error("not_found_error", f"{path} is not there"))
        # What the agent asks for beside the conversation, such as a title for it, comes without tools.
        step, seen = next_step(request["messages"]) if request.get("tools") else ("say aside", [])
        verb, _, rest = step.partition(" ")
        print(f"{request.get('model')}: {step}", file=sys.stderr, flush=True)
        if verb == "fail":
            status, kind = rest.split()
            return self.reply(int(status), error(kind, f"scripted: {kind}"))
        if verb == "write":
            path, _, text = rest.partition(" ")
            content = tool("Write", {"file_path": path, "content": text})
        elif verb == "run":
            content = tool("Bash", {"command": rest, "description": "scripted"})
        elif verb == "count":
            number, pause = map(int, rest.split())
            content = text_block((f"{n} " for n in range(number)), pause / 1000)
        else:
            content = text_block([json.dumps(seen) if verb == "recall" else rest])
        message = {
            "id": f"msg_{time.monotonic_ns()}", "type": "message", "role": "assistant", "model": request["model"],
            "content": [], "stop_reason": None, "stop_sequence": None,
            "usage": {"input_tokens": 1, "output_tokens": 1},
        }
        stop = "tool_use" if verb in ("write", "run") else "end_turn"
        if request.get("stream"):
            self.stream(message, content, stop)
        else:
            start, deltas = content
            message.update(content=[whole(start, list(deltas))], stop_reason=stop)
            self.reply(200, message)

    def reply(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.send_header("request-id", "req_scripted")
        # The client need not find out by retrying.
        self.send_header("x-should-retry", "false")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def stream(self, message, content, stop):
        start, deltas = content
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        self.close_connection = True
        try:
            self.event("message_start", message=message)
            self.event("content_block_start", index=0, content_block=start)
            for delta in deltas:
                self.event("content_block_delta", index=0, delta=delta)
            self.event("content_block_stop", index=0)
            self.event("message_delta", delta={"stop_reason": stop, "stop_sequence": None}, usage={"output_tokens": 1})
            self.event("message_stop")
        except (BrokenPipeError, ConnectionResetError):
            print("the client has gone", file=sys.stderr, flush=True)

    def event(self, name, **fields):
        self.wfile.write(f"event: {name}\ndata: {json.dumps({'type': name, **fields})}\n\n".encode())
        self.wfile.flush()

    def log_message(self, *_):
        pass


def error(kind, text):
    return {"type": "error", "error": {"type": kind, "message": text}, "request_id": "req_scripted"}


def text_block(pieces, pause=0):
    """A text block's beginning, and its pieces, one after each pause."""
    def deltas():
        for piece in pieces:
            time.sleep(pause)
            yield {"type": "text_delta", "text": piece}
    return {"type": "text", "text": ""}, deltas()


def tool(name, arguments):
    start = {"type": "tool_use", "id": f"toolu_{time.monotonic_ns()}", "name": name, "input": {}}
    return start, [{"type": "input_json_delta", "partial_json": json.dumps(arguments)}]


def whole(start, deltas):
    """A block that is not streamed."""
    if start["type"] == "text":
        return {**start, "text": "".join(delta["text"] for delta in deltas)}
    return {**start, "input": json.loads("".join(delta["partial_json"] for delta in deltas))}


if __name__ == "__main__":
    server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Answer)
    server.daemon_threads = True
    server.serve_forever()
