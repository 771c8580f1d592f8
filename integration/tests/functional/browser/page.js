// A page with a terminal in a sandbox. `drive.mjs` opens it, types at it, and reads the screen.

import { Terminal } from "@xterm/xterm";
import { Attachment, contract } from "./attachment.js";

const messages = await contract("/descriptors.bin");

/** Opens a terminal with a sandbox's token. `place` is `{ url, sandboxID, token }`. */
window.begin = async (place) => {
  const shown = new Terminal({ cols: 90, rows: 25, scrollback: 10_000 });
  shown.open(document.getElementById("terminal"));
  const answer = await fetch(`${place.url}/api/sandboxes/${place.sandboxID}/pty`, {
    method: "POST",
    headers: { Authorization: `Bearer ${place.token}`, "Content-Type": "application/json" },
    body: JSON.stringify({ cols: shown.cols, rows: shown.rows }),
  });
  if (!answer.ok) throw new Error(`no terminal: ${answer.status} ${await answer.text()}`);
  const { sessionID } = await answer.json();
  const received = [];
  const attachment = new Attachment({ ...place, sessionID }, messages, (data, done) => {
    received.push(data);
    shown.write(data, done);
  });
  shown.onData((text) => attachment.write(text));
  shown.onResize((size) => attachment.resize(size));
  shown.focus();

  window.terminal = {
    sessionID,
    resize: (cols, rows) => shown.resize(cols, rows),
    /** Every line there is, those that were scrolled away included. */
    lines() {
      const buffer = shown.buffer.active;
      return Array.from({ length: buffer.length }, (_, row) => buffer.getLine(row).translateToString(true));
    },
    /** All output, as text. */
    output: async () => await new Blob(received).text(),
    state() {
      const { offset, connections, isConnected, ended, closes, faults } = attachment;
      return { offset: Number(offset), connections, isConnected, ended, closes, faults };
    },
  };
};
