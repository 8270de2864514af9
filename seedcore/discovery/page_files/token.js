// The token that this tab shows with each request. It goes when the tab is closed.

const KEY = "seedcore:token";

export const hasToken = () => sessionStorage.getItem(KEY) !== null;

export const authorization = () => (hasToken() ? { Authorization: `Bearer ${sessionStorage.getItem(KEY)}` } : {});

/** Keeps a token, or forgets it where that is null. */
export function keepToken(token) {
  if (token === null) sessionStorage.removeItem(KEY);
  else sessionStorage.setItem(KEY, token);
}
