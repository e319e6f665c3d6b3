// SPDX-License-Identifier: Apache-2.0

package scorers_test

import (
	"math"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/internal/pooltest"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/scheduler"
	"github.com/baton-epp/baton/scheduler/schedulertest"
	"github.com/baton-epp/baton/scorers"
)

// scorer makes a scorer; parameters in YAML flow style.
func scorer(t *testing.T, kind, parameters string) scheduler.Scorer {
	t.Helper()
	return scheduler.Plugins[scheduler.Scorer](schedulertest.New(t, scorers.Registry(), kind, parameters))[kind]
}

// rows turns endpoints into candidates.
func rows(builders ...*pooltest.Builder) []scheduler.Candidate {
	snap := pooltest.Snapshot(builders...)
	cands := make([]scheduler.Candidate, len(builders))
	for i, e := range snap.Endpoints {
		m := e.Metrics()
		cands[i] = scheduler.Candidate{
			Endpoint: e, Metrics: m, Fresh: m.Fresh(time.Now()),
			Requests: e.Load.Requests(), Tokens: e.Load.Tokens(), SinceScrape: e.Load.SinceScrape(m),
		}
	}
	return cands
}

func cycle() *scheduler.Cycle {
	return &scheduler.Cycle{Request: &inference.Request{Model: "m"}, Now: time.Now()}
}

func check(t *testing.T, s scheduler.Scorer, cy *scheduler.Cycle, cands []scheduler.Candidate, want ...float64) {
	t.Helper()
	got := make([]float64, len(cands))
	s.Score(cy, cands, got)
	if diff := cmp.Diff(want, got, cmpopts.EquateApprox(0, 1e-9)); diff != "" {
		t.Error(diff)
	}
}

func e() *pooltest.Builder { return pooltest.E("p") }

func TestFormulas(t *testing.T) {
	f := func(name, kind, parameters string, cands []scheduler.Candidate, want ...float64) {
		t.Helper()
		t.Run(name, func(t *testing.T) {
			t.Helper()
			cy := cycle()
			cy.Prompts[0] = scheduler.Prompt{Blocks: 10, BlockSize: 64, Tokens: 600}
			check(t, scorer(t, kind, parameters), cy, cands, want...)
		})
	}
	since := func(cands []scheduler.Candidate, n ...int64) []scheduler.Candidate {
		for i := range n {
			cands[i].SinceScrape, cands[i].Requests = n[i], n[i]
		}
		return cands
	}
	matched := func(cands []scheduler.Candidate, n ...int32) []scheduler.Candidate {
		for i := range n {
			cands[i].Matched[0] = n[i]
		}
		return cands
	}
	f("queue", "queue-scorer", "", rows(e().Waiting(0), e().Waiting(5), e().Waiting(10)), 1, .5, 0)
	f("queue, all equal", "queue-scorer", "", rows(e().Waiting(3), e().Waiting(3)), 1, 1)
	f("queue since scrape", "queue-scorer", "", since(rows(e(), e().Waiting(4)), 8, 0), 0, 1)
	f("queue unknown: in flight counts", "queue-scorer", "", since(rows(e().Waiting(9).Stale(), e().Waiting(4), e().Unscraped()), 8, 0, 0), 0, .5, 1)
	f("queue nonsense", "queue-scorer", "", rows(e().Waiting(math.NaN()), e().Waiting(math.Inf(1)), e().Waiting(2)), 1, 1, 0)
	f("running", "running-requests-size-scorer", "", rows(e().Running(2), e().Running(4)), 1, 0)
	f("running since scrape", "running-requests-size-scorer", "", since(rows(e().Running(2), e().Running(4)), 4, 0), 0, 1)
	f("KV", "kv-cache-utilization-scorer", "", rows(e().KV(0), e().KV(.75), e().KV(1.2), e().KV(.1).Stale(), e().Unscraped()), 1, .25, 0, .5, .5)
	f("load aware", "load-aware-scorer", "", rows(e(), e().Waiting(64), e().Waiting(1000)), .5, .25, 0)
	f("load aware, threshold", "load-aware-scorer", "{threshold: 10}", rows(e().Waiting(5)), .25)
	f("load aware, bad threshold", "load-aware-scorer", "{threshold: -1}", rows(e().Waiting(64)), .25)
	f("active requests", "active-request-scorer", "", rows(e(), e().InFlight(1), e().InFlight(1, 1, 1, 1)), 1, .75, 0)
	f("active requests, idle threshold", "active-request-scorer", "{idleThreshold: 1, maxBusyScore: 0.5, requestTimeout: 2m}", rows(e().InFlight(1), e().InFlight(1, 1), e().InFlight(1, 1, 1, 1)), 1, .25, 0)
	f("token load", "token-load-scorer", "{queueThresholdTokens: 1200}", matched(rows(e(), e().InFlight(300), e().InFlight(9999)), 0, 5, 0), .5, .4833333333, 0)
	f("LoRA", "lora-affinity-scorer", "", rows(
		e().LoRA(2, "m"), e().LoRA(2, "a"), e().LoRA(1, "a").WaitingLoRA("m"), e().LoRA(1, "a"), e(), e().LoRA(2, "m").Stale()), 1, .8, .6, 0, 0, 0)
	f("prefix", "prefix-cache-scorer", "", matched(rows(e(), e(), e()), 0, 5, 10), 0, .5, 1)
	f("prefix, match length", "prefix-cache-scorer", "{matchLengthWeight: 0.5, matchLengthScaleTokens: 640}", matched(rows(e(), e(), e()), 0, 5, 10), 0, .375, 1)
}

