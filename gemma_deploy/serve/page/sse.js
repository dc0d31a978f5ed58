// Server-sent events, as https://html.spec.whatwg.org/multipage/server-sent-events.html reads them.

export const LONGEST_EVENT = 4_000_000; // characters; a server that sends more in one is not listened to any longer

export class TooLong extends Error {}

/**
 * The `data` of every event of a stream.
 * @param {ReadableStream<Uint8Array>} stream UTF-8
 * @returns {AsyncGenerator<string>}
 * @throws {TooLong} an event has more than LONGEST_EVENT characters
 */
export async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = ""; // the beginning of a line
  let data = [];
  let size = 0;
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return; // an event without an empty line behind it is none
      const lines = (waiting + value).split(/\r\n|\n|\r(?!$)/); // a CR at the end may be half a line end
      waiting = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield data.join("\n");
          data = [];
          size = 0;
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
          size += line.length;
        }
      }
      if (size + waiting.length > LONGEST_EVENT) throw new TooLong();
    }
  } finally {
    await reader.cancel().catch(() => {}); // it may be over already, which is as good
  }
}
