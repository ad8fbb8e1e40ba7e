// Remembers how many messages there were and the name that it was told. Its state is two lines, count and name, as in every other example:
// each goes on where another left off.
package main

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
)

func main() {
	if err := turn(); err != nil {
		// Standard error goes to the turn's log. The turn has failed, and the state stays as it was.
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func turn() error {
	message, err := readWhole(messageRead)
	if err != nil {
		return fmt.Errorf("cannot read the message: %w", err)
	}
	count, name, err := recall()
	if err != nil {
		return err
	}
	count++
	var answer string
	if told, ok := strings.CutPrefix(message, "my name is "); ok {
		name, _, _ = strings.Cut(told, "\n") // A name is one line of the state.
		answer = fmt.Sprintf("Hello %s, this is message %d.", name, count)
	} else if message != "what is my name?" {
		answer = fmt.Sprintf("You said: %s; this is message %d.", message, count)
	} else if name == "" {
		answer = fmt.Sprintf("I do not know your name; this is message %d.", count)
	} else {
		answer = fmt.Sprintf("You are %s; this is message %d.", name, count)
	}
	if err := save(fmt.Sprintf("%d\n%s\n", count, name)); err != nil {
		return fmt.Errorf("cannot save the state: %w", err)
	}
	return say(answer)
}

// recall reads what the last turn saved: nothing, in the first.
func recall() (count uint64, name string, err error) {
	state, err := readWhole(snapshotRead)
	if err == noEntry {
		return 0, "", nil
	}
	if err != nil {
		return 0, "", fmt.Errorf("cannot read the state: %w", err)
	}
	lines := strings.Split(state, "\n")
	if len(lines) < 3 {
		return 0, "", errors.New("the state is not two lines, count and name")
	}
	count, err = strconv.ParseUint(lines[0], 10, 64)
	return count, lines[1], err
}