func TestPrefixWithoutPrompt(t *testing.T) {
	check(t, scorer(t, "prefix-cache-scorer", ""), cycle(), rows(e(), e()), 0, 0)
}

func TestSessionToken(t *testing.T) {
	plugin := schedulertest.New(t, scorers.Registry(), "session-affinity-scorer", "")
	s := scheduler.Plugins[scheduler.Scorer](plugin)["session-affinity-scorer"]
	cands := rows(pooltest.E("a"), pooltest.E("b"), pooltest.E("b").Rank(1))
	f := func(token string, want ...float64) {
		t.Helper()
		cy := cycle()
		cy.Request.Headers = inference.Headers{{Name: "x-session-token", Value: token}}
		check(t, s, cy, cands, want...)
	}
	for i := range cands {
		h := plugin.ResponseHeaders(cands[i].Endpoint)
		if len(h) != 1 || h[0].Name != "x-session-token" {
			t.Fatalf("response headers %v", h)
		}
		want := make([]float64, len(cands))
		want[i] = 1
		f(h[0].Value, want...)
	}
	f("ZGVmYXVsdC9iLXJhbmstMA==", 0, 1, 0) // default/b-rank-0, as llm-d writes it
	f("ZGVmYXVsdC9i!!", 0, 0, 0)
	f("", 0, 0, 0)
	f(string(make([]byte, 5000)), 0, 0, 0)
	f("ZGVmYXVsdC9iLXJhbmstOTk5OTk5OTk5OTk5OTk5OTk5OTk5OQ==", 0, 0, 0) // rank 9999…
}

func TestSessionID(t *testing.T) {
	s := scorer(t, "session-affinity-scorer", "{strategy: session_id, sessionIdConfig: {sources: [{header: X-Conversation}], evictionTtlSeconds: 60}}")
	cands := rows(pooltest.E("a"), pooltest.E("b"), pooltest.E("c"))
	cy := cycle()
	cy.Request.Headers = inference.Headers{{Name: "x-conversation", Value: "one"}}
	learn := func(e *pool.Endpoint) { s.(scheduler.Learner).Learn(cy.Request, e, nil) }

	check(t, s, cy, cands, 0, 0, 0)
	learn(cands[1].Endpoint)
	check(t, s, cy, cands, 0, 1, 0)
	learn(cands[2].Endpoint) // picked elsewhere although b was there: the binding stays
	check(t, s, cy, cands, 0, 1, 0)
	check(t, s, cy, []scheduler.Candidate{cands[0], cands[2]}, 0, 0)
	learn(cands[2].Endpoint) // b was no candidate
	check(t, s, cy, cands, 0, 0, 1)

	cy.Now = cy.Now.Add(2 * time.Minute)
	check(t, s, cy, cands, 0, 0, 0)
	cy.Request.Headers = nil
	learn(cands[0].Endpoint)
	check(t, s, cy, cands, 0, 0, 0)
}

// TestSessionTableIsBounded: clients choose the ids.
func TestSessionTableIsBounded(t *testing.T) {
	s := scorer(t, "session-affinity-scorer", "{strategy: session_id}")
	cands := rows(pooltest.E("a"))
	cy := cycle()
	for i := range 140_000 {
		id := time.Duration(i).String()
		cy.Request.Headers = inference.Headers{{Name: "x-session-id", Value: id}}
		s.(scheduler.Learner).Learn(cy.Request, cands[0].Endpoint, nil)
	}
	check(t, s, cy, cands, 1)
}
