package main

import (
	"fmt"
	"unicode/utf8"
	"unsafe"
)

// The functions of the host that this worker calls; turnhouse.h has the others. A string is two parameters, pointer and length: since Go 1.24.

//go:wasmimport turnhouse_v1 message_read
func messageRead(ptr unsafe.Pointer, cap uint32) int32

//go:wasmimport turnhouse_v1 snapshot_read
func snapshotRead(ptr unsafe.Pointer, cap uint32) int32

//go:wasmimport turnhouse_v1 snapshot_write
func snapshotWrite(state string) int32

//go:wasmimport turnhouse_v1 emit
func emit(kind, data string) int32

// errno is what a function of the host returns when it fails: -(WASI errno).
type errno int32

const (
	noEntry      errno = -44
	notPermitted errno = -63
)

func (e errno) Error() string { return fmt.Sprintf("the host says %d", int32(e)) }

func check(result int32) error {
	if result < 0 {
		return errno(result)
	}
	return nil
}

// readWhole gives all that a read of the host gives. A read copies what fits and returns the whole size: so it is asked for the size first.
func readWhole(read func(unsafe.Pointer, uint32) int32) (string, error) {
	size := read(nil, 0)
	if size <= 0 {
		return "", check(size)
	}
	bytes := make([]byte, size)
	if err := check(read(unsafe.Pointer(&bytes[0]), uint32(size))); err != nil {
		return "", err
	}
	return string(bytes), nil
}

// save stages the state for the next turn; it counts if this turn completes.
func save(state string) error {
	err := check(snapshotWrite(state))
	if err == notPermitted {
		return nil // A turn without a conversation has nowhere to save, and can answer all the same.
	}
	return err
}

// say streams the reply. An event is at most 64 KiB and whole UTF-8: longer text goes out in pieces that end between characters.
func say(text string) error {
	for len(text) > 0 {
		end := min(len(text), 32*1024)
		for end < len(text) && !utf8.RuneStart(text[end]) {
			end--
		}
		if err := check(emit("output.delta", text[:end])); err != nil {
			return err
		}
		text = text[end:]
	}
	return nil
}
