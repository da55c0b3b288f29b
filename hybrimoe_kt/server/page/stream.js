// Talks to the server: an answer piece by piece, and plain JSON. Nothing here touches the page.

export class ApiError extends Error {
  constructor(status, message, code, retryAfter) {
    super(message);
    Object.assign(this, {status, code, retryAfter});
  }
}

const headers = (key) => (key ? {Authorization: `Bearer ${key}`} : {});

async function refusal(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // not JSON: a proxy in between, perhaps
  }
  const message = error.message || `the server answered ${response.status} ${response.statusText}`.trim();
  return new ApiError(response.status, message, error.code, response.headers.get("Retry-After"));
}

async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "the server cannot be reached; is it still running?");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

export async function getJson(path, key) {
  return (await ask(path, {headers: headers(key), cache: "no-store"})).json();
}

// Yields the data of server-sent events from a stream of text, however it was cut into chunks.
export async function* events(reader) {
  let rest = "";
  let data = [];
  for (;;) {
    const {value, done} = await reader.read();
    rest += value ?? "";
    const lines = rest.split(/\r\n|\n|\r(?!$)/);
    rest = done ? "" : lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
      else if (line === "" && data.length) {
        yield data.join("\n");
        data = [];
      }
    }
    if (done) {
      if (data.length) yield data.join("\n");
      return;
    }
  }
}

// Yields {text}, {thought}, {finish} and {usage} of one answer; ApiError when it cannot be had or breaks off.
export async function* streamChat(request, key, signal) {
  const response = await ask("v1/chat/completions", {
    method: "POST",
    headers: {"Content-Type": "application/json", ...headers(key)},
    body: JSON.stringify({...request, stream: true, stream_options: {include_usage: true}}),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let ended = false;
  try {
    for await (const data of events(reader)) {
      if (data === "[DONE]") return;
      const piece = JSON.parse(data);
      if (piece.error) throw new ApiError(response.status, piece.error.message, piece.error.code);
      const {delta, finish_reason: finish} = piece.choices?.[0] ?? {};
      if (delta?.reasoning_content) yield {thought: delta.reasoning_content};
      if (delta?.content) yield {text: delta.content};
      if (finish) {
        ended = true;
        yield {finish};
      }
      if (piece.usage) yield {usage: piece.usage};
    }
  } catch (error) {
    if (error instanceof ApiError || error.name === "AbortError") throw error;
    throw new ApiError(0, "the connection broke off");
  } finally {
    reader.cancel().catch(() => {});
  }
  if (!ended) throw new ApiError(0, "the connection ended before the answer did");
}
