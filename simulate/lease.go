// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"encoding/json"
	"time"
)

// lease pins the blocks of a finished prefill until a decode engine has read them or nobody came.
type lease struct {
	id       string // remote_request_id
	request  string // the HTTP request's id
	blocks   []int32
	tokens   int
	raw      json.RawMessage // the handle as given out; nil when none was
	noRaw    string          // why none was
	buffered *written        // what another engine wrote here, in the place of blocks
	parked   []blockHash     // told as stored in CPU memory
	why      string          // of the leak, when nobody comes; default "lease expired"
	since    time.Time
	expires  time.Time   // zero for never
	timer    *time.Timer // nil for never
}

// handle is kv_transfer_params of a prefill answer, current generation.
type handle struct {
	DoRemotePrefill bool      `json:"do_remote_prefill"`
	DoRemoteDecode  bool      `json:"do_remote_decode"`
	BlockIDs        [][]int32 `json:"remote_block_ids"`
	EngineID        string    `json:"remote_engine_id"`
	RequestID       string    `json:"remote_request_id"`
	Host            string    `json:"remote_host"`
	Port            int       `json:"remote_port"`
	TPSize          int       `json:"tp_size"`
	DCPSize         int       `json:"dcp_size"`
	PPSize          int       `json:"pp_size"`
	NumTokens       int       `json:"remote_num_tokens"`
	Expiry          *float64  `json:"remote_blocks_expiry_time"`
	Mode            string    `json:"transfer_mode"`
	CachedTokens    *int      `json:"remote_prefill_cached_tokens,omitempty"` // only where no more than one token was generated
}

// pushHandle is the same where the prefill engine writes: without block ids.
type pushHandle struct {
	DoRemotePrefill bool   `json:"do_remote_prefill"`
	DoRemoteDecode  bool   `json:"do_remote_decode"`
	EngineID        string `json:"remote_engine_id"`
	RequestID       string `json:"remote_request_id"`
	Host            string `json:"remote_host"`
	Port            int    `json:"remote_port"`
	TPSize          int    `json:"tp_size"`
	NumTokens       int    `json:"remote_num_tokens"`
	Mode            string `json:"transfer_mode"`
	CachedTokens    int    `json:"remote_prefill_cached_tokens"`
}

// oldHandle is the same of the old generation: flat block ids and fewer fields.
type oldHandle struct {
	DoRemotePrefill bool    `json:"do_remote_prefill"`
	DoRemoteDecode  bool    `json:"do_remote_decode"`
	BlockIDs        []int32 `json:"remote_block_ids"`
	EngineID        string  `json:"remote_engine_id"`
	RequestID       string  `json:"remote_request_id"`
	Host            string  `json:"remote_host"`
	Port            int     `json:"remote_port"`
	TPSize          int     `json:"tp_size"`
}

func (p *process) handleOf(q *sequence) json.RawMessage {
	e := p.e
	current := handle{
		DoRemotePrefill: true, BlockIDs: [][]int32{q.blocks}, EngineID: p.id, RequestID: q.id, Host: e.remoteHost(),
		Port: p.sidePort(), TPSize: e.opts.TPSize, DCPSize: 1, PPSize: 1, NumTokens: len(q.tokens), Mode: "pull",
	}
	if len(q.generated) <= 1 {
		current.CachedTokens = &q.cached
	}
	var v any = current
	switch {
	case e.opts.Connector == connectorPush:
		v = pushHandle{
			DoRemotePrefill: true, EngineID: p.id, RequestID: q.id, Host: e.remoteHost(), Port: p.sidePort(),
			TPSize: e.opts.TPSize, NumTokens: len(q.tokens), Mode: transferPush, CachedTokens: q.cached,
		}
	case e.opts.Generation == generationOld:
		v = oldHandle{
			DoRemotePrefill: true, BlockIDs: q.blocks, EngineID: p.id, RequestID: q.id, Host: e.remoteHost(),
			Port: p.sidePort(), TPSize: e.opts.TPSize,
		}
	}
	return marshal(v)
}

// pin keeps the blocks of every finished sequence of g under a lease and returns the handle of the one that a real
// vLLM answers: the last child of the first prompt. The other leases can only expire.
func (p *process) pin(g *group, c *call, odd func(json.RawMessage) json.RawMessage) json.RawMessage {
	p.mu.Lock()
	defer p.mu.Unlock()
	var given json.RawMessage
	for i, q := range g.seqs {
		if p.e.opts.Generation == generationOld && q.finish != finishLength {
			continue // freed at once, no handle
		}
		l := &lease{id: q.id, request: c.id}
		switch {
		case c.stream:
			l.noRaw = "streamed prefill: no handle in chunks"
		case i != c.n-1:
			l.noRaw = "another answer's handle was given"
		default:
			l.raw = odd(p.handleOf(q))
			given = l.raw
		}
		if given == nil && l.noRaw == "" {
			l.noRaw = "handle withheld by a fault"
		}
		p.keepLocked(q, l, max(p.e.timing.lease, 1))
	}
	return given
}

// expire frees a lease that ran out, unless it was extended meanwhile.
func (p *process) expire(l *lease) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.leases[l.id] != l || p.front.isGone() {
		return // read meanwhile, or of a process that is gone with its memory
	}
	if rest := time.Until(l.expires); rest > 0 {
		l.timer.Reset(rest)
		return
	}
	why := l.why
	if why == "" {
		why = "lease expired"
	}
	if l.noRaw != "" {
		why += ": " + l.noRaw
	}
	p.leakLocked(l, why)
	p.meter.add(metricSlots().expired, 1)
}

// leakLocked frees a lease that nobody came for.
func (p *process) leakLocked(l *lease, why string) {
	p.e.records.leak(Leak{ // first, so that whoever sees no hold sees the leak
		Engine: p.e.opts.Name, RequestID: l.request, RemoteRequestID: l.id, Blocks: l.size(), Tokens: l.tokens,
		Since: l.since, At: time.Now(), Reason: why,
	})
	p.freeLocked(l)
}

// size is the number of blocks kept, in the pool or in a receiver buffer.
func (l *lease) size() int {
	if l.buffered != nil {
		return len(l.buffered.keys)
	}
	return len(l.blocks)
}

func (p *process) freeLocked(l *lease) {
	delete(p.leases, l.id)
	if l.timer != nil {
		l.timer.Stop()
	}
	if l.parked != nil {
		p.events.unpark(l.parked)
	}
	p.cache.release(l.blocks)
	p.admit()
}

// notify is what a decode engine sends when it has read the blocks or will not.
func (p *process) notify(id string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if l := p.leases[id]; l != nil {
		p.freeLocked(l)
		return
	}
	p.meter.add(metricSlots().lateNotifications, 1)
}

// extend is a heartbeat.
func (p *process) extend(id string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if l := p.leases[id]; l != nil {
		if until := time.Now().Add(p.e.timing.lease * 2 / 3); until.After(l.expires) {
			l.expires = until
		}
	}
}

func (p *process) stopLeasesLocked() {
	for id, l := range p.leases {
		if l.timer != nil {
			l.timer.Stop()
		}
		delete(p.leases, id)
	}
}
