// SPDX-License-Identifier: Apache-2.0

package app

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/baton-epp/baton/simulate"
)

// calm scrapes rarely, so that requests find out first what is wrong with an endpoint.
const calm = "scraping: {busyInterval: 3s, idleInterval: 3s}\n"

// TestEnvoyNextPrefiller: the first prefill attempt fails in each way that another prefiller may mend.
func TestEnvoyNextPrefiller(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name, reason string
		fault        simulate.Fault
		leaks        int
	}{
		{name: "500", reason: "status_5xx", fault: simulate.Fault{Kind: "status", Status: 500}},
		{name: "404", reason: "not_found", fault: simulate.Fault{Kind: "status", Status: 404}},
		{name: "429", reason: "overloaded", fault: simulate.Fault{Kind: "status", Status: 429}},
		{name: "reset", reason: "reset", fault: simulate.Fault{Kind: "reset_before_headers"}},
		{name: "not JSON", reason: "malformed", fault: simulate.Fault{Kind: "status", Status: 200, Body: "<html>"}},
		{name: "reset in the answer", reason: "reset", fault: simulate.Fault{Kind: "reset_mid_stream"}, leaks: 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			o := fast(2, 2)
			o.Template.Lease = 4 * time.Second
			s := newStack(t, stackOptions{pool: o})
			test.fault.Phase, test.fault.Attempt = "prefill", "1"
			s.setFaults("prefill", test.fault)
			s.post("/v1/chat/completions", chatBody(100, ""), "x-request-id", "r").whole(t, "disaggregated")
			d := s.decision("r")
			if len(d.Attempts) != 2 || d.Attempts[0].Reason != test.reason || d.Attempts[1].Reason != "ok" || d.Attempts[0].Endpoint == d.Attempts[1].Endpoint {
				t.Errorf("attempts %+v", d.Attempts)
			}
			if p := s.pulls(); len(p) != 1 || p[0].Tokens == 0 || p[0].Err != "" || !p[0].Verbatim {
				t.Errorf("pulls %+v", p)
			}
			s.settledWith(test.leaks)
		})
	}
}

// TestEnvoyPrefillerRefuses: one of two prefillers is down; whoever asks it first is served by the other.
func TestEnvoyPrefillerRefuses(t *testing.T) {
	t.Parallel()
	s := newStack(t, stackOptions{config: calm})
	s.engines("prefill")[0].Kill()
	refused := 0
	for i := range 32 {
		id := fmt.Sprintf("r%d", i)
		s.post("/v1/chat/completions", fmt.Sprintf(`{"model":"tiny","max_tokens":4,"messages":[{"role":"user","content":"%d %s"}]}`, i, strings.Repeat("word ", 100)), "x-request-id", id).whole(t, "disaggregated")
		if d := s.decision(id); len(d.Attempts) == 2 && d.Attempts[0].Reason == "refused" && d.Attempts[1].Reason == "ok" {
			refused++
		}
	}
	if refused == 0 {
		t.Error("no request met the dead prefiller")
	}
	s.settled()
}

// TestEnvoyAllPrefillersDown: the answer comes anyway, slower, and says so; when they are back, they are used again.
func TestEnvoyAllPrefillersDown(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"quiet-override-host", "buffered-override-host"} {
		t.Run(name, func(t *testing.T) {
			s := newStack(t, stackOptions{envoy: name, config: "disaggregation: {breaker: {failures: 5, openFor: 200ms}}\n"})
			s.setFaults("prefill", simulate.Fault{Kind: "reset_before_headers"})
			for _, stream := range []string{"", `,"stream":true`} {
				s.post("/v1/chat/completions", chatBody(100, stream)).whole(t, "fallback-reset")
			}
			for _, e := range s.engines("prefill") {
				e.Kill()
			}
			for _, stream := range []string{"", `,"stream":true`} {
				r := s.post("/v1/chat/completions", chatBody(100, stream))
				outcome := r.header.Get("x-baton-outcome")
				if !strings.HasPrefix(outcome, "fallback-") && outcome != "aggregated" { // the second once scrapes have noticed
					t.Errorf("outcome %q", outcome)
				}
				r.whole(t, outcome)
			}
			for _, b := range s.bodies("decode") {
				if b.Phase != "plain" || strings.Contains(string(b.Body), "kv_transfer_params") || b.Header.Get("X-Prefiller-Host-Port") != "" {
					t.Errorf("an aggregated request carries %s, %v", b.Phase, b.Header)
				}
			}
			s.setFaults("prefill")
			for _, e := range s.engines("prefill") {
				if err := e.Restart(); err != nil {
					t.Fatal(err)
				}
			}
			eventually(t, "prefillers are used again", func() bool {
				return s.post("/v1/chat/completions", chatBody(100, "")).header.Get("x-baton-outcome") == "disaggregated"
			})
			s.settled()
		})
	}
}

