// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"context"
	"slices"
	"time"
)

// Checkpoints of a request at which a fault can end the process: values of [Fault.At].
const (
	atArrival   = "arrival"    // the request was received
	atPrefill   = "prefill"    // half of the prefill is computed
	atPull      = "pull"       // the blocks of another engine are about to be fetched
	atDone      = "done"       // everything is computed, no byte of the answer is out; a prefill's blocks are pinned
	atFirstByte = "first_byte" // the headers are out
	atStreaming = "streaming"  // some events, or half of a body, are out
)

// Checkpoints lists the values of [Fault.At], in a request's order.
func Checkpoints() []string {
	return []string{atArrival, atPrefill, atPull, atDone, atFirstByte, atStreaming}
}

// diesAt reports whether f ends the process at that checkpoint; f may be nil.
func (f *Fault) diesAt(at ...string) bool {
	return f != nil && f.Kind == faultDie && slices.Contains(at, f.At)
}

// kill ends the process, and starts it again where the fault says when.
func (p *process) kill(f *Fault) {
	p.e.die(p, nil, "", "fault")
	if f.RestartMS > 0 {
		// Not waited for: it may have to wait for a Close that waits for this handler.
		revive := p.e.reviveAfter
		go revive(time.Duration(f.RestartMS) * time.Millisecond)
	}
}

// killComputing ends the process in the middle of g's prefill of length d, if a fault says so.
func (p *process) killComputing(ctx context.Context, g *group, sl *sleeper, d time.Duration) bool {
	if !g.fault.diesAt(atPrefill) {
		return false
	}
	if sl.sleep(ctx, d/2) {
		p.kill(g.fault)
	}
	return true
}
