// Drives `page.html` in a headless Chromium as a person does, while whoever started this kills services.
//
// Asks for that on standard output, `please kill SERVICE` or `please hibernate`, and goes on when it reads a line. The
// environment says the rest.

import assert from "node:assert/strict";
import { createServer } from "node:http";
import { readFile } from "node:fs/promises";
import { dirname, extname, join, normalize } from "node:path";
import process from "node:process";
import { createInterface } from "node:readline";
import { setTimeout as sleep } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import { chromium } from "playwright-core";

const { OC_URL: url, OC_SANDBOX: sandboxID, OC_TOKEN: token, OC_DESCRIPTORS, OC_BROWSER, OC_SCREENSHOT } = process.env;
// Milliseconds: for anything, and for all together.
const PATIENCE = 120_000;
const ALL_PATIENCE = 600_000;
const LINES = 200;
const HERE = dirname(fileURLToPath(import.meta.url));
const PACKAGES = dirname(dirname(fileURLToPath(import.meta.resolve("playwright-core/package.json"))));
const TYPES = { ".html": "text/html", ".js": "text/javascript", ".mjs": "text/javascript", ".css": "text/css" };

const answers = createInterface({ input: process.stdin })[Symbol.asyncIterator]();

/** Has something done, and waits for it. */
async function please(wish) {
  console.log(`please ${wish}`);
  const { done } = await answers.next();
  assert(!done, `nobody does this: ${wish}`);
}

/** Serves the page, the packages, and the contract. */
async function serve() {
  const server = createServer(async (request, response) => {
    const path = normalize(new URL(request.url, "http://page").pathname);
    const file = path === "/descriptors.bin" ? OC_DESCRIPTORS
      : path.startsWith("/packages/") ? join(PACKAGES, path.slice("/packages".length))
      : join(HERE, path);
    const body = await readFile(file).catch(() => null);
    response.writeHead(body ? 200 : 404, { "Content-Type": TYPES[extname(file)] ?? "application/octet-stream" });
    response.end(body);
  });
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  return `http://127.0.0.1:${server.address().port}/page.html`;
}

/** The page, in the words of this test. */
class Screen {
  constructor(page) {
    this.page = page;
  }

  lines = () => this.page.evaluate(() => window.terminal.lines());
  state = () => this.page.evaluate(() => window.terminal.state());

  async until(what, condition) {
    const deadline = Date.now() + PATIENCE;
    for (;;) {
      const [lines, state] = [await this.lines(), await this.state()];
      if (condition(lines, state)) return;
      if (Date.now() > deadline) {
        assert.fail(`not within ${PATIENCE} ms: ${what}\n${JSON.stringify(state)}\n${lines.slice(-40).join("\n")}`);
      }
      await sleep(20);
    }
  }

  shows = (line) => this.until(line, (lines) => lines.includes(line));

  /** Keys, one after another. */
  async types(text) {
    await this.page.keyboard.type(text);
    await this.page.keyboard.press("Enter");
  }
}

/** Waits until a program has the terminal. */
async function is_in_front(program) {
  const deadline = Date.now() + PATIENCE;
  for (;;) {
    const answer = await fetch(`${url}/api/sandboxes/${sandboxID}/exec/run`, {
      method: "POST",
      headers: { Authorization: `Bearer ${token}`, "Content-Type": "application/json" },
      body: JSON.stringify({ cmd: `ps -o stat= -C ${program} | grep -q '^S.*+'` }),
    });
    assert.equal(answer.status, 200);
    if ((await answer.json()).exitCode === 0) return;
    assert(Date.now() < deadline, `${program} does not run`);
    await sleep(100);
  }
}

/** A shell that does what is typed. */
async function answers_what_is_typed(screen) {
  await screen.until("a prompt", (lines) => lines.some((line) => line.trim()));
  await screen.types("echo typed $((6 * 7))");
  await screen.shows("typed 42");
  await screen.types("echo 'grüße ✓' | rev");
  await screen.shows("✓ eßürg");
  await screen.page.keyboard.press("ArrowUp");
  await screen.page.keyboard.type(" | tr r R");
  await screen.page.keyboard.press("Enter");
  await screen.shows("✓ eßüRg");
  await screen.types("sleep 300");
  await screen.until("sleep", (lines) => lines.some((line) => line.endsWith("sleep 300")));
  // Before the shell has handed the terminal over, a Ctrl-C would be its own.
  await is_in_front("sleep");
  await screen.page.keyboard.press("Control+C");
  await screen.types("echo 'back at'; tty");
  await screen.shows("back at");
}

