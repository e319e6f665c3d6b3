// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"time"

	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/scheduler"
)

// Job is one request's work before decode.
type Job struct {
	Request  *inference.Request
	Decision *scheduler.Decision
	Decode   *pool.Endpoint // the pick so far; nil when decode is picked after prefill
	// Body collects the edits of the decode request; the orchestrator adds its own to it (nil = there is no JSON body).
	Body *inference.Edits
	// Model is what the prefill endpoint is asked for when it is not the name that the client sent; "" = as sent.
	Model string
	// PrefillLoad counts the request on the first ranked prefiller; the orchestrator releases it, whatever happens.
	PrefillLoad *pool.Reservation
	Start       time.Time // when the request was first seen: the budget counts from here
}

// Attempt is one sub-request.
type Attempt struct {
	Phase    scheduler.Phase
	Endpoint *pool.Endpoint
	Number   int    // from 1, the value of X-Processor-Attempt
	Status   int    // HTTP status, 0 when there was none
	Reason   string // ok or why not, from the closed set of Reasons
	Start    time.Time
	Duration time.Duration // the wait for a free slot included
}

// The values of Outcome.Name; the last is a prefix.
const (
	outcomeDisaggregated = "disaggregated"
	outcomeAggregated    = "aggregated"
	outcomeFallback      = "fallback-"
)

// Outcome is what the phases before decode came to. It belongs to the stream's goroutine, as the job does.
type Outcome struct {
	// Name is the value of x-baton-outcome: disaggregated, aggregated or fallback-<reason>; empty beside an error.
	Name          string
	Headers       []inference.Header // to set on the decode request: x-prefiller-host-port, x-encoder-hosts-ports
	Prefiller     *pool.Endpoint     // who prefills; nil when aggregated
	HasHandle     bool               // the decode body carries a handle: exactly one destination, once, before HandleUntil
	HandleUntil   time.Time
	PrefillTokens int64 // prompt tokens the prefiller reported, for the leak counters
	Checkpoint    Checkpoint
	Attempts      []Attempt

	way     way
	wire    wire           // whose handle it is
	decode  *pool.Endpoint // who got it
	lost    bool           // its prefill was counted as leaked
	settled bool           // the transfer's end was noted
}

// way is how a request is served.
type way uint8

const (
	wayAggregated  way = iota // decode alone
	wayHeaders                // a sidecar at the decode endpoint prefills where a header says
	wayOrchestrate            // we prefill
)
