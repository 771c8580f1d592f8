// Messages for an agent, in the form in which the SDK takes them: an iterable that waits for the next one.

export class Inbox {
  #messages = [];
  #isEnded = false;
  #wake = null;

  push(message) {
    this.#messages.push(message);
    this.#wake?.();
  }

  end() {
    this.#isEnded = true;
    this.#wake?.();
  }

  async *[Symbol.asyncIterator]() {
    for (;;) {
      while (this.#messages.length > 0) yield this.#messages.shift();
      if (this.#isEnded) return;
      await new Promise((resolve) => (this.#wake = resolve));
      this.#wake = null;
    }
  }
}