// TestEnvoyPrefillRejects: a 400 of a prefiller is never the client's answer; decode tells the truth.
func TestEnvoyPrefillRejects(t *testing.T) {
	t.Parallel()
	s := newStack(t, stackOptions{})
	s.setFaults("prefill", simulate.Fault{Kind: "status", Status: 400})
	s.post("/v1/chat/completions", chatBody(100, ""), "x-request-id", "r").whole(t, "fallback-rejected")
	if d := s.decision("r"); len(d.Attempts) != 1 || d.Attempts[0].Status != 400 {
		t.Errorf("attempts %+v", d.Attempts)
	}
	// And where the request is really wrong, the client gets the decode endpoint's 400.
	r := s.post("/v1/chat/completions", chatBody(100, `,"temperature":-7`))
	if r.status != http.StatusBadRequest || !strings.Contains(r.body, "temperature") {
		t.Errorf("%d: %s", r.status, r.body)
	}
	s.settled()
}

// TestEnvoyOnFailureFail: where aggregation is forbidden the client gets 502 in its API's own form.
func TestEnvoyOnFailureFail(t *testing.T) {
	t.Parallel()
	s := newStack(t, stackOptions{config: "disaggregation: {onFailure: fail}\n"})
	s.setFaults("prefill", simulate.Fault{Kind: "status", Status: 503})
	r := s.post("/v1/messages", chatBody(100, ""))
	var body struct {
		Type  string
		Error struct{ Type, Message string }
	}
	if err := json.Unmarshal([]byte(r.body), &body); err != nil || r.status != http.StatusBadGateway || body.Type != "error" || body.Error.Type != "api_error" {
		t.Errorf("%v, %d: %s", err, r.status, r.body)
	}
	if r.header.Get("x-llm-d-request-dropped-reason") != "prefill-failed" {
		t.Errorf("headers %v", r.header)
	}
	s.settled()
}

// TestEnvoyBudgetSpent: the held phase is over in time, with 504, and what ran is cancelled.
func TestEnvoyBudgetSpent(t *testing.T) {
	t.Parallel()
	s := newStack(t, stackOptions{config: "disaggregation: {budget: 300ms, prefill: {timeout: 200ms}}\n"})
	s.setFaults("prefill", simulate.Fault{Kind: "hang"})
	r := s.post("/v1/chat/completions", chatBody(100, ""))
	if r.status != http.StatusGatewayTimeout || r.header.Get("x-llm-d-request-dropped-reason") != "budget-spent" || !strings.Contains(r.body, `"type":"GatewayTimeoutError"`) {
		t.Errorf("%d, %v: %s", r.status, r.header, r.body)
	}
	s.settled()
}

// TestEnvoyDecodeVanishesDuringPrefill: the prefill is kept, the next decode endpoint serves, the handle leaves once.
func TestEnvoyDecodeVanishesDuringPrefill(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"quiet-override-host", "quiet-original-dst", "buffered-override-host"} {
		t.Run(name, func(t *testing.T) {
			s := newStack(t, stackOptions{envoy: name, pool: single(1, 2)})
			prefill := s.engines("prefill")[0]
			release := s.occupy(prefill)
			answer := s.chat(t.Context(), chatBody(100, ""), "x-request-id", "r")
			eventually(t, "the prefill waits", func() bool { return prefill.Stats().Waiting == 1 })
			stay := []*simulate.Engine{prefill}
			for _, e := range s.engines("decode") {
				if s.app.Snapshot().ByAddr(e.Addr()).Load.Requests() == 0 {
					stay = append(stay, e)
				}
			}
			if len(stay) != 2 {
				t.Fatalf("%d decode endpoints are not picked, want 1", len(stay)-1)
			}
			s.writeEndpoints(stay...)
			release()
			r := <-answer
			if r.err != nil {
				t.Fatal(r.err)
			}
			r.whole(t, "disaggregated")
			d := s.decision("r")
			if len(d.Attempts) != 1 || d.Picks["decode"] != "default/"+stay[1].Name() || d.Served != stay[1].Addr().String() && name != "quiet-original-dst" {
				t.Errorf("decision %+v", d)
			}
			if p := s.pulls(); len(p) != 1 || p[0].To != stay[1].Name() || p[0].Err != "" {
				t.Errorf("pulls %+v", p)
			}
			if n := s.seen("decode"); n != 1 {
				t.Errorf("%d decode requests, want 1", n)
			}
			s.settled()
		})
	}
}

