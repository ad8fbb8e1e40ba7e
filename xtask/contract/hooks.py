"""What Schemathesis cannot know from the document: what a module is, and that cursors and whole messages come from somewhere."""

import base64
import os

import schemathesis
from hypothesis import strategies

with open(os.environ["CONTRACT_MODULE"], "rb") as module:
    MODULE = module.read()

# Whatever else could be generated would be refused at its first byte.
schemathesis.openapi.media_type("application/wasm", strategies.just(MODULE))


@schemathesis.serializer("application/wasm")
def module(context, value):
    return value if isinstance(value, bytes) else str(value).encode()


def is_cursor(text):
    """A list's letter, a colon, a place: only a host makes them, and a schema cannot say what they are."""
    try:
        return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))[1:2] == b":"
    except (TypeError, ValueError):
        return False


def is_empty(message):
    """Whether a message has no byte of text and no other part, which a schema cannot say either."""
    parts = message.get("parts") if isinstance(message, dict) else None
    return isinstance(parts, list) and all(part == {"type": "text", "text": ""} for part in parts)


@schemathesis.hook
def map_query(context, query):
    if query and "after" in query and not is_cursor(query["after"]):
        del query["after"]
    return query


@schemathesis.hook
def filter_case(context, case):
    if case.meta is None or not case.meta.generation.mode.is_positive:
        return True
    if case.query and "after" in case.query and not is_cursor(case.query["after"]):
        return False
    return not (isinstance(case.body, dict) and is_empty(case.body.get("message")))
