// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"net/http"
	"strings"
	"time"
)

const (
	pollEvery  = 250 * time.Millisecond
	retryAfter = 500 * time.Millisecond
)

// A decision is what the demo reads of one entry of /debug/decisions.
type decision struct {
	Time         time.Time         `json:"time"`
	RequestID    string            `json:"request_id"`
	PromptTokens int               `json:"prompt_tokens"`
	PromptBlocks int               `json:"prompt_blocks"`
	Outcome      string            `json:"outcome"`
	Picks        map[string]string `json:"picks"`   // phase to endpoint
	Reasons      map[string]string `json:"reasons"` // phase to why it ran or not
	Profiles     []struct {
		Phase     string `json:"phase"`
		Endpoints []struct {
			Endpoint string `json:"endpoint"`
			Matched  int    `json:"matched_blocks"`
		} `json:"endpoints"`
	} `json:"profiles"`
	Attempts []struct {
		Phase    string `json:"phase"`
		Endpoint string `json:"endpoint"`
		Status   int    `json:"status"`
		Reason   string `json:"reason"`
	} `json:"attempts"`
}

const (
	phasePrefill         = "prefill"
	phaseDecode          = "decode"
	outcomeDisaggregated = "disaggregated"
	outcomeAggregated    = "aggregated"
)

// prefiller is the endpoint that really did the prefill, "" when none did.
func (d *decision) prefiller() string {
	if d.Outcome != outcomeDisaggregated {
		return ""
	}
	for _, a := range d.Attempts {
		if a.Phase == phasePrefill && a.Status == http.StatusOK {
			return a.Endpoint
		}
	}
	return d.Picks[phasePrefill]
}

// matched is how many leading blocks of the prompt the endpoint was known to hold.
func (d *decision) matched(phase, endpoint string) int {
	for _, p := range d.Profiles {
		for _, e := range p.Endpoints {
			if p.Phase == phase && e.Endpoint == endpoint {
				return e.Matched
			}
		}
	}
	return 0
}

// computing is the phase and endpoint where the prompt was computed, as far as it had to be.
func (d *decision) computing() (phase, endpoint string) {
	if p := d.prefiller(); p != "" {
		return phasePrefill, p
	}
	return phaseDecode, d.Picks[phaseDecode]
}

// Reasons of Baton's deciders that the view puts in words of its own.
const (
	reasonUncached = "uncached prompt"
	reasonCached   = "prompt cached on the decode endpoint"
)

// toCompute is how many tokens of the prompt the decode endpoint was not known to hold: what the decider compares with
// its threshold. Only the last block may be partial, so the size of a block, a multiple of 16, is the mean rounded up.
func (d *decision) toCompute() int {
	if d.PromptBlocks == 0 {
		return d.PromptTokens
	}
	mean := (d.PromptTokens + d.PromptBlocks - 1) / d.PromptBlocks
	size := (mean + 15) / 16 * 16
	return max(0, d.PromptTokens-d.matched(phaseDecode, d.Picks[phaseDecode])*size)
}

// why is the reason in a few words, with the share of the prompt that was cached where it was computed.
func (d *decision) why() string {
	why := d.Reasons[phasePrefill]
	switch {
	case d.Outcome != outcomeDisaggregated && d.Outcome != outcomeAggregated && d.Outcome != "":
		why = d.Outcome
	case why == reasonCached: // of a part of it: the rest is below the threshold
		return "only " + number(d.toCompute()) + " tokens to compute"
	case why == reasonUncached:
		why = "much to compute"
	}
	if matched := d.matched(d.computing()); matched > 0 {
		why += ", " + percent(matched, d.PromptBlocks) + " cached"
	}
	return why
}

// An endpointState is one entry of /debug/endpoints.
type endpointState struct {
	Endpoint string  `json:"endpoint"`
	Address  string  `json:"address"`
	Role     string  `json:"role"`
	Ready    bool    `json:"ready"`
	Fresh    bool    `json:"fresh"`
	Queue    float64 `json:"queue"`
	Running  float64 `json:"running"`
	KVCache  float64 `json:"kv_cache_usage"` // fraction
	InFlight int     `json:"in_flight"`
	Standing string  `json:"standing"`
}

// state is the word shown for the endpoint.
func (e *endpointState) state() string {
	switch {
	case !e.Ready:
		return "not ready"
	case e.Standing != "" && e.Standing != "healthy":
		return e.Standing
	case !e.Fresh:
		return "stale"
	}
	return "ready"
}

// shortName drops the namespace.
func shortName(endpoint string) string {
	return endpoint[strings.LastIndexByte(endpoint, '/')+1:]
}

// A watcher follows Baton's debug interface until its context ends.
type watcher struct {
	http *http.Client
	base string // of Baton's metrics port
}

// decisions hands each decision to into as it is made, and connects again when the stream breaks.
func (w *watcher) decisions(ctx context.Context, into func(decision)) {
	for ctx.Err() == nil {
		w.follow(ctx, into)
		wait(ctx, retryAfter)
	}
}

func (w *watcher) follow(ctx context.Context, into func(decision)) {
	resp, err := get(ctx, w.http, w.base+"/debug/decisions", "text/event-stream")
	if err != nil {
		return
	}
	defer resp.Body.Close()
	for data, err := range events(resp.Body) {
		var d decision
		if err == nil && json.Unmarshal(data, &d) == nil && d.RequestID != "" {
			into(d)
		}
	}
}

// endpoints hands the state of the pool to into a few times a second.
func (w *watcher) endpoints(ctx context.Context, into func([]endpointState)) {
	for ctx.Err() == nil {
		var all []endpointState
		if getJSON(ctx, w.http, w.base+"/debug/endpoints", &all) == nil {
			into(all)
		}
		wait(ctx, pollEvery)
	}
}

// wait returns after d, or when ctx ends; it reports whether d passed.
func wait(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
