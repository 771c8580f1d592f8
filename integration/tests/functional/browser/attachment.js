// A client that is attached to a session and stays so, whatever connection dies: `oc.v1.ExecService.AttachExec` over
// WebSockets. Output is asked for from the first byte that did not come; input is kept until the session has it.

import { create, createFileRegistry, fromBinary, toBinary } from "@bufbuild/protobuf";
import { FileDescriptorSetSchema } from "@bufbuild/protobuf/wkt";

/** Milliseconds from a lost connection to the next attempt. */
const AGAIN_AFTER = 100;
/** For how long the session waits for a client that has lost its connection, milliseconds. */
const HOLD = 60_000;

/** The contract's messages, by name. */
export async function contract(url) {
  const descriptors = new Uint8Array(await (await fetch(url)).arrayBuffer());
  const files = createFileRegistry(fromBinary(FileDescriptorSetSchema, descriptors));
  return (name) => files.getMessage(`oc.v1.${name}`);
}

export class Attachment {
  /** The first byte of output that has not come. */
  offset = 0n;
  /** Connections that were made. */
  connections = 0;
  isConnected = false;
  /** `exitCode` of a session that has ended. */
  ended = null;
  /** How connections have ended, and attempts at one. */
  closes = [];
  /** What the server must not do. */
  faults = [];

  #id = crypto.randomUUID();
  /** Input that the session may not have yet: `{ offset, data }`, the oldest first. */
  #input = [];
  #inputEnd = 0n;
  #socket = null;

  /** `place` is `{ url, sandboxID, sessionID, token }`; `onOutput` gets bytes, and what to call when it is done with them. */
  constructor(place, messages, onOutput) {
    this.place = place;
    this.request = messages("AttachExecRequest");
    this.response = messages("AttachExecResponse");
    this.onOutput = onOutput;
    this.#connect();
  }

  /** Types. */
  write(text) {
    const data = new TextEncoder().encode(text);
    this.#input.push({ offset: this.#inputEnd, data });
    this.#inputEnd += BigInt(data.length);
    if (this.isConnected) this.#say("stdin", this.#input.at(-1));
  }

  /** Sets the terminal's size. */
  resize(size) {
    if (this.isConnected) this.#say("resize", size);
  }

  #connect() {
    const { url, sandboxID, sessionID, token } = this.place;
    const path = `/api/sandboxes/${sandboxID}/pty/${sessionID}`;
    const socket = new WebSocket(url.replace(/^http/, "ws") + path, ["oc.v1.exec", `oc.bearer.${token}`]);
    socket.binaryType = "arraybuffer";
    this.#socket = socket;
    socket.onopen = () => {
      if (socket.protocol !== "oc.v1.exec") this.faults.push(`subprotocol ${socket.protocol}`);
      const start = { offset: this.offset, attachmentId: this.#id, acknowledges: true, holdMs: HOLD };
      this.#say("start", start, { sandboxId: sandboxID, sessionId: sessionID });
    };
    socket.onmessage = ({ data }) => this.#hear(fromBinary(this.response, new Uint8Array(data)).event);
    socket.onclose = ({ code, reason }) => {
      this.closes.push({ code, reason });
      this.isConnected = false;
      if (this.ended === null) setTimeout(() => this.#connect(), AGAIN_AFTER);
    };
  }

  #say(kind, value, more = {}) {
    const message = create(this.request, { input: { case: kind, value }, ...more });
    this.#socket.send(toBinary(this.request, message));
  }

  #hear({ case: kind, value }) {
    switch (kind) {
      case "attached":
        this.#takePlace(value.offset);
        this.connections += 1;
        this.isConnected = true;
        this.#forget(value.stdinOffset);
        for (const input of this.#input) this.#say("stdin", input);
        break;
      case "output": {
        this.#takePlace(value.offset);
        this.offset += BigInt(value.data.length);
        const done = this.offset;
        this.onOutput(value.data, () => {
          if (this.isConnected) this.#say("acknowledge", { offset: done });
        });
        break;
      }
      case "stdinAccepted":
        this.#forget(value.offset);
        break;
      case "dropped":
        this.faults.push(`${value.bytes} bytes are missing from ${value.offset} on`);
        break;
      case "exit":
        this.#takePlace(value.offset);
        this.ended = { exitCode: value.exitCode };
        break;
    }
  }

  /** What comes begins at `offset`, which must be where this client is. */
  #takePlace(offset) {
    if (offset !== this.offset) this.faults.push(`at ${offset} instead of ${this.offset}`);
  }

  /** The session has all input before `offset`. */
  #forget(offset) {
    this.#input = this.#input
      .filter((input) => input.offset + BigInt(input.data.length) > offset)
      .map((input) => {
        const begin = input.offset < offset ? offset : input.offset;
        return { offset: begin, data: input.data.subarray(Number(begin - input.offset)) };
      });
  }
}
