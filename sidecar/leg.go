// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"context"

	"github.com/baton-epp/baton/pool"
)

// NeedsPrefill reports whether a decode endpoint cannot serve a prompt that was not prefilled elsewhere: its label says
// that it only decodes, and its engine's connector has no way back (connectors.Traits.Aggregates).
func (o *Orchestrator) NeedsPrefill(decode *pool.Endpoint) bool { return false }

// Pulls reports whether endpoints may fetch cached prefixes from each other (disaggregation.pullCachedPrefix).
func (o *Orchestrator) Pulls() bool { return false }

// Pending is closed when the prefill that runs beside decode is over; nil when there is none.
func (out *Outcome) Pending() <-chan struct{} { return nil }

// Settle takes over into out what the prefill beside decode came to; called by the stream's goroutine once Pending is
// closed. A *[PhaseError] means that decode waits in vain: the decode endpoint was told to let go where its engine needs
// that, and the client is to be answered now.
func (o *Orchestrator) Settle(ctx context.Context, j *Job, out *Outcome) error { return nil }

// Leave is told that the stream is over. What runs beside decode is cancelled, and decode told to let go, unless unseen
// says that the gateway ended the stream before the response: then it runs on, within its limits.
func (o *Orchestrator) Leave(j *Job, out *Outcome, unseen bool) {}
