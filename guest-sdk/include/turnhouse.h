/*
 * turnhouse.h: the functions that a Turnhouse host gives its workers, import module "turnhouse_v1".
 *
 * A worker is a WASI preview 1 command: a module for wasm32 that exports `memory` and `_start` (and no `_initialize`). With clang:
 *
 *     clang --target=wasm32-wasi -O2 -Wl,-z,stack-size=131072 worker.c -o worker.wasm
 *
 * None of this is needed for a plain worker, which reads its message from stdin and writes its reply to stdout.
 *
 * Conventions
 *   - Every parameter and result is an i32. Pointers and lengths are unsigned and come in pairs; with length 0 the pointer is ignored.
 *   - A result >= 0 is the function's value. A negative one is -(WASI errno), one of the TH_E... below; treat an unknown one as TH_EIO.
 *   - A read copies min(cap, total) bytes and returns total; cap 0 asks for the size.
 *   - Errors are checked in this order: TH_EFAULT; TH_EINVAL or TH_EILSEQ; TH_EPERM or TH_EACCES; limits. After an error nothing is staged.
 *   - Only th_recv and th_wait wait; th_attachment_read may, for the host's store. The end of the turn (its deadline, a cancel) never returns to the worker.
 *   - Text is UTF-8, without a terminating NUL.
 *
 * Functions are only ever added to turnhouse_v1; what would break a worker gets a turnhouse_v2 beside it.
 */
#ifndef TURNHOUSE_H
#define TURNHOUSE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#ifdef __wasm__
#define TH_IMPORT(name) __attribute__((import_module("turnhouse_v1"), import_name(name)))
#else
#define TH_IMPORT(name) /* elsewhere a test brings functions of its own */
#endif

/* WASI preview 1 errnos. A function returns their negative: -TH_EFAULT. */
#define TH_E2BIG 1      /* more bytes than the host takes */
#define TH_EACCES 2     /* the agent's settings do not allow it */
#define TH_EAGAIN 6     /* nothing is ready, and timeout_ms was 0 */
#define TH_EBADF 8      /* no open operation has this handle */
#define TH_EFAULT 21    /* pointer and length reach outside the worker's memory */
#define TH_EILSEQ 25    /* not UTF-8 */
#define TH_EINVAL 28    /* malformed: an event's name, JSON, a count */
#define TH_EIO 29       /* it failed; after th_recv, th_error_read says why */
#define TH_EMFILE 33    /* too many operations open at once */
#define TH_ENOBUFS 42   /* used up for this turn */
#define TH_ENOENT 44    /* there is nothing to read */
#define TH_ENOSYS 52    /* the host knows no such operation */
#define TH_EPERM 63     /* this turn may not do that */
#define TH_ETIMEDOUT 73 /* timeout_ms is over */

/* Levels of th_log. */
#define TH_LOG_TRACE 0
#define TH_LOG_DEBUG 1
#define TH_LOG_INFO 2
#define TH_LOG_WARN 3
#define TH_LOG_ERROR 4

/* For timeout_ms. Any positive number is milliseconds. */
#define TH_WAIT_FOREVER (-1) /* until the turn's own end */
#define TH_POLL 0

/* th_wait takes at most so many handles. */
#define TH_WAIT_MAX 8

/* How many functions this host knows, as a number that only grows. 1: those below but th_attachment_read. 2: those below. */
TH_IMPORT("abi_revision") int32_t th_abi_revision(void);

/*
 * The turn, as JSON. Returns the total size. Errors: EFAULT.
 *   {"turn_id": "...", "conversation_id": "..." or null, "agent_id": "...", "run_id": "..." or null,
 *    "attempt": 1, "dry_run": false, "deadline_unix_ms": 1767225600000,
 *    "message": {"text": "..."} or {"parts": [{"type": "text", "text": "..."}, {"type": "json", "data": ...},
 *                                             {"type": "blob", "media_type": "...", "base64": "..."},
 *                                             {"type": "attachment", "attachment_id": "sha256-...", "name": "...",
 *                                              "media_type": "...", "bytes": 7}]},
 *    "snapshot": {"run_id": "...", "worker": "...", "version": 1} or null,
 *    "environment": {"NAME": "value"},
 *    "history": [{"role": "user" or "agent", "turn_id": "...", "text": "..." or "parts": [...]}]}
 * Fields may be added; ignore those you do not know.
 */
