// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"errors"
	"sync/atomic"
	"time"

	"github.com/sony/gobreaker/v2"

	"github.com/baton-epp/baton/config"
)

// breakerStates is the number of states of a breaker.
const breakerStates = int(gobreaker.StateOpen) + 1

var errNoted = errors.New("failed")

// breaker is a circuit breaker whose results are noted when they are known: nobody holds a permit, so none can be
// lost. Half open, it lets one request through per openFor. Safe for concurrent use.
type breaker struct {
	*gobreaker.CircuitBreaker[struct{}]
	openFor time.Duration
	probed  atomic.Int64 // unix nanoseconds of the last request let through half open
}

// newBreaker makes a closed breaker; opened is called each time it opens from closed.
func newBreaker(c config.Breaker, opened func()) *breaker {
	return &breaker{openFor: c.OpenFor, CircuitBreaker: gobreaker.NewCircuitBreaker[struct{}](gobreaker.Settings{
		Timeout:     c.OpenFor,
		ReadyToTrip: func(n gobreaker.Counts) bool { return int64(n.ConsecutiveFailures) >= int64(c.Failures) },
		OnStateChange: func(_ string, from, _ gobreaker.State) {
			if from == gobreaker.StateClosed {
				opened()
			}
		},
	})}
}

// ready reports whether allow would let a request through. A nil breaker is one that never failed.
func (b *breaker) ready(now time.Time) bool {
	if b == nil {
		return true
	}
	switch b.State() {
	case gobreaker.StateClosed:
		return true
	case gobreaker.StateOpen:
		return false
	default:
		return now.UnixNano()-b.probed.Load() >= int64(b.openFor)
	}
}

// allow reports whether a request may go; half open, each true is one of the rare probes.
func (b *breaker) allow(now time.Time) bool {
	if b == nil || b.State() == gobreaker.StateClosed {
		return true
	}
	last := b.probed.Load()
	return b.ready(now) && b.probed.CompareAndSwap(last, now.UnixNano())
}

// note tells how a request ended.
func (b *breaker) note(ok bool) {
	_, _ = b.Execute(func() (struct{}, error) {
		if ok {
			return struct{}{}, nil
		}
		return struct{}{}, errNoted
	})
}