// TestEnvoyNoDecodeLeft: when every decode endpoint is gone the client gets 503 and the prefill is counted as leaked.
func TestEnvoyNoDecodeLeft(t *testing.T) {
	t.Parallel()
	o := single(1, 1)
	o.Template.Lease = time.Second
	s := newStack(t, stackOptions{pool: o})
	prefill := s.engines("prefill")[0]
	release := s.occupy(prefill)
	answer := s.chat(t.Context(), chatBody(100, ""))
	eventually(t, "the prefill waits", func() bool { return prefill.Stats().Waiting == 1 })
	s.writeEndpoints(prefill)
	release()
	r := <-answer
	if r.err != nil || r.status != http.StatusServiceUnavailable || r.header.Get("x-llm-d-request-dropped-reason") != "rejected-no-endpoints" {
		t.Errorf("%v, %d, %v: %s", r.err, r.status, r.header, r.body)
	}
	s.settledWith(1)
}

// TestEnvoyClientLeavesDuringPrefill: the prefill engine sees the abort at once, and nothing is left behind.
func TestEnvoyClientLeavesDuringPrefill(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"quiet-override-host", "full-duplex-override-host", "buffered-override-host"} {
		t.Run(name, func(t *testing.T) {
			o := fast(1, 1)
			o.Template.PrefillFixed = time.Minute
			s := newStack(t, stackOptions{envoy: name, pool: o})
			ctx, leave := context.WithCancel(t.Context())
			answer := s.chat(ctx, chatBody(100, ""))
			prefill := s.engines("prefill")[0]
			eventually(t, "the prefill runs", func() bool { h := prefill.Held(); return len(h) == 1 && h[0].State == "prefill" })
			if s.load("prefill") == 0 || s.load("decode") == 0 {
				t.Error("nothing is reserved for a running prefill")
			}
			leave()
			if r := <-answer; r.err == nil {
				t.Errorf("an answer: %d", r.status)
			}
			eventually(t, "the engine sees the abort", func() bool { return s.aborts("prefill", "prefill") == 1 })
			if n := s.seen("decode"); n != 0 {
				t.Errorf("%d decode requests", n)
			}
			s.settled()
		})
	}
}

// TestEnvoyClientLeavesDuringDecode: the decode engine sees the abort, and P's blocks were given free by the pull.
func TestEnvoyClientLeavesDuringDecode(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"quiet-override-host", "full-duplex-override-host", "buffered-override-host"} {
		t.Run(name, func(t *testing.T) {
			s := newStack(t, stackOptions{envoy: name})
			ctx, leave := context.WithCancel(t.Context())
			body := s.open(ctx, 30000)
			if body.status != http.StatusOK || body.header.Get("x-baton-outcome") != "disaggregated" {
				t.Fatalf("%d, %v", body.status, body.header)
			}
			for range 3 {
				event(t, body.Reader)
			}
			if s.load("prefill") != 0 || s.load("decode") != 1 {
				t.Errorf("reserved during decode: prefill %d, decode %d, want 0 and 1", s.load("prefill"), s.load("decode"))
			}
			if h := s.engines("prefill"); len(h[0].Held())+len(h[1].Held()) != 0 {
				t.Error("the prefill engine still holds blocks")
			}
			leave()
			eventually(t, "the engine sees the abort", func() bool { return s.aborts("decode", "decode") == 1 })
			s.settled()
		})
	}
}

// TestEnvoyClientLeavesBeforePull: the handle was forwarded, the decode engine had not pulled yet; it lets the blocks go.
func TestEnvoyClientLeavesBeforePull(t *testing.T) {
	t.Parallel()
	o := single(1, 1)
	o.Template.Handshake = time.Minute
	s := newStack(t, stackOptions{pool: o})
	ctx, leave := context.WithCancel(t.Context())
	answer := s.chat(ctx, chatBody(100, ""))
	decode := s.engines("decode")[0]
	eventually(t, "the pull runs", func() bool { return decode.Stats().Requests == 1 && len(decode.Held()) == 1 })
	leave()
	<-answer
	eventually(t, "the engine sees the abort", func() bool { return len(decode.Aborts()) == 1 })
	s.settled()
}
