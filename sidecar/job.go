// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"time"

	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/scheduler"
	"github.com/baton-epp/baton/sidecar/connectors"
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
	Error    string // what broke, at most 200 bytes; "" where an answer says it all
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
	Name         string
	Headers      []inference.Header // to set on the decode request: x-prefiller-host-port, x-encoder-hosts-ports
	Prefiller    *pool.Endpoint     // who prefills; nil when aggregated
	Encoders     []*pool.Endpoint   // who encoded, or is named to a sidecar for it
	WayReason    string             // why nobody prefills elsewhere although the decision wanted it
	EncodeReason string             // why nothing is encoded apart although the decision wanted it
	EncodeTime   time.Duration      // of the whole phase; its attempts overlap
	// HasHandle says that the decode body carries what may be used once, before HandleUntil, and holds blocks at the
	// prefill endpoint: a handle, or the ticket of a rendezvous.
	HasHandle     bool
	HandleUntil   time.Time
	PrefillTokens int64 // prompt tokens the prefiller reported, for the leak counters
	CachedTokens  int64 // of these, found in the prefiller's cache; -1 when it did not say
	Checkpoint    Checkpoint
	Attempts      []Attempt
	Leaked        string // why nobody claims the blocks of a finished prefill, from the closed set of leakReasons; "" = somebody may

	way      way
	encoding *encoding
	wire     wire                 // whose handle it is
	x        *connectors.Exchange // what the connector was told; of Prefiller, or of a pull by decode alone
	decode   *pool.Endpoint       // who got it
	leg      *leg                 // the prefill that runs, or ran, beside decode
	beside   bool                 // decode counts on that leg
	joined   bool                 // what the leg came to is in the outcome
	vain     bool                 // decode waits for that leg in vain
	lost     bool                 // nobody takes the blocks: counted, or cancelled in time
	settled  bool                 // the transfer's end was noted
	seen     bool                 // response headers came
}

// Bound reports whether the decode request is for one endpoint only, whichever that is: it must not be sent to another
// one besides or afterwards.
func (out *Outcome) Bound() bool { return out.HasHandle || out.beside || out.Fixed() }

// ForgetBody drops what was needed for the bodies of the request's legs; called when all of them were sent.
func (out *Outcome) ForgetBody() {
	if out != nil {
		out.encoding = nil
	}
}

// Fixed reports whether the prefill was made for the decode endpoint that Run was told of.
func (out *Outcome) Fixed() bool { return out.Delivered() && out.wire.NeedsDecode }

// Delivered reports whether somebody else than decode prefills, by our own request: decode may be picked anew, for that
// prefiller.
func (out *Outcome) Delivered() bool {
	return out.Prefiller != nil && (out.HasHandle || out.way == wayOrchestrate)
}

// Overlaps reports whether decode was sent while prefill ran, so that its first byte waited for both.
func (out *Outcome) Overlaps() bool { return out.leg != nil }

// way is how a request is served.
type way uint8

const (
	wayAggregated  way = iota // decode alone
	wayHeaders                // a sidecar at the decode endpoint prefills where a header says
	wayOrchestrate            // we prefill
)
