// SPDX-License-Identifier: Apache-2.0

// Package leaktest fails a package whose tests leave goroutines behind.
package leaktest

import (
	"bytes"
	"flag"
	"fmt"
	"net/http"
	"os"
	"runtime"
	"testing"
	"time"
)

// patience is how long goroutines have to end once the last test has; a loaded machine needs some of it.
const patience = 20 * time.Second

// Run runs the tests and returns the status to exit with: 1 with the stacks of all goroutines that are left, if there
// are. Idle connections of net/http's default transport are closed first, for it outlives every test. Fuzzing has
// goroutines of its own, and nothing is looked for then.
func Run(m *testing.M) int {
	before := goroutines()
	code := m.Run()
	if fuzz := flag.Lookup("test.fuzz"); code != 0 || fuzz != nil && fuzz.Value.String() != "" {
		return code
	}
	if t, ok := http.DefaultTransport.(*http.Transport); ok {
		t.CloseIdleConnections()
	}
	end, tick := time.After(patience), time.NewTicker(5*time.Millisecond)
	defer tick.Stop()
	for {
		now := goroutines()
		for name := range before {
			delete(now, name)
		}
		if len(now) == 0 {
			return 0
		}
		select {
		case <-tick.C:
		case <-end:
			fmt.Fprintf(os.Stderr, "%d goroutines left %v after the last test:\n", len(now), patience)
			for name, stack := range now {
				fmt.Fprintf(os.Stderr, "%s %s\n\n", name, stack)
			}
			return 1
		}
	}
}

// goroutines returns the stacks of all others by name, such as "goroutine 7".
func goroutines() map[string][]byte {
	buf := make([]byte, 1<<20)
	for n := runtime.Stack(buf, true); ; n = runtime.Stack(buf, true) {
		if n < len(buf) {
			buf = buf[:n]
			break
		}
		buf = make([]byte, 2*len(buf))
	}
	out := map[string][]byte{}
	for i, stack := range bytes.Split(buf, []byte("\n\n")) {
		if name, rest, ok := bytes.Cut(stack, []byte(" [")); ok && i > 0 { // the first is this one
			out[string(name)] = rest
		}
	}
	return out
}
