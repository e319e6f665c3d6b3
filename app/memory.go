// SPDX-License-Identifier: Apache-2.0

package app

import (
	"math"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
)

// The bounds of limits.maxHeldBytes: auto (docs/design.md 5).
const autoHeldBytes = 2 << 30

// memoryLimit is the process's memory limit in bytes from its control group, 0 when there is none.
func memoryLimit() int64 {
	for _, file := range []string{"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"} {
		text, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		// "max", and version 1's page-rounded huge number, both mean no limit.
		n, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
		if err != nil || n <= 0 || n > math.MaxInt64/2 {
			return 0
		}
		return n
	}
	return 0
}

// heldBytes resolves limits.maxHeldBytes: auto (0) is 2 GiB or half the memory limit, whichever is less.
func heldBytes(configured, limit int64) int64 {
	if configured > 0 {
		return configured
	}
	if limit > 0 {
		return min(autoHeldBytes, limit/2)
	}
	return autoHeldBytes
}

// heapFloor is how far the heap may grow before the first collection counts, in bytes.
const heapFloor = 32 << 20

// newHeapFloor reserves memory that is never touched, so it costs address space and nothing else. The picker lives on a
// few megabytes and allocates with every request: sized by that little, collections would run several times a second
// and cost a tenth of the CPU. Unlike a higher GOGC it does not multiply what large held bodies need.
func newHeapFloor(limit int64) []byte {
	if limit > 0 {
		return make([]byte, min(heapFloor, limit/8))
	}
	return make([]byte, heapFloor)
}

// setMemoryLimit tells the collector the control group's limit, unless GOMEMLIMIT says otherwise.
func setMemoryLimit(limit int64) {
	if limit > 0 && os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(limit - limit/10) // a tenth is left to stacks and the kernel's buffers
	}
}
