// SPDX-License-Identifier: Apache-2.0

package app

import (
	"context"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/baton-epp/baton/manifests/envoy"
	"github.com/baton-epp/baton/simulate"
)

// responseMode is a gateway's way to show responses, and how Baton then learns that a request is over (docs/design.md 5.1).
type responseMode struct {
	name    string
	envoy   string
	rewrite func(string) string
	headers bool   // response headers are shown
	end     string // how the end is seen: bodies, end or none
}

func responseModes() []responseMode {
	quiet, buffered, duplex := envoy.QuietOverrideHost, envoy.BufferedOverrideHost, envoy.FullDuplexOverrideHost
	return []responseMode{
		{"quiet", quiet, nil, true, "end"},
		{"quiet without headers", quiet, replacing(headerSend, "response_header_mode: SKIP"), false, "end"},
		{"full duplex", duplex, nil, true, "bodies"},
		{"streamed", quiet, replacing(bodyNone, "response_body_mode: STREAMED"), true, "bodies"},
		{"streamed, no trailers", quiet, replacing(bodyNone, "response_body_mode: STREAMED", trailerSend, "response_trailer_mode: SKIP"), true, "bodies"},
		{"buffered response", quiet, replacing(bodyNone, "response_body_mode: BUFFERED"), true, "bodies"},
		{"FDH", quiet, replacing(trailerSend, "response_trailer_mode: SKIP"), true, "none"},
		{"request only", quiet, replacing(headerSend, "response_header_mode: SKIP", trailerSend, "response_trailer_mode: SKIP"), false, "none"},
		{"buffered request, quiet", buffered, nil, true, "end"},
		{"buffered request, streamed", buffered, replacing(bodyNone, "response_body_mode: STREAMED"), true, "bodies"},
		{"buffered request, nothing of the response", buffered, replacing(headerSend, "response_header_mode: SKIP", trailerSend, "response_trailer_mode: SKIP"), false, "end"},
	}
}

// TestEnvoyResponseModes: in every mode answers are whole, and the reservation on decode lives as long as the request
// where the gateway lets us see its end, and becomes an estimate where it does not.
func TestEnvoyResponseModes(t *testing.T) {
	t.Parallel()
	for _, m := range responseModes() {
		t.Run(m.name, func(t *testing.T) {
			t.Parallel()
			s := newStack(t, stackOptions{envoy: m.envoy, rewrite: m.rewrite})
			outcome := ""
			if m.headers {
				outcome = "disaggregated"
			}
			for _, stream := range []string{"", `,"stream":true`} {
				s.post("/v1/chat/completions", chatBody(100, stream)).whole(t, outcome)
				s.post("/v1/chat/completions", strings.Replace(chatBody(100, stream), `"max_tokens":4`, `"max_tokens":500`, 1)).whole(t, outcome)
			}
			s.settled()
			if m.name != "buffered response" { // there, nothing comes before the end
				m.reservation(t, s)
			}
			s.settled()
		})
	}
}

// reservation watches what is counted on a long stream, which the client cuts in the end.
func (m *responseMode) reservation(t *testing.T, s *stack) {
	t.Helper()
	before := s.sum("baton_extproc_stream_ends_total", m.end)
	ctx, leave := context.WithCancel(t.Context())
	defer leave()
	body := s.open(ctx, 60000)
	event(t, body.Reader)
	if n := s.load("prefill"); n != 0 {
		t.Errorf("load of prefill during decode: %d", n)
	}
	go func() { _, _ = io.Copy(io.Discard, body) }() // ends with the request
	if m.end == "none" {
		eventually(t, "the reservation is an estimate, released by the second scrape", func() bool { return s.load("decode") == 0 })
		if n := s.sum("baton_extproc_stream_ends_total", "none"); n == 0 {
			t.Error("no stream end was counted as not seen")
		}
		leave()
		eventually(t, "the engine sees the abort", func() bool { return s.aborts("decode", "decode") == 1 })
		return
	}
	for range 3 {
		s.scraped("decode")
		if n := s.load("decode"); n < 1 {
			t.Errorf("load of decode while it streams: %d", n)
		}
	}
	leave()
	eventually(t, "the engine sees the abort", func() bool { return s.aborts("decode", "decode") == 1 })
	eventually(t, "the reservation is gone", func() bool { return s.load("decode") == 0 })
	eventually(t, "the end is counted", func() bool { return s.sum("baton_extproc_stream_ends_total", m.end) > before })
}

