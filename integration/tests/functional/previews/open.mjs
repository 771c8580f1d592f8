// Opens a page in a headless Chromium, and waits until it says what it is to say.

import assert from "node:assert/strict";
import process from "node:process";
import { chromium } from "playwright-core";

const { OC_URL, OC_SAYS, OC_BROWSER } = process.env;
const PATIENCE = 60_000;

const browser = await chromium.launch({ executablePath: OC_BROWSER, args: ["--no-sandbox"], timeout: PATIENCE });
try {
  const page = await browser.newPage();
  const failures = [];
  page.on("pageerror", (error) => failures.push(String(error)));
  const answer = await page.goto(OC_URL, { timeout: PATIENCE });
  assert.equal(answer.status(), 200);
  try {
    await page.waitForFunction((says) => document.body.innerText.includes(says), OC_SAYS, { timeout: PATIENCE });
  } catch (error) {
    assert.fail(`it says ${JSON.stringify(await page.innerText("body"))}: ${failures.join(", ")} ${error}`);
  }
} finally {
  await browser.close();
}
