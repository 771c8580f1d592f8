// What a user of the published TypeScript client does, one check after another; prints `ok NAME` for each that holds.
//
// The mesh is named by the variables that the client reads. Arguments are beginnings of names of checks; all run without.

import assert from "node:assert/strict";
import { createHash, randomBytes } from "node:crypto";
import { readFile } from "node:fs/promises";
import process from "node:process";
import { setTimeout as sleep } from "node:timers/promises";
import { inspect } from "node:util";
import { ExecTimeoutError, Sandbox, ShellBusyError, ShellClosedError } from "@opencomputer/sdk";

const { OPENCOMPUTER_API_URL: URL_OF_MESH, OPENCOMPUTER_API_KEY: KEY } = process.env;
// Milliseconds; guests are emulated and the machine is busy.
const PATIENCE = 120_000;
const CHECK_PATIENCE = 400_000;

// Answers an agent in the sandbox what its prompts say.
const MESSAGES_API = new URL("../../../src/messages_api.py", import.meta.url);
const MESSAGES_PORT = 8399;

const equal = assert.deepEqual;
const sha256 = (bytes) => createHash("sha256").update(bytes).digest("hex");
const lines = (count) => Array.from({ length: count }, (_, index) => `line ${index + 1}\n`).join("");

/** Waits for a promise no longer than that. */
async function within(promise, what, patience = PATIENCE) {
  const over = new AbortController();
  const late = sleep(patience, undefined, { signal: over.signal }).then(() => {
    throw new assert.AssertionError({ message: `not within ${patience} ms: ${what}` });
  });
  late.catch(() => {});
  try {
    return await Promise.race([promise, late]);
  } finally {
    over.abort();
  }
}

/** Waits for something that a callback brings; `what` says how far it is. */
async function until(condition, what) {
  const deadline = Date.now() + PATIENCE;
  while (!(await condition())) {
    if (Date.now() > deadline) assert.fail(`not within ${PATIENCE} ms: ${what()}`);
    await sleep(20);
  }
}

/** A call that the client has no method for. */
async function rest(method, path, body) {
  const answer = await fetch(`${URL_OF_MESH.replace(/\/+$/, "")}/api${path}`, {
    method,
    headers: { "X-API-Key": KEY, "Content-Type": "application/json" },
    body: body && JSON.stringify(body),
  });
  assert(answer.ok, `${method} ${path}: ${answer.status}`);
  return answer;
}

/** What one attached client is told, in its order. */
class Watcher {
  bytes = { out: [], err: [] };
  exits = [];
  order = [];
  replayed = null;
  callbacks = {
    onStdout: (chunk) => this.#add("out", chunk),
    onStderr: (chunk) => this.#add("err", chunk),
    onExit: (code) => {
      this.exits.push(code);
      this.order.push("exit");
    },
    onScrollbackEnd: () => {
      this.replayed = this.out;
      this.order.push("scrollback end");
    },
  };

  #add(stream, chunk) {
    this.bytes[stream].push(chunk);
    this.order.push(stream);
  }

  get raw() {
    return Buffer.concat(this.bytes.out);
  }

  get out() {
    return this.raw.toString();
  }

  get err() {
    return Buffer.concat(this.bytes.err).toString();
  }

  async sees(text) {
    await until(() => this.out.includes(text), () => JSON.stringify(this.out));
  }
}

/** An agent's events, as one attached client is told them. */
class Agent {
  events = [];
  log = [];
  callbacks = { onEvent: (event) => this.events.push(event), onError: (text) => this.log.push(text) };

  count = (type) => this.events.filter((event) => event.type === type).length;
  last = (type) => this.events.findLast((event) => event.type === type);

  /** Waits until there are so many events of this type; returns the last. */
  async says(type, count = 1) {
    await until(() => this.count(type) >= count, () => inspect([this.events.map((event) => event.type), this.log]));
    return this.last(type);
  }
}

const ends = (session) => within(session.done, `the end of ${session.sessionId}`);

