// A process of the SDK's, and a turn of it.

import { randomUUID } from 'node:crypto';

import { Inbox } from './inbox.mjs';

/** What the SDK has to stop, or to end, before it is made to. */
const PATIENCE_MS = 10_000;

/** One prompt, from when it is begun to its result. */
export class Turn {
  /** By which the SDK names it. */
  id = randomUUID();
  /** It is to end as soon as may be. */
  isStopped = false;
}

export class Agent {
  #query;
  #options;
  #inbox = new Inbox();
  #turn = null;
  /** It has come up, with the conversation that it was to go on with. */
  #isUp = false;
  /** It works on the turn: only then is an interrupt the turn's. */
  #hasBegun = false;
  /** The SDK's class of the API's last error. */
  #apiError = null;
  #resolve = null;
  #reject = null;
  #deadline = null;
  /** Settled when it is gone. */
  over = Promise.resolve();

  constructor(query, options) {
    this.#options = options;
    this.#query = query({ prompt: this.#inbox, options });
  }

  /** What it says, until it ends. */
  async *messages() {
    for await (const message of this.#query) {
      // About our prompts, by names that nobody else knows.
      if (message.type !== 'command_lifecycle') yield message;
    }
  }

  /** Puts a prompt to it, and waits for its end: what went wrong, or `null`. One at a time. */
  async ask(turn, text) {
    this.#turn = turn;
    this.#hasBegun = false;
    this.#apiError = null;
    const result = new Promise((resolve, reject) => {
      this.#resolve = resolve;
      this.#reject = reject;
    });
    const message = { role: 'user', content: text };
    this.#inbox.push({ type: 'user', uuid: turn.id, message, parent_tool_use_id: null });
    try {
      const failure = this.#failure(await result);
      // It says why it does not come up, and goes.
      if (!this.#isUp) await this.dismiss();
      return failure;
    } finally {
      this.#turn = null;
      clearTimeout(this.#deadline);
      this.#deadline = null;
    }
  }

  /** Ends the turn, with the process if need be. */
  stop() {
    if (this.#turn === null) return;
    this.#deadline ??= setTimeout(() => this.#query.close(), PATIENCE_MS);
    if (this.#hasBegun) this.#query.interrupt().catch(() => this.#query.close());
  }

  /** Takes note of what it said. */
  hear(message) {
    if (this.#turn === null) return;
    if (message.type === 'system' && message.subtype === 'init') {
      this.#isUp = this.#hasBegun = true;
      if (this.#turn.isStopped) this.stop();
    }
    if (message.type === 'assistant' && message.error) this.#apiError = message.error;
    if (message.type === 'result' && answers(message, this.#turn)) this.#resolve(message);
  }

  /** Takes note of its end. */
  lose(reason) {
    this.#reject?.(reason);
  }

  /** Ends it once it is idle. */
  async dismiss() {
    this.#inbox.end();
    const deadline = setTimeout(() => this.#query.close(), PATIENCE_MS);
    await this.over;
    clearTimeout(deadline);
  }

  #failure(result) {
    if (!result.is_error && result.subtype === 'success') return null;
    const message = result.result || result.errors?.join('\n') || result.subtype;
    if (this.#apiError === null) {
      const unresumed = !this.#isUp && this.#options.resume !== undefined && 'cannot_resume';
      return { code: result.startup_failure_reason || unresumed || result.subtype, message };
    }
    const code = this.#apiError === 'unknown' ? 'api_error' : this.#apiError;
    return { code, message, ...(result.api_error_status && { status: result.api_error_status }) };
  }
}

/** Whether a result is that of this turn, and not of something that the agent began by itself. */
function answers(result, turn) {
  const ids = result.user_message_uuids ?? (result.user_message_uuid ? [result.user_message_uuid] : []);
  return ids.length === 0 || ids.includes(turn.id);
}
