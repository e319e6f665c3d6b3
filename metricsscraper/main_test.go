// SPDX-License-Identifier: Apache-2.0

package metricsscraper

import (
	"bytes"
	"fmt"
	"os"
	"runtime"
	"testing"
	"time"
)

// TestMain fails the package when goroutines of its tests are left.
func TestMain(m *testing.M) {
	code := m.Run()
	if left := leaked(); code == 0 && left != nil {
		fmt.Fprintf(os.Stderr, "goroutines left:\n%s\n", left)
		code = 1
	}
	os.Exit(code)
}

// leaked waits up to 2 s for goroutines of this package to end and returns the stacks of those that did not.
func leaked() []byte {
	deadline := time.After(2 * time.Second)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		stacks := make([]byte, 1<<20)
		stacks = stacks[:runtime.Stack(stacks, true)]
		var left []byte
		for i, stack := range bytes.Split(stacks, []byte("\n\n")) {
			if i > 0 && (bytes.Contains(stack, []byte("baton/metricsscraper.")) || bytes.Contains(stack, []byte("net/http.(*persistConn)"))) {
				left = append(append(left, stack...), '\n', '\n')
			}
		}
		if left == nil {
			return nil
		}
		select {
		case <-deadline:
			return left
		case <-tick.C:
		}
	}
}
