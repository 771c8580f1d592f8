#!/usr/bin/node
// An agent: the Claude Agent SDK behind JSON lines. Each line of standard input is a command, each line of standard
// output an event; standard error is the log.
//
//   {"type": "prompt", "text": "…"}      something to do; one at a time, the others wait
//   {"type": "interrupt"}                stops what it does, and forgets the prompts that wait
//   {"type": "configure", …}             how it works from the next prompt on (options.mjs)
//
// Events: `ready` first; `configured` for each `configure`; the SDK's messages as they are (`system`, `assistant`,
// `user`, `result`, …); exactly one `turn_complete` or `interrupted` at the end of each prompt that was begun, and one
// `interrupted` for an `interrupt` while it does nothing; `error` with `message` and `code`, and for the API's errors
// `status`. Nothing that is said to it or that the API answers ends it; the end of standard input does, once all
// prompts are done.

import { Conversation } from './conversation.mjs';
import { readLines } from './lines.mjs';
import { readOptions } from './options.mjs';

/** Longest line, bytes: 1 MiB of text whose every byte is written as an escape of six, and what goes around it. */
const MAX_LINE = (6 << 20) + (1 << 16);
/** Longest prompt, bytes. */
const MAX_PROMPT = 1 << 20;

/** Says an event. Written before this returns: a reader that is slow holds up the agent, not our memory. */
function emit(event) {
  process.stdout.write(`${JSON.stringify(event)}\n`);
}

function log(text) {
  process.stderr.write(`${text.trimEnd()}\n`);
}

function refuse(code, message) {
  log(`${code}: ${message}`);
  emit({ type: 'error', code, message });
}

/** Does what one line says. Never waits: an interrupt is heard whatever goes on. */
function obey(conversation, text) {
  let command;
  try {
    command = JSON.parse(text);
  } catch (error) {
    return refuse('bad_command', `no JSON: ${error.message}`);
  }
  if (command === null || typeof command !== 'object' || Array.isArray(command)) {
    return refuse('bad_command', 'no JSON object');
  }
  switch (command.type) {
    case 'prompt':
      if (typeof command.text !== 'string' || command.text === '') {
        return refuse('bad_command', 'a prompt has a text that is not empty');
      }
      if (Buffer.byteLength(command.text) > MAX_PROMPT) {
        return refuse('bad_command', `a prompt has ${MAX_PROMPT} bytes at most`);
      }
      if (!conversation.prompt(command.text)) refuse('too_many_prompts', 'too many prompts wait already');
      return;
    case 'interrupt':
      return conversation.interrupt();
    case 'configure':
      try {
        conversation.configure(readOptions(command));
      } catch (error) {
        return refuse('bad_command', error.message);
      }
      return emit({ type: 'configured' });
    default:
      return refuse('bad_command', `unknown type: ${JSON.stringify(command.type)?.slice(0, 100)}`);
  }
}

// Nobody is left to say anything to.
process.stdout.on('error', () => process.exit(1));
process.stderr.on('error', () => {});

const conversation = new Conversation({ emit, log });
emit({ type: 'ready' });
for await (const line of readLines(process.stdin, MAX_LINE)) {
  if (line === null) refuse('bad_command', `a line has ${MAX_LINE} bytes at most`);
  else if (line.trim() !== '') obey(conversation, line);
}
await conversation.end();
process.exit(0);
