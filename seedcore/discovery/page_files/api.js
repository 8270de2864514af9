// Calls of the HTTP API. URLs are relative, because the app may be mounted under a prefix.

import { learnTime } from "./clock.js";
import { authorization } from "./token.js";

/**
 * A failed call. `status` is 0 without an answer; `code` is the kind of the problem that was sent, or null;
 * `isTimeout` distinguishes a timeout from an unreachable server. The message is shown, and never read.
 */
class ApiError extends Error {
  constructor(message, { status = 0, code = null, isTimeout = false } = {}) {
    super(message);
    this.status = status;
    this.code = code;
    this.isTimeout = isTimeout;
  }
}

/** Whether the user lacks the right for this request. */
export const isRefusal = (status) => status === 401 || status === 403;

export const getJson = (path, options) => call(path, {}, options);

export const postJson = (path, body, options) =>
  call(
    path,
    { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) },
    { timeoutMs: 15_000, ...options },
  );

export const agentPath = (id) => `v1/agents/${encodeURIComponent(id)}`;

async function call(path, init, { signal, timeoutMs = 8000, token = null } = {}) {
  const timeout = AbortSignal.timeout(timeoutMs);
  const either = signal ? AbortSignal.any([signal, timeout]) : timeout;
  try {
    const headers = { ...init.headers, ...(token === null ? authorization() : { Authorization: `Bearer ${token}` }) };
    const response = await fetch(path, { ...init, headers, signal: either, cache: "no-store" });
    const body = await response.json().catch((error) => {
      if (either.aborted) throw error;
      return null;
    });
    if (!response.ok) {
      const { status } = response;
      throw new ApiError(body?.detail || `HTTP status ${status}`, { status, code: body?.code ?? null });
    }
    if (body === null) throw new ApiError("the answer is not JSON", { status: response.status });
    learnTime(body.as_of, response.headers.get("date"));
    return body;
  } catch (error) {
    if (error instanceof ApiError || signal?.aborted) throw error;
    if (timeout.aborted) throw new ApiError(`no answer within ${timeoutMs / 1000} s`, { isTimeout: true });
    throw new ApiError("the server cannot be reached");
  }
}
