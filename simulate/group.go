// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"context"
	"time"
)

// sequence is one prompt with one answer: what the engine schedules.
type sequence struct {
	index   int // of the choice in the answer
	prompt  int // prompt tokens
	id      string
	salt    uint64
	root    uint64      // hash before the first token; differs per adapter
	tokens  []uint32    // whose KV the blocks hold: the prompt, then what was generated
	chain   []uint64    // hash of each full block's prefix
	hashes  []blockHash // vLLM's, as far as KV events needed them
	extra   *extraKeys  // of hashes; nil without KV events
	sibling *sequence   // another answer to the same prompt, whose full blocks this one shares

	blocks   []int32
	cached   int    // prompt tokens found in the prefix cache
	pulled   int    // blocks that the cache or a pull filled; prefill need not
	remote   int    // prompt tokens that came from a pull
	wrong    uint64 // not 0 when some block holds another prompt's KV
	created  int    // tokens that this prompt added to the prefix cache
	headroom int    // blocks that must be free beyond its own before it is let in again, after a preemption
	counted  bool   // in the prefix cache metrics

	seed       uint64   // of the answer
	given      []uint32 // its first tokens, where another engine made them
	generated  []uint32
	text       []byte
	finish     string // "", length, stop or error
	stopReason string
}

// group is the sequences of one HTTP request: admitted together, in lockstep.
type group struct {
	id      string
	lora    string
	seqs    []*sequence
	slots   int // places in the batch
	placed  bool
	arrived time.Time
	first   time.Time // first token
	state   string    // for Held and Aborts: queued, prefill, deferred, pull, decode
	remote  *transfer // the NIXL handle to pull with, nil for none
	leg     leg       // the part in another wire's transfer, nil for none
	fault   *Fault    // to inject, nil for none
}

// key is the prefix cache key of a block whose prefix hash is h.
func (q *sequence) key(h uint64) uint64 {
	if q.salt == 0 {
		return h
	}
	return mix(h ^ q.salt)
}

func (q *sequence) keys() []uint64 {
	if q.salt == 0 {
		return q.chain
	}
	out := make([]uint64, len(q.chain))
	for i, h := range q.chain {
		out[i] = q.key(h)
	}
	return out
}

// parent is the prefix hash before the block that is not full yet.
func (q *sequence) parent() uint64 {
	if len(q.chain) == 0 {
		return q.root
	}
	return q.chain[len(q.chain)-1]
}

// next generates the sequence's next token.
func (q *sequence) next() uint32 {
	i := len(q.generated)
	t := nextToken(q.seed^q.wrong, i, q.wrong != 0)
	if i < len(q.given) {
		t = q.given[i]
	}
	q.generated = append(q.generated, t)
	return t
}

// blockCount is the number of blocks that the group holds.
func (g *group) blockCount() int {
	n := 0
	for _, q := range g.seqs {
		n += len(q.blocks)
	}
	return n
}

// admitted blocks until t is admitted (true) or the client is gone (false). For a group with a handle it sends
// heartbeats for the remote blocks meanwhile.
func (p *process) admitted(ctx context.Context, t *ticket) bool {
	var beat <-chan time.Time
	if t.g.remote != nil && p.e.timing.lease > 0 {
		tick := time.NewTicker(max(p.e.timing.lease/heartbeats, time.Millisecond))
		defer tick.Stop()
		beat = tick.C
	}
	for {
		select {
		case <-t.ready:
			return true
		case <-ctx.Done():
			p.mu.Lock()
			p.withdraw(t)
			p.mu.Unlock()
			return false
		case <-beat:
			p.e.heartbeat(t.g.remote)
		}
	}
}

// sleeper waits for instants with one timer.
type sleeper struct{ t *time.Timer }

func (s *sleeper) close() {
	if s.t != nil {
		s.t.Stop()
	}
}

// until waits for at; false when ctx ended first.
func (s *sleeper) until(ctx context.Context, at time.Time) bool {
	d := time.Until(at)
	if d <= 0 {
		return ctx.Err() == nil
	}
	if s.t == nil {
		s.t = time.NewTimer(d)
	} else {
		s.t.Reset(d)
	}
	select {
	case <-s.t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

func (s *sleeper) sleep(ctx context.Context, d time.Duration) bool {
	return s.until(ctx, time.Now().Add(d))
}
