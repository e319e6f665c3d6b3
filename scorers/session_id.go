// SPDX-License-Identifier: Apache-2.0

package scorers

import (
	"hash/maphash"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/scheduler"
)

// Bounds of the session table: clients choose the ids.
const (
	sessionShards      = 16
	maxSessionsInShard = 8192
	maxSessionID       = 256 // bytes; longer ids are not remembered
)

// sessionID is the strategy that remembers which endpoint a session was sent to. 1 for that endpoint, 0 for the others
// and for everybody in a session that is new or expired. A session moves to another endpoint only when its own was not
// among the candidates; a pick that merely differs leaves it.
type sessionID struct {
	headers []string
	ttl     time.Duration
	prefill bool // remember the prefill endpoint instead of the decode one
	seed    maphash.Seed
	shards  [sessionShards]sessionShard
}

type sessionShard struct {
	mu       sync.RWMutex
	sessions map[string]*binding // guarded by mu
}

// binding is one session's endpoint.
type binding struct {
	state   *pool.State
	expires atomic.Int64 // unix nanoseconds
	missing atomic.Bool  // the endpoint was not among the candidates of the last request
}

func newSessionID(headers []string, ttl time.Duration, prefill bool) *sessionID {
	s := &sessionID{headers: headers, ttl: ttl, prefill: prefill, seed: maphash.MakeSeed()}
	for i := range s.shards {
		s.shards[i].sessions = make(map[string]*binding)
	}
	return s
}

// id is the request's session, "" for none.
func (s *sessionID) id(req *inference.Request) string {
	for _, h := range s.headers {
		if id := req.Headers.Get(h); id != "" && len(id) <= maxSessionID {
			return id
		}
	}
	return ""
}

func (s *sessionID) shard(id string) *sessionShard {
	return &s.shards[maphash.String(s.seed, id)%sessionShards]
}

// Score implements [scheduler.Scorer]: one look-up per request.
func (s *sessionID) Score(cy *scheduler.Cycle, cands []scheduler.Candidate, out []float64) {
	clear(out)
	id := s.id(cy.Request)
	if id == "" {
		return
	}
	shard := s.shard(id)
	shard.mu.RLock()
	b := shard.sessions[id]
	shard.mu.RUnlock()
	if b == nil || cy.Now.UnixNano() > b.expires.Load() {
		return
	}
	for i := range cands {
		if cands[i].Endpoint.State == b.state {
			out[i] = 1
			b.missing.Store(false)
			return
		}
	}
	b.missing.Store(true)
}

// Learn implements [scheduler.Learner].
func (s *sessionID) Learn(req *inference.Request, decode, prefill *pool.Endpoint) {
	e := decode
	if s.prefill {
		e = prefill
	}
	id := s.id(req)
	if e == nil || id == "" {
		return
	}
	now := time.Now()
	expires := now.Add(s.ttl).UnixNano()
	shard := s.shard(id)
	shard.mu.Lock()
	defer shard.mu.Unlock()
	if b := shard.sessions[id]; b != nil && !b.missing.Load() && now.UnixNano() <= b.expires.Load() {
		if b.state == e.State {
			b.expires.Store(expires)
		}
		return
	}
	if len(shard.sessions) >= maxSessionsInShard {
		shard.evictLocked(now.UnixNano())
	}
	b := &binding{state: e.State}
	b.expires.Store(expires)
	shard.sessions[strings.Clone(id)] = b
}

// evictLocked makes room for an eighth of the shard, so that a full one does not look at everything each time: expired
// sessions go first, then any.
func (s *sessionShard) evictLocked(now int64) {
	for id, b := range s.sessions {
		if b.expires.Load() < now {
			delete(s.sessions, id)
		}
	}
	for id := range s.sessions {
		if len(s.sessions) <= maxSessionsInShard*7/8 {
			return
		}
		delete(s.sessions, id)
	}
}

func lower(s string) string { return strings.ToLower(s) }

func itoa(i int) string { return strconv.Itoa(i) }
