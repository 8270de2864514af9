"""URLs that an endpoint may have and may not have, in Python as in SQL."""

from __future__ import annotations

from seedcore.core.limits import MAX_ENDPOINTS, MAX_LABEL_KEY_CHARS, MAX_URL_CHARS

GOOD_URLS = (
    "http://10.0.0.3:8000",
    "https://agent.example/v1?x=1#top",
    "grpc://[2001:db8::1]:50051",
    "tcp://host:0",
    "HTTP+unix.v1-x://h/",
    "http://h/@here?mail=a@b",
    "http://höst:80/päth",
    "http://h?" + "q" * (MAX_URL_CHARS - len("http://h?")),
)

# what is wrong: the endpoints, and a word of the message
BAD_ENDPOINTS: dict[str, tuple[object, str]] = {
    "no URL": ({"http": "10.0.0.3:8000"}, "absolute URL"),
    "no host": ({"http": "localhost:8000"}, "absolute URL"),
    "only a port": ({"http": "http://:8000"}, "absolute URL"),
    "only a path": ({"http": "http:///v1"}, "absolute URL"),
    "only a scheme": ({"http": "http://"}, "absolute URL"),
    "a scheme of digits": ({"http": "1http://h"}, "absolute URL"),
    "a relative URL": ({"http": "//host/v1"}, "absolute URL"),
    "a blank in the host": ({"http": "http://a b"}, "absolute URL"),
    "a blank in the path": ({"http": "http://a/b c"}, "absolute URL"),
    "another space": ({"http": "http://a/b\u3000c"}, "absolute URL"),
    "a port that is none": ({"http": "http://h:http"}, "absolute URL"),
    "half an IPv6 address": ({"http": "http://[::1"}, "absolute URL"),
    "an IPv6 address without brackets": ({"http": "http://::1:80"}, "absolute URL"),
    "a backslash": ({"http": "http://h\\evil"}, "absolute URL"),
    "a port beyond all": ({"http": "http://h:65536"}, "port"),
    "a user": ({"http": "http://ann@h"}, "user or a password"),
    "a password": ({"http": "http://ann:secret@h:80/v1"}, "user or a password"),
    "a control character": ({"http": "http://h/\x01"}, "control characters"),
    "nothing": ({"http": ""}, "must not be empty"),
    "a number": ({"http": 8000}, "must be text"),
    "null": ({"http": None}, "must be text"),
    "a list": ({"http": ["http://h"]}, "must be text"),
    "too long": ({"http": "http://h/" + "p" * MAX_URL_CHARS}, f"at most {MAX_URL_CHARS} characters"),
    "no name": ({"": "http://h"}, "must not be empty"),
    "a long name": ({"n" * (MAX_LABEL_KEY_CHARS + 1): "http://h"}, f"at most {MAX_LABEL_KEY_CHARS} characters"),
    "a name of two lines": ({"a\nb": "http://h"}, "control characters"),
    "too many": ({f"n{n}": "http://h" for n in range(MAX_ENDPOINTS + 1)}, f"at most {MAX_ENDPOINTS}"),
}
