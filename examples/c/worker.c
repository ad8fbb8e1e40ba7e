/*
 * Remembers how many messages there were and the name that it was told. Its state is two lines, count and name, as in every other example:
 * each goes on where another left off.
 */
#include "turnhouse.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char TELLS[] = "my name is ";
static const char ASKS[] = "what is my name?";
static const char DELTA[] = "output.delta";

/* The turn fails, and the state stays as it was. Standard error goes to the turn's log. */
static _Noreturn void fail(const char *what, int32_t errno_negated) {
    fprintf(stderr, "%s: %d\n", what, (int)errno_negated);
    exit(1);
}

/*
 * All that `read` gives, with a NUL behind it for string.h; NULL where there is nothing to read. A read copies what fits and returns the whole
 * size: so it is asked for the size first. Nothing is freed: the program's end comes first.
 */
static char *read_whole(int32_t (*read)(void *, uint32_t), const char *what, int32_t *size) {
    *size = read(NULL, 0);
    if (*size == -TH_ENOENT)
        return NULL;
    if (*size < 0)
        fail(what, *size);
    char *bytes = malloc((size_t)*size + 1);
    if (!bytes)
        fail("out of memory", 0);
    read(bytes, (uint32_t)*size);
    bytes[*size] = '\0';
    return bytes;
}

/* Streams a piece of the reply. An event is at most 64 KiB and whole UTF-8: longer text goes out in pieces that end between characters. */
static void say(const char *text, size_t length) {
    while (length > 0) {
        size_t piece = length;
        if (piece > 32 * 1024) {
            piece = 32 * 1024;
            while (((unsigned char)text[piece] & 0xC0) == 0x80)
                piece--;
        }
        int32_t result = th_emit(DELTA, sizeof DELTA - 1, text, (uint32_t)piece);
        if (result < 0)
            fail("cannot reply", result);
        text += piece;
        length -= piece;
    }
}

static void say_all(const char *text) {
    say(text, strlen(text));
}

int main(void) {
    int32_t message_size, state_size;
    const char *message = read_whole(th_message_read, "cannot read the message", &message_size);
    const char *state = read_whole(th_snapshot_read, "cannot read the state", &state_size);

    uint64_t count = 0;
    const char *name = "";
    size_t name_length = 0;
    if (state) {
        char *end;
        count = strtoull(state, &end, 10);
        if (end == state || *end != '\n' || !strchr(end + 1, '\n'))
            fail("the state is not two lines, count and name", 0);
        name = end + 1;
        name_length = strcspn(name, "\n");
    }
    count++;

    char tail[64];
    snprintf(tail, sizeof tail, "this is message %" PRIu64 ".", count);
    if (strncmp(message, TELLS, sizeof TELLS - 1) == 0) {
        name = message + sizeof TELLS - 1;
        name_length = strcspn(name, "\n"); /* a name is one line of the state */
        say_all("Hello ");
        say(name, name_length);
        say_all(", ");
    } else if (strcmp(message, ASKS) != 0) {
        say_all("You said: ");
        say(message, (size_t)message_size);
        say_all("; ");
    } else if (name_length == 0) {
        say_all("I do not know your name; ");
    } else {
        say_all("You are ");
        say(name, name_length);
        say_all("; ");
    }
    say_all(tail);

    char *next = malloc(name_length + 32);
    if (!next)
        fail("out of memory", 0);
    int length = snprintf(next, name_length + 32, "%" PRIu64 "\n%.*s\n", count, (int)name_length, name);
    int32_t result = th_snapshot_write(next, (uint32_t)length);
    /* A turn without a conversation has nowhere to save, and can answer all the same. */
    if (result < 0 && result != -TH_EPERM)
        fail("cannot save the state", result);
    return 0;
}