TH_IMPORT("input_read") int32_t th_input_read(void *ptr, uint32_t cap);

/* The message's text alone. Returns the total size. Errors: EFAULT. */
TH_IMPORT("message_read") int32_t th_message_read(void *ptr, uint32_t cap);

/*
 * An attachment of the message or of the history, from `offset` on. Copies what fits and returns how many bytes there are from there: 0 at its end and
 * past it. The id is an attachment_id as it stands in the input. Errors: ENOENT (the turn does not refer to it), EINVAL, EILSEQ, ENOBUFS (the turn has
 * had as much read as it may), EIO, EFAULT.
 */
TH_IMPORT("attachment_read")
int32_t th_attachment_read(const char *id_ptr, uint32_t id_len, uint32_t offset, void *ptr, uint32_t cap);

/* The state that this turn starts from. Returns the total size; 0 is a state of no bytes. Errors: ENOENT (there is none), EFAULT. */
TH_IMPORT("snapshot_read") int32_t th_snapshot_read(void *ptr, uint32_t cap);

/*
 * Stages the next state; the last one wins, and it counts only if the turn completes. Returns 0. A refused write leaves what was staged before.
 * Errors: EPERM (a private turn), E2BIG, EFAULT.
 */
TH_IMPORT("snapshot_write") int32_t th_snapshot_write(const void *ptr, uint32_t len);

/*
 * Sends an event at once. Returns 0. The kinds:
 *   "output.delta"  a piece of the reply, text
 *   "status"        what the worker is doing, text
 *   "x.<name>"      an event of your own, JSON; the name is 1 to 48 of a-z 0-9 _ . -
 * A module that imports this function or th_reply speaks through them; its stdout goes to the log.
 * Errors: EINVAL, EILSEQ, E2BIG, ENOBUFS, EFAULT.
 */
TH_IMPORT("emit")
int32_t th_emit(const char *kind_ptr, uint32_t kind_len, const void *ptr, uint32_t len);

/*
 * The whole reply as JSON, {"text": "..."} or {"parts": [...]}; the last one wins, and it replaces what was streamed. Without a call the reply is
 * the deltas, joined. Returns 0. Errors: EINVAL, EILSEQ, E2BIG, EFAULT.
 */
TH_IMPORT("reply") int32_t th_reply(const void *ptr, uint32_t len);

/* A line for the turn's log. What is over the limit is dropped and counted. Returns 0. Errors: EINVAL, EILSEQ, EFAULT. */
TH_IMPORT("log") int32_t th_log(int32_t level, const char *ptr, uint32_t len);

/*
 * Starts an operation of the host, such as "host.echo", with a JSON request; never waits for its answer. Returns a handle >= 1. The request is copied.
 * Errors: ENOSYS, EACCES, EINVAL, E2BIG, EMFILE, ENOBUFS, EFAULT.
 */
TH_IMPORT("call")
int32_t th_call(const char *op_ptr, uint32_t op_len, const void *req_ptr, uint32_t req_len);

/*
 * The operation's next frame. Returns its length, 0 at the end. A frame longer than cap is neither copied nor consumed: come again with more
 * room. The first frame is a JSON head, the others are what the operation defines. Errors: EAGAIN, ETIMEDOUT, EBADF, EIO, EFAULT.
 */
TH_IMPORT("recv") int32_t th_recv(int32_t handle, void *ptr, uint32_t cap, int32_t timeout_ms);

/*
 * Why an operation failed: {"code": "...", "detail": "...", "retryable": false, "retry_after_ms": null}. Returns the total size. The handle stays
 * open. Errors: EBADF, ENOENT (it has not failed), EFAULT.
 */
TH_IMPORT("error_read") int32_t th_error_read(int32_t handle, void *ptr, uint32_t cap);

/*
 * Waits until one of the operations has a frame or has ended. Returns its index in `handles`, the first where several are. Errors: EAGAIN,
 * ETIMEDOUT, EBADF, EINVAL (none, or more than TH_WAIT_MAX), EFAULT.
 */
TH_IMPORT("wait") int32_t th_wait(const int32_t *handles, uint32_t count, int32_t timeout_ms);

/* Ends an operation; what the host still does for it is stopped. Handles are never used again. Returns 0. Errors: EBADF. */
TH_IMPORT("close") int32_t th_close(int32_t handle);

#undef TH_IMPORT

#ifdef __cplusplus
}
#endif

#endif