/** A terminal that knows how large it is shown. */
async function follows_the_size(screen) {
  await screen.types("stty size");
  await screen.shows("25 90");
  await screen.page.evaluate(() => window.terminal.resize(120, 40));
  await screen.types("clear; stty size");
  await screen.shows("40 120");
}

/** Nothing is lost or doubled by a service that dies amid output, nor what is typed meanwhile. */
async function outlives(service, screen) {
  const before = await screen.state();
  // What is typed meanwhile is not shown among the lines.
  await screen.types(`stty -echo; for i in $(seq 1 ${LINES}); do echo ${service} line $i; sleep 0.03; done; stty echo`);
  await screen.shows(`${service} line 20`);
  const killed = please(`kill ${service}`);
  const wasLost = (_, state) => !state.isConnected || state.connections > before.connections;
  await screen.until("the connection is lost", wasLost);
  await screen.types(`echo ${service} typed blind $((1 + 1))`);
  await killed;
  await screen.shows(`${service} line ${LINES}`);
  await screen.shows(`${service} typed blind 2`);
  const told = (await screen.lines()).filter((line) => line.startsWith(`${service} line `));
  assert.deepEqual(told, Array.from({ length: LINES }, (_, index) => `${service} line ${index + 1}`));
  const blind = (await screen.lines()).filter((line) => line === `${service} typed blind 2`);
  assert.equal(blind.length, 1, "what was typed was done once");
  const after = await screen.state();
  assert(after.connections > before.connections, "it was attached again");
  assert.deepEqual(after.faults, []);
}

/** The page wakes a sandbox that sleeps, and goes on where it was. */
async function sleeps_and_wakes(screen) {
  const before = await screen.state();
  await screen.types("C='kept in memory'");
  await please("hibernate");
  await screen.until("it is attached again", (_, state) => state.isConnected && state.connections > before.connections);
  await screen.types("echo is $C");
  await screen.shows("is kept in memory");
  const { closes, faults } = await screen.state();
  assert(closes.some(({ code }) => code === 4409), JSON.stringify(closes));
  assert.deepEqual(faults, []);
}

/** What the page has is what the session wrote, to the byte. */
async function has_all_of_it(screen) {
  const sessionID = await screen.page.evaluate(() => window.terminal.sessionID);
  await screen.types("exit 7");
  await screen.until("the end", (_, state) => state.ended !== null && state.closes.at(-1)?.code === 1000);
  const state = await screen.state();
  assert.deepEqual([state.ended, state.faults], [{ exitCode: 7 }, []]);
  const ask = async (path) => {
    const answer = await fetch(`${url}/api/sandboxes/${sandboxID}/exec/${sessionID}${path}`, {
      headers: { Authorization: `Bearer ${token}` },
    });
    assert.equal(answer.status, 200, path);
    return await answer.json();
  };
  const session = await ask("");
  assert.deepEqual([session.running, session.exitCode, Number(session.outputBytes)], [false, 7, state.offset]);
  const { stdout } = await ask("/result");
  assert.equal(await screen.page.evaluate(() => window.terminal.output()), stdout);
}

async function main() {
  const address = await serve();
  const browser = await chromium.launch({ executablePath: OC_BROWSER, args: ["--no-sandbox", "--disable-gpu"], timeout: PATIENCE });
  const page = await browser.newPage();
  const screen = new Screen(page);
  const problems = [];
  page.on("pageerror", (error) => problems.push(error));
  try {
    await page.goto(address, { timeout: PATIENCE });
    await page.waitForFunction(() => window.begin, undefined, { timeout: PATIENCE });
    await page.evaluate((place) => window.begin(place), { url, sandboxID, token });
    const steps = {
      answers_what_is_typed,
      follows_the_size,
      outlives_the_gateway: (screen) => outlives("gateway", screen),
      outlives_the_vmm_agent: (screen) => outlives("vmm-agent", screen),
      sleeps_and_wakes,
      has_all_of_it,
    };
    for (const [name, step] of Object.entries(steps)) {
      await step(screen);
      assert.deepEqual(problems, []);
      console.log(`ok ${name}`);
    }
    return 0;
  } catch (error) {
    await page.screenshot({ path: OC_SCREENSHOT }).catch(() => {});
    console.error(error, ...problems, `\nThe screen is in ${OC_SCREENSHOT}`);
    return 1;
  } finally {
    await browser.close();
  }
}

setTimeout(() => {
  console.error(`not done within ${ALL_PATIENCE} ms`);
  process.exit(1);
}, ALL_PATIENCE).unref();
process.exit(await main());
