// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"time"
)

// Stats are an engine's counts. Those under "since start" begin at 0 with each process, the rest only with
// [Engine.ResetRecords].
type Stats struct {
	Name     string `json:"name"`
	Role     string `json:"role"`
	Model    string `json:"model"`
	EngineID string `json:"engine_id"` // empty when the engine is down
	Alive    bool   `json:"alive"`

	// Now.
	Running      int     `json:"running"`
	Waiting      int     `json:"waiting"`  // for capacity
	Deferred     int     `json:"deferred"` // for remote KV or an adapter
	HeldBlocks   int     `json:"held_blocks"`
	Leases       int     `json:"leases"`
	KVCacheUsage float64 `json:"kv_cache_usage"` // fraction, 0–1

	// Since start.
	PromptTokens     int `json:"prompt_tokens"`
	GenerationTokens int `json:"generation_tokens"`
	PrefixQueries    int `json:"prefix_cache_queries"` // tokens
	PrefixHits       int `json:"prefix_cache_hits"`    // tokens
	RemoteTokens     int `json:"remote_tokens"`        // prompt tokens that came by a pull
	Expired          int `json:"kv_expired"`           // leases
	KVEvents         int `json:"kv_events"`            // messages of KV events, those that a fault held back included
	KVEventsDropped  int `json:"kv_events_dropped"`    // messages that a slow subscriber did not get

	// Over all processes.
	Requests      int `json:"requests"`
	Leaked        int `json:"leaked"`
	Pulls         int `json:"pulls"`
	PulledTokens  int `json:"pulled_tokens"`
	FailedPulls   int `json:"failed_pulls"`
	WrongPulls    int `json:"wrong_pulls"` // of another prompt's KV
	Aborts        int `json:"aborts"`
	Deaths        int `json:"deaths"`
	InvalidParams int `json:"invalid_params"` // handles ignored for a missing field
	Injected      int `json:"injected_faults"`

	// Of media, over all processes.
	Encoded          int `json:"encoded"`           // on encode legs
	EncodedLocally   int `json:"encoded_locally"`   // by the engine that used it
	FetchedEncodings int `json:"fetched_encodings"` // from the store or a peer
	FailedEncodings  int `json:"failed_encodings"`
	HeldEncodings    int `json:"held_encodings"` // now
	LeakedEncodings  int `json:"leaked_encodings"`
}

// Stats returns the engine's counts.
func (e *Engine) Stats() Stats {
	s := Stats{Name: e.opts.Name, Role: e.opts.Role, Model: e.opts.Model}
	r := &e.records
	r.mu.Lock()
	t := r.totals
	r.mu.Unlock()
	s.Requests, s.Leaked, s.Pulls, s.PulledTokens, s.FailedPulls = t.requests, t.leaked, t.pulls, t.pulledTokens, t.failedPulls
	s.WrongPulls, s.Aborts, s.Deaths, s.InvalidParams, s.Injected = t.wrongPulls, t.aborts, t.deaths, t.invalidParams, t.faults
	s.Encoded, s.EncodedLocally, s.FetchedEncodings = t.encoded, t.encodedLocally, t.fetchedEncodings
	s.FailedEncodings, s.LeakedEncodings, s.HeldEncodings = t.failedEncodings, t.leakedEncodings, len(e.HeldEncodings())
	p := e.running()
	if p == nil {
		return s
	}
	s.Alive, s.EngineID = true, p.id
	for _, q := range p.ranks {
		s.addRank(q)
	}
	s.KVCacheUsage /= float64(len(p.ranks))
	return s
}

// addRank adds one rank's counts.
func (s *Stats) addRank(p *process) {
	p.mu.Lock()
	defer p.mu.Unlock()
	capacity, adapter := p.waiting()
	s.Running += p.running
	s.Waiting += capacity
	s.Deferred += p.deferred + adapter
	s.HeldBlocks += p.cache.used()
	s.Leases += len(p.leases)
	s.KVCacheUsage += p.cache.usage()
	m, sl := &p.meter, metricSlots()
	s.PromptTokens += int(m.get(sl.promptTokens))
	s.GenerationTokens += int(m.get(sl.generationTokens))
	s.PrefixQueries += int(m.get(sl.prefixQueries))
	s.PrefixHits += int(m.get(sl.prefixHits))
	s.RemoteTokens += int(m.get(sl.sourceRemote))
	s.Expired += int(m.get(sl.expired))
	if p.events != nil {
		s.KVEvents += int(p.events.next)                 //nolint:gosec // a count
		s.KVEventsDropped += int(p.events.pub.Dropped()) //nolint:gosec // a count
	}
}

