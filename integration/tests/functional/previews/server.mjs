// Runs in a sandbox: a page, events, uploads, and a WebSocket that says what it was told. Node alone.

import { createHash } from "node:crypto";
import { createServer } from "node:http";

const PAGE = `<!doctype html><title>preview</title><p id="said">nothing yet</p><script type="module">
  const said = [];
  const say = (what) => {
    said.push(what);
    document.querySelector("#said").textContent = said.toSorted().join(" ");
  };
  const socket = new WebSocket(location.href.replace(/^http/, "ws") + "socket");
  socket.onopen = () => socket.send("websocket");
  socket.onmessage = ({ data }) => say(data);
  new EventSource("/events").onmessage = function ({ data }) { this.close(); say(data); };
  fetch("/upload", { method: "PUT", body: new Uint8Array(3_000_000) }).then((answer) => answer.text()).then(say);
</script>`;

const server = createServer(async (request, response) => {
  if (request.url === "/events") {
    response.writeHead(200, { "content-type": "text/event-stream" });
    response.write("data: event\n\n");
    setTimeout(() => response.end("data: last\n\n"), 1500);
  } else if (request.url === "/upload") {
    let bytes = 0;
    for await (const piece of request) bytes += piece.length;
    response.end(`${bytes}`);
  } else if (request.url === "/headers") {
    response.end(JSON.stringify(request.headers));
  } else {
    response.writeHead(200, { "content-type": "text/html" });
    response.end(PAGE);
  }
});

server.on("upgrade", (request, socket) => {
  const key = request.headers["sec-websocket-key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
  const accept = createHash("sha1").update(key).digest("base64");
  socket.write(`HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: ${accept}\r\n\r\n`);
  socket.on("error", () => {});
  let unread = Buffer.alloc(0);
  socket.on("data", (data) => {
    unread = Buffer.concat([unread, data]);
    // Short messages are enough: a byte of length, four of the mask.
    while (unread.length >= 6 && unread.length >= 6 + (unread[1] & 127)) {
      const length = unread[1] & 127;
      const mask = unread.subarray(2, 6);
      const text = unread.subarray(6, 6 + length).map((byte, index) => byte ^ mask[index % 4]);
      if ((unread[0] & 15) === 8) return socket.end();
      socket.write(Buffer.concat([Buffer.from([unread[0], length]), text]));
      unread = unread.subarray(6 + length);
    }
  });
});

server.listen(3000, "127.0.0.1");
