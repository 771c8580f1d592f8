// Lines of a stream of bytes, bounded.

const NEWLINE = 0x0a;

/**
 * The lines of `stream` as text, without their ends; `null` for one that is longer than `limit` bytes, of which nothing
 * is kept. What follows the last newline is a line, too, unless it is empty.
 */
export async function* readLines(stream, limit) {
  let parts = [];
  let length = 0;
  const add = (part) => {
    length += part.length;
    if (length > limit) parts = [];
    else if (part.length > 0) parts.push(part);
  };
  const take = () => {
    const line = length > limit ? null : Buffer.concat(parts).toString('utf8');
    parts = [];
    length = 0;
    return line;
  };
  for await (const chunk of stream) {
    let start = 0;
    for (let end; (end = chunk.indexOf(NEWLINE, start)) !== -1; start = end + 1) {
      add(chunk.subarray(start, end));
      yield take();
    }
    add(chunk.subarray(start));
  }
  if (length > 0) yield take();
}
