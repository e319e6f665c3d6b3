// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"sync"
	"time"

	"github.com/baton-epp/baton/config"
)

const (
	// retryWindow is how long unused retries of the guaranteed minimum add up.
	retryWindow = 10 * time.Second
	// retrySavings is how many retries earned by requests are kept at most, so that the loss of a busy endpoint can be
	// mended at once; more than that at once is an outage.
	retrySavings = 100
	// rounding is what sums of fractions may lack of a whole.
	rounding = 1e-6
)

// retryBudget is a token bucket that bounds retries pool-wide, so that trouble does not multiply: every request earns
// a part of one, and a minimum comes with time. Safe for concurrent use.
type retryBudget struct {
	mu     sync.Mutex
	config config.RetryBudget // guarded by mu
	tokens float64            // guarded by mu
	last   time.Time          // guarded by mu
}

func newRetryBudget(c config.RetryBudget, now time.Time) *retryBudget {
	return &retryBudget{config: c, tokens: c.MinPerSecond * retryWindow.Seconds(), last: now}
}

func (b *retryBudget) set(c config.RetryBudget) {
	b.mu.Lock()
	b.config = c
	b.mu.Unlock()
}

// earn is told of each request that may need retries.
func (b *retryBudget) earn() {
	b.mu.Lock()
	if b.tokens < retrySavings {
		b.tokens += b.config.Ratio
	}
	b.mu.Unlock()
}

// take spends one retry, if there is one.
func (b *retryBudget) take(now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	floor := b.config.MinPerSecond * retryWindow.Seconds()
	if b.tokens < floor {
		b.tokens = min(floor, b.tokens+b.config.MinPerSecond*now.Sub(b.last).Seconds())
	}
	b.last = now
	if b.tokens < 1-rounding {
		return false
	}
	b.tokens--
	return true
}
