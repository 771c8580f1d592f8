// A conversation: prompts, one at a time, put to an agent that is started when it is needed.
//
// The agent stays for the next prompt. Where that wants other options, or the agent has died, a new one goes on with the
// same conversation, which the SDK keeps in the user's home.

import { statSync } from 'node:fs';

import { Agent, Turn } from './agent.mjs';
import { sdkOptions } from './options.mjs';

/** Prompts that wait. */
const MAX_WAITING = 64;

export class Conversation {
  #emit;
  #log;
  #query;
  #settings = {};
  /** The options have changed since the agent was started. */
  #isStale = false;
  /** The SDK's ID of the conversation. */
  #sessionId = null;
  #waiting = [];
  #turn = null;
  #agent = null;
  #isWorking = false;
  #working = Promise.resolve();

  /** Tells `emit` the events, and `log` what the SDK says beside them. */
  constructor({ emit, log }) {
    this.#emit = emit;
    this.#log = log;
    // It takes a while, in which commands come already. Whoever needs it hears of what fails.
    this.#query = import('@anthropic-ai/claude-agent-sdk').then((sdk) => sdk.query);
    this.#query.catch(() => {});
  }

  /** Takes a prompt; whether there was room. */
  prompt(text) {
    if (this.#waiting.length >= MAX_WAITING) return false;
    this.#waiting.push(text);
    if (!this.#isWorking) this.#working = this.#work();
    return true;
  }

  /** Sets options for the prompts that are begun from now on. */
  configure({ resume, ...changes }) {
    Object.assign(this.#settings, changes);
    if (resume !== undefined) this.#sessionId = resume || null;
    this.#isStale = true;
  }

  /** Stops the turn, and forgets the prompts that wait. */
  interrupt() {
    this.#waiting.length = 0;
    if (this.#turn === null) return this.#emit({ type: 'interrupted', ...this.#session() });
    this.#turn.isStopped = true;
    this.#agent?.stop();
  }

  /** Waits for all prompts, then ends the agent. */
  async end() {
    await this.#working;
    await this.#dismiss();
  }

  async #work() {
    this.#isWorking = true;
    while (this.#waiting.length > 0) {
      const turn = new Turn();
      this.#turn = turn;
      await this.#take(turn, this.#waiting.shift());
      this.#turn = null;
      this.#emit({ type: turn.isStopped ? 'interrupted' : 'turn_complete', ...this.#session() });
    }
    this.#isWorking = false;
  }

  async #take(turn, text) {
    try {
      if (this.#isStale) await this.#dismiss();
      const query = await this.#query;
      if (turn.isStopped) return;
      this.#agent ??= this.#start(query);
      const failure = await this.#agent.ask(turn, text);
      if (failure === null) return;
      if (!turn.isStopped) this.#emit({ type: 'error', ...failure });
      // There is no such conversation. That is told once; the next prompt begins another.
      if (failure.code === 'cannot_resume') this.#sessionId = null;
    } catch (error) {
      this.#log(`agent_failed: ${error.message}`);
      if (!turn.isStopped) this.#emit({ type: 'error', code: 'agent_failed', message: error.message });
    }
  }

  #start(query) {
    this.#isStale = false;
    const options = { ...sdkOptions(this.#settings, process.env), stderr: this.#log };
    if (this.#sessionId !== null) options.resume = this.#sessionId;
    // The SDK would blame its own program.
    if (options.cwd && !statSync(options.cwd, { throwIfNoEntry: false })?.isDirectory()) {
      throw new Error(`cwd ${options.cwd} is no directory`);
    }
    const agent = new Agent(query, options);
    agent.over = this.#listen(agent);
    return agent;
  }

  /** Passes on what the agent says, until it ends. */
  async #listen(agent) {
    let reason = new Error('the agent has ended');
    try {
      for await (const message of agent.messages()) {
        if (message.type === 'system' && message.subtype === 'init') this.#sessionId = message.session_id;
        this.#emit(message);
        agent.hear(message);
      }
    } catch (error) {
      reason = error;
    }
    if (this.#agent === agent) this.#agent = null;
    agent.lose(reason);
  }

  async #dismiss() {
    const agent = this.#agent;
    this.#agent = null;
    await agent?.dismiss();
  }

  #session() {
    return this.#sessionId === null ? {} : { claude_session_id: this.#sessionId };
  }
}
