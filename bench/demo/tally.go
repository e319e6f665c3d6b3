// SPDX-License-Identifier: Apache-2.0

package main

import (
	"maps"
	"slices"
	"sync"
	"time"
)

// kept is how many of the last requests the view may show.
const kept = 200

// A row is one request as the view shows it: what Baton decided and what the client saw.
type row struct {
	ID       string
	Decision decision // its RequestID is empty while none was seen
	Result   result   // its ID is empty while the request runs
}

// hits counts what the prefix cache was worth on one endpoint.
type hits struct {
	Picked int // requests that were prefilled or decoded there
	Hit    int // of them, those of which it already held leading blocks
}

// A tally gathers everything the demo sees. All methods are safe for concurrent use.
type tally struct {
	mu        sync.Mutex // guards all fields
	started   time.Time
	endpoints []endpointState
	hits      map[string]hits // by endpoint
	rows      []row           // the last ones, oldest first
	decided   map[string]bool // request ids whose decision was seen
	sum       totals
	first     []time.Duration // time to first token of each answered request
}

// totals are counts since the start.
type totals struct {
	Sent, Answered, Failed int
	Stopped                int // under way when the demo was ended
	Disaggregated          int // as the client was told
	Fallbacks              int // requests that were to be disaggregated and were not
	Decisions              int
	PrefixHits             int // decisions whose prefill or decode endpoint held leading blocks
	MatchedBlocks          int // of the prompts, where they were computed
	PromptBlocks           int
	FirstError             string
}

func newTally() *tally {
	return &tally{started: time.Now(), hits: map[string]hits{}, decided: map[string]bool{}}
}

func (t *tally) sent(r chat) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.sum.Sent++
	t.rowLocked(r.ID)
}

func (t *tally) done(r result) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.rowLocked(r.ID).Result = r
	if r.Stopped {
		t.sum.Stopped++
		return
	}
	if r.Err != nil {
		t.sum.Failed++
		if t.sum.FirstError == "" {
			t.sum.FirstError = r.ID + ": " + r.Err.Error()
		}
		return
	}
	t.sum.Answered++
	t.first = append(t.first, r.FirstToken)
	switch r.Outcome {
	case outcomeDisaggregated:
		t.sum.Disaggregated++
	case outcomeAggregated, "":
	default:
		t.sum.Fallbacks++
	}
}

func (t *tally) decide(d decision) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.decided[d.RequestID] {
		return // seen before the stream broke
	}
	t.decided[d.RequestID] = true
	t.rowLocked(d.RequestID).Decision = d
	t.sum.Decisions++

	for phase, endpoint := range map[string]string{phasePrefill: d.prefiller(), phaseDecode: d.Picks[phaseDecode]} {
		if endpoint != "" {
			t.pickLocked(endpoint, d.matched(phase, endpoint))
		}
	}
	best := d.matched(d.computing())
	t.sum.MatchedBlocks += best
	t.sum.PromptBlocks += d.PromptBlocks
	if best > 0 {
		t.sum.PrefixHits++
	}
}

func (t *tally) pickLocked(endpoint string, matched int) {
	h := t.hits[endpoint]
	h.Picked++
	if matched > 0 {
		h.Hit++
	}
	t.hits[endpoint] = h
}

func (t *tally) pool(all []endpointState) {
	slices.SortFunc(all, func(a, b endpointState) int {
		// Prefill stands above decode, as the request travels.
		if a.Role != b.Role && (a.Role == phasePrefill || b.Role == phasePrefill) {
			if a.Role == phasePrefill {
				return -1
			}
			return 1
		}
		if a.Endpoint < b.Endpoint {
			return -1
		}
		return 1
	})
	t.mu.Lock()
	defer t.mu.Unlock()
	t.endpoints = all
}

// rowLocked finds or adds the row of a request; it is good until the next call.
func (t *tally) rowLocked(id string) *row {
	for i := len(t.rows) - 1; i >= 0; i-- {
		if t.rows[i].ID == id {
			return &t.rows[i]
		}
	}
	if len(t.rows) == kept {
		t.rows = slices.Delete(t.rows, 0, 1)
	}
	t.rows = append(t.rows, row{ID: id})
	return &t.rows[len(t.rows)-1]
}

// A snapshot is a tally at one moment.
type snapshot struct {
	Elapsed   time.Duration
	Endpoints []endpointState
	Hits      map[string]hits
	Rows      []row // oldest first
	Totals    totals
	Median    time.Duration // to the first token
	P95       time.Duration
}

func (t *tally) snapshot() snapshot {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := snapshot{
		Elapsed:   time.Since(t.started),
		Endpoints: t.endpoints, // replaced whole, never changed
		Hits:      maps.Clone(t.hits),
		Rows:      slices.Clone(t.rows),
		Totals:    t.sum,
	}
	sorted := slices.Sorted(slices.Values(t.first))
	s.Median, s.P95 = quantile(sorted, 0.5), quantile(sorted, 0.95)
	return s
}

// quantile of sorted values; 0 when there are none.
func quantile(sorted []time.Duration, q float64) time.Duration {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[min(len(sorted)-1, int(q*float64(len(sorted))))]
}
