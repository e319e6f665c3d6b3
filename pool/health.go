// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"sync/atomic"
	"time"
)

// The numbers of passive health (docs/design.md 5.2).
const (
	// EjectAfter consecutive failures take an endpoint out of the race.
	EjectAfter = 5
	// EjectFor is the first ejection; each one that follows without a success between doubles, up to EjectMax.
	EjectFor = 10 * time.Second
	// EjectMax is the longest ejection.
	EjectMax = 5 * time.Minute
	// probeFor is how long a probe may stay unanswered before another one is let through.
	probeFor = 30 * time.Second
	// RampUp is the time in which a new endpoint's share grows to that of the others.
	RampUp = 30 * time.Second
)

// Health is what requests have shown about an endpoint: consecutive failures, ejection and the probe that ends it.
// Safe for concurrent use, without locks.
type Health struct {
	failures     atomic.Int32
	ejections    atomic.Int32
	ejectedUntil atomic.Int64 // unix nanoseconds, 0 = not ejected
	probeUntil   atomic.Int64 // unix nanoseconds until which a probe is out
	notReady     atomic.Bool  // set by the source or the scraper: two refused scrapes with file discovery
}

// Standing is what an endpoint's health allows.
type Standing uint8

// The values of [Standing].
const (
	Healthy Standing = iota
	// Probation: the ejection is over and one request at a time may try.
	Probation
	// Ejected: no request, unless more than half the pool would be gone.
	Ejected
	// NotReady: nobody answers there.
	NotReady
)

// String is the standing in one word, as /debug/endpoints shows it.
func (s Standing) String() string {
	return [...]string{"healthy", "probation", "ejected", "not-ready"}[s]
}

// Standing reports what may be sent to the endpoint at now.
func (h *Health) Standing(now time.Time) Standing {
	if h.notReady.Load() {
		return NotReady
	}
	until := h.ejectedUntil.Load()
	if until == 0 {
		return Healthy
	}
	n := now.UnixNano()
	if n < until || n < h.probeUntil.Load() {
		return Ejected
	}
	return Probation
}

// EjectedUntil is when the ejection ends, zero when there is none.
func (h *Health) EjectedUntil() time.Time {
	if until := h.ejectedUntil.Load(); until != 0 {
		return time.Unix(0, until)
	}
	return time.Time{}
}

// TryProbe claims the one probe of an endpoint in Probation; true for a healthy endpoint.
func (h *Health) TryProbe(now time.Time) bool {
	if h.ejectedUntil.Load() == 0 {
		return true
	}
	old := h.probeUntil.Load()
	n := now.UnixNano()
	return n >= old && h.probeUntil.CompareAndSwap(old, n+int64(probeFor))
}

// Succeed notes an answer that shows the endpoint works; it ends an ejection.
func (h *Health) Succeed() {
	if h.failures.Load() != 0 {
		h.failures.Store(0)
	}
	if h.ejectedUntil.Load() != 0 {
		h.ejectedUntil.Store(0)
		h.ejections.Store(0)
		h.probeUntil.Store(0)
	}
}

// Fail notes a failure (refused, reset, Envoy-made 502/503/504, upstream 5xx, failed sub-request) and reports
// whether it ejected the endpoint.
func (h *Health) Fail(now time.Time) bool {
	wasOut := h.ejectedUntil.Load() != 0
	if h.failures.Add(1) < EjectAfter && !wasOut {
		return false
	}
	if wasOut && now.UnixNano() < h.ejectedUntil.Load() {
		return false // answers to requests sent before the ejection do not lengthen it
	}
	times := h.ejections.Add(1)
	out := min(EjectFor<<min(times-1, 10), EjectMax)
	h.ejectedUntil.Store(now.Add(out).UnixNano())
	h.probeUntil.Store(0)
	return true
}

// SetReady is told by whoever can see that nothing listens at the endpoint any more, or again.
func (h *Health) SetReady(ready bool) { h.notReady.Store(!ready) }