// scraped waits until every endpoint of a role was scraped once more.
func (s *stack) scraped(role string) {
	s.t.Helper()
	start := time.Now()
	for _, e := range s.app.Snapshot().Endpoints {
		if e.Labels["llm-d.ai/role"] == role {
			eventually(s.t, "another scrape", func() bool { return e.Metrics().Begun.After(start) })
		}
	}
}

// TestEnvoyResponseUsage: where bodies are shown, what they say of tokens is counted.
func TestEnvoyResponseUsage(t *testing.T) {
	t.Parallel()
	s := newStack(t, stackOptions{envoy: envoy.FullDuplexOverrideHost})
	for _, extra := range []string{"", `,"stream":true,"stream_options":{"include_usage":true}`} {
		s.post("/v1/chat/completions", chatBody(100, extra)).whole(t, "disaggregated")
	}
	s.settled()
	families, err := s.app.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == "llm_d_epp_request_output_tokens" {
			if h := f.GetMetric()[0].GetHistogram(); h.GetSampleCount() != 2 || h.GetSampleSum() != 8 {
				t.Errorf("output tokens: %v", h)
			}
			return
		}
	}
	t.Error("no output tokens were counted")
}

// TestEnvoyHandleOnce: whatever the route's retries, a KV handle reaches one host once.
func TestEnvoyHandleOnce(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name   string
		fault  simulate.Fault
		status int // 0 is an answer that breaks somewhere
	}{
		{name: "503", fault: simulate.Fault{Kind: "status", Status: 503}, status: 503},
		{name: "500", fault: simulate.Fault{Kind: "status", Status: 500}, status: 503}, // Envoy's own, when the retry finds nobody
		{name: "reset before an answer", fault: simulate.Fault{Kind: "reset_before_headers"}, status: 503},
		{name: "reset after the headers", fault: simulate.Fault{Kind: "reset_after_headers"}},
		{name: "reset after bytes", fault: simulate.Fault{Kind: "reset_mid_stream"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			o := fast(1, 3)
			o.Template.Lease = 2 * time.Second
			s := newStack(t, stackOptions{pool: o, rewrite: replacing(routeLine, retryAnyhow)})
			test.fault.Phase = "transfer"
			s.setFaults("decode", test.fault)
			r, err := s.try(t.Context(), http.MethodPost, "/v1/chat/completions", strings.NewReader(chatBody(100, `,"stream":true`)), "x-request-id", "r")
			if err == nil && r.status < 500 || test.status != 0 && r.status != test.status {
				t.Errorf("%v, status %d, want %d: %s", err, r.status, test.status, r.body)
			}
			handed := map[string]int{}
			for _, b := range s.bodies("decode") {
				if b.Phase == "transfer" {
					handed[b.Header.Get("X-Gateway-Destination-Endpoint")]++
				}
			}
			if n := s.seen("decode"); n != 1 || len(handed) != 1 {
				t.Errorf("%d decode requests, handles by destination %v, want one", n, handed)
			}
			eventually(t, "no KV block held", func() bool { return len(s.engines("prefill")[0].Held()) == 0 })
			// A decode endpoint that answers without looking at the handle leaves its blocks to the lease.
			leaked := len(s.engines("prefill")[0].Leaked())
			if failed := s.sum("baton_sidecar_transfers_failed_total"); test.status != 0 && failed != 1 {
				t.Errorf("%v failed transfers counted", failed)
			}
			t.Logf("leaked %d", leaked)
		})
	}
}

// TestEnvoyDecodeRefuses: the named host is down; nobody else is tried, the client gets 503.
func TestEnvoyDecodeRefuses(t *testing.T) {
	t.Parallel()
	s := newStack(t, stackOptions{pool: single(1, 2), rewrite: replacing(routeLine, retryAnyhow)})
	prefill := s.engines("prefill")[0]
	release := s.occupy(prefill)
	answer := s.chat(t.Context(), chatBody(100, ""))
	eventually(t, "the prefill waits", func() bool { return prefill.Stats().Waiting == 1 })
	var other *simulate.Engine
	for _, e := range s.engines("decode") {
		if s.app.Snapshot().ByAddr(e.Addr()).Load.Requests() != 0 {
			e.Kill()
		} else {
			other = e
		}
	}
	release()
	r := <-answer
	if r.err != nil || r.status != http.StatusServiceUnavailable && r.header.Get("x-baton-outcome") != "disaggregated" {
		t.Errorf("%v, %d: %s", r.err, r.status, r.body)
	}
	for _, b := range other.Bodies() {
		if r.status != http.StatusOK { // had the scraper noticed first, it is the repick that serves
			t.Errorf("the handle wandered: %s", b.Phase)
		}
	}
}
