// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"time"

	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/prefix"
)

// Phase is one part of serving a request.
type Phase uint8

// The phases, in the order in which llm-d's decode-first handler picks them.
const (
	PhaseDecode Phase = iota
	PhaseEncode
	PhasePrefill
	phaseCount
)

// String is the phase's name in logs, metrics and /debug/decisions.
func (p Phase) String() string {
	switch p {
	case PhaseEncode:
		return "encode"
	case PhasePrefill:
		return "prefill"
	default:
		return "decode"
	}
}

// MaxProducers bounds how many prefix producers one configuration may name.
const MaxProducers = 4

// Candidate is an endpoint still in the race in this cycle, with its row of facts. Rows are values in one pooled
// slice: filters compact them in place and nobody keeps them after the cycle.
type Candidate struct {
	Endpoint *pool.Endpoint
	Metrics  *pool.Metrics // never nil
	Fresh    bool          // Metrics may be believed at Cycle.Now; when false every scraped value is unknown

	Requests    int64 // in flight by our own count (pool.Load.Requests)
	Tokens      int64 // prompt tokens in flight by our own count
	SinceScrape int64 // reserved since the scrape of Metrics began

	// Matched is the number of prefix blocks this endpoint is believed to hold, contiguous from the start, one
	// column per producer (bound when the profile is built).
	Matched [MaxProducers]int32

	// Score is the weighted sum, written by the profile before the picker runs.
	Score float64

	index    int32         // position in work.rows
	claim    uint32        // claim counter of the endpoint, read before its load
	standing pool.Standing // Healthy, Probation or (kept because half the pool is gone) Ejected
}

// Prompt is what a prefix producer knows about the request, the same for every candidate.
type Prompt struct {
	Blocks    int // blocks in the prompt, the partial last one included
	BlockSize int // tokens in a block
	Tokens    int // prompt tokens, estimated or counted
}

// UncachedTokens is how much of the prompt an endpoint with matched blocks would have to compute (llm-d's formula of
// inflight-load-producer).
func (p Prompt) UncachedTokens(matched int32) int64 {
	uncached := int64(p.Blocks-int(matched)) * int64(p.BlockSize)
	return max(0, min(uncached, int64(p.Tokens))) + max(0, int64(p.Tokens)-int64(p.Blocks)*int64(p.BlockSize))
}

// PrefillSeconds is how long a prefill of uncached prompt tokens would take at c from now on if c computed speed tokens
// per second, more than 0 (pool.Pace.TokensPerSecond): the wait, then the computing. The wait is the learned one or what the
// tokens in flight need, whichever is longer: the same requests show in both.
func (c *Candidate) PrefillSeconds(now time.Time, uncached int64, speed float64) float64 {
	wait := max(c.Endpoint.Pace.Queue(now).Seconds(), float64(max(0, c.Tokens))/speed)
	return wait + float64(max(0, uncached))/speed
}

// Cycle is one run of one profile: what plugins may look at. Read-only for plugins, valid during the call only.
type Cycle struct {
	Request *inference.Request
	Phase   Phase
	Profile string
	Now     time.Time
	// Seed is derived from the request's id and the phase: random choices made with it are repeatable (see Rand, Tie).
	Seed uint64
	// Peer is the endpoint picked in an earlier phase of the same request, nil in the first.
	Peer *pool.Endpoint
	// Prompts has one entry per producer column.
	Prompts [MaxProducers]Prompt

	rand uint64
}

// Rand returns the next value of a repeatable sequence started by Seed (splitmix64).
func (cy *Cycle) Rand() uint64 {
	cy.rand += golden
	return mix(cy.rand + cy.Seed)
}

// Tie is a repeatable random number for one endpoint in this request, whatever its position among the candidates:
// equal candidates are ordered by it.
func (cy *Cycle) Tie(e *pool.Endpoint) uint64 { return mix(cy.Seed ^ (uint64(e.Slot)+1)*golden) }

// Unit is [Cycle.Rand] as a fraction, 0 ≤ u < 1.
func (cy *Cycle) Unit() float64 { return unit(cy.Rand()) }

func unit(r uint64) float64 { return float64(r>>11) / (1 << 53) }

// golden is splitmix64's increment.
const golden = 0x9e3779b97f4a7c15

// mix is splitmix64's finaliser.
func mix(z uint64) uint64 {
	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9
	z = (z ^ (z >> 27)) * 0x94d049bb133111eb
	return z ^ (z >> 31)
}

// Scorer gives every candidate a score. len(out) == len(cands); it writes every cell, 0 worst to 1 best, and keeps
// neither slice. It may not wait, fail, allocate, log or look anything up by endpoint.
type Scorer interface {
	Score(cy *Cycle, cands []Candidate, out []float64)
}

// Filter moves the candidates it keeps to the front, in their order, and returns how many they are; the removed ones
// must still be behind them (swap, never overwrite), so that the trace can name them. reason is one constant text of
// the filter's, used for all it removed.
type Filter interface {
	Filter(cy *Cycle, cands []Candidate) (kept int, reason string)
}

// Picker orders the candidates in place, best first, at least as far as want; Score is set. It returns how many of them
// may be named to the gateway (maxNumOfEndpoints), which limits nothing else; when that is more than want, the order
// reaches as far.
type Picker interface {
	Pick(cy *Cycle, cands []Candidate, want int) (send int)
}

// Learner is an optional interface of a plugin: it is told where the request really went. decode or prefill may be nil.
// Called outside the pick path; it may lock, it may not wait.
type Learner interface {
	Learn(req *inference.Request, decode, prefill *pool.Endpoint)
}

// Decider says whether a phase runs at all. decode is the endpoint picked for decode, nil when decode is picked later
// (prefill-first). reason is a constant.
type Decider interface {
	Decide(cy *Cycle, decode *Candidate) (run bool, reason string)
}

// Matcher is a prefix producer: it looks the request's prefix up and fills one column of every candidate.
type Matcher interface {
	// Match writes how many leading blocks each candidate holds into its Matched[column] and returns what it knows of
	// the prompt. It may not wait; memory it needs is in m.
	Match(req *inference.Request, m *Memory, cands []Candidate, column int) Prompt
	// Learn notes that the prompt was sent to the endpoint behind st. m is the one that Match of the same request used.
	Learn(m *Memory, st *pool.State)
	// Forget drops what is known of the endpoint in slot before it returns.
	Forget(slot uint32)
}

// Memory is what a [Matcher] keeps between the match and the lesson of one request.
type Memory struct {
	Keys    prefix.Keys
	matches prefix.Matches
}
