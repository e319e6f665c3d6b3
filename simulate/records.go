// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"net/http"
	"slices"
	"sync"
	"time"
)

// Hold is a use of KV blocks: by a running request, or by a finished prefill under lease.
type Hold struct {
	RequestID       string    `json:"request_id"`
	RemoteRequestID string    `json:"remote_request_id,omitempty"` // of the handle, for a lease
	State           string    `json:"state"`                       // "lease", "buffer" (written here by another engine), or the phase of the running request
	Blocks          int       `json:"blocks"`
	Since           time.Time `json:"since"`
	Expires         time.Time `json:"expires,omitzero"` // of a lease
	Rank            int       `json:"rank,omitempty"`   // data-parallel rank
}

// Leak is a finished prefill whose blocks nobody came for before the lease ended.
type Leak struct {
	Engine          string    `json:"engine"`
	RequestID       string    `json:"request_id"`
	RemoteRequestID string    `json:"remote_request_id"`
	Blocks          int       `json:"blocks"`
	Tokens          int       `json:"tokens"`
	Since           time.Time `json:"since"`
	At              time.Time `json:"at"`
	Reason          string    `json:"reason"`
}

// Pull is one transfer of KV blocks, recorded by the engine that pulled.
type Pull struct {
	At        time.Time `json:"at"`
	From      string    `json:"from"` // engine name; empty when none was reached
	To        string    `json:"to"`
	RequestID string    `json:"request_id"` // remote_request_id of the handle
	Tokens    int       `json:"tokens"`
	Blocks    int       `json:"blocks"`
	Bytes     int       `json:"bytes"`
	Wrong     bool      `json:"wrong"`    // the blocks held another prompt's KV
	Verbatim  bool      `json:"verbatim"` // the handle arrived byte for byte as it was given out
	Err       string    `json:"err,omitempty"`

	runs int // of neighbouring blocks, each copied at once
}

// Recorded is one generation request as it was received.
type Recorded struct {
	At        time.Time
	Method    string
	URI       string      // path and query
	Header    http.Header // names in canonical form, as net/http has them
	Body      []byte
	RequestID string // X-Request-Id
	Attempt   string // X-Processor-Attempt
	Phase     string // "prefill", "transfer" (a decode leg that fetches), "plain", or "query" of a bootstrap server
}

// Abort is a request whose client left before the answer was complete.
type Abort struct {
	At        time.Time `json:"at"`
	RequestID string    `json:"request_id"`
	State     string    `json:"state"`  // queued, prefill, deferred, pull, decode
	Tokens    int       `json:"tokens"` // generated before
}

// Death is an engine process that ended by itself, as a real one does on a bad handle.
type Death struct {
	At        time.Time `json:"at"`
	RequestID string    `json:"request_id"`
	Reason    string    `json:"reason"`
}

// maxRecords bounds each list of records; the oldest go first, the counts in [Stats] go on.
const maxRecords = 16384

// records outlive the processes of an engine.
type records struct {
	mu                sync.Mutex
	maxBodies, budget int
	bytes             int
	bodies            []Recorded
	leaks             []Leak
	pulls             []Pull
	aborts            []Abort
	deaths            []Death
	encodings         []Encoding
	leakedPins        []Pin
	totals            totals
}

type totals struct {
	requests, leaked, pulls, pulledTokens, failedPulls, wrongPulls, aborts, deaths, invalidParams, faults int

	encoded, encodedLocally, fetchedEncodings, failedEncodings, leakedEncodings int
}

func (r *records) limit(bodies, bytes int) { r.maxBodies, r.budget = bodies, bytes }

func push[T any](list []T, v T) []T {
	if len(list) >= maxRecords {
		list = slices.Delete(list, 0, maxRecords/4)
	}
	return append(list, v)
}

func (r *records) body(v Recorded) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.totals.requests++
	if r.maxBodies < 0 {
		return
	}
	r.bodies = append(r.bodies, v)
	r.bytes += len(v.Body)
	drop := 0
	for len(r.bodies)-drop > r.maxBodies || (r.bytes > r.budget && drop < len(r.bodies)-1) {
		r.bytes -= len(r.bodies[drop].Body)
		drop++
	}
	r.bodies = slices.Delete(r.bodies, 0, drop)
}

func (r *records) leak(v Leak) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.leaks = push(r.leaks, v)
	r.totals.leaked++
}

func (r *records) pull(v Pull) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.pulls = push(r.pulls, v)
	if v.Err != "" {
		r.totals.failedPulls++
		return
	}
	r.totals.pulls++
	r.totals.pulledTokens += v.Tokens
	if v.Wrong {
		r.totals.wrongPulls++
	}
}

func (r *records) abort(v Abort) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.aborts = push(r.aborts, v)
	r.totals.aborts++
}

func (r *records) death(v Death) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.deaths = push(r.deaths, v)
	r.totals.deaths++
}

func (r *records) count(f func(*totals)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f(&r.totals)
}

// Held lists who holds KV blocks now: running requests and leases. Empty when the engine is idle and owes nothing.
func (e *Engine) Held() []Hold {
	p := e.running()
	if p == nil {
		return nil
	}
	var out []Hold
	for _, q := range p.ranks {
		out = q.holds(out)
	}
	slices.SortFunc(out, func(a, b Hold) int { return a.Since.Compare(b.Since) })
	return out
}

// holds appends who holds blocks of one rank.
func (p *process) holds(out []Hold) []Hold {
	p.mu.Lock()
	defer p.mu.Unlock()
	for g := range p.active {
		if n := g.blockCount(); n > 0 {
			out = append(out, Hold{RequestID: g.id, State: g.state, Blocks: n, Since: g.arrived, Rank: p.rank})
		}
	}
	for _, l := range p.leases {
		h := Hold{
			RequestID: l.request, RemoteRequestID: l.id, State: "lease", Blocks: l.size(), Since: l.since, Expires: l.expires,
			Rank: p.rank,
		}
		if l.buffered != nil {
			h.State = "buffer"
		}
		out = append(out, h)
	}
	return out
}

// Leaked lists the leases that ran out, over all processes of the engine.
func (e *Engine) Leaked() []Leak { return snapshot(&e.records, &e.records.leaks) }

// Pulls lists the transfers that this engine made or tried, oldest first.
func (e *Engine) Pulls() []Pull { return snapshot(&e.records, &e.records.pulls) }

// Bodies lists the generation requests received, oldest first. The bodies must not be changed.
func (e *Engine) Bodies() []Recorded { return snapshot(&e.records, &e.records.bodies) }

// Aborts lists the requests whose clients left early.
func (e *Engine) Aborts() []Abort { return snapshot(&e.records, &e.records.aborts) }

// Deaths lists the engine processes that ended by themselves. Kill is not counted.
func (e *Engine) Deaths() []Death { return snapshot(&e.records, &e.records.deaths) }

func snapshot[T any](r *records, list *[]T) []T {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(*list)
}

// ResetRecords forgets all records and counts. What is held stays held.
func (e *Engine) ResetRecords() {
	r := &e.records
	r.mu.Lock()
	defer r.mu.Unlock()
	r.bytes, r.bodies, r.leaks, r.pulls, r.aborts, r.deaths, r.totals = 0, nil, nil, nil, nil, nil, totals{}
	r.encodings, r.leakedPins = nil, nil
}
