// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"context"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/pool"
)

// peerKey is an endpoint's identity: the pod that has the address, so that a reused address starts clean.
type peerKey struct {
	uid  string
	addr netip.AddrPort
}

func keyOf(e *pool.Endpoint) peerKey { return peerKey{e.UID, e.Addr} }

// alive reports whether the snapshot still has the endpoint.
func (k peerKey) alive(s *pool.Snapshot) bool {
	e := s.ByAddr(k.addr)
	return e != nil && e.UID == k.uid
}

// pairKey is a prefill and a decode endpoint: transfers fail between two of them, not at one.
type pairKey struct{ prefill, decode peerKey }

// peers remembers how endpoints and pairs of them behaved. Safe for concurrent use.
type peers struct {
	log     *slog.Logger
	metrics *metrics

	swept atomic.Uint64 // generation of the snapshot last swept

	mu     sync.Mutex
	config config.Breaker       // guarded by mu
	byKey  map[peerKey]*peer    // guarded by mu
	pairs  map[pairKey]*breaker // guarded by mu; only pairs that failed once
}

// peer is what is remembered of one endpoint.
type peer struct {
	*breaker
	slots        chan struct{} // guarded by peers.mu; one entry for each sub-request in flight
	introduction *introduction // guarded by peers.mu; nil before it and when what it said may be out of date
	silent       bool          // guarded by peers.mu; the last introduction failed
}

func newPeers(c config.Breaker, m *metrics, log *slog.Logger) *peers {
	return &peers{log: log, metrics: m, config: c, byKey: make(map[peerKey]*peer), pairs: make(map[pairKey]*breaker)}
}

// reset forgets every breaker, for new settings.
func (p *peers) reset(c config.Breaker) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.config = c
	clear(p.byKey)
	clear(p.pairs)
}

// sweep forgets those that left the pool.
func (p *peers) sweep(s *pool.Snapshot) {
	if old := p.swept.Load(); old == s.Generation || !p.swept.CompareAndSwap(old, s.Generation) {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for key := range p.byKey {
		if !key.alive(s) {
			delete(p.byKey, key)
		}
	}
	for key := range p.pairs {
		if !key.prefill.alive(s) || !key.decode.alive(s) {
			delete(p.pairs, key)
		}
	}
}

func (p *peers) peerLocked(key peerKey) *peer {
	known := p.byKey[key]
	if known == nil {
		known = &peer{breaker: newBreaker(p.config, p.opened(scopeEndpoint, key.addr.String(), ""))}
		p.byKey[key] = known
	}
	return known
}

// breakers returns the breakers of e, and of the pair with decode, which may be nil; nil ones let everything through.
func (p *peers) breakers(e, decode *pool.Endpoint) (own, pair *breaker) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if known := p.byKey[keyOf(e)]; known != nil {
		own = known.breaker
	}
	if decode != nil {
		pair = p.pairs[pairKey{keyOf(e), keyOf(decode)}]
	}
	return own, pair
}

// ready reports whether allow would say yes now; it takes nothing.
func (p *peers) ready(e, decode *pool.Endpoint, now time.Time) bool {
	own, pair := p.breakers(e, decode)
	return own.ready(now) && pair.ready(now)
}

// allow reports whether the breakers of e, and of the pair with decode, let a request through; half open, a yes is
// their one permit.
func (p *peers) allow(e, decode *pool.Endpoint, now time.Time) bool {
	own, pair := p.breakers(e, decode)
	return own.ready(now) && pair.ready(now) && own.allow(now) && pair.allow(now)
}

// note tells the breaker of e how an attempt ended.
func (p *peers) note(e *pool.Endpoint, ok bool) {
	p.mu.Lock()
	known := p.peerLocked(keyOf(e))
	p.mu.Unlock()
	known.note(ok)
}

// notePair tells the breaker of a pair how a transfer ended.
func (p *peers) notePair(prefill, decode *pool.Endpoint, ok bool) {
	key := pairKey{keyOf(prefill), keyOf(decode)}
	p.mu.Lock()
	pair := p.pairs[key]
	if pair == nil && !ok {
		pair = newBreaker(p.config, p.opened(scopePair, prefill.Hostport, decode.Hostport))
		p.pairs[key] = pair
	}
	p.mu.Unlock()
	if pair != nil {
		pair.note(ok)
	}
}

// slot waits for one of the size places that an endpoint has for sub-requests. It is given back by receiving from
// the channel.
func (p *peers) slot(ctx context.Context, e *pool.Endpoint, size int) (chan struct{}, error) {
	p.mu.Lock()
	known := p.peerLocked(keyOf(e))
	if cap(known.slots) != size {
		known.slots = make(chan struct{}, size) // those in flight give back to the old one
	}
	slots := known.slots
	p.mu.Unlock()
	select {
	case slots <- struct{}{}:
		return slots, nil
	default:
	}
	start := time.Now()
	defer func() { p.metrics.slotWait.Observe(time.Since(start).Seconds()) }()
	select {
	case slots <- struct{}{}:
		return slots, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// opened returns what is called each time a breaker opens from closed.
func (p *peers) opened(scope, endpoint, decode string) func() {
	return func() {
		p.metrics.trips.WithLabelValues(scope).Inc()
		p.log.Info("circuit breaker opened", slog.String("endpoint", endpoint), slog.String("decode", decode))
	}
}

// count returns how many breakers are in each state, by scope.
func (p *peers) count() (endpoints, pairs [breakerStates]int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, known := range p.byKey {
		endpoints[known.State()]++
	}
	for _, known := range p.pairs {
		pairs[known.State()]++
	}
	return endpoints, pairs
}
