// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"errors"
	"fmt"
	"strings"

	"github.com/baton-epp/baton/scheduler"
)

var (
	// ErrBudgetSpent means that the time for all phases before decode is over: 504 for the client.
	ErrBudgetSpent = errors.New("budget for the phases before decode spent")
	// ErrLooped means that one of our own sub-requests came back through the gateway: a route leads from model servers
	// to the gateway that asks us.
	ErrLooped = errors.New("own sub-request came back through the gateway")

	// ErrNotCarried means that a request cannot be prefilled elsewhere, by what it asks for, and that its decode endpoint
	// cannot prefill for itself: 400 for the client.
	ErrNotCarried = errors.New("this model is served disaggregated only, and the request cannot be")

	errPhaseTimeout = errors.New("phase timeout")
	errNotInPool    = errors.New("address is not in the pool")
	errReplayed     = errors.New("connection reset, and reset again when sent anew")
	errIntroduction = errors.New("introduction too large")
)

// PhaseError means that a phase could not be had and that the configuration forbids to go on without it: 502 for the
// client.
type PhaseError struct {
	Phase    scheduler.Phase
	Endpoint string // host:port of the last attempt; empty when no endpoint could be tried
	Attempt  int    // how many there were
	Status   int    // of the last attempt, 0 when it got no answer
	Reason   string // of the last attempt, from the closed set of Reasons
	Err      error  // what the last attempt met; may be nil
}

// Error says where and how the phase ended.
func (e *PhaseError) Error() string {
	var b strings.Builder
	b.WriteString(e.Phase.String())
	if e.Endpoint != "" {
		fmt.Fprintf(&b, " %s attempt %d", e.Endpoint, e.Attempt)
	}
	b.WriteString(": ")
	switch {
	case e.Err != nil:
		b.WriteString(e.Err.Error())
	case e.Status != 0:
		fmt.Fprintf(&b, "status %d", e.Status)
		if e.Status < 300 {
			fmt.Fprintf(&b, " (%s)", e.Reason)
		}
	default:
		b.WriteString(e.Reason)
	}
	return b.String()
}

// Unwrap returns what the last attempt met.
func (e *PhaseError) Unwrap() error { return e.Err }
