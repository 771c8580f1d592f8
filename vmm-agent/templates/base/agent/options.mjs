// How an agent works: what `configure` says, and what the SDK is told.

const isText = (value) => typeof value === 'string';
const isTexts = (value) => Array.isArray(value) && value.every(isText);
const isObject = (value) => value !== null && typeof value === 'object' && !Array.isArray(value);
const MODES = ['default', 'acceptEdits', 'bypassPermissions', 'plan', 'dontAsk', 'auto'];

/** What `configure` may set, and what is wrong with a value that is refused. */
const KNOWN = {
  model: [isText, 'a text'],
  systemPrompt: [isText, 'a text'],
  allowedTools: [isTexts, 'a list of texts'],
  disallowedTools: [isTexts, 'a list of texts'],
  permissionMode: [(value) => MODES.includes(value), `one of ${MODES.join(', ')}`],
  maxTurns: [(value) => Number.isSafeInteger(value) && value > 0, 'a whole number above 0'],
  cwd: [isText, 'a text'],
  mcpServers: [isObject, 'an object'],
  resume: [isText, 'a text'],
  includePartialMessages: [(value) => typeof value === 'boolean', 'true or false'],
};

/**
 * What of `command` are options. One that is absent stays as it was, one that is `null` is left to the SDK again, and
 * what we do not know is passed over.
 */
export function readOptions(command) {
  const changes = {};
  for (const [name, [isGood, expected]] of Object.entries(KNOWN)) {
    const value = command[name];
    if (value === undefined) continue;
    if (value !== null && !isGood(value)) throw new Error(`${name} is ${expected}`);
    changes[name] = value;
  }
  return changes;
}

/** The SDK's options for `settings`, in the environment `environment`. */
export function sdkOptions(settings, environment) {
  const options = {
    // The microVM is the sandbox.
    permissionMode: 'bypassPermissions',
    allowDangerouslySkipPermissions: true,
    env: {
      // The template has one version; and what is no part of the conversation goes nowhere unless it is wanted.
      CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC: '1',
      ...environment,
    },
  };
  for (const [name, value] of Object.entries(settings)) {
    if (value !== null && value !== '') options[name] = value;
  }
  return options;
}
