// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"sync"
	"sync/atomic"
	"time"
)

// estimateLife bounds how long a reservation whose end nobody reports may count (docs/design.md 5.1).
const estimateLife = 60 * time.Second

// Load counts what was sent to an endpoint and is not known to have ended, at decision time, so that a burst does
// not herd on numbers scraped before it. Safe for concurrent use; the counters are atomics, the mutex guards only
// the estimates, which no pick touches.
type Load struct {
	requests atomic.Int64
	tokens   atomic.Int64
	started  atomic.Int64

	mu        sync.Mutex
	estimates []estimate // guarded by mu
	marks     []mark     // guarded by mu; oldest first, the first one is at least settle old where there is such a one
}

// settle is how long a request may take from its pick to the engine's counters: through the gateway, and the body with
// it. What was picked shortly before a scrape is not in the scraped numbers yet.
const settle = 200 * time.Millisecond

// maxMarks bounds the marks; scrapes that come faster share one.
const maxMarks = 16

// mark is how many reservations had been made at one moment.
type mark struct {
	at      time.Time
	started int64
}

// estimate is a reservation whose request can no longer be observed.
type estimate struct {
	res         *Reservation
	scrapesLeft int // released when this reaches 0: the second scrape begun after it sees the truth
	deadline    time.Time
}

// Requests is the number of requests in flight.
func (l *Load) Requests() int64 { return l.requests.Load() }

// Tokens is the number of prompt tokens (and, by configuration, estimated output tokens) in flight.
func (l *Load) Tokens() int64 { return l.tokens.Load() }

// Started counts every reservation ever made; the scraper notes it when a scrape begins ([Metrics.Started]).
func (l *Load) Started() int64 { return l.started.Load() }

// Settled notes how many reservations were made until now and returns how many were made long enough ago (settle) that
// a scrape which begins now shows them: the value of [Metrics.Started]. Called by the endpoint's scrape loop.
func (l *Load) Settled(now time.Time) int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	if n := len(l.marks); n == 0 || now.Sub(l.marks[n-1].at) >= settle/(maxMarks-2) {
		l.marks = append(l.marks, mark{now, l.started.Load()})
	}
	old := 0
	for i, m := range l.marks {
		if now.Sub(m.at) >= settle {
			old = i
		}
	}
	l.marks = append(l.marks[:0], l.marks[old:]...)
	if now.Sub(l.marks[0].at) < settle {
		return 0 // just begun: everything in flight may be missing from the page
	}
	return l.marks[0].started
}

// SinceScrape is how many requests were reserved since m's scrape began and are still in flight: what a queue
// depth or a running count scraped then cannot include.
func (l *Load) SinceScrape(m *Metrics) int64 {
	since := l.started.Load() - m.Started
	return max(0, min(since, l.requests.Load()))
}

// Reserve counts one request of the given tokens until the reservation is released.
func (l *Load) Reserve(tokens int64) *Reservation {
	r := &Reservation{load: l, tokens: tokens}
	l.requests.Add(1)
	l.tokens.Add(tokens)
	l.started.Add(1)
	return r
}

// Reservation is one request counted on one endpoint. It is owned by the request's goroutine until Expire hands
// it to the endpoint. Release is idempotent and safe for concurrent use.
type Reservation struct {
	load      *Load
	tokens    int64
	tokensOut atomic.Bool
	done      atomic.Bool
}

// ReleaseTokens gives the tokens back and keeps the request counted: prefill is over, decode goes on.
func (r *Reservation) ReleaseTokens() {
	if r != nil && r.tokensOut.CompareAndSwap(false, true) {
		r.load.tokens.Add(-r.tokens)
	}
}

// Release ends the reservation. Every call after the first does nothing; a nil reservation is released already.
func (r *Reservation) Release() {
	if r == nil || !r.done.CompareAndSwap(false, true) {
		return
	}
	r.ReleaseTokens()
	r.load.requests.Add(-1)
}

// Expire turns the reservation into an estimate, for a request whose end the gateway will not report: it is
// released by the second scrape begun from now on or after life, 60 s at most, whichever comes first.
func (r *Reservation) Expire(now time.Time, life time.Duration) {
	if r == nil || r.done.Load() {
		return
	}
	if life <= 0 || life > estimateLife {
		life = estimateLife
	}
	l := r.load
	l.mu.Lock()
	l.estimates = append(l.estimates, estimate{res: r, scrapesLeft: 2, deadline: now.Add(life)})
	l.mu.Unlock()
}

// ScrapeBegins ages the estimates: called by the endpoint's scrape loop at the start of each scrape, before it
// reads Started. scraped is false when the call is only a clock tick (the endpoint cannot be scraped).
func (l *Load) ScrapeBegins(now time.Time, scraped bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	kept := l.estimates[:0]
	for _, e := range l.estimates {
		if scraped {
			e.scrapesLeft--
		}
		if e.scrapesLeft <= 0 || now.After(e.deadline) {
			e.res.Release()
			continue
		}
		kept = append(kept, e)
	}
	clear(l.estimates[len(kept):])
	l.estimates = kept
}
