// SPDX-License-Identifier: Apache-2.0

// Package alloctest counts allocations where they can be counted: not under the race detector, which allocates by itself
// and makes sync.Pool forget at random. make test runs every test with Alloc in its name a second time without it.
package alloctest

import (
	"runtime/debug"
	"slices"
	"strings"
	"testing"
)

// runs is how often a measured function is called, so that a stray allocation of another goroutine does not count.
const runs = 200

// Each returns how many allocations one call of f makes, on average and rounded down; 0 under the race detector, where f
// is called once. A test whose name would leave it out of the second run fails.
func Each(t *testing.T, f func()) float64 {
	t.Helper()
	if name, _, _ := strings.Cut(t.Name(), "/"); !strings.Contains(name, "Alloc") {
		t.Fatal("a test that counts allocations needs Alloc in its name, or make test never counts them")
	}
	if raceDetector() {
		f()
		return 0
	}
	defer debug.SetGCPercent(debug.SetGCPercent(-1)) // a collection empties every sync.Pool
	return testing.AllocsPerRun(runs, f)
}

// AtMost fails t when one call of f makes more than ceiling allocations. See [Each].
func AtMost(t *testing.T, ceiling float64, what string, f func()) {
	t.Helper()
	if n := Each(t, f); n > ceiling {
		t.Errorf("%s: %v allocations, at most %v", what, n, ceiling)
	}
}

func raceDetector() bool {
	info, ok := debug.ReadBuildInfo()
	return !ok || slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}
