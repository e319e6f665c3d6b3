// SPDX-License-Identifier: Apache-2.0

// Package admission decides whether a request may go on. Its one type is the [Gate], which today keeps the budget of
// request bytes held by the whole process: what is over it is shed with 429, never queued without a bound. Floor 1.
package admission

import (
	"errors"
	"fmt"
	"sync/atomic"
)

// ErrOverBudget means that the bytes of all held requests together would pass the limit (limits.maxHeldBytes).
var ErrOverBudget = errors.New("too many request bytes held at once")

// Gate counts the body bytes of all requests being held. Safe for concurrent use.
type Gate struct {
	max  int64 // bytes, immutable
	held atomic.Int64
}

// New makes a gate that lets maxHeldBytes (bytes, above 0) be held at once.
func New(maxHeldBytes int64) (*Gate, error) {
	if maxHeldBytes <= 0 {
		return nil, fmt.Errorf("limits.maxHeldBytes: %d, must be above 0", maxHeldBytes)
	}
	return &Gate{max: maxHeldBytes}, nil
}

// Hold takes n bytes of the budget, or answers [ErrOverBudget] and takes none.
func (g *Gate) Hold(n int) error {
	if g.held.Add(int64(n)) > g.max {
		g.held.Add(-int64(n))
		return fmt.Errorf("%w: limit %d bytes (limits.maxHeldBytes)", ErrOverBudget, g.max)
	}
	return nil
}

// Free gives n held bytes back.
func (g *Gate) Free(n int) { g.held.Add(-int64(n)) }

// Held is the number of bytes held now.
func (g *Gate) Held() int64 { return g.held.Load() }
