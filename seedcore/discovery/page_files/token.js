// The token that this tab sends with each request. Closing the tab removes it.

const KEY = "seedcore:token";

export const hasToken = () => sessionStorage.getItem(KEY) !== null;

export const authorization = () => (hasToken() ? { Authorization: `Bearer ${sessionStorage.getItem(KEY)}` } : {});

/** Stores a token, or removes it if null. */
export function keepToken(token) {
  if (token === null) sessionStorage.removeItem(KEY);
  else sessionStorage.setItem(KEY, token);
}