// serveFaults reads (GET) or replaces (POST, PUT) the engine's faults.
func (p *process) serveFaults(x *exchange) {
	switch x.r.Method {
	case http.MethodGet:
	case http.MethodPost, http.MethodPut:
		body, err := io.ReadAll(io.LimitReader(x.r.Body, 1<<20))
		if err != nil {
			return
		}
		var f Faults
		dec := json.NewDecoder(bytes.NewReader(body))
		dec.DisallowUnknownFields()
		if err = dec.Decode(&f); err == nil {
			err = p.e.SetFaults(f)
		}
		if err != nil {
			x.fail(badRequest("", "%s", err.Error()))
			return
		}
	default:
		x.json(http.StatusMethodNotAllowed, []byte(`{"detail":"Method Not Allowed"}`))
		return
	}
	x.json(http.StatusOK, marshal(p.e.Faults()))
}

// State is the answer of GET /admin/state.
type State struct {
	Stats
	Holds      []Hold  `json:"holds"`
	LeakedList []Leak  `json:"leaks"`
	PullList   []Pull  `json:"recent_pulls"` // the last 32
	AbortList  []Abort `json:"recent_aborts"`
	DeathList  []Death `json:"deaths_list"`
	Faults     Faults  `json:"faults"`

	EncodingList []Encoding `json:"recent_encodings,omitempty"`
	PinList      []Pin      `json:"pins,omitempty"` // encoded items that wait for their consumers
}

// State returns everything that GET /admin/state tells.
func (e *Engine) State() State {
	return State{
		Stats: e.Stats(), Holds: e.Held(), LeakedList: tailOf(e.Leaked()), PullList: tailOf(e.Pulls()),
		AbortList: tailOf(e.Aborts()), DeathList: tailOf(e.Deaths()), Faults: e.Faults(),
		EncodingList: tailOf(e.Encodings()), PinList: tailOf(e.HeldEncodings()),
	}
}

func tailOf[T any](list []T) []T { return list[max(0, len(list)-32):] }

func (p *process) serveState(x *exchange) { x.json(http.StatusOK, marshal(p.e.State())) }

// serveClock moves the clock of the lease timers by jump_ms (before scaling).
func (p *process) serveClock(x *exchange) {
	body, ok := x.readBody()
	if !ok {
		return
	}
	var in struct {
		Jump int `json:"jump_ms"`
	}
	if err := json.Unmarshal(body, &in); err != nil {
		x.fail(badRequest("", "%s", err.Error()))
		return
	}
	p.e.JumpClock(time.Duration(in.Jump) * time.Millisecond)
	x.json(http.StatusOK, []byte(`{"jumped":true}`))
}

// serveKill ends the process, after the answer, and starts it again after restart_after_ms (real milliseconds), if given.
func (p *process) serveKill(x *exchange) {
	body, ok := x.readBody()
	if !ok {
		return
	}
	var in struct {
		RestartAfter int `json:"restart_after_ms"`
	}
	if len(body) > 0 {
		if err := json.Unmarshal(body, &in); err != nil {
			x.fail(badRequest("", "%s", err.Error()))
			return
		}
	}
	x.w.Header().Set("Connection", "close")
	x.json(http.StatusOK, []byte(`{"killed":true}`))
	_ = http.NewResponseController(x.w).Flush() // the client may have left
	p.e.die(p, x.conn(), "", "admin kill")
	if in.RestartAfter > 0 {
		// Not waited for: it may have to wait for a Close that waits for this handler.
		go p.e.reviveAfter(time.Duration(in.RestartAfter) * time.Millisecond)
	}
}