const describe = async (sandbox, sessionId) =>
  (await sandbox.exec.list()).find((one) => one.sessionID === sessionId);

const DIALOGUE = "echo out $B; pwd; echo err >&2; read line; echo got $line; exit 4";

const CHECKS = {
  // --- the sandbox itself -----------------------------------------------------------------------------------------

  async a_sandbox_is_created_and_connected_to(sandbox) {
    assert.match(sandbox.sandboxId, /^sb-/);
    equal([sandbox.id, sandbox.status], [sandbox.sandboxId, "running"]);
    assert(await sandbox.isRunning());
    const again = await Sandbox.connect(sandbox.sandboxId);
    equal([again.sandboxId, again.status], [sandbox.sandboxId, "running"]);
    equal((await again.exec.run("echo $A")).stdout, "b\n");
    await sandbox.setTimeout(60);
    const facts = await (await rest("GET", `/sandboxes/${sandbox.sandboxId}`)).json();
    equal([facts.timeout, facts.metadata, facts.memoryMB], [60, { k: "v" }, 1024]);
    await sandbox.setTimeout(0);
    await assert.rejects(Sandbox.connect("sb-00000000000000000000"), /: 404/);
    await assert.rejects(Sandbox.connect(sandbox.sandboxId, { apiKey: `osb_${"0".repeat(64)}` }), /: 403/);
  },

  // --- commands ---------------------------------------------------------------------------------------------------

  async a_command_is_run(sandbox) {
    const ran = await sandbox.exec.run("echo $A $B; pwd; echo err >&2; exit 3", { env: { B: "c" }, cwd: "/tmp" });
    equal(ran, { exitCode: 3, stdout: "b c\n/tmp\n", stderr: "err\n" });
    equal((await sandbox.commands.run("pwd; id -un")).stdout, "/home/sandbox\nsandbox\n");
    equal((await sandbox.exec.run("kill -9 $$")).exitCode, 137);
    equal((await sandbox.exec.run("no-such-command-anywhere")).exitCode, 127);
  },

  async output_that_is_no_text_comes_as_text(sandbox) {
    const ran = await sandbox.exec.run(String.raw`printf 'a\377b\0c'; printf '\303' >&2`);
    equal([ran.stdout, ran.stderr], ["a\ufffdb\0c", "\ufffd"]);
    // Characters of several bytes, wherever the output is cut on its way.
    const { stdout } = await sandbox.exec.run("yes 'x😀é' | head -n 100000");
    equal(sha256(stdout), sha256("x😀é\n".repeat(100_000)));
  },

  async a_command_that_takes_a_while_is_asked_for(sandbox) {
    const began = Date.now();
    const script = String.raw`echo begun; printf '\377'; sleep 2; echo done; echo err >&2; exit 5`;
    const ran = await sandbox.exec.run(script);
    equal(ran, { exitCode: 5, stdout: "begun\n\ufffddone\n", stderr: "err\n" });
    assert(Date.now() - began >= 2000);
    const begun = "a=1; for i in 1 2 3; do sleep 0.3; echo $i; done";
    const many = await Promise.all([1, 2, 3].map(() => sandbox.exec.run(begun)));
    for (const one of many) equal(one.stdout, "1\n2\n3\n");
  },

  async a_command_that_takes_too_long_is_ended(sandbox) {
    const ran = await sandbox.exec.run("echo begun; sleep 30", { timeout: 5 });
    equal([ran.exitCode, ran.stdout], [-1, "begun\n"]);
    const quick = await sandbox.exec.run("sleep 30", { timeout: 1, timeoutMs: 20_000 });
    equal(quick.exitCode, -1);
  },

  async a_command_outlives_who_waits_for_it(sandbox) {
    const late = await sandbox.exec.run("echo begun; sleep 8; echo done; exit 6", { timeoutMs: 600 }).catch((e) => e);
    assert(late instanceof ExecTimeoutError, inspect(late));
    const seen = new Watcher();
    const session = await sandbox.exec.attach(late.execId, seen.callbacks);
    equal(await ends(session), 6);
    equal(seen.out, "begun\ndone\n");
    const result = await sandbox.exec.result(late.execId);
    equal([result.running, result.exitCode, result.stdout], [false, 6, "begun\ndone\n"]);
    await assert.rejects(sandbox.exec.result("none"), /: 404/);
  },

  // --- sessions ---------------------------------------------------------------------------------------------------

  async a_session_is_talked_to(sandbox) {
    const seen = new Watcher();
    const options = { args: ["-c", DIALOGUE], env: { B: "c" }, cwd: "/tmp", ...seen.callbacks };
    const session = await sandbox.exec.start("sh", options);
    await seen.sees("out c\n/tmp\n");
    await until(() => seen.err === "err\n", () => seen.err);
    const listed = await describe(sandbox, session.sessionId);
    equal([listed.sandboxID, listed.command, listed.args], [sandbox.sandboxId, "sh", ["-c", DIALOGUE]]);
    equal([listed.running, listed.attachedClients], [true, 1]);
    assert(listed.exitCode == null && Date.parse(listed.startedAt) > 0, JSON.stringify(listed));
    session.sendStdin("hel");
    session.sendStdin(new TextEncoder().encode("lo\n"));
    equal(await ends(session), 4);
    equal([seen.out, seen.err, seen.exits], ["out c\n/tmp\ngot hello\n", "err\n", [4]]);
    equal([seen.order.filter((one) => one === "scrollback end").length, seen.order.at(-1)], [1, "exit"]);

    // Attached to when it is over, it says all of it again.
    const late = new Watcher();
    equal(await ends(await sandbox.exec.attach(session.sessionId, late.callbacks)), 4);
    equal([late.out, late.err, late.replayed], [seen.out, seen.err, seen.out]);
    equal(late.order.slice(-2), ["scrollback end", "exit"]);
    const ended = await describe(sandbox, session.sessionId);
    equal([ended.running, ended.exitCode], [false, 4]);
  },

  async a_client_that_comes_later_is_shown_what_it_missed(sandbox) {
    const [first, second, third] = [new Watcher(), new Watcher(), new Watcher()];
    const count = "seq -f 'line %g' 5; read go; seq -f 'line %g' 6 60; read line";
    const session = await sandbox.exec.background("sh", { args: ["-c", count], ...first.callbacks });
    await first.sees("line 5\n");
    const other = await sandbox.exec.attach(session.sessionId, second.callbacks);
    await until(() => second.replayed !== null, () => second.order);
    assert(second.replayed.includes("line 5\n") && !second.replayed.includes("line 60\n"), second.replayed);
    // One that goes disturbs neither the process nor the other.
    session.close();
    other.sendStdin("go\n");
    await second.sees("line 60\n");
    equal(second.out, lines(60));
    const last = await sandbox.exec.attach(session.sessionId, third.callbacks);
    await until(() => third.replayed !== null, () => third.order);
    equal([third.replayed, third.out], [lines(60), lines(60)]);
    last.sendStdin("done\n");
    equal([await ends(last), await ends(other)], [0, 0]);
  },

  async bytes_come_through_a_session_unchanged(sandbox) {
    const seen = new Watcher();
    const script = "read go; head -c 3000000 /dev/urandom | tee sent; read go; head -c 1000000 | sha256sum";
    const session = await sandbox.exec.start("sh", { args: ["-c", script], ...seen.callbacks });
    session.sendStdin("go\n");
    await until(() => seen.raw.length >= 3_000_000, () => seen.raw.length);
    equal(sha256(seen.raw), sha256(await sandbox.files.readBytes("sent")));
    const sent = randomBytes(1_000_000);
    session.sendStdin("go\n");
    // One message that is large, and many that are not.
    session.sendStdin(sent.subarray(0, 500_000));
    for (let begin = 500_000; begin < 1_000_000; begin += 20_000) {
      session.sendStdin(sent.subarray(begin, begin + 20_000));
    }
    equal(await ends(session), 0);
    equal(seen.raw.subarray(3_000_000).toString().split(" ")[0], sha256(sent));
  },

  async a_session_is_killed(sandbox) {
    const killed = await sandbox.exec.start("sleep", { args: ["300"] });
    const told = await sandbox.exec.start("sleep", { args: ["300"] });
    await killed.kill();
    await sandbox.exec.kill(told.sessionId, 15);
    equal([await ends(killed), await ends(told)], [137, 143]);
    await sandbox.exec.kill(told.sessionId);
    await assert.rejects(sandbox.exec.kill("none"), /: 404/);
    // It is refused before there is a WebSocket.
    await assert.rejects(sandbox.exec.attach("none"), /WebSocket (connection failed|closed before opening)/);
    await assert.rejects(sandbox.exec.start("no-such-command-anywhere"), /: 400/);
  },

  async a_session_ends_by_itself_as_it_was_told(sandbox) {
    const seen = new Watcher();
    const limited = await sandbox.exec.start("sleep", { args: ["300"], timeout: 1, ...seen.callbacks });
    const left = await sandbox.exec.start("sleep", { args: ["300"], maxRunAfterDisconnect: 1 });
    const stays = await sandbox.exec.start("sleep", { args: ["300"] });
    left.close();
    stays.close();
    equal([await ends(limited), seen.exits], [-1, [-1]]);
    await until(async () => !(await describe(sandbox, left.sessionId)).running, () => "it runs");
    assert((await describe(sandbox, stays.sessionId)).running);
    await sandbox.exec.kill(stays.sessionId);
  },

  // --- shells -----------------------------------------------------------------------------------------------------

  async a_shell_remembers(sandbox) {
    const shell = await sandbox.exec.shell({ cwd: "/tmp", env: { B: "c" } });
    equal(await shell.run("pwd; echo $A $B"), { exitCode: 0, stdout: "/tmp\nb c\n", stderr: "" });
    equal((await shell.run("cd /usr; export C=d; f() { echo in f >&2; return 5; }")).exitCode, 0);
    const seen = new Watcher();
    equal(await shell.run("pwd; echo $C; f", seen.callbacks), { exitCode: 5, stdout: "/usr\nd\n", stderr: "in f\n" });
    equal([seen.out, seen.err], ["/usr\nd\n", "in f\n"]);
    equal((await shell.run("")).exitCode, 0);
    equal((await shell.run("for i in 1 2\ndo\n  echo $i\ndone\nfalse")).stdout, "1\n2\n");
    const much = await shell.run("seq 1 20000; seq 1 20000 >&2");
    equal([much.stdout.length, much.stderr.length], [108894, 108894]);
    const slow = shell.run("sleep 0.5; echo slow");
    await assert.rejects(shell.run("true"), ShellBusyError);
    equal((await slow).stdout, "slow\n");

    const again = await sandbox.exec.reattachShell(shell.sessionId);
    // What it said before is not taken for its answer.
    equal(await again.run("pwd; echo $C"), { exitCode: 0, stdout: "/usr\nd\n", stderr: "" });
    await again.close();
    await until(async () => !(await describe(sandbox, shell.sessionId)).running, () => "it runs");
    await assert.rejects(shell.run("true"), ShellClosedError);
  },

  async a_shell_that_exits_is_closed(sandbox) {
    const shell = await sandbox.exec.shell();
    await assert.rejects(shell.run("exit 3"), (error) => error instanceof ShellClosedError && /3/.test(error.message));
  },

  // --- terminals --------------------------------------------------------------------------------------------------

  async a_terminal_is_typed_at(sandbox) {
    const screen = new Watcher();
    const pty = await sandbox.pty.create({ cols: 100, rows: 30, onOutput: screen.callbacks.onStdout });
    // The client is told nothing of when its socket is open, but a shell shows a prompt then.
    await until(() => screen.raw.length > 0, () => "no prompt");
    pty.send("tty; stty size; echo mark$((40 + 2))\n");
    await screen.sees("mark42\r\n");
    assert.match(screen.out, /\/dev\/pts\/\d+\r\n30 100\r\nmark42\r\n/);
    const path = `/sandboxes/${sandbox.sandboxId}/pty/${pty.sessionId}`;
    await rest("POST", `${path}/resize`, { cols: 132, rows: 50 });
    pty.send(new TextEncoder().encode("stty size\n"));
    await screen.sees("50 132\r\n");
    pty.send("sleep 300; echo 'not '$((1 + 1))\n");
    // Before the shell has handed the terminal over, a Ctrl-C would be its own.
    const inFront = () => sandbox.exec.run("ps -o stat= -C sleep | grep -q '^S.*+'");
    await until(async () => (await inFront()).exitCode === 0, () => "sleep does not run");
    pty.send("\x03");
    pty.send("echo still $((1 + 2))\n");
    await screen.sees("still 3\r\n");
    assert(!screen.out.includes("not 2"), screen.out);
    await rest("DELETE", path);
    await until(async () => !(await describe(sandbox, pty.sessionId)).running, () => "it runs");
    pty.close();
  },

  // --- files ------------------------------------------------------------------------------------------------------

  async files_come_back_as_they_went(sandbox) {
    const { files } = sandbox;
    const every = Uint8Array.from({ length: 768 }, (_, index) => index % 256);
    await files.write("dir/sub/text", "täxt\n");
    equal(await files.read("dir/sub/text"), "täxt\n");
    await files.write("/home/sandbox/dir/ü & ?#%.bin", every);
    equal(await files.readBytes("dir/ü & ?#%.bin"), every);
    const pieces = Array.from({ length: 300 }, (_, number) => new Uint8Array(10_000).fill(number % 256));
    await files.write("dir/streamed", ReadableStream.from(pieces));
    equal(sha256(await files.readBytes("dir/streamed")), sha256(Buffer.concat(pieces)));
    await files.write("dir/empty", "");
    equal(await files.readBytes("dir/empty"), new Uint8Array());
    const listed = new Map((await files.list("/home/sandbox/dir")).map((entry) => [entry.name, entry]));
    equal([...listed.keys()].sort(), ["empty", "streamed", "sub", "ü & ?#%.bin"]);
    const [streamed, sub] = [listed.get("streamed"), listed.get("sub")];
    equal([streamed.isDir, streamed.path, streamed.size], [false, "/home/sandbox/dir/streamed", 3_000_000]);
    equal([sub.isDir, sub.path], [true, "/home/sandbox/dir/sub"]);
    await files.makeDir("made/of/many");
    await files.makeDir("made/of/many");
    equal(await files.list("made/of/many"), []);
    assert(await files.exists("dir/streamed"));
    // To this client a directory is nothing that exists.
    assert(!(await files.exists("dir/none")) && !(await files.exists("made")));
    await files.remove("dir");
    assert(!(await files.exists("dir/streamed")));
    await assert.rejects(files.read("dir/streamed"), /: 404/);
  },

  async a_signed_url_needs_no_key(sandbox) {
    await sandbox.files.write("signed/ü file", "for anyone");
    const url = await sandbox.downloadUrl("/home/sandbox/signed/ü file");
    const answer = await fetch(url);
    equal([answer.status, await answer.text()], [200, "for anyone"]);
    const upload = await sandbox.uploadUrl("/home/sandbox/signed/came", { expiresIn: 60 });
    assert((await fetch(upload, { method: "PUT", body: "from anyone" })).ok);
    equal(await sandbox.files.read("signed/came"), "from anyone");
    // Neither for the other direction, nor another file, nor with anything changed.
    assert([403, 404, 405].includes((await fetch(url, { method: "PUT", body: "x" })).status));
    for (const [name, value] of [["path", "/etc/passwd"], ["expires", "99999999999"], ["signature", "0".repeat(64)]]) {
      const changed = new URL(url);
      changed.searchParams.set(name, value);
      equal((await fetch(changed)).status, 403, name);
    }
    const brief = await sandbox.downloadUrl("/home/sandbox/signed/ü file", { expiresIn: 1 });
    // Clocks may differ by five seconds.
    await sleep(7100);
    equal((await fetch(brief)).status, 403);
  },

  // --- agents -----------------------------------------------------------------------------------------------------

  async an_agent_is_prompted_and_interrupted(sandbox) {
    await sandbox.files.write("messages_api.py", await readFile(MESSAGES_API));
    await sandbox.exec.background("python3", { args: ["messages_api.py", String(MESSAGES_PORT)] });
    const listens = `until (: > /dev/tcp/127.0.0.1/${MESSAGES_PORT}) 2>&-; do sleep 0.1; done`;
    equal((await sandbox.exec.run(`bash -c '${listens}'`)).exitCode, 0);

    const [seen, late, next] = [new Agent(), new Agent(), new Agent()];
    const prompt = "step: write /home/sandbox/by-agent made by it\nstep: say written";
    const agent = await sandbox.agent.start({ prompt, systemPrompt: "Do as you are told.", ...seen.callbacks });
    await seen.says("turn_complete");
    equal(seen.last("result").result, "written");
    equal(await sandbox.files.read("by-agent"), "made by it");
    equal(seen.events[0].type, "ready");
    for (const type of ["system", "assistant", "user"]) assert(seen.count(type) > 0, type);

    const [before, configured] = [seen.count("system"), seen.count("configured")];
    agent.sendPrompt("step: count 2000 50");
    await seen.says("system", before + 1);
    agent.interrupt();
    await seen.says("interrupted");
    agent.configure({ maxTurns: 3 });
    await seen.says("configured", configured + 1);
    agent.sendPrompt("step: say still there");
    await seen.says("turn_complete", 2);
    equal(seen.last("result").result, "still there");

    const listed = (await sandbox.agent.list()).find((one) => one.sessionID === agent.sessionId);
    equal([listed.sandboxID, listed.running], [sandbox.sandboxId, true]);
    // Who comes later is told the same.
    const other = await sandbox.agent.attach(agent.sessionId, late.callbacks);
    await until(() => late.events.length >= seen.events.length, () => inspect(late.events));
    equal(late.events, seen.events);
    await agent.kill();
    equal([await ends(agent), await ends(other)], [137, 137]);
    equal((await sandbox.agent.list()).map((one) => one.running), [false]);

    // Another one goes on with the conversation.
    const resume = seen.events.find((event) => event.subtype === "init").session_id;
    const resumed = await sandbox.agent.start({ prompt: "step: recall", resume, ...next.callbacks });
    const recalled = JSON.parse((await next.says("result")).result);
    assert(recalled.includes("say written") && recalled.includes("recall"), inspect(recalled));
    await resumed.kill();
    equal(await ends(resumed), 137);
  },

  // --- sleep, checkpoints -----------------------------------------------------------------------------------------

  async a_session_sleeps_and_wakes_with_its_sandbox(sandbox) {
    const [seen, after] = [new Watcher(), new Watcher()];
    const count = "i=0; while ! test -e stop; do i=$((i + 1)); echo line $i; sleep 0.1; done; exit 6";
    const session = await sandbox.exec.start("sh", { args: ["-c", count], ...seen.callbacks });
    const shell = await sandbox.exec.shell();
    await shell.run("cd /usr; C=d");
    await seen.sees("line 3\n");
    await sandbox.hibernate();
    // The connection ends, and not the session.
    equal([await ends(session), seen.exits], [-1, [-1]]);
    equal([await sandbox.isRunning(), sandbox.status], [false, "hibernated"]);
    await sandbox.wake();
    equal([await sandbox.isRunning(), sandbox.status], [true, "running"]);
    const again = await sandbox.exec.attach(session.sessionId, after.callbacks);
    await until(() => after.replayed !== null, () => after.order);
    assert(after.out.startsWith(seen.out), `${seen.out}\n--- then\n${after.out}`);
    await after.sees(`line ${after.out.split("\n").length + 2}\n`);
    const reopened = await sandbox.exec.reattachShell(shell.sessionId);
    equal((await reopened.run("pwd; echo $C")).stdout, "/usr\nd\n");
    await reopened.close();
    await sandbox.files.write("stop", "");
    equal(await ends(again), 6);
    equal(after.out, lines(after.out.split("\n").length - 1));
    await sandbox.files.remove("stop");
  },

  async any_call_wakes_a_sandbox(sandbox) {
    await sandbox.files.write("slept", "here");
    await sandbox.hibernate();
    // This client asks to be told that the sandbox wakes, and comes again.
    equal(await sandbox.files.read("slept"), "here");
    await sandbox.hibernate();
    equal((await sandbox.exec.run("cat slept; echo $A")).stdout, "hereb\n");
    await sandbox.hibernate();
    await sandbox.files.write("slept", ReadableStream.from([new TextEncoder().encode("again")]));
    await sandbox.hibernate();
    const shell = await sandbox.exec.shell();
    equal((await shell.run("cat slept")).stdout, "again");
    await shell.close();
  },

  async a_checkpoint_is_gone_back_to_and_forked(sandbox) {
    await sandbox.files.write("state", "one");
    const taken = await sandbox.createCheckpoint("one");
    equal([taken.status, taken.name], ["ready", "one"]);
    await sandbox.files.write("state", "two");
    equal((await sandbox.listCheckpoints()).map((one) => one.name), ["one"]);
    await assert.rejects(sandbox.createCheckpoint("one"), /: 409/);
    const fork = await Sandbox.createFromCheckpoint(taken.id, { timeout: 60, envs: { A: "c" } });
    assert.notEqual(fork.sandboxId, sandbox.sandboxId);
    equal((await fork.exec.run("cat state; echo $A")).stdout, "onec\n");
    const seen = new Watcher();
    const session = await fork.exec.start("sh", { args: ["-c", "cat state; exit 8"], ...seen.callbacks });
    equal([await ends(session), seen.out], [8, "one"]);
    await fork.kill();
    await sandbox.restoreCheckpoint(taken.id);
    equal((await sandbox.exec.run("cat state")).stdout, "one");
    equal(await ends(await sandbox.exec.start("sh", { args: ["-c", "cat state; exit 9"] })), 9);
    await sandbox.deleteCheckpoint(taken.id);
    await sandbox.deleteCheckpoint(taken.id);
    equal(await sandbox.listCheckpoints(), []);
  },
};

async function main() {
  const wanted = process.argv.slice(2);
  const chosen = Object.entries(CHECKS).filter(
    ([name]) => wanted.length === 0 || wanted.some((beginning) => name.startsWith(beginning)),
  );
  assert(chosen.length > 0, "no check has such a name");
  const model = { ANTHROPIC_BASE_URL: `http://127.0.0.1:${MESSAGES_PORT}`, ANTHROPIC_API_KEY: "sk-ant-none" };
  const sandbox = await Sandbox.create({ envs: { A: "b", ...model }, metadata: { k: "v" }, memoryMB: 1024 });
  try {
    for (const [name, check] of chosen) {
      try {
        await within(check(sandbox), name, CHECK_PATIENCE);
      } catch (error) {
        console.error(`failed ${name}`, error);
        return 1;
      }
      console.log(`ok ${name}`);
    }
  } finally {
    await sandbox.kill();
  }
  assert(!(await sandbox.isRunning()));
  console.log("ok a_sandbox_is_killed");
  console.log(`done ${sandbox.sandboxId}`);
  return 0;
}

// Sockets of a check that has failed would keep it alive.
process.exit(await main());
