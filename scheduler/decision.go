// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/pool"
)

// ErrNoCandidate is wrapped by every error that means "nothing fits": 503 for the client.
var ErrNoCandidate = errors.New("no endpoint fits")

// Subset is the gateway's subset hint (requirement P3). The zero Subset means that no hint was given.
type Subset struct {
	Given bool
	Addrs []netip.AddrPort // ip and port both count; empty and Given = nothing is eligible
}

// Query is one request for a decision. Read-only for the scheduler, which keeps nothing of it.
type Query struct {
	Request  *inference.Request // nil = a request nothing is known about
	Snapshot *pool.Snapshot
	Subset   Subset
	Now      time.Time
	// Seed makes random choices repeatable; derived from the request's id. 0 = the scheduler takes one of its own.
	Seed uint64
	// OnlyDecode switches the other phases off (disaggregation.mode off, or the request's Bars).
	OnlyDecode bool
	// OnlyReason is put into the skipped phases' Reason.
	OnlyReason string
	// NeedsPrefill tells of a decode endpoint that cannot serve a prompt which was not prefilled elsewhere (SGLang in
	// decode mode): there the prefill phase runs whatever the decider or OnlyDecode say. Nil = there is none.
	NeedsPrefill func(decode *pool.Endpoint) bool
	// Encodes says that encode endpoints can be asked: without it the encode phase does not run. With it, that phase
	// ranks every endpoint it has left, MaxEncoders at most: items are spread over them.
	Encodes bool
	// Pulls asks for [Pick.Source].
	Pulls bool
	// Rank is how many endpoints each phase must rank at least (attempts + 1), as far as there are so many.
	Rank int
	// Reserve asks for a reservation of load on the first endpoint of each phase but encode ([Pick.Reservation]), and for its probe
	// where it is on probation, made in one step with the choice: a choice made on load counts that another request has
	// changed meanwhile is made again. Without it Schedule changes nothing, and requests scheduled at the same instant
	// see the same idle endpoints.
	Reserve bool
}

const (
	// MaxEncoders bounds how many encode endpoints are ranked for one request.
	MaxEncoders = 64
	// MinSourceTokens is how many more prompt tokens a third endpoint must hold for a transfer to be worth it; vLLM's
	// kv_recompute_threshold.
	MinSourceTokens = 64
)

// Ranked is an endpoint in the order the picker wants it.
type Ranked struct {
	Endpoint *pool.Endpoint
	Score    float64
	Matched  int32 // prefix blocks of the default producer
	// UncachedTokens is how many prompt tokens the endpoint would have to compute.
	UncachedTokens int64
	// ReserveTokens is what a reservation counts: UncachedTokens and, where inflight-load-producer asks for it, the
	// estimated output tokens of a decode.
	ReserveTokens int64
}

// Pick is the result of one phase.
type Pick struct {
	Run    bool   // false: the phase does not run for this request
	Wanted bool   // the decider or the decode endpoint wanted the phase, and no endpoint was there for it: Run is false
	Reason string // why it runs or not: the decider's or filter's constant
	Ranked []Ranked
	// Source is the endpoint that holds the longest part of the prompt, where that is longer than what Ranked[0] holds by
	// at least MinSourceTokens; nil otherwise, and unless Query.Pulls.
	Source *pool.Endpoint
	// Send is how many of Ranked, from the first, may be named to the gateway (the picker's maxNumOfEndpoints).
	Send int
	// Reservation counts the request on Ranked[0]; nil unless Query.Reserve was set, and for encode, whose items count
	// where each of them goes. It belongs to the caller, who releases it; Decision.Release does not.
	Reservation *pool.Reservation
}

// Decision is what a scheduling cycle decided: endpoints per phase, best first, with reasons. It belongs to the
// stream's goroutine; Release gives its memory back, the slices of its Picks included. The Trace outlives it.
type Decision struct {
	Picks  [phaseCount]Pick
	Prompt Prompt // of the default producer
	Trace  Trace

	scheduler *Scheduler
	work      *work
}

// Phase returns the pick of one phase.
func (d *Decision) Phase(p Phase) *Pick { return &d.Picks[p] }

// Trace explains a decision; filled only when Options.Trace is on. It is a copy of its own.
type Trace struct {
	Profiles []ProfileTrace
}

// ProfileTrace is one profile's run.
type ProfileTrace struct {
	Profile string
	Phase   Phase
	Scorers []string // names, in the order of RowTrace.Scores
	Rows    []RowTrace
}

// RowTrace is what happened to one endpoint in a profile.
type RowTrace struct {
	Endpoint  *pool.Endpoint
	RemovedBy string // the filter's name, or one of the By constants; empty when it was scored
	Reason    string
	Scores    []float32 // one per scorer, before weights
	Total     float64
	Rank      int // from 1; 0 when it was not ranked
	Matched   int32
}

// What removes an endpoint besides the profile's filters: values of Removal.By and RowTrace.RemovedBy.
const (
	BySubset = "subset"  // the gateway's hint does not name it
	ByHealth = "health"  // not ready, ejected, sleeping or being probed
	ByRole   = "role"    // no configuration: an endpoint whose role label does not allow decode
	ByPeer   = "peer"    // prefill on the endpoint that decodes
	ByPair   = "pair"    // no KV transfer with the endpoint of the other phase: pair labels, engine, tensor parallel size
	ByRampUp = "ramp-up" // new, and this request is not of its share yet
)

// Removal says how many endpoints one filter took out of the race, and why.
type Removal struct {
	By     string // the filter's name or one of the By constants
	Reason string
	Count  int
}

// NoCandidateError says which profile was left without endpoints, and by what. It wraps [ErrNoCandidate].
type NoCandidateError struct {
	Profile string
	Removed []Removal // in the order of the filters
}

// Error names the profile and every removal.
func (e *NoCandidateError) Error() string {
	if len(e.Removed) == 0 {
		return fmt.Sprintf("%v profile %s: the pool is empty", ErrNoCandidate, e.Profile)
	}
	parts := make([]string, len(e.Removed))
	for i, r := range e.Removed {
		parts[i] = fmt.Sprintf("%s removed %d (%s)", r.By, r.Count, r.Reason)
	}
	return fmt.Sprintf("%v profile %s: %s", ErrNoCandidate, e.Profile, strings.Join(parts, ", "))
}

// Unwrap makes errors.Is(err, ErrNoCandidate) true.
func (e *NoCandidateError) Unwrap() error { return ErrNoCandidate }
